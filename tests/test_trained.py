"""What a checkpoint's weights go over, where its run stored those alone that it trained: the very ones of its training,
for who resumes it, starts from it, or reads it."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from helpers.distributed import run_on_ranks
from helpers.runs import assert_same, checkpoint, distil, run, write_toyworld
from longlive.adapters.lora import base_name
from longlive.models.wan.weights import save_weights
from longlive.parallel.checkpoint import is_trainable_only
from longlive.trained import load_trained
from longlive.typing import Tensor


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toyworld(tmp_path_factory.mktemp("shards"))


def further(stage_one: Path, shards: Path, steps: int) -> None:
    run(stage_one, shards, "optimizer.lr=0.02", "learning_rate=constant", f"trainer.max_steps={steps}")


@pytest.fixture(scope="module")
def four_steps(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stage 1."""
    directory = tmp_path_factory.mktemp("stage_one") / "run"
    further(directory, shards, 4)
    return directory


@pytest.fixture
def stage_one(four_steps: Path, tmp_path: Path) -> Path:
    """One that may be trained further, moved or removed."""
    return Path(shutil.copytree(four_steps, tmp_path / "stage_one"))


def strip(directory: Path, step: int) -> Path:
    """What a sharded run with `trainable_only` would have stored."""
    path = directory / "checkpoints" / f"step-{step:07d}.ckpt"
    saved = torch.load(path, weights_only=True)
    learned = {
        name: weight
        for name, weight in saved["state_dict"].items()
        if base_name(name) is None or name.endswith("_amax")
    }
    torch.save(saved | {"state_dict": learned, "trainable_only": True}, path)
    return path


