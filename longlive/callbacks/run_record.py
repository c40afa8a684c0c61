"""What became of a run: `run.json` in its directory, one entry for every time that it was started.

Written by rank 0 and replaced in one step: when training starts, with every checkpoint, and at the end, whatever end it
is. A process that is killed writes nothing; its entry still says `running`, and names the process, so a reader can tell
(`longlive doctor run`). What fails on a rank is written by that rank, to `errors/`: the others, rank 0 too, may be
killed before they know.

A start that is refused before it trains leaves everything as it was.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from longlive.callbacks.stop_on_signal import StopOnSignal
from longlive.data.atomic import write_aside

log = logging.getLogger(__name__)

RECORD = "run.json"
ERRORS = "errors"
MAX_STARTS = 100
"""Older ones are forgotten."""

MAX_MESSAGE = 4000
"""Characters of an error's message that are kept."""


class RunRecord(Callback):
    """See the module docstring. `longlive train` adds it to every run.

    Args:
        directory: the run's.
        origin: where the run comes from, see `callbacks.provenance`.
    """

    def __init__(self, directory: str | Path, origin: Mapping[str, Any]) -> None:
        self.directory = Path(directory)
        self.origin = dict(origin)
        self._start: dict[str, Any] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start = {
            "state": "running",
            "began": time.time(),
            "ended": None,
            "first_step": trainer.global_step,
            "last_step": trainer.global_step,
            "max_steps": trainer.max_steps,
            "world_size": trainer.world_size,
            "device": trainer.strategy.root_device.type,
            "process": this_process(),
            "signal": None,
            "error": None,
            **self.origin,
        }
        if trainer.is_global_zero:
            starts = [*read_starts(self.directory), self._start]
            _write(self.directory / RECORD, {"starts": starts[-MAX_STARTS:]})

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._update(trainer, last_step=trainer.global_step)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # After the strategy's end: a checkpoint that was written in the background is complete, or raised.
        stopped = [call.stopped_by for call in _callbacks(trainer) if isinstance(call, StopOnSignal)]
        signal = next((name for name in stopped if name is not None), None)
        state = "stopped" if signal else "finished"
        self._update(trainer, state=state, signal=signal, last_step=trainer.global_step, ended=time.time())

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._start is None:
            return
        if isinstance(exception, SIGTERMException):
            # A run without `StopOnSignal`, which Lightning ends at a signal.
            self._update(trainer, state="stopped", signal="SIGTERM", last_step=trainer.global_step, ended=time.time())
            return
        error = {
            "rank": trainer.global_rank,
            "step": trainer.global_step,
            "time": time.time(),
            "type": type(exception).__name__,
            "message": str(exception)[:MAX_MESSAGE],
        }
        with suppress(OSError):  # what failed first is the error that counts
            _write(self.directory / ERRORS / f"rank-{trainer.global_rank:04d}.json", error)
        state = "interrupted" if isinstance(exception, KeyboardInterrupt) else "failed"
        self._update(trainer, state=state, error=error, last_step=trainer.global_step, ended=error["time"])

    def _update(self, trainer: Trainer, **changes: Any) -> None:
        if self._start is None or not trainer.is_global_zero:
            return
        self._start |= changes
        try:
            _write(self.directory / RECORD, {"starts": [*read_starts(self.directory)[:-1], self._start]})
        except OSError as error:  # a full disk, perhaps: the run does not depend on its record
            log.warning("%s does not tell that the run is %s: %s", RECORD, self._start["state"], error)


def read_starts(directory: Path) -> list[dict[str, Any]]:
    """The entries of a run, oldest first; none if it has no record.

    Raises:
        ValueError: if the record is none of ours.
    """
    file = directory / RECORD
    if not file.exists():
        return []
    try:
        starts = json.loads(file.read_text())["starts"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is no record of a run: {error!r}; move it away") from error
    return cast(list[dict[str, Any]], starts)


def read_errors(directory: Path, since: float) -> list[dict[str, Any]]:
    """What ranks raised after a time, the first one first."""
    found = [json.loads(file.read_text()) for file in sorted((directory / ERRORS).glob("rank-*.json"))]
    return sorted((error for error in found if error["time"] >= since), key=lambda error: float(error["time"]))


def this_process() -> dict[str, Any]:
    """What tells this process from any other, also from a later one of its number."""
    return {"host": platform.node(), "pid": os.getpid(), "ticks": start_ticks(os.getpid())}


def start_ticks(pid: int) -> int | None:
    """When a process of this machine started, in the kernel's ticks (Linux); None: there is none, or nobody knows."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _callbacks(trainer: Trainer) -> Sequence[Callback]:
    return cast(Sequence[Callback], trainer.callbacks)  # type: ignore[attr-defined]


def _write(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with write_aside(file) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")
