"""What runs on several ranks saw and where they are interrupted, as callbacks; and whole commands that are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from helpers.runs import overrides
from longlive.callbacks.stop_on_signal import StopOnSignal
from longlive.data.batch import VideoBatch

POLL_SECONDS = 0.05
LOOK_EVERY = 50
"""Calls between two looks at the disk."""


class Drawn(Callback):
    """The samples that this rank trained on, by optimizer step."""

    def __init__(self) -> None:
        self.samples: dict[int, list[int]] = {}

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: VideoBatch, batch_idx: int
    ) -> None:
        self.samples.setdefault(trainer.global_step, []).extend(batch.sample_ids.tolist())


class CountCalls(Callback):
    """Counts calls of Python and C functions from the moments that a `Kill` knows: to the next step, or until the
    checkpoint has its name.

    Attributes:
        calls: by kind of moment and global step.

    Args:
        steps: to be counted; counting is slow.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.calls: dict[tuple[str, int], int] = {}
        self._number = 0
        self._since: dict[tuple[str, int], int] = {}

    def _count(self, frame: FrameType, event: str, argument: object) -> None:
        self._number += event in ("call", "c_call")
        for kind, step in [*self._since] if self._number % LOOK_EVERY == 0 else ():
            if kind == "save" and ("written", step) not in self._since and unfinished(self.root):
                self._since["written", step] = self._number
            elif kind == "written" and not unfinished(self.root):
                self._close("save", "written")

    def _close(self, *kinds: str) -> None:
        for moment in [moment for moment in self._since if moment[0] in kinds]:
            self.calls[moment] = self._number - self._since.pop(moment)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.root = trainer.default_root_dir
        self._since["setup", 0] = self._number
        sys.setprofile(self._count)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._close("setup", "step")
        if trainer.global_step == self.steps:
            sys.setprofile(None)
        self._since["step", trainer.global_step] = self._number

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._since["save", trainer.global_step] = self._number


