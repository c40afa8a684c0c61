"""Data workers that hang or die are told by the sample that they were at.

A worker notes in shared memory which sample it reads, and since when. A worker that hangs (a network file system, a
broken decoder) cannot be asked, and one that was killed says nothing; but what it noted last is still there.

A signal to all processes of a job is one for the training process, which still needs its workers to finish the step.
So workers do not listen to it, other than to their own parent's SIGTERM.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data._utils import signal_handling


class DataWorkerError(RuntimeError):
    """A data worker does not deliver. The message names the sample that it was reading."""


class Reading:
    """Which sample each worker of a loader is reading, and since when.

    Args:
        num_workers: 0 if the samples are read in the training process, where nothing is noted.
    """

    def __init__(self, num_workers: int) -> None:
        self._notes = torch.full((num_workers, 2), -1, dtype=torch.int64).share_memory_()

    def begin(self, sample_id: int) -> None:
        """Called in a worker: it turns to a sample."""
        self._note(sample_id, time.monotonic_ns())

    def end(self) -> None:
        """It is done with it."""
        self._note(-1, -1)

    def _note(self, sample_id: int, since: int) -> None:
        info = get_worker_info()
        if info is not None and info.id < len(self._notes):
            self._notes[info.id] = torch.tensor([sample_id, since])

    def of(self, worker: int) -> tuple[int, float] | None:
        """The sample that a worker is at, and for how many seconds; None: none."""
        sample_id, since = self._notes[worker].tolist()
        return None if sample_id < 0 else (sample_id, (time.monotonic_ns() - since) / 1e9)

    def longest(self) -> tuple[int, int, float] | None:
        """Of the worker that has been at its sample for the longest: its number, the sample and the seconds."""
        at = [(worker, *found) for worker in range(len(self._notes)) if (found := self.of(worker)) is not None]
        return max(at, key=lambda each: each[2], default=None)


class NamedSamples(Protocol):
    """A dataset that notes what is read, and whose samples have names."""

    reading: Reading

    def name(self, sample_id: int) -> str: ...


class WatchedLoader(DataLoader[Any]):
    """A DataLoader whose errors about workers name the sample.

    Args:
        dataset: see `NamedSamples`.
        num_workers: as torch's.
        timeout: seconds that training waits for a batch from a worker before it gives up; None: for ever. Without
            workers the training process reads itself, and nobody watches it.
        **settings: torch's.
    """

    def __init__(self, dataset: Any, *, num_workers: int, timeout: float | int | None, **settings: Any) -> None:
        self.samples: NamedSamples = dataset
        self.processes: list[Any] = []
        """The workers."""
        self._batches: Any = None
        dataset.reading = Reading(num_workers)
        super().__init__(
            dataset,
            num_workers=num_workers,
            timeout=timeout or 0 if num_workers else 0,
            worker_init_fn=_ignore_signals_to_all,
            persistent_workers=num_workers > 0,
            **settings,
        )

    def __iter__(self) -> Any:
        self._batches = super().__iter__()
        self.processes = list(self._batches._workers) if self.num_workers else []
        return _Watched(self, self._batches)

    def end_workers(self) -> None:
        """At once: one that hangs does not end when it is asked to."""
        if self._batches is not None and self.processes and self._batches._worker_pids_set:
            # torch would raise for every worker that it sees die, wherever the training process is.
            signal_handling._remove_worker_pids(id(self._batches))
            self._batches._worker_pids_set = False
        for process in self.processes:
            process.kill()

    def explain(self, error: BaseException) -> str | None:
        """What torch's error means, if it is one about a worker of this loader that hangs or died."""
        said = str(error)
        if said.startswith("DataLoader timed out"):
            found = self.samples.reading.longest()
            at = "none of them reads" if found is None else f"worker {found[0]} {self._at(found[1:])}"
            return (
                f"training has waited {self.timeout:g} s for a batch of the data workers (data.reader_timeout): {at}. "
                "Is its storage reachable? A larger data.reader_timeout waits longer"
            )
        if not said.startswith("DataLoader worker"):
            return None
        dead = [number for number, process in enumerate(self.processes) if process.exitcode]
        ends = [
            f"worker {number} {_end(self.processes[number].exitcode)} {self._at(self.samples.reading.of(number))}"
            for number in dead
        ]
        return f"a data worker died: {'; '.join(ends)}. If memory ran out, use fewer data.num_workers" if ends else None

    def _at(self, found: tuple[int, float] | None) -> str:
        if found is None:
            return "was between two samples"
        return f"was reading sample {self.samples.name(found[0])}, for {found[1]:.1f} s"


class _Watched(Iterator[Any]):
    def __init__(self, loader: WatchedLoader, batches: Iterator[Any]) -> None:
        self.loader, self.batches = loader, batches

    def __next__(self) -> Any:
        try:
            return next(self.batches)
        except RuntimeError as error:
            message = self.loader.explain(error)
            if message is None:
                raise
            self.loader.end_workers()
            raise DataWorkerError(message) from error


def _end(exit_code: int) -> str:
    if exit_code < 0:
        return f"was killed by {signal.Signals(-exit_code).name}, and"
    return f"ended with exit code {exit_code}, and"


def _ignore_signals_to_all(worker: int) -> None:
    """Called in a worker when it begins."""
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_if_the_parent_says, daemon=True).start()


def _end_if_the_parent_says() -> None:
    while True:
        sender = signal.sigwaitinfo([signal.SIGTERM]).si_pid
        if sender == os.getppid():
            os._exit(0)
