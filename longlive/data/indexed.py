"""Random access to local shards: every sample by byte offset, in an order that is a pure function of (seed, epoch).

Rank and position exact: the global batch of a step is the same set of samples for any number of data ranks, and
neither workers nor a restart can change it.
"""

from collections.abc import Collection, Iterator, Sequence
from itertools import count
from pathlib import Path

from longlive.data.order import epoch_order
from longlive.data.reader import Candidate, ShardReader
from longlive.data.sample import ClipSpec, UnreachableSampleError, UnreadableSampleError


class IndexedShards(ShardReader):
    """Reads local directories of shards. Arguments and errors as `ShardReader`'s; a missing shard is an error here."""

    def __init__(self, locations: Sequence[str | Path], spec: ClipSpec, *, seed: int, shuffle: bool) -> None:
        super().__init__(locations, spec, seed=seed, shuffle=shuffle)
        paths = sorted({self._path(sample_id) for sample_id in range(len(self.samples))})
        missing = [str(path) for path in paths if not path.exists()]
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} of {len(paths)} shards are missing: {', '.join(missing[:5])}; copy them again"
            )
        self._orders: dict[int, Sequence[int]] = {}

    def _path(self, sample_id: int) -> Path:
        sample = self.samples[sample_id]
        return Path(sample.location) / sample.entry.shard

    def _order(self, epoch: int) -> Sequence[int]:
        if not self.shuffle:
            return range(len(self.samples))
        if epoch not in self._orders:
            self._orders = {epoch: epoch_order(len(self.samples), self.seed, epoch)}
        return self._orders[epoch]

    def candidates(self, position: int) -> Iterator[Candidate]:
        for candidate_position in count(position):
            epoch, place = divmod(candidate_position, len(self.samples))
            sample_id = self._order(epoch)[place]
            self.reading.begin(sample_id)
            wanted = self.wanted(sample_id, self.clip_epoch(epoch))
            yield Candidate(sample_id, epoch, self._read(sample_id, wanted))

    def read_shard(self, shard: int) -> Iterator[Candidate]:
        for sample_id in self.shards[shard][1]:
            yield Candidate(sample_id, 0, self._read(sample_id, self.samples[sample_id].entry.members))

    def _read(self, sample_id: int, wanted: Collection[str]) -> dict[str, bytes] | UnreadableSampleError:
        members = self.samples[sample_id].entry.members
        contents = {}
        try:
            with self._path(sample_id).open("rb") as file:
                for suffix in wanted:
                    file.seek(members[suffix].offset)
                    contents[suffix] = file.read(members[suffix].num_bytes)
        except OSError as error:
            return UnreachableSampleError(str(error))
        return contents
