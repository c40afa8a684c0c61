"""A run is what its command says, from the first step or from any interruption: real shards, real files, real kills."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from helpers.runs import assert_same, checkpoint, curves, events, overrides, run, write_toyworld
from longlive.callbacks.ema import averaged_weights
from longlive.callbacks.run_record import read_starts
from longlive.config import compose
from longlive.parallel.checkpoint import newest_checkpoint
from longlive.parallel.launcher import EXIT_STOPPED
from longlive.train import make_trainer, train

STEPS = 12
SECONDS_TO_SAVE = 10
"""From a signal to a checkpoint."""

LOGGED_EVERY = "trainer.log_every_n_steps=3"
"""No divisor of the checkpoint interval, so that checkpoints fall inside log intervals."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return write_toyworld(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def whole(shards, tmp_path_factory) -> Path:
    """An uninterrupted run."""
    directory = tmp_path_factory.mktemp("whole")
    run(directory, shards, LOGGED_EVERY)
    return directory


def files(directory: Path) -> dict[Path, int]:
    """All files and when they were written."""
    return {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()}


def scalars(directory: Path) -> dict[str, dict[int, float]]:
    """A run's curves, without those that measure time."""
    return {tag: curve for tag, curve in curves(directory).items() if not tag.startswith("throughput/")}


def assert_same_run(ours: Path, theirs: Path, steps: int = STEPS) -> None:
    """Weights, moments, average, counters, position in the data and every logged value are equal bit for bit."""
    found, expected = checkpoint(ours, steps), checkpoint(theirs, steps)
    names = {"state_dict", "optimizer_states", "lr_schedulers", "VideoDataModule", "global_step"}
    assert names < found.keys()
    assert_same({name: found[name] for name in names}, {name: expected[name] for name in names})
    states = [
        {key: state for key, state in each["callbacks"].items() if not key.startswith("RunCheckpoint")}
        for each in (found, expected)
    ]
    assert {"EMA", "Throughput", "LossBreakdown"} == states[0].keys()
    assert_same(*states)
    assert_same(scalars(ours), scalars(theirs))


def snapshot(directory: Path, target: Path, after_batches: int) -> str:
    """An override that copies the run's directory at that moment: what a kill then leaves on the disk."""
    settings = f"source: {directory}, target: {target}, after_batches: {after_batches}"
    return f"+callbacks.moment={{_target_: helpers.runs.Snapshot, {settings}}}"


