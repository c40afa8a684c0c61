"""`kill -9` of any one rank, at random moments of a run on two: what is on the disk always continues to the same end.

The ranks are forked, so that many kills are cheap; `test_launcher.py` kills whole commands.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

import longlive.train
from helpers.distributed import RankError, run_on_ranks
from helpers.interrupted import CountCalls, Kill, Signal, override
from helpers.runs import assert_same, config_of, curve_values, state_after, write_toyworld
from longlive.callbacks.run_record import read_starts
from longlive.parallel.checkpoint import load_checkpoint, newest_checkpoint
from longlive.parallel.launcher import EXIT_STOPPED

STEPS, INTERVAL, RANKS = 6, 2, 2
NUM_KILLS = 20
KILLS_IN_A_ROW = 7
SETTINGS = (
    "strategy=balanced_sp",
    f"trainer.devices={RANKS}",
    f"trainer.max_steps={STEPS}",
    "trainer.log_every_n_steps=3",
    f"callbacks.checkpoint.every_n_train_steps={INTERVAL}",
)
"""Checkpoints fall inside log intervals."""

Calls = dict[tuple[str, int], int]


def train(directory: Path, shards: Path, *more: str) -> list[Calls]:
    """The run on all ranks; what `CountCalls` counted on each, if it is among its callbacks."""

    config = config_of(directory, shards, *SETTINGS, *more)

    def each() -> Calls:
        trainer = longlive.train.train(config)
        counts = [callback.calls for callback in trainer.callbacks if isinstance(callback, CountCalls)]
        return counts[0] if counts else {}

    return run_on_ranks(each, RANKS, init_process_group=False, timeout=240)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return write_toyworld(tmp_path_factory.mktemp("shards"))


@dataclass(frozen=True)
class Whole:
    """An uninterrupted run, and how many calls each rank makes between its moments."""

    directory: Path
    calls: list[Calls]


@pytest.fixture(scope="module")
def whole(shards, tmp_path_factory) -> Whole:
    directory = tmp_path_factory.mktemp("whole")
    return Whole(directory, train(directory, shards, override("count", CountCalls, steps=INTERVAL)))


def moment(whole: Whole, draw: random.Random, number: int, begins_at: int) -> tuple[int, str, int, int]:
    """Rank, kind of moment, step of the run, calls after that. Some steps come after a save of the same start."""
    rank = draw.randrange(RANKS)
    kind = "setup" if number % 10 == 9 else ("step", "save", "step", "written")[number % 4]
    if kind == "setup":
        return rank, kind, 0, 1 + draw.randrange(sure(whole.calls[rank][kind, 0]))
    after = draw.randrange(min(2 * INTERVAL, STEPS - begins_at)) if kind == "step" else INTERVAL
    counted = after % INTERVAL if kind == "step" else INTERVAL
    return rank, kind, begins_at + after, 1 + draw.randrange(sure(whole.calls[rank][kind, counted]))


def sure(calls: int) -> int:
    """How many of the calls that one start made another one makes as well: a resumed start skips some."""
    return max(1, calls * 3 // 4)


def reached(directory: Path) -> int:
    """The step of the newest checkpoint, which can be read to its end; 0 if there is none."""
    newest = newest_checkpoint(directory / "checkpoints")
    return 0 if newest is None else load_checkpoint(newest)["global_step"]


def test_a_run_that_is_killed_at_twenty_random_moments_ends_as_if_it_had_not_been(whole, shards, tmp_path):
    """Torn checkpoints, samples drawn twice, logs that were not on the disk, leftovers that the next save stumbles
    over: each needs its own moment to show. On the same ranks, all is equal bit for bit."""
    outcomes: Counter[str] = Counter()
    directory, draw, in_a_row = tmp_path / "run-0", random.Random(0), 0
    for number in range(NUM_KILLS):
        begins_at = reached(directory)
        if in_a_row == KILLS_IN_A_ROW or begins_at == STEPS:
            finish(directory, shards, whole, begins_at)
            directory, begins_at, in_a_row = tmp_path / f"run-{number}", 0, 0
        in_a_row += 1
        rank, kind, step, calls = moment(whole, draw, number, begins_at)
        notes = tmp_path / f"notes-{number}"
        notes.mkdir()
        kill = override("kill", Kill, rank=rank, kind=kind, step=step, calls=calls, directory=notes)
        with pytest.raises(RankError):
            train(directory, shards, kill)
        assert (notes / "killed").exists(), (rank, kind, step, calls)
        if kind != "setup":
            assert {(notes / f"began-{rank}").read_text() for rank in range(RANKS)} == {str(begins_at)}
        outcomes["kills"] += 1
        outcomes["during a save"] += bool((notes / "killed").read_text())
        outcomes["after a checkpoint"] += begins_at > 0
    finish(directory, shards, whole, reached(directory))
    assert outcomes["kills"] == NUM_KILLS
    assert outcomes["during a save"] >= 4, outcomes
    assert outcomes["after a checkpoint"] >= 4, outcomes


def test_a_signal_to_one_rank_stops_all_at_the_end_of_the_step_and_nothing_is_lost(whole, shards, tmp_path):
    """Ranks that do not stop at the same step wait for each other for half an hour, or save halves of two steps."""
    directory = tmp_path / "run"
    config = config_of(directory, shards, *SETTINGS, override("signal", Signal, rank=1, step=2))

    def each() -> tuple[int | str | None, list[str]]:
        with pytest.raises(SystemExit) as exit:
            longlive.train.train(config)
        return exit.value.code, [path.name for path in sorted((directory / "checkpoints").iterdir())]

    left = ["step-0000002.ckpt", "step-0000003.ckpt"]
    assert run_on_ranks(each, RANKS, init_process_group=False, timeout=240) == [(EXIT_STOPPED, left)] * RANKS
    assert reached(directory) == 3
    (start,) = read_starts(directory)
    assert (start["state"], start["signal"], start["last_step"]) == ("stopped", "SIGTERM", 3)
    finish(directory, shards, whole, begins_at=3)
    assert [start["state"] for start in read_starts(directory)] == ["stopped", "finished"]


def finish(directory: Path, shards: Path, whole: Whole, begins_at: int) -> None:
    """The last start goes to the end, and all is as in the run that was not killed."""
    train(directory, shards, override("began", Kill, rank=-1, kind="never", step=0, calls=0, directory=directory))
    assert (directory / "began-0").read_text() == str(begins_at)
    assert_same(state_after(directory, STEPS), state_after(whole.directory, STEPS))
    assert curve_values(directory) == curve_values(whole.directory)
    assert [path.name for path in (directory / "checkpoints").glob(".*")] == []
