"""The page about a run says what became of it: finished, stopped, killed, failed, or still at it."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers.interrupted import Drawn
from helpers.runs import config_of, curves, write_toyworld
from longlive.callbacks.run_record import this_process
from longlive.config import compose
from longlive.doctor.report import main
from longlive.doctor.run import RunState, StoredCheckpoint, look_at, samples_of_step
from longlive.train import train

STEPS = 4


@pytest.fixture(scope="module")
def drawn() -> dict[int, list[int]]:
    """What the run trained on, by step."""
    return {}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, drawn) -> Path:
    """A finished run."""
    directory = tmp_path_factory.mktemp("runs") / "whole"
    shards = write_toyworld(tmp_path_factory.mktemp("shards"))
    more = ("trainer.max_steps=4", "callbacks.checkpoint.every_n_train_steps=2", "+callbacks.drawn={_target_: "
            "helpers.interrupted.Drawn}")  # fmt: skip
    trainer = train(config_of(directory, shards, *more))
    drawn |= next(callback.samples for callback in trainer.callbacks if isinstance(callback, Drawn))
    return directory


@pytest.fixture
def directory(whole, tmp_path) -> Path:
    """A copy that a test may change."""
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def change(directory: Path, **changes: Any) -> None:
    """The last start's entry."""
    record = json.loads((directory / "run.json").read_text())
    record["starts"][-1] |= changes
    (directory / "run.json").write_text(json.dumps(record))


def page(capsys: pytest.CaptureFixture[str], directory: Path, *arguments: str) -> str:
    assert main(["run", str(directory), *arguments]) == 0
    return capsys.readouterr().out


def test_a_finished_run_has_its_numbers_and_what_to_do_with_it(whole, capsys):
    found = json.loads(page(capsys, whole, "--json"))
    assert (found["state"], found["last_step"], found["newest_checkpoint"]) == ("finished", 4, "step-0000004.ckpt")
    assert [(each["step"], each["fault"]) for each in found["checkpoints"]] == [(2, None), (4, None)]
    loss = curves(whole)["train/loss"]
    least = min(loss, key=lambda step: loss[step])
    tables = found["tables"]
    assert tables["curves"]["loss"] == (
        f"{loss[0]:.4f} (step 0), last {loss[3]:.4f} (step 3), least {loss[least]:.4f} (step {least})"
    )
    assert "tokens/s" in tables["curves"]["throughput"]
    assert tables["curves"]["time of a step"].startswith("data ")
    assert tables["data"]["positions seen"] == "0 to 7, up to step-0000004.ckpt, 1.60 epochs of 5 samples"
    assert tables["run"]["model.dim"] == "32"
    text = page(capsys, whole)
    assert "finished: it finished at step 4" in text
    assert f"longlive generate checkpoint={whole}" in text


def test_the_command_that_it_prints_can_be_typed(whole, tmp_path, capsys):
    """Hydra reads `checkpoint=runs/lr=1` as no override at all."""
    for name in ("seed-1+optimizer.lr-0.001", "lr=1,seed=2", "my run (2)"):
        directory = Path(shutil.copytree(whole, tmp_path / name))
        words = shlex.split(page(capsys, directory).partition("- longlive ")[2].partition(" prompts=")[0])
        assert words[0] == "generate"
        assert compose("generate", words[1:]).checkpoint == str(directory)


def test_the_clips_of_every_step_are_those_that_it_trained_on(whole, drawn, capsys):
    assert len(drawn) == STEPS
    for step, ids in drawn.items():
        assert json.loads(page(capsys, whole, f"--step={step}", "--json")) == [
            [number, f"toyworld-{number:08d}"] for number in ids
        ]


def test_a_killed_run_is_told_from_one_that_runs(directory, capsys):
    """Neither could write how it ended. Its number may be another process's by now."""
    change(directory, state="running", process=this_process())
    text = page(capsys, directory)
    assert f"running: it is running, as process {os.getpid()} on " in text
    assert "SIGTERM stops it" in text
    change(directory, process=this_process() | {"ticks": 1})
    text = page(capsys, directory)
    assert "killed: process" in text
    assert "is gone without a word" in text
    assert "Start the same command again: it continues from step-0000004.ckpt." in text
    change(directory, process=this_process() | {"host": "elsewhere"})
    assert "unknown: it was running, as process" in page(capsys, directory)


