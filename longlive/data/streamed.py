"""Shards read front to back through webdataset: from any URL or command that it can open, and from local paths.

webdataset opens the shards and groups their members. Splitting, shuffling and resuming are ours, because webdataset's
own trust the environment's rank, seed from the process id and the time, and have no state. Each lane (see `order.py`)
draws its shards for an epoch, and lets their samples through a shuffle buffer. The buffer's order is computed
beforehand, from the lengths in the index: so a resumed run knows which samples are still to come, and opens only the
shards that hold them.

What holds: the order depends on (seed, data rank, data size, batch size) and not on workers; a resumed run continues
exactly. What does not, other than with the indexed reader: another number of data ranks gets another split, and since
shards are of different lengths, a lane may begin its next epoch a little before the others. Validation data is read
whole by every rank.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path

import webdataset
from webdataset.tariterators import group_by_keys, tar_file_expander

from longlive import rng
from longlive.data.order import buffer_shuffle, lane_shards, num_lanes, place_in_lane
from longlive.data.reader import Candidate, ShardReader
from longlive.data.sample import ClipSpec, UnreachableSampleError, UnreadableSampleError


class StreamedShards(ShardReader):
    """Reads shards front to back. Positions must be asked for in roughly ascending order: a step back reopens shards.

    Args:
        locations, spec, seed, shuffle: as `ShardReader`'s.
        batch_size: samples per batch of a rank.
        data_rank, data_size: which share of the shards is read here.
        shuffle_buffer: undecoded samples that wait in memory to be mixed, per lane.

    Raises:
        ValueError: if there are fewer shards than data ranks, or a location is named twice.
    """

    def __init__(
        self,
        locations: Sequence[str | Path],
        spec: ClipSpec,
        *,
        seed: int,
        shuffle: bool,
        batch_size: int,
        data_rank: int,
        data_size: int,
        shuffle_buffer: int = 64,
    ) -> None:
        super().__init__(locations, spec, seed=seed, shuffle=shuffle)
        if shuffle_buffer < 1:
            raise ValueError(f"shuffle_buffer={shuffle_buffer} must be at least 1 (1: samples leave as they come)")
        if len(set(map(str, locations))) < len(locations):
            raise ValueError(f"a shard set is named twice in {[str(location) for location in locations]}; name it once")
        self.data_rank, self.data_size = data_rank, data_size
        self.batch_size, self.shuffle_buffer = batch_size, shuffle_buffer
        self.lanes = num_lanes(len(self.shards), data_size) if shuffle else 1
        self._streams: dict[int, _Stream] = {}

    def candidates(self, position: int) -> Iterator[Candidate]:
        lane, offset = 0, position
        if self.shuffle:
            lane, offset = place_in_lane(position, self.data_size, self.batch_size, self.lanes)
        stream = self._streams.get(lane)
        if stream is None or stream.offset > offset:
            stream = self._streams[lane] = _Stream(self._stream(lane, offset), offset)
        return stream.ahead_of(offset)

    def epoch_plan(self, lane: int, epoch: int) -> tuple[list[int], list[int]]:
        """Shards that a lane reads in an epoch, and the order in which their samples, numbered as read, come out."""
        if not self.shuffle:
            return list(range(len(self.shards))), list(range(len(self.samples)))
        global_lane, lanes = self.data_rank * self.lanes + lane, self.data_size * self.lanes
        shards = lane_shards(len(self.shards), self.seed, epoch, global_lane, lanes)
        length = sum(len(self.shards[shard][1]) for shard in shards)
        generator = rng.generator(self.seed, "shuffle_buffer", step=epoch, sample=global_lane)
        return shards, buffer_shuffle(length, self.shuffle_buffer, generator)

    def read_shard(self, shard: int) -> Iterator[Candidate]:
        url, sample_ids = self.shards[shard]
        for sample_id, members in zip(sample_ids, self._read_shard(url, sample_ids), strict=True):
            yield Candidate(sample_id, 0, members)

    def _stream(self, lane: int, offset: int) -> Iterator[Candidate]:
        """A lane's samples from an offset on, without end."""
        for epoch in count():
            shards, order = self.epoch_plan(lane, epoch)
            if offset < len(order):
                yield from self._epoch(epoch, shards, order[offset:])
            offset = max(0, offset - len(order))

    def _epoch(self, epoch: int, shards: list[int], order: list[int]) -> Iterator[Candidate]:
        """Read shards in turn, keep what is still to come, and let it out in order."""
        waiting: dict[int, Candidate] = {}
        reading = self._read(epoch, shards, set(order))
        for number in order:
            while number not in waiting:
                arrival, candidate = next(reading)
                waiting[arrival] = candidate
            yield waiting.pop(number)

    def _read(self, epoch: int, shards: list[int], wanted: set[int]) -> Iterator[tuple[int, Candidate]]:
        first = 0
        for shard in shards:
            url, sample_ids = self.shards[shard]
            numbers = range(first, first + len(sample_ids))
            first = numbers.stop
            if wanted.isdisjoint(numbers):
                continue
            for number, sample_id, members in zip(numbers, sample_ids, self._read_shard(url, sample_ids), strict=True):
                if number in wanted:
                    yield number, Candidate(sample_id, epoch, members)

    def _read_shard(self, url: str, sample_ids: list[int]) -> Iterator[dict[str, bytes] | UnreadableSampleError]:
        """What a shard holds for each sample that the index lists; an error in the place of what is not there."""
        errors: list[Exception] = []

        def keep_error(error: Exception) -> bool:
            errors.append(error)
            return True

        places = {self.samples[sample_id].entry.key: place for place, sample_id in enumerate(sample_ids)}
        next_place = 0
        self.reading.begin(sample_ids[0])
        try:
            with webdataset.gopen(url) as stream:
                files = tar_file_expander([{"url": url, "stream": stream}], handler=keep_error)
                for found in group_by_keys(files, handler=keep_error):
                    place = places.get(found["__key__"], -1)
                    if place < next_place:
                        continue
                    for _ in range(next_place, place):
                        yield UnreachableSampleError(f"it is missing in {url}")
                    yield {name: content for name, content in found.items() if not name.startswith("__")}
                    next_place = place + 1
                    self.reading.begin(sample_ids[min(next_place, len(sample_ids) - 1)])
        except OSError as error:
            keep_error(error)
        reason = f": {errors[-1]}" if errors else ""
        for _ in range(next_place, len(sample_ids)):
            yield UnreachableSampleError(f"it is missing in {url}{reason}")


class _Stream:
    """A lane's iterator with its offset, and the samples that were looked at ahead of their turn."""

    def __init__(self, candidates: Iterator[Candidate], offset: int) -> None:
        self.offset = offset
        self._candidates = candidates
        self._ahead: deque[Candidate] = deque()

    def ahead_of(self, offset: int) -> Iterator[Candidate]:
        """Move on to `offset` (samples before it are gone), then yield from there without moving."""
        while self.offset < offset:
            if self._ahead:
                self._ahead.popleft()
            else:
                next(self._candidates)
            self.offset += 1
        for place in count():
            if place == len(self._ahead):
                self._ahead.append(next(self._candidates))
            yield self._ahead[place]
