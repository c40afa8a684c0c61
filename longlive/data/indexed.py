"""Random access to local shards: every sample by byte offset, in an order that is a pure function of (seed, epoch).

All epochs form one endless order: position `p` is sample `p mod n` of the permutation of epoch `p div n`. Position is all there is
to know: data rank r of R reads the positions r, r + R, r + 2R, ..., so the global batch of a step is the same set of samples for
any number of ranks, and neither workers nor a restart can change it.

An unreadable sample is replaced by the one at the next position (which still comes at its own place too), so the others stay
where they are.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from torch.utils.data import Dataset, Sampler

from longlive import rng
from longlive.data.sample import (
    MAX_UNREADABLE_IN_A_ROW,
    ClipSpec,
    UnreadableSampleError,
    UnreadableSamples,
    VideoSample,
    decode_sample,
)
from longlive.data.shards import ShardSample, load_index


class IndexedShards(Dataset[VideoSample]):
    """Samples by position in the endless order.

    Args:
        directories: shard sets; sample ids count through them in this order.
        spec: the clip that is wanted.
        seed: of the order and of the windows.
        shuffle: whether an epoch is a permutation. Without it, samples come as they are stored, always with the first epoch's
            window, and repetitions beyond the first epoch (they only fill up a batch) have no valid frame.

    Raises:
        FileNotFoundError: if a directory, its index, or one of its shards is missing.
        ValueError: if an index is broken or empty.
    """

    def __init__(self, directories: Sequence[str | Path], spec: ClipSpec, *, seed: int, shuffle: bool) -> None:
        self.spec, self.seed, self.shuffle = spec, seed, shuffle
        self.samples: list[tuple[Path, ShardSample]] = []
        for directory in directories:
            samples = load_index(directory).samples
            missing = sorted(name for name in {sample.shard for sample in samples} if not (Path(directory) / name).exists())
            if missing:
                raise FileNotFoundError(f"{directory} lacks {len(missing)} of its shards: {', '.join(missing[:5])}; copy them again")
            self.samples += [(Path(directory) / sample.shard, sample) for sample in samples]
        self.unreadable = UnreadableSamples(len(self.samples))
        self._order = lru_cache(maxsize=2)(self._permutation)

    @property
    def num_samples(self) -> int:
        """Samples of one epoch."""
        return len(self.samples)

    def __len__(self) -> int:
        return len(self.samples)

    def _permutation(self, epoch: int) -> Sequence[int]:
        if not self.shuffle:
            return range(len(self.samples))
        return rng.permutation(len(self.samples), self.seed, "data_order", step=epoch).numpy()

    def sample_id(self, position: int) -> int:
        """Which sample stands at a position of the endless order."""
        epoch, place = divmod(position, len(self.samples))
        return int(self._order(epoch)[place])

    def __getitem__(self, position: int) -> VideoSample:
        """The sample at a position, or the next readable one.

        Raises:
            RuntimeError: if no sample of the set, or none of the next thousand, is readable.
        """
        tries = min(len(self.samples), MAX_UNREADABLE_IN_A_ROW)
        for candidate in range(position, position + tries):
            sample_id = self.sample_id(candidate)
            epoch = position // len(self.samples) if self.shuffle else 0
            try:
                sample = decode_sample(
                    self._read_members(sample_id), self.spec, seed=self.seed, epoch=epoch, sample_id=sample_id
                )
            except UnreadableSampleError as error:
                self.unreadable.report(sample_id, self.samples[sample_id][1].key, error)
                last_error = error
            else:
                is_filler = not self.shuffle and position >= len(self.samples)
                return replace(sample, num_valid_frames=0) if is_filler else sample
        path, entry = self.samples[sample_id]
        raise RuntimeError(f"{tries} samples in a row are unreadable, the last one {entry.key} in {path}: {last_error}")

    def _read_members(self, sample_id: int) -> dict[str, bytes]:
        path, sample = self.samples[sample_id]
        contents = {}
        try:
            with path.open("rb") as file:
                for suffix, member in sample.members.items():
                    file.seek(member.offset)
                    contents[suffix] = file.read(member.num_bytes)
        except OSError as error:
            raise UnreadableSampleError(str(error)) from error
        return contents


class PositionBatches(Sampler[list[int]]):
    """Batches of one data rank: positions `rank, rank + size, ...` of the endless order, from `start()` on.

    Args:
        start: asked at the beginning of every iteration: samples consumed so far, over all ranks.
        batch_size: samples per batch of this rank.
        data_rank, data_size: which share of the order is read here.
        stop: end before this position (rounded up to whole global batches); None: never.
    """

    def __init__(
        self, start: Callable[[], int], batch_size: int, data_rank: int, data_size: int, stop: int | None = None
    ) -> None:
        self.start, self.batch_size, self.data_rank, self.data_size, self.stop = start, batch_size, data_rank, data_size, stop

    def __iter__(self) -> Iterator[list[int]]:
        first = self.start()
        global_batch = self.batch_size * self.data_size
        while self.stop is None or first < self.stop:
            yield list(range(first + self.data_rank, first + global_batch, self.data_size))
            first += global_batch


class FinitePositionBatches(PositionBatches):
    """The same for a known end: it has a length."""

    def __init__(self, stop: int, batch_size: int, data_rank: int, data_size: int) -> None:
        super().__init__(lambda: 0, batch_size, data_rank, data_size, stop)
        self._length = -(-stop // (batch_size * data_size))

    def __len__(self) -> int:
        return self._length
