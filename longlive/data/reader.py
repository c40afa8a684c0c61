"""What the two readers share: samples by position, and what happens when one is unreadable.

An unreadable sample is counted, logged once with its key, and replaced by the next readable one of the order (which
still comes at its own place too), so the others stay where they are, on every rank.

Sequence-parallel peers decode different windows of one sample. Whatever can be told without decoding (missing members,
checksums, the video's own table) is looked at as a whole, so they agree. What is left, a video that was broken already
when it was stored, may make one of them take another sample: `VideoBatch.sample_ids` then differ between peers.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from torch.utils.data import Dataset

from longlive.data.latents import EncodesClips, LatentSettings, unpack_sample
from longlive.data.sample import ClipSpec, UnreadableSampleError, VideoSample, decode_sample
from longlive.data.shard_index import ShardSample
from longlive.data.shards import load_index, locate
from longlive.data.workers import Reading

logger = logging.getLogger(__name__)

MAX_UNREADABLE_IN_A_ROW = 1000
"""After so many, the shards are at fault and not single samples."""


@dataclass(frozen=True)
class StoredSample:
    """A line of the index, and where its shard set is."""

    location: str | Path
    entry: ShardSample
    latents: LatentSettings | None = None
    """None: it is a video."""


@dataclass(frozen=True)
class Candidate:
    """A sample that was read, before it is decoded. `members` is what went wrong if reading failed."""

    sample_id: int
    epoch: int
    members: Mapping[str, bytes] | UnreadableSampleError


class UnreadableSamples:
    """Counts unreadable samples across the worker processes of a loader, and logs each of them once."""

    def __init__(self, num_samples: int) -> None:
        self._is_reported = torch.zeros(num_samples, dtype=torch.bool).share_memory_()

    def report(self, sample_id: int, sample: StoredSample, error: UnreadableSampleError) -> None:
        if not self._is_reported[sample_id]:
            self._is_reported[sample_id] = True
            logger.warning(
                "unreadable sample %s in %s, taking the next one: %s", sample.entry.key, sample.entry.shard, error
            )

    @property
    def count(self) -> int:
        """Distinct unreadable samples met so far."""
        return int(self._is_reported.sum())


class ShardReader(Dataset[VideoSample], ABC):
    """Samples by position (see `order.py`).

    Args:
        locations: shard sets, read as one; sample ids count through them in this order.
        spec: the clip that is wanted.
        seed: of the order and of the temporal crops.
        shuffle: whether the order is random. Without it, samples come as they are stored, always with the first
            epoch's crop, and positions beyond the first epoch (they fill up the last batches) have no valid frame.

    Raises:
        FileNotFoundError: if a local shard set or its index is missing.
        ValueError: if an index is broken or empty, its latents are of other clips than wanted, or some sets hold
            latents and some videos.
    """

    def __init__(self, locations: Sequence[str | Path], spec: ClipSpec, *, seed: int, shuffle: bool) -> None:
        self.spec, self.seed, self.shuffle = spec, seed, shuffle
        self.samples: list[StoredSample] = []
        self.latents: dict[str, LatentSettings] = {}
        """By location, of those that hold latents."""
        for location in locations:
            index, latents = load_index(location), None
            if index.latents is not None:
                latents = self.latents[str(location)] = LatentSettings.from_json(index.latents, str(location))
                latents.check_clip(spec, str(location))
            self.samples += [StoredSample(location, entry, latents) for entry in index.samples]
        if videos := {str(location) for location in locations} - self.latents.keys() if self.latents else set():
            raise ValueError(
                f"{', '.join(sorted(self.latents))} holds latents, {', '.join(sorted(videos))} videos; a batch cannot "
                "mix them: encode the videos too (stage=encode)"
            )
        shards: dict[str, list[int]] = {}
        for sample_id, sample in enumerate(self.samples):
            shards.setdefault(locate(sample.location, sample.entry.shard), []).append(sample_id)
        self.shards = list(shards.items())
        """Path or URL of every shard, and the samples in it."""
        self.unreadable = UnreadableSamples(len(self.samples))
        self.reading = Reading(num_workers=0)
        """What the loader's workers are at; the loader makes one for its number of them."""

    @abstractmethod
    def candidates(self, position: int) -> Iterator[Candidate]:
        """The sample at a position, then those after it in this reader's order, without end; read when asked for."""

    @abstractmethod
    def read_shard(self, shard: int) -> Iterator[Candidate]:
        """All samples of a shard, with all their members, one after the other as they are stored."""

    def __len__(self) -> int:
        """Samples of one epoch."""
        return len(self.samples)

    def __getitem__(self, position: int) -> VideoSample:
        """The sample at a position, or the next readable one.

        Raises:
            RuntimeError: if no sample of the set, or none of the next thousand, is readable.
        """
        tries = min(len(self.samples), MAX_UNREADABLE_IN_A_ROW)
        for candidate in islice(self.candidates(position), tries):
            self.reading.begin(candidate.sample_id)
            try:
                sample = self._decode(candidate)
            except UnreadableSampleError as error:
                self.unreadable.report(candidate.sample_id, self.samples[candidate.sample_id], error)
                last_error = error
            else:
                self.reading.end()
                is_padding = not self.shuffle and position >= len(self.samples)
                return replace(sample, num_valid_frames=0) if is_padding else sample
        raise RuntimeError(
            f"{tries} samples in a row are unreadable, so the shards are at fault and not single samples; "
            f"the last one: {last_error}"
        )

    def name(self, sample_id: int) -> str:
        """Key and shard of a sample, for messages."""
        entry = self.samples[sample_id].entry
        return f"{entry.key} in {entry.shard}"

    def check_encoders(self, module: EncodesClips) -> None:
        """Raise a `ValueError` if latents were made by another codec or text encoder than a module's."""
        fingerprints = module.encoder_fingerprints() if self.latents else {}
        for location, latents in self.latents.items():
            latents.check_encoders(fingerprints, location)

    def wanted(self, sample_id: int, epoch: int) -> Collection[str]:
        """The members of a sample that an epoch needs."""
        sample = self.samples[sample_id]
        if sample.latents is None:
            return sample.entry.members
        return [name for name in sample.latents.members(sample.entry.members, epoch) if name in sample.entry.members]

    def clip_epoch(self, epoch: int) -> int:
        """Whose clips an epoch reads: its own, or always the first one's."""
        return epoch if self.shuffle else 0

    def intact_members(self, candidate: Candidate) -> Mapping[str, bytes]:
        """What was read of a sample.

        Raises:
            UnreadableSampleError: if reading failed, or it is not what was written.
        """
        if isinstance(candidate.members, UnreadableSampleError):
            raise candidate.members
        stored = self.samples[candidate.sample_id].entry.members
        for suffix, content in candidate.members.items():
            if suffix in stored and not stored[suffix].holds(content):
                raise UnreadableSampleError(f"its {suffix} is not what was written: the checksum differs")
        return candidate.members

    def _decode(self, candidate: Candidate) -> VideoSample:
        members, sample_id = self.intact_members(candidate), candidate.sample_id
        epoch, latents = self.clip_epoch(candidate.epoch), self.samples[sample_id].latents
        if latents is not None:
            return unpack_sample(members, latents, self.spec, epoch=epoch, sample_id=sample_id)
        return decode_sample(members, self.spec, seed=self.seed, epoch=epoch, sample_id=sample_id)