def start(directory: Path, shards: Path, *more: str) -> subprocess.Popen[str]:
    """`longlive train` in a process of its own."""
    command = [sys.executable, "-m", "longlive.cli", "train", *overrides(directory, shards, *more)]
    tests = Path(__file__).resolve().parent
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}"}
    return subprocess.Popen(
        command, cwd=directory.parent, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


@pytest.fixture
def kill_on_exit() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes put here do not outlive the test."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def children(process: int) -> list[int]:
    """Processes that a process started: its data workers."""
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def test_a_run_that_was_killed_stopped_and_started_again_equals_one_that_was_not(whole, shards, tmp_path, kill_on_exit):
    """Anything that is neither saved nor recomputed (a moment, the order, unflushed logs) bends the curve at a kill.
    A signal to the whole job also reaches the data workers, whom the step still needs."""
    directory = tmp_path / "run"
    command = (LOGGED_EVERY, "data.num_workers=1", "+callbacks.pause={_target_: helpers.runs.Pause, seconds: 0.1}")
    process = start(directory, shards, *command)
    kill_on_exit.append(process)
    saved = directory / "checkpoints" / "step-0000004.ckpt"
    while not saved.exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    time.sleep(0.15)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    reached = newest_checkpoint(directory / "checkpoints")
    assert reached is not None
    assert reached.name < f"step-{STEPS:07d}.ckpt"

    again = start(directory, shards, *command)
    kill_on_exit.append(again)
    while not list((directory / "tensorboard").glob(f"events.*.{again.pid}.*")):
        assert again.poll() is None, again.communicate()[0]
        time.sleep(0.005)
    sent = time.time()
    for process in (again.pid, *children(again.pid), again.pid):  # as to a whole job, and once more
        os.kill(process, signal.SIGTERM)
    output, _ = again.communicate(timeout=120)
    assert again.returncode == EXIT_STOPPED, output
    assert f"continuing from {reached}" in output
    stopped = newest_checkpoint(directory / "checkpoints")
    assert stopped is not None
    assert reached.name < stopped.name < f"step-{STEPS:07d}.ckpt"
    assert stopped.stat().st_mtime - sent < SECONDS_TO_SAVE
    run(directory, shards, LOGGED_EVERY, "data.num_workers=1")
    assert_same_run(directory, whole)
    assert [start["state"] for start in read_starts(directory)] == ["running", "stopped", "finished"]


@pytest.mark.parametrize(
    ("settings", "after_batches", "continues_from"),
    [
        ((), 6, 4),
        ((), 11, 8),
        (("data.num_workers=1",), 7, 4),
        (("trainer.accumulate_grad_batches=2",), 9, 4),
        (("trainer.accumulate_grad_batches=2",), 14, 4),
        (("optimizer=muon",), 10, 8),
    ],
)
def test_a_kill_at_any_moment_leaves_what_is_needed_to_continue(
    shards, tmp_path, settings, after_batches, continues_from
):
    """A run is copied while it trains: the copy is what a kill leaves on the disk. Odd numbers of batches are in the
    middle of a gradient accumulation."""
    directory, killed = tmp_path / "run", tmp_path / "killed"
    command = (LOGGED_EVERY, *settings)
    run(directory, shards, *command, snapshot(directory, killed, after_batches))
    directory.rename(tmp_path / "whole")
    killed.rename(directory)
    assert newest_checkpoint(directory / "checkpoints") == directory / f"checkpoints/step-{continues_from:07d}.ckpt"
    run(directory, shards, *command)
    assert_same_run(directory, tmp_path / "whole")


def test_a_run_that_is_killed_twice_with_accumulation_continues_between_two_steps(shards, tmp_path):
    """Lightning saved again after the first micro-batch of a resumed run, whose gradient is then lost."""
    directory = tmp_path / "run"
    command = (LOGGED_EVERY, "trainer.accumulate_grad_batches=2")
    run(tmp_path / "whole", shards, *command)
    run(directory, shards, *command, "trainer.max_steps=4", "learning_rate.num_training_steps=12")
    killed = tmp_path / "killed"
    run(directory, shards, *command, snapshot(directory, killed, after_batches=10))
    assert [path.name for path in (killed / "checkpoints").iterdir()] == ["step-0000004.ckpt"]  # not a second one of it
    shutil.rmtree(directory)
    killed.rename(directory)
    run(directory, shards, *command)
    assert_same_run(directory, tmp_path / "whole")


def test_a_run_with_a_global_batch_continues_with_another_accumulation(shards, tmp_path, caplog):
    """The first step after the change came too early, on a part of the batch and with its gradient too small."""
    command = (LOGGED_EVERY, "data.global_batch_size=4", "callbacks.loss_breakdown.every_n_steps=1")
    run(tmp_path / "whole", shards, *command, "data.batch_size=4", "trainer.max_steps=8")
    directory = tmp_path / "run"
    stop = ("trainer.max_steps=4", "learning_rate.num_training_steps=8")
    with caplog.at_level(logging.INFO, logger="longlive"):
        run(directory, shards, *command, "data.batch_size=2", *stop)
        run(directory, shards, *command, "data.batch_size=1", "trainer.max_steps=8")
    said = [record.getMessage() for record in caplog.records if "global batch" in record.getMessage()]
    assert said == [
        "global batch 4 = 1 data rank x 2 clips x 2 accumulated",
        "global batch 4 = 1 data rank x 1 clip x 4 accumulated",
    ]
    losses, expected = (curves(path)["train/loss"] for path in (directory, tmp_path / "whole"))
    assert losses == pytest.approx(expected, rel=1e-4)
    assert checkpoint(directory, 8)["VideoDataModule"]["samples_consumed"] == 8 * 4


def test_a_file_that_was_being_written_at_the_kill_is_ignored(whole, shards, tmp_path):
    directory = tmp_path / "run"
    run(directory, shards, LOGGED_EVERY, "trainer.max_steps=8", "learning_rate.num_training_steps=12")
    (directory / "checkpoints" / ".step-0000012.ckpt.partial").write_bytes(b"torn")
    run(directory, shards, LOGGED_EVERY)
    assert_same_run(directory, whole)
    assert {path.name for path in (directory / "checkpoints").iterdir()} == {"step-0000008.ckpt", "step-0000012.ckpt"}


def test_the_last_step_is_saved_whatever_the_interval_and_a_longer_run_continues_from_it(shards, tmp_path):
    """A run shorter than the interval would leave nothing to generate from; of any other, the last steps are lost."""
    constant = "learning_rate=constant"
    run(tmp_path / "whole", shards, constant)
    run(tmp_path / "run", shards, constant, "trainer.max_steps=3")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-0000003.ckpt"]
    run(tmp_path / "run", shards, constant, "trainer.max_steps=6")
    assert newest_checkpoint(tmp_path / "run" / "checkpoints").name == "step-0000006.ckpt"
    run(tmp_path / "run", shards, constant)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_finished_run_started_again_writes_no_checkpoint_and_no_point(whole, shards, tmp_path):
    directory = tmp_path / "run"
    run(directory, shards)
    before, points = files(directory / "checkpoints"), len(list(events(directory)))
    trainer = run(directory, shards)
    assert trainer.global_step == STEPS
    assert files(directory / "checkpoints") == before
    assert len(list(events(directory))) == points


def test_two_runs_of_one_command_are_equal_and_other_seeds_are_not(whole, shards, tmp_path):
    run(tmp_path / "same", shards, LOGGED_EVERY)
    assert_same_run(tmp_path / "same", whole)
    run(tmp_path / "other", shards, LOGGED_EVERY, "seed=1")
    assert scalars(tmp_path / "other")["train/loss"] != scalars(whole)["train/loss"]


def test_a_checkpoint_holds_plain_containers_and_the_resolved_config(whole, shards):
    """OmegaConf inside a checkpoint needs OmegaConf, and unsafe loading, to be read."""
    saved = checkpoint(whole, STEPS)
    config = saved["config"]
    assert config["data"]["train"] == str(shards)
    assert config["module"]["model"]["dim"] == 32
    assert config["callbacks"]["checkpoint"]["dirpath"] == str(whole / "checkpoints")

    def check(tree: object) -> None:
        if isinstance(tree, dict):
            for key, value in tree.items():
                assert isinstance(key, str | int)
                check(value)
        elif isinstance(tree, list | tuple):
            for value in tree:
                check(value)
        else:
            assert isinstance(tree, torch.Tensor | str | int | float | bool | None), type(tree)

    check(saved)
    assert compose("train", overrides(whole, shards, LOGGED_EVERY)).model == config["model"]


def test_the_config_of_a_run_lies_in_its_directory(whole, shards):
    text = (whole / "config.yaml").read_text()
    assert f"train: {shards}" in text
    assert "${" not in text


def test_a_new_run_from_anothers_weights_starts_at_step_0_with_its_average(whole, shards, tmp_path):
    """Loading another run's file as one's own goes on with its step count, its moments and its place in the data."""
    directory = tmp_path / "run"
    never_moves = ("optimizer.lr=0", "trainer.max_steps=4", "callbacks.ema.decay=0.0")
    trainer = run(directory, shards, f"initialise_from={whole}", *never_moves)
    assert trainer.global_step == 4
    source, saved = checkpoint(whole, STEPS), checkpoint(directory, 4)
    average = source["callbacks"]["EMA"]["average"]
    assert_same(dict(saved["state_dict"]), dict(source["state_dict"]) | average)
    assert any(not torch.equal(average[name], source["state_dict"][name]) for name in average)
    assert saved["VideoDataModule"]["samples_consumed"] == 4 * 2
    assert {int(state["step"]) for state in saved["optimizer_states"][0]["state"].values()} == {4}
    assert sorted(curves(directory)["train/loss"]) == [0, 1, 2, 3]


def test_a_run_that_was_initialised_continues_its_own_checkpoints(whole, shards, tmp_path):
    """The second start of the same command would otherwise begin at the other run's weights once more."""
    command = (f"initialise_from={whole}", LOGGED_EVERY)
    run(tmp_path / "whole", shards, *command)
    run(tmp_path / "run", shards, *command, "trainer.max_steps=4", "learning_rate.num_training_steps=12")
    run(tmp_path / "run", shards, *command)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_initialising_from_another_model_is_refused_before_anything_is_written(whole, shards, tmp_path):
    with pytest.raises(ValueError, match=r"of another model: .*\(32, .*in the checkpoint, \(64, .*in this model"):
        run(tmp_path / "run", shards, f"initialise_from={whole}", "model.dim=64")
    assert not (tmp_path / "run").exists()


def test_a_run_resumes_from_the_checkpoint_that_is_named(whole, shards, tmp_path):
    run(tmp_path / "run", shards, LOGGED_EVERY, f"resume={whole / 'checkpoints' / 'step-0000008.ckpt'}")
    assert_same(checkpoint(tmp_path / "run", STEPS)["optimizer_states"], checkpoint(whole, STEPS)["optimizer_states"])
    assert sorted(curves(tmp_path / "run")["train/loss"]) == [8, 11]


def test_going_back_inside_a_run_is_refused(whole, shards):
    """The checkpoints of both futures would lie in one directory, and the next start would take those of the old."""
    before = files(whole)
    with pytest.raises(ValueError, match=r"step-0000008\.ckpt, but .*step-0000012\.ckpt exists: .* another directory="):
        run(whole, shards, f"resume={whole / 'checkpoints' / 'step-0000008.ckpt'}", "optimizer.lr=0.1")
    assert files(whole) == before
    newest = whole / "checkpoints" / "step-0000012.ckpt"
    assert run(whole, shards, LOGGED_EVERY, f"resume={newest}").global_step == STEPS


def test_never_resuming_refuses_to_overwrite_a_run(whole, shards, tmp_path):
    before = files(whole)
    with pytest.raises(ValueError, match=r"resume=never, but .*step-0000012.ckpt exists: nothing .* is overwritten"):
        run(whole, shards, "resume=never")
    assert files(whole) == before
    run(tmp_path / "run", shards, "resume=never", "trainer.max_steps=1")
    assert checkpoint(tmp_path / "run", 1)["global_step"] == 1


def test_a_checkpoint_of_another_shape_is_refused_before_any_step(whole, shards, tmp_path):
    """Weights that do not fit would be left at their initial values, or fail with a page of names."""
    directory = tmp_path / "run"
    shutil.copytree(whole, directory)
    saved = files(directory / "checkpoints")
    with pytest.raises(ValueError, match=r"another model: (network\.[\w.]+: [^;]+; ){5}and \d+ more\. Use the"):
        run(directory, shards, "model.num_layers=2", "trainer.max_steps=14")
    assert files(directory / "checkpoints") == saved
    assert scalars(directory) == scalars(whole)
    assert (directory / "config.yaml").read_text() == (whole / "config.yaml").read_text()


def test_a_torn_checkpoint_is_named(whole, shards, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(whole, directory)
    newest = directory / "checkpoints" / "step-0000012.ckpt"
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"step-0000012\.ckpt cannot be read as a checkpoint"):
        run(directory, shards)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (("data.train=nowhere",), FileNotFoundError, "nowhere is no directory; `longlive shards` writes one"),
        (("model.num_heads=5",), ValueError, r"num_heads=5 does not divide dim=32; use one of \[1, 2, 4, 8, 16\]"),
        (("data.num_frames=10",), ValueError, "num_frames=10 is no multiple of chunk_frames=4; use 8 or 12"),
        (("data.height=36",), ValueError, "height=36.* no multiples of the codec's spatial_ratio=8; use 32"),
        (("data.batch_size=0",), ValueError, "batch_size=0 must be at least 1"),
        (
            ("data.global_batch_size=7",),
            ValueError,
            "data: global_batch_size=7 .* use global_batch_size=6 or 8, or batch_s",
        ),
        (("codec=dtc",), ValueError, "(?s)Could not find 'codec/dtc'.*dct"),
        (("model.in_channels=48",), ValueError, "in_channels=48, but the codec makes latents of 16 channels"),
        (("model.text_dim=32", "text.embed_dim=64"), ValueError, "text_dim=32, but .* have 64 features"),
        (("rollout.window=10",), ValueError, "window=10"),
        (("resume=nowhere.ckpt",), FileNotFoundError, "no checkpoint at nowhere.ckpt"),
        (("initialise_from=nowhere",), FileNotFoundError, "no checkpoint at nowhere"),
        (("callbacks.ema.decay=1.0",), ValueError, "decay=1.0 must be at least 0 and below 1"),
        (("+callbacks.ema.dekay=1",), ValueError, "callbacks.ema.*unexpected keyword argument 'dekay'"),
        (("trainer.max_step=1",), ValueError, r"unknown key 'trainer\.max_step'.*did you mean trainer\.max_steps"),
    ],
)
def test_bad_input_is_one_clear_message_before_any_work(shards, tmp_path, monkeypatch, settings, error, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        run(tmp_path / "run", shards, *settings)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_an_empty_shard_set_is_refused(tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "shards.json").write_text('{"format_version": 1, "samples": [], "skipped": []}')
    with pytest.raises(ValueError, match=r"shards\.json lists no sample: the shard set is empty"):
        run(tmp_path / "run", tmp_path / "shards")


def test_a_refused_setting_is_one_message_and_exit_code_1(shards, tmp_path, kill_on_exit):
    process = start(tmp_path / "run", shards, "model.num_heads=5")
    kill_on_exit.append(process)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "longlive train: module.model: num_heads=5 does not divide dim=32" in output
    assert "Traceback" not in output


def test_callbacks_and_loggers_that_are_null_are_left_out(shards, tmp_path):
    config = compose("train", overrides(tmp_path, shards, "callbacks.ema=null", "logger.tensorboard=null"))
    trainer = make_trainer(config)
    names = {type(callback).__name__ for callback in trainer.callbacks}
    assert {"RunCheckpoint", "LossBreakdown", "Throughput"} <= names
    assert not names & {"EMA", "SampleVideo", "RunProgress"}
    assert trainer.loggers == []


def test_a_run_without_an_average_trains_and_its_weights_are_its_weights(shards, tmp_path):
    train(compose("train", overrides(tmp_path, shards, "callbacks.ema=null", "trainer.max_steps=2")))
    saved = checkpoint(tmp_path, 2)
    assert_same(averaged_weights(saved), dict(saved["state_dict"]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_a_gpu_trains_saves_and_resumes(shards, tmp_path):
    """Lightning builds the network with the GPU as torch's default device: nothing else here would notice."""
    settings = ("trainer.accelerator=gpu", "trainer.devices=1", "precision=bf16-mixed")
    run(tmp_path, shards, *settings, "trainer.max_steps=4")
    trainer = run(tmp_path, shards, *settings, "trainer.max_steps=8")
    assert trainer.global_step == 8
    assert all(tensor.isfinite().all() for tensor in checkpoint(tmp_path, 8)["state_dict"].values())
