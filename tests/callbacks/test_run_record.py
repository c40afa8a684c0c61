"""What became of a run is on the disk, whatever became of it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from helpers.interrupted import Signal
from helpers.runs import fake_batches, fit, tiny_module
from longlive.callbacks.run_record import ERRORS, RECORD, RunRecord, read_errors, read_starts, start_ticks
from longlive.callbacks.stop_on_signal import StopOnSignal

ORIGIN = {"command": ["longlive", "train"], "versions": {}, "commit": None}


class Look(Callback):
    """What a reader finds while the run trains."""

    def __init__(self, directory: Path, error: BaseException | None = None) -> None:
        self.directory, self.error = directory, error
        self.found: list[dict[str, Any]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.found = read_starts(self.directory)
        if trainer.global_step == 2 and self.error is not None:
            raise self.error


def run(directory: Path, *callbacks: Callback) -> None:
    fit(tiny_module(), fake_batches(3), [*callbacks, RunRecord(directory, ORIGIN)])


def test_a_run_is_running_until_it_has_finished(tmp_path):
    look = Look(tmp_path)
    run(tmp_path, look)
    assert [start["state"] for start in look.found] == ["running"]
    process = look.found[0]["process"]
    assert process["pid"] == os.getpid()
    assert process["ticks"] == start_ticks(os.getpid())
    (start,) = read_starts(tmp_path)
    assert (start["state"], start["first_step"], start["last_step"], start["max_steps"]) == ("finished", 0, 3, 3)
    assert start["began"] < start["ended"]
    assert start.items() >= ORIGIN.items()
    assert [path.name for path in tmp_path.iterdir()] == [RECORD]


def test_every_start_has_an_entry_and_the_earlier_ones_stay(tmp_path):
    with pytest.raises(RuntimeError, match="broken"):
        run(tmp_path, Look(tmp_path, RuntimeError("broken")))
    (failed,) = read_starts(tmp_path)
    run(tmp_path, StopOnSignal(), Signal(rank=0, step=0))
    starts = read_starts(tmp_path)
    assert starts[0] == failed
    assert [(start["state"], start["signal"], start["last_step"]) for start in starts] == [
        ("failed", None, 2),
        ("stopped", "SIGTERM", 1),
    ]


def test_an_error_is_kept_with_its_message_by_the_rank_that_had_it(tmp_path):
    """A rank that fails is followed by the death of the others: rank 0 may not be there to write."""
    with pytest.raises(RuntimeError, match="broken"):
        run(tmp_path, Look(tmp_path, RuntimeError("broken " + 10_000 * "x")))
    (start,) = read_starts(tmp_path)
    error = start["error"]
    assert (error["type"], error["rank"], error["step"]) == ("RuntimeError", 0, 2)
    assert error["message"].startswith("broken xxx")
    assert len(error["message"]) == 4000
    assert read_errors(tmp_path, since=start["began"]) == [error]
    assert read_errors(tmp_path, since=start["ended"] + 1) == []
    (tmp_path / ERRORS / "rank-0003.json").write_text(json.dumps(error | {"rank": 3, "time": error["time"] - 0.1}))
    assert [each["rank"] for each in read_errors(tmp_path, since=0.0)] == [3, 0]


def test_a_signal_that_lightning_answers_is_no_failure(tmp_path):
    with pytest.raises(SIGTERMException):
        run(tmp_path, Look(tmp_path, SIGTERMException()))
    (start,) = read_starts(tmp_path)
    assert (start["state"], start["signal"], start["last_step"]) == ("stopped", "SIGTERM", 2)
    assert not (tmp_path / ERRORS).exists()


def test_a_start_that_is_refused_leaves_the_record_as_it_was(tmp_path):
    class Refuse(Callback):
        def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        run(tmp_path, Refuse())
    assert list(tmp_path.iterdir()) == []


def test_a_record_that_cannot_be_written_does_not_end_the_run(tmp_path, caplog):
    """It is written with every checkpoint: a full disk would be told by its error, and not by the checkpoint's."""

    class Block(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            (tmp_path / f".{RECORD}.partial").mkdir(exist_ok=True)

    run(tmp_path, Block())
    assert "run.json does not tell that the run is finished" in caplog.text


def test_a_file_that_is_no_record_is_named(tmp_path):
    (tmp_path / RECORD).write_text("[]")
    with pytest.raises(ValueError, match=r"run\.json is no record of a run"):
        read_starts(tmp_path)


def test_a_process_that_has_ended_has_no_start():
    child = os.fork()
    if child == 0:
        os._exit(0)
    while start_ticks(child) is not None:  # until it is a zombie, which is still listed
        os.sched_yield()
    os.waitpid(child, 0)
    assert start_ticks(child) is None