class Kill(Callback):
    """Kills its own process at a moment that is as exact as a function call, and notes at which step the run began.

    Args:
        rank: whose process.
        kind: what the calls are counted from: `"setup"` of the fit, the start of the `"step"` or of the `"save"`, or
            the first thing that the save has `"written"`.
        step: Lightning's `global_step` at that moment.
        calls: calls of Python and C functions after it.
        directory: where `began-<rank>` and `killed` are written; `killed` lists what was being saved.
    """

    def __init__(self, rank: int, kind: str, step: int, calls: int, directory: str) -> None:
        self.rank, self.moment, self.calls, self.directory = rank, (kind, step), calls, Path(directory)
        self.waits_for_file = kind == "written"
        self._number = 0

    def _count(self, frame: FrameType, event: str, argument: object) -> None:
        if event not in ("call", "c_call"):
            return
        self._number += 1
        if self.waits_for_file and self._number % LOOK_EVERY == 0:
            self.waits_for_file = not unfinished(self.root)
        self.calls -= not self.waits_for_file
        if self.calls <= 0:
            sys.setprofile(None)
            (self.directory / "killed").write_text(" ".join(unfinished(self.root)))
            os.kill(os.getpid(), signal.SIGKILL)

    def _at(self, kind: str, trainer: Trainer) -> None:
        if trainer.global_rank == self.rank and (kind, trainer.global_step) == self.moment:
            self.root = trainer.default_root_dir
            sys.setprofile(self._count)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._at("setup", trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        (self.directory / f"began-{trainer.global_rank}").write_text(str(trainer.global_step))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._at("step", trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._at("save", trainer)
        self._at("written", trainer)


def unfinished(directory: str | Path) -> list[str]:
    """What a run is writing or replacing among its checkpoints."""
    folder = Path(directory, "checkpoints")
    return [name for name in os.listdir(folder) if name.startswith(".")] if folder.exists() else []


class Signal(Callback):
    """Sends signals to its own process, in the middle of a step, and once more in the middle of the next save.

    Args:
        rank: whose process.
        step: Lightning's `global_step` at that moment.
        names: of the signals, in their order.
        batches: of an accumulation before it.
    """

    def __init__(self, rank: int, step: int, names: Sequence[str] = ("SIGTERM",), batches: int = 0) -> None:
        self.rank, self.step, self.names, self.batches = rank, step, names, batches
        self._has_sent = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank == self.rank and trainer.global_step == self.step and not self._has_sent:
            self.batches -= 1
            if self.batches < 0:
                self._send()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._has_sent:
            self._send()

    def _send(self) -> None:
        self._has_sent = True
        for name in self.names:
            os.kill(os.getpid(), signal.Signals[name])


class AwaitSignal(Callback):
    """Holds a run in a step until a signal has come, so that one that somebody else sends comes in this step.

    Args:
        step: Lightning's `global_step` at that moment.
        directory: where every rank says that it waits, by a file `waits-<rank>`.
    """

    def __init__(self, step: int, directory: str) -> None:
        self.step, self.directory = step, Path(directory)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step != self.step:
            return
        listeners = [callback for callback in trainer.callbacks if isinstance(callback, StopOnSignal)]
        (self.directory / f"waits-{trainer.global_rank}").touch()
        while not any(bool(listener._received.any()) for listener in listeners):
            time.sleep(POLL_SECONDS)


class Fail(Callback):
    """Raises on one rank; the others do not notice, like ranks in a collective that waits for ever."""

    def __init__(self, rank: int, step: int) -> None:
        self.rank, self.step = rank, step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            if trainer.global_rank == self.rank:
                raise RuntimeError("this rank fails")
            time.sleep(600)


def override(name: str, callback: type[Callback], **arguments: Any) -> str:
    """The setting that adds a callback to a run."""
    settings = "".join(f", {key}: {value}" for key, value in arguments.items())
    return f"+callbacks.{name}={{_target_: {callback.__module__}.{callback.__name__}{settings}}}"


def relative_errors(ours: Any, theirs: Any, where: str = "") -> dict[str, float]:
    """Of every tensor of two trees that are otherwise equal."""
    if isinstance(theirs, Mapping):
        assert ours.keys() == theirs.keys(), where
        found = [relative_errors(ours[key], theirs[key], f"{where}/{key}") for key in theirs]
        return {name: error for each in found for name, error in each.items()}
    if isinstance(theirs, list | tuple):
        return relative_errors(dict(enumerate(ours)), dict(enumerate(theirs)), where)
    if not isinstance(theirs, torch.Tensor):
        assert ours == theirs, where
        return {}
    return {where: float((ours - theirs).norm() / theirs.norm().clamp_min(1e-12))}


class Command:
    """`longlive train` of a tiny run, with all its processes.

    Args:
        directory: the run's; no other process may have it in its command line.
        shards: what it trains on.
        *more: overrides.
    """

    def __init__(self, directory: Path, shards: Path, *more: str) -> None:
        self.directory = directory
        self.log = directory.with_suffix(".log")
        arguments = overrides(directory, shards, *more)
        tests = Path(__file__).resolve().parents[1]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "longlive.cli", "train", *arguments],
                cwd=directory.parent,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    @property
    def output(self) -> str:
        return self.log.read_text()

    def processes(self) -> list[int]:
        """Ids of all that run, ranks and their data workers; one that ended and waits for its parent does not."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and f"directory={self.directory}" in _text(entry / "cmdline").split("\0"):
                found.append(int(entry.name))
        return found

    def rank(self, local_rank: int) -> int:
        """A rank's process id; the command itself is rank 0."""
        if local_rank == 0:
            return self.process.pid
        for process in self.processes():
            is_child = f"\nPPid:\t{self.process.pid}\n" in _text(Path(f"/proc/{process}/status"))
            if is_child and f"LOCAL_RANK={local_rank}" in _text(Path(f"/proc/{process}/environ")).split("\0"):
                return process
        raise AssertionError(f"rank {local_rank} does not run\n{self.output}")

    def until_saved(self, step: int, timeout: float = 240) -> None:
        """Wait for a checkpoint."""
        path = self.directory / "checkpoints" / f"step-{step:07d}.ckpt"
        deadline = time.monotonic() + timeout
        while not path.exists():
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(POLL_SECONDS)

    def end(self, timeout: float = 240) -> int:
        """Wait for the command; its exit code."""
        return self.process.wait(timeout)

    def orphans(self, timeout: float = 20) -> list[int]:
        """What still runs so long after the command's end."""
        deadline = time.monotonic() + timeout
        while self.processes() and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        return self.processes()

    def kill(self) -> None:
        """End what is left of it."""
        for process in self.processes():
            os.kill(process, signal.SIGKILL)
        self.process.wait()


def _text(file: Path) -> str:
    """Of a file of a process that may end at any time."""
    try:
        return file.read_bytes().decode(errors="replace")
    except OSError:
        return ""