def base_of(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {str(base_name(name)): weight for name, weight in weights.items() if base_name(name) is not None}


def test_adapters_stay_over_the_weights_that_they_were_trained_over(
    stage_one: Path, shards: Path, tmp_path: Path
) -> None:
    """The run that they started from went on: its newest checkpoint is another base."""
    directory = tmp_path / "run"
    distil(directory, stage_one, steps=2)
    expected = base_of(checkpoint(directory, 2)["state_dict"])
    strip(directory, 2)
    further(stage_one, shards, 8)
    start = str(stage_one / "checkpoints" / "step-0000004.ckpt")
    assert f"initialise_from: {start}\n" in (directory / "config.yaml").read_text()
    assert_same(base_of(dict(load_trained(directory).module.state_dict())), expected)
    distil(directory, stage_one, steps=4)
    resumed = checkpoint(directory, 4)
    assert_same(base_of(resumed["state_dict"]), expected)
    assert resumed["config"]["initialise_from"] == start
    distil(tmp_path / "new", stage_one, steps=2)
    newer = base_of(checkpoint(tmp_path / "new", 2)["state_dict"])
    assert any(not torch.equal(newer[name], weight) for name, weight in expected.items())


def test_a_run_goes_on_over_its_weights_whatever_the_command_names(stage_one: Path, tmp_path: Path) -> None:
    """Without `initialise_from` its base would be initial weights."""
    directory = tmp_path / "run"
    distil(directory, stage_one, steps=2)
    expected = base_of(checkpoint(directory, 2)["state_dict"])
    strip(directory, 2)
    distil(directory, None, steps=4)
    assert_same(base_of(checkpoint(directory, 4)["state_dict"]), expected)


def test_weights_that_are_gone_are_named_and_may_be_given_where_they_are(stage_one: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    distil(directory, stage_one, steps=2)
    expected = base_of(checkpoint(directory, 2)["state_dict"])
    strip(directory, 2)
    moved = stage_one.rename(tmp_path / "moved")
    name = "step-0000004.ckpt"
    gone = rf"initialise_from={stage_one}/checkpoints/{name}, which is not there"
    for given in (stage_one, moved, None):
        with pytest.raises(ValueError, match=rf"{gone}.* give that checkpoint itself: initialise_from=\S*/{name}"):
            distil(directory, given, steps=4)
    with pytest.raises(ValueError, match=rf"{gone}.* a link"):
        load_trained(directory)
    distil(directory, moved / "checkpoints" / name, steps=4)
    assert_same(base_of(checkpoint(directory, 4)["state_dict"]), expected)
    assert checkpoint(directory, 4)["config"]["initialise_from"] == str(moved / "checkpoints" / name)


def test_a_run_that_was_stored_whole_goes_on_without_the_one_that_it_started_from(
    stage_one: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    distil(directory, stage_one, steps=2)
    shutil.rmtree(stage_one)
    distil(directory, stage_one, steps=4)
    assert load_trained(directory).step == 4


@pytest.mark.parametrize("precision", ["null", "{student: nvfp4}"])
def test_what_was_trained_alone_starts_another_run_over_its_own_base(
    stage_one: Path, tmp_path: Path, precision: str
) -> None:
    """A 2-step student from a 4-step one: the whole base of the second run was random."""
    roles = f"module.role_precision={precision}"
    first, second, whole = (tmp_path / name for name in ("first", "second", "whole"))
    distil(first, stage_one, roles, steps=2)
    distil(whole, first, roles, "seed=5", steps=2)
    strip(first, 2)
    distil(second, first, roles, "seed=5", steps=2)
    assert_same(checkpoint(second, 2)["state_dict"], checkpoint(whole, 2)["state_dict"])
    strip(second, 2)
    # A packed network holds the layers beside its codes in bfloat16; the run below has them in float32.
    read, expected = (load_trained(directory).module.state_dict() for directory in (second, whole))
    torch.testing.assert_close(read, expected, atol=0, rtol=2**-8)


def test_the_base_may_be_a_file_of_weights(four_steps: Path, tmp_path: Path) -> None:
    network = load_trained(four_steps).module.trained_network
    save_weights(network.state_dict(), network.config, tmp_path / "weights")
    first, second, whole = (tmp_path / name for name in ("first", "second", "whole"))
    distil(first, None, f"module.weights={tmp_path / 'weights'}", steps=2)
    distil(whole, first, "seed=5", steps=2)
    strip(first, 2)
    distil(second, first, "seed=5", steps=2)
    assert_same(checkpoint(second, 2)["state_dict"], checkpoint(whole, 2)["state_dict"])
    strip(second, 2)
    assert_same(dict(load_trained(second).module.state_dict()), dict(load_trained(whole).module.state_dict()))


def test_adapters_over_initial_weights_start_no_other_run(tmp_path: Path) -> None:
    """Its base is a function of its seed, which is not the other's."""
    distil(tmp_path / "first", None, steps=2)
    whole = dict(load_trained(tmp_path / "first").module.state_dict())
    strip(tmp_path / "first", 2)
    assert_same(dict(load_trained(tmp_path / "first").module.state_dict()), whole)
    with pytest.raises(ValueError, match=r"step-0000002\.ckpt holds what its run trained alone, over initial weights"):
        distil(tmp_path / "second", tmp_path / "first", steps=2)


def distil_on_ranks(stage_one: Path, directory: Path) -> None:
    """A part is stored, which then starts another run and is gone on from; these store all that they have."""
    common = ("strategy=fsdp", "trainer.devices=2", "module.role_precision={student: nvfp4}")
    distil(directory / "first", stage_one, *common, "strategy.checkpoints.trainable_only=true", steps=2)
    distil(directory / "second", directory / "first", *common, "seed=5", "optimizer.lr=0", steps=2)
    distil(directory / "first", None, *common, steps=4)


def test_sharded_runs_start_from_a_part_and_go_on_from_it_too(stage_one: Path, tmp_path: Path) -> None:
    run_on_ranks(partial(distil_on_ranks, stage_one, tmp_path), 2, init_process_group=False)
    expected = base_of(dict(load_trained(stage_one).module.state_dict()))
    part = tmp_path / "first" / "checkpoints" / "step-0000002.ckpt"
    read = {
        path: dict(load_trained(path).module.state_dict()) for path in (part, tmp_path / "first", tmp_path / "second")
    }
    for path, weights in read.items():
        # A packed network holds the layers beside its codes in bfloat16.
        torch.testing.assert_close(base_of(weights), expected, atol=0, rtol=0 if path == part else 2**-8)
    assert is_trainable_only(part)
    student = [name for name in read[part] if ".student." in name]
    first, second = ({name: read[path][name] for name in student} for path in (part, tmp_path / "second"))
    assert_same(second, first)