def test_a_failed_run_says_what_failed_first_and_where(directory, capsys):
    """Rank 0 is killed with the others, and its own record still says that it runs."""
    change(directory, state="running", process=this_process() | {"ticks": 1}, last_step=2)
    began = json.loads((directory / "run.json").read_text())["starts"][-1]["began"]
    (directory / "errors").mkdir()
    for rank, seconds, message in ((0, 3, "connection reset"), (1, 2, "out of paper"), (2, -9, "of an earlier start")):
        error = {"rank": rank, "step": 3, "time": began + seconds, "type": "OSError", "message": message}
        (directory / "errors" / f"rank-{rank:04d}.json").write_text(json.dumps(error))
    text = page(capsys, directory)
    assert "failed: it failed in step 3, on rank 1 first: OSError: out of paper" in text
    assert "Mend what the error says" in text


@pytest.mark.parametrize(
    ("error", "message", "expected"),
    [
        ("NonFiniteError", "the loss is nan", "Look at the clips that"),
        ("OSError", "[Errno 28] the disk is full: a checkpoint needs", "Make room on the disk"),
        ("DataWorkerError", "training has waited 2 s", "See whether the sample's storage answers"),
        ("OutOfMemoryError", "CUDA out of memory", "longlive doctor plan"),
    ],
)
def test_what_to_do_next_depends_on_the_error(directory, capsys, error, message, expected):
    failure = {"rank": 0, "step": 3, "time": 0.0, "type": error, "message": message}
    change(directory, state="failed", error=failure)
    text = page(capsys, directory)
    assert f"{error}: {message}" in text
    assert expected in text


def test_a_run_that_a_number_ended_shows_the_file_about_it(directory, capsys):
    (directory / "non_finite.json").write_text('{"step": 3, "micro_batches": []}')
    change(directory, state="failed", error={"rank": 0, "step": 3, "time": 0.0, "type": "X", "message": ""})
    assert json.loads(page(capsys, directory, "--json"))["non_finite"]["step"] == 3
    os.utime(directory / "non_finite.json", (1, 1))  # of an earlier start
    assert json.loads(page(capsys, directory, "--json"))["non_finite"] is None


def test_torn_and_unfinished_checkpoints_are_named_and_not_counted_on(directory, capsys):
    folder = directory / "checkpoints"
    newest = folder / "step-0000004.ckpt"
    newest.write_bytes(newest.read_bytes()[:1000])
    (folder / ".step-0000006.ckpt.partial").write_bytes(b"half")
    (folder / "step-0000005.ckpt").mkdir()
    change(directory, state="stopped", signal="SIGTERM")
    text = " ".join(page(capsys, directory).split())
    assert "stopped: SIGTERM stopped it after step 4, with a checkpoint" in text
    assert "it continues from step-0000002.ckpt, and trains 2 steps again" in text
    assert ".step-0000006.ckpt.partial 4 bytes, was being written or removed" in text
    assert "step-0000005.ckpt 0 bytes, was not written to its end" in text
    faults = {each.name: each.fault for each in look_at(directory).checkpoints}
    assert "torn: " in str(faults["step-0000004.ckpt"])


def test_a_directory_without_a_run_is_an_error(tmp_path, capsys):
    assert main(["run", str(tmp_path)]) == 1
    assert "is no directory of a run" in capsys.readouterr().err
    assert main(["run", str(tmp_path / "nowhere")]) == 1


def test_clips_of_a_run_whose_steps_changed_are_not_guessed(whole, capsys):
    """The average of steps of 4 and of 8 clips is of no step."""

    def run(*consumed: tuple[int, int]) -> RunState:
        stored = [StoredCheckpoint(f"{step}.ckpt", step, None, 1, samples) for step, samples in consumed]
        return replace(look_at(whole), checkpoints=stored)

    assert run((100, 400), (200, 800)).clips_per_step == 4
    assert run((100, 400)).clips_per_step == 4
    changed = run((100, 400), (200, 1200))
    assert changed.clips_per_step is None
    with pytest.raises(ValueError, match="clips per step changed in this run"):
        samples_of_step(changed, 150)


def test_the_clips_of_a_step_that_cannot_be_told_are_an_error(directory, capsys):
    shutil.rmtree(directory / "checkpoints")
    assert main(["run", str(directory), "--step=0"]) == 1
    assert "no complete checkpoint tells them" in capsys.readouterr().err
