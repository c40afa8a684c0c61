"""A run goes on with other ranks, another split or another strategy as if nothing had happened: whole commands, real
shards."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig

import longlive.train
from helpers.distributed import run_on_ranks
from helpers.interrupted import Drawn, override, relative_errors
from helpers.runs import config_of, curves, write_toyworld
from longlive.parallel.checkpoint import load_checkpoint

HALF, STEPS = 2, 4
GLOBAL_BATCH = 4
RUN = (
    "data.num_frames=16",
    "model.num_heads=4",
    "data.batch_size=1",
    f"data.global_batch_size={GLOBAL_BATCH}",
    f"trainer.max_steps={STEPS}",
    f"callbacks.checkpoint.every_n_train_steps={HALF}",
    override("drawn", Drawn),
)
"""Four chunks and four heads, for four sequence ranks. The 16 clips that are drawn are more than there are."""


@dataclass(frozen=True)
class Ranks:
    """How many, how many of them share a clip, and the rest of the command."""

    number: int
    sequence: int
    settings: tuple[str, ...]


BALANCED, CONTIGUOUS = "strategy=balanced_sp", "strategy=contiguous_sp"
MESHES = {
    "1 plain": Ranks(1, 1, ()),
    "1 sharded": Ranks(1, 1, ("strategy=fsdp",)),
    "1 x 2": Ranks(2, 2, (BALANCED,)),
    "2 x 1": Ranks(2, 1, (BALANCED, "strategy.sequence_parallel_size=1", "data.batch_size=2")),
    "1 x 4": Ranks(4, 4, (BALANCED,)),
    "2 x 2": Ranks(4, 2, (BALANCED, "strategy.sequence_parallel_size=2")),
    "1 x 2 contiguous": Ranks(2, 2, (CONTIGUOUS,)),
    "2 x 2 contiguous": Ranks(4, 2, (CONTIGUOUS, "strategy.sequence_parallel_size=2")),
}
"""Data ranks x sequence ranks. The global batch takes 1, 2 or 4 batches of each rank."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return write_toyworld(tmp_path_factory.mktemp("shards"), num_clips=7, num_raw_frames=61)


def drawn(config: DictConfig) -> dict[int, list[int]]:
    trainer = longlive.train.train(config)
    (callback,) = (callback for callback in trainer.callbacks if isinstance(callback, Drawn))
    return callback.samples


def train(directory: Path, shards: Path, mesh: str) -> dict[int, list[int]]:
    """The run on such ranks; returns the samples of every optimizer step, which its data ranks drew together."""
    ranks = MESHES[mesh]
    config = config_of(directory, shards, *RUN, *ranks.settings, f"trainer.devices={ranks.number}")
    found = run_on_ranks(drawn, ranks.number, config, init_process_group=False, timeout=240)
    for rank, samples in enumerate(found):
        assert samples == found[rank // ranks.sequence * ranks.sequence], "peers draw the same clips"
    groups = found[:: ranks.sequence]
    return {step: sorted(sample for samples in groups for sample in samples[step]) for step in found[0]}


@dataclass(frozen=True)
class Whole:
    """An uninterrupted run."""

    directory: Path
    samples: dict[int, list[int]]


@pytest.fixture(scope="module")
def whole(shards, tmp_path_factory) -> Any:
    """Runs by mesh, each made once."""
    found: dict[str, Whole] = {}

    def get(mesh: str) -> Whole:
        if mesh not in found:
            directory = tmp_path_factory.mktemp("whole")
            found[mesh] = Whole(directory, train(directory, shards, mesh))
        return found[mesh]

    return get


def state(directory: Path) -> dict[str, Any]:
    """Weights, moments and average of a run that ended. A key's bias does nothing, and its gradient is rounding."""
    saved = load_checkpoint(directory / "checkpoints" / f"step-{STEPS:07d}.ckpt")
    names = list(saved["state_dict"])
    (optimizer,) = saved["optimizer_states"]
    tree = {
        "weights": dict(saved["state_dict"]),
        "moments": {names[number]: values for number, values in optimizer["state"].items()},
        "average": dict(saved["callbacks"]["EMA"]["average"]),
    }
    return {
        part: {name: value for name, value in values.items() if not name.endswith("self_attn.k.bias")}
        for part, values in tree.items()
    }


@pytest.mark.parametrize(
    ("writer", "reader"),
    [
        ("2 x 2", "1 plain"),
        ("2 x 2", "1 sharded"),
        ("2 x 2", "1 x 2"),
        ("2 x 2", "2 x 1"),
        ("2 x 2", "1 x 4"),
        ("2 x 2", "2 x 2 contiguous"),
        ("1 x 2 contiguous", "2 x 1"),
        ("1 plain", "1 x 2"),
    ],
)
def test_a_run_continues_on_other_ranks_as_if_it_had_not_stopped(whole, shards, tmp_path, writer, reader):
    """Clips drawn twice or never, moments or an average that begin anew, a batch of another size: the curve bends, and
    nothing else tells."""
    expected = whole(writer)
    name = f"step-{HALF:07d}.ckpt"
    saved, copy = expected.directory / "checkpoints" / name, tmp_path / "checkpoints" / name
    copy.parent.mkdir()
    shutil.copytree(saved, copy) if saved.is_dir() else shutil.copy(saved, copy)
    samples = train(tmp_path, shards, reader)
    left = range(HALF, STEPS)
    assert samples == {step: expected.samples[step] for step in left}
    losses, expected_losses = (curves(path)["train/loss"] for path in (tmp_path, expected.directory))
    assert losses == pytest.approx({step: expected_losses[step] for step in left}, rel=1e-6)
    errors = relative_errors(state(tmp_path), state(expected.directory))
    assert len(errors) > 100
    assert max(errors.values()) <= 1e-5, max(errors, key=lambda name: errors[name])
    ends = [load_checkpoint(path / "checkpoints" / f"step-{STEPS:07d}.ckpt") for path in (tmp_path, expected.directory)]
    assert [end["VideoDataModule"]["samples_consumed"] for end in ends] == [STEPS * GLOBAL_BATCH] * 2
    assert ends[0]["lr_schedulers"] == ends[1]["lr_schedulers"]
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_every_step_draws_new_clips_until_all_were_drawn(whole):
    """The test above would hold for a run that draws the same clips at every step."""
    samples = whole("2 x 2").samples
    assert [len(samples[step]) for step in range(STEPS)] == [GLOBAL_BATCH] * STEPS
    assert len({sample for step in samples.values() for sample in step}) == 7
