"""A data worker that hangs or dies is told by the sample that it was reading, and signals to all do not end it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import pytest
import torch

from longlive.data.datamodule import VideoDataModule
from longlive.data.indexed import IndexedShards
from longlive.data.order import epoch_order, samples_at
from longlive.data.sample import ClipSpec, UnreadableSampleError
from longlive.data.streamed import StreamedShards
from longlive.data.workers import DataWorkerError, Reading, WatchedLoader

BAD = 4
"""The sample at which a worker hangs or dies; the second one that is read."""

POSITIONS = [[0], [BAD], [1]]
MESSAGE = r"worker 0 (.*)was reading sample clip-004 in shard-000001\.tar, for [\d.]+ s\."


class Bad(IndexedShards):
    """Something happens when a sample is read."""

    happens: Callable[[], None]

    def _read(self, sample_id: int, wanted: Collection[str]) -> dict[str, bytes] | UnreadableSampleError:
        if sample_id == BAD:
            self.happens()
        return super()._read(sample_id, wanted)


def loader_of(directory: Path, spec: ClipSpec, happens: Callable[[], None], timeout: float | None) -> WatchedLoader:
    shards = Bad([directory], spec, seed=5, shuffle=False)
    shards.happens = happens
    return WatchedLoader(shards, num_workers=1, timeout=timeout, batch_sampler=POSITIONS, collate_fn=lambda x: x[0])


@pytest.fixture
def ended() -> Iterator[list[WatchedLoader]]:
    """Loaders put here leave no worker."""
    loaders: list[WatchedLoader] = []
    yield loaders
    for loader in loaders:
        loader.end_workers()
        for process in loader.processes:
            process.join()


def test_a_reader_that_hangs_is_an_error_that_names_the_sample(pristine_shards, spec, ended):
    """torch says "timed out after 2 seconds", and its workers then keep the process from ending."""
    loader = loader_of(pristine_shards, spec, lambda: time.sleep(600), timeout=2)
    ended.append(loader)
    batches = iter(loader)
    assert next(batches).sample_id == 0
    begin = time.monotonic()
    with pytest.raises(DataWorkerError, match=rf"has waited 2 s for a batch .*\(data\.reader_timeout\): {MESSAGE}"):
        next(batches)
    assert time.monotonic() - begin < 60
    loader.processes[0].join(60)
    assert loader.processes[0].exitcode == -signal.SIGKILL


def test_a_worker_that_was_killed_is_an_error_that_names_the_sample(pristine_shards, spec, ended):
    loader = loader_of(pristine_shards, spec, lambda: os.kill(os.getpid(), signal.SIGKILL), timeout=None)
    ended.append(loader)
    with pytest.raises(DataWorkerError, match=rf"a data worker died: {MESSAGE} If memory ran out") as error:
        list(loader)
    assert "was killed by SIGKILL, and" in str(error.value)


def test_a_death_that_is_noticed_elsewhere_is_explained_by_a_note(pristine_shards, spec, ended, monkeypatch):
    """torch raises wherever the training process is when the worker dies: in the middle of a step."""
    # Lightning puts back the handlers that were there before a fit, and torch, which sets its own once, does not know.
    monkeypatch.setattr("torch.utils.data._utils.signal_handling._SIGCHLD_handler_set", False)
    module = VideoDataModule(
        pristine_shards, num_frames=3, chunk_frames=1, height=16, width=32, num_workers=1, reader_timeout=60
    )
    module.setup("fit")
    loader = module.train_dataloader()
    assert isinstance(loader, WatchedLoader)
    assert loader.timeout == 60
    ended.append(loader)
    batches = iter(loader)
    next(batches)

    def step() -> None:
        loader.processes[0].kill()
        time.sleep(60)

    with pytest.raises(RuntimeError, match="is killed by signal") as error:
        step()
    module.on_exception(error.value)
    (note,) = error.value.__notes__
    assert note.startswith("a data worker died: worker 0 was killed by SIGKILL, and was ")
    other = RuntimeError("another")
    module.on_exception(other)
    assert not hasattr(other, "__notes__")


def test_signals_to_the_whole_job_do_not_end_a_worker_and_its_parent_does(pristine_shards, spec, ended):
    """Workers that end with them leave the training process without the rest of its step."""
    loader = loader_of(pristine_shards, spec, lambda: None, timeout=60)
    ended.append(loader)
    batches = iter(loader)
    next(batches)
    (worker,) = loader.processes
    stranger = os.fork()  # not the worker's parent
    if stranger == 0:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            os.kill(worker.pid, number)
        os._exit(0)
    os.waitpid(stranger, 0)
    assert [next(batches).sample_id for _ in range(2)] == [BAD, 1]
    worker.join(0.2)
    assert worker.is_alive()
    worker.terminate()
    worker.join(60)
    assert worker.exitcode == 0


@pytest.mark.parametrize("kind", ["indexed", "streamed"])
def test_both_readers_note_what_they_read_before_they_do(pristine_shards, spec, kind):
    """Noted afterwards, a hang is blamed on the sample before."""
    noted: list[int] = []

    class Noting(Reading):
        def begin(self, sample_id: int) -> None:
            noted.append(sample_id)

    if kind == "indexed":
        reader = IndexedShards([pristine_shards], spec, seed=5, shuffle=False)
    else:
        stream = {"batch_size": 1, "data_rank": 0, "data_size": 1}
        reader = StreamedShards([pristine_shards], spec, seed=5, shuffle=False, **stream)
    reader.reading = Noting(num_workers=0)
    read: list[int] = []
    for position in range(4):
        noted.clear()
        read.append(reader[position].sample_id)
        assert read[-1] in noted
    assert read == [0, 1, 2, 3]


def test_the_longest_reading_is_the_one_that_hangs():
    reading = Reading(num_workers=3)
    assert reading.longest() is None
    now = time.monotonic_ns()
    reading._notes[:] = torch.tensor([[7, now], [8, now - 5_000_000_000], [-1, -1]])
    worker, sample, seconds = reading.longest() or (0, 0, 0.0)
    assert (worker, sample) == (1, 8)
    assert 5 <= seconds < 60


def test_what_was_read_follows_from_seed_epoch_and_position(pristine_shards, spec):
    """Written down nowhere, so it must be computed rightly: against what the reader reads."""
    reader = IndexedShards([pristine_shards], spec, seed=5, shuffle=True)
    positions = [0, 3, 10, 11, 21, 22, 40]
    assert samples_at(positions, 11, seed=5) == [reader[position].sample_id for position in positions]
    assert samples_at(range(11, 22), 11, seed=5) == list(epoch_order(11, 5, 1))


def test_a_timeout_that_is_none_is_refused(pristine_shards):
    with pytest.raises(ValueError, match="reader_timeout=0 must be positive, or null"):
        VideoDataModule(pristine_shards, num_frames=3, chunk_frames=1, height=16, width=32, reader_timeout=0)
