"""Video shards become latent shards: the clips that training would read, encoded once, by any number of processes.

Every shard becomes one shard of the same name in which the same keys have the same places; a shard is what a process
does at a time. Task k of n encodes the shards k, k + n, ...; any tasks may follow, also of another n, for a shard that
is there is not encoded again (`shard_set.py`).

Memory does not grow with time, and hardly with a clip's length: a clip is decoded and encoded in pieces, each going on
where the codec stopped at the one before. What there is of a whole clip are its file and its latents, 1/64 of its
pixels or less.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

from longlive.data.indexed import IndexedShards
from longlive.data.latents import (
    PROMPT_EMBEDS,
    LatentSettings,
    latents_name,
    pack_latents,
    pack_prompt_embeds,
    prompts_of,
)
from longlive.data.reader import Candidate, ShardReader
from longlive.data.sample import ClipSpec, StoredVideo, UnreachableSampleError, UnreadableSampleError
from longlive.data.shard_index import ShardIndex, ShardSample, check_unique, shard_name, write_tar
from longlive.data.shard_set import ShardSetWriter
from longlive.data.shards import is_local
from longlive.data.sources import UnreadableClipError
from longlive.data.streamed import StreamedShards
from longlive.typing import Float, Tensor, UInt8

logger = logging.getLogger(__name__)


@runtime_checkable
class ClipEncoder(Protocol):
    """Makes of a clip what training would make of it."""

    def latents(self, pieces: Iterable[UInt8[Tensor, "t 3 H W"]]) -> Float[Tensor, "f c h w"]:
        """On the CPU, as they are stored.

        Args:
            pieces: the raw frames of the clip: `1 + r k`, then `r k` and so on.
        """
        ...

    def prompt_embeds(self, prompts: Sequence[str]) -> Mapping[str, Float[Tensor, "token d"]]:
        """By prompt, on the CPU, without padding."""
        ...


@dataclass(frozen=True)
class VideoShards:
    """Shards of videos, as a source of latent shards.

    Attributes:
        path: directory or URL of a set, or several that training reads as one, in the same order: it names samples by
            their place in all of them, and draws clips by these names.
    """

    path: str | Path | Sequence[str | Path]

    def open(self, spec: ClipSpec, seed: int) -> ShardReader:
        """A reader of all samples.

        Raises:
            FileNotFoundError: if a set, its index or one of its shards is missing.
            ValueError: if a set is no set of videos, or two samples have one key.
        """
        locations = [self.path] if isinstance(self.path, str | Path) else list(self.path)
        reader: ShardReader
        if all(map(is_local, locations)):
            reader = IndexedShards(locations, spec, seed=seed, shuffle=False)
        else:
            reader = StreamedShards(locations, spec, seed=seed, shuffle=False, batch_size=1, data_rank=0, data_size=1)
        if reader.latents:
            raise ValueError(f"{', '.join(reader.latents)} holds latents already; stage=encode takes shards of videos")
        check_unique(sample.entry.key for sample in reader.samples)
        return reader


@dataclass(frozen=True)
class Share:
    """The part of the shards that one of `count` workers encodes.

    Raises:
        ValueError: if there is no such worker.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(
                f"task_index={self.index} must be one of 0 .. {self.count - 1}, for num_tasks={self.count}; number a "
                f"SLURM array from 0: --array=0-{max(self.count, 1) - 1}"
            )

    def of(self, num_shards: int) -> range:
        return range(self.index, num_shards, self.count)

    def split(self, count: int) -> list[Share]:
        """The same shards, divided among `count` workers."""
        return [Share(self.index + self.count * worker, self.count * count) for worker in range(count)]


class LatentShards:
    """A set of latent shards that is being written.

    Args:
        reader: of the videos; its seed draws the clips.
        directory: where the latents go.
        settings: what they are.

    Raises:
        ValueError: if settings and reader differ.
    """

    def __init__(self, reader: ShardReader, directory: str | Path, settings: LatentSettings) -> None:
        settings.check_clip(reader.spec, str(directory))
        assert settings.seed == reader.seed
        self.reader, self.settings = reader, settings
        plan = settings.to_json() | {"videos": _fingerprint(reader)}
        self.writer = ShardSetWriter(Path(directory), plan, len(reader.shards))

    @property
    def num_shards(self) -> int:
        return self.writer.num_shards

    @property
    def num_written(self) -> int:
        """Shards that are there, whoever encoded them."""
        return self.writer.num_written()

    def num_clips(self, shard: int) -> int:
        """Of a shard."""
        return len(self.reader.shards[shard][1])

    def begin(self, strict: bool = False) -> ShardIndex | None:
        """The index, if the set is complete. Else say what is written here; any number of processes may.

        Raises:
            ValueError: if the directory holds something else.
            UnreadableClipError: in strict mode, if the set is complete but for an unreadable clip.
        """
        index = self.writer.finished()
        if index is None:
            self.writer.begin()
        return index and index.checked(strict)

    def encode(
        self,
        encoder: ClipEncoder,
        share: Share | None = None,
        *,
        piece_frames: int = 16,
        strict: bool = False,
        advance: Callable[[int], object] = lambda num_clips: None,
    ) -> ShardIndex | None:
        """Encode a share of the shards, but for those that are there; where it is the last one, finish the set.

        Args:
            encoder: makes latents and embeddings as `settings` say.
            share: None: all shards.
            piece_frames: latent frames that are decoded and encoded at once; changes no value.
            strict: raise at the first unreadable clip, also one that an earlier run has left out. Otherwise it is
                logged, listed in the index, and its sample has no latents.
            advance: called with the number of clips that were done.

        Returns:
            The index; None: other shares are not done yet.

        Raises:
            ValueError: if the directory holds something else.
            UnreadableClipError: in strict mode; if no clip at all is readable, always.
            UnreachableSampleError: if a shard cannot be read, which may be mended.
        """
        if piece_frames < 1:
            raise ValueError(f"piece_frames={piece_frames} must be at least 1")
        index = self.begin(strict)
        if index is not None:
            return index

        def write(shard: int, wait: bool) -> bool:
            num_encoded = 0

            def make(path: Path) -> ShardIndex:
                def one_more() -> None:
                    nonlocal num_encoded
                    num_encoded += 1
                    advance(1)

                return self._write_shard(path, shard, encoder, piece_frames, strict, one_more)

            begin = time.monotonic()
            is_written = self.writer.write(shard, make, wait)
            if is_written:
                advance(self.num_clips(shard) - num_encoded)
            if num_encoded:
                logger.info("%s: %d clips in %.0f s", shard_name(shard), num_encoded, time.monotonic() - begin)
            return is_written

        shards = (share or Share()).of(self.num_shards)
        # What other processes are writing comes last: most of it will be done by then.
        for shard in [shard for shard in shards if not write(shard, wait=False)]:
            write(shard, wait=True)
        index = self.writer.finish(_check_readable, self.settings.to_json())
        return index and index.checked(strict)

    def _write_shard(
        self,
        path: Path,
        shard: int,
        encoder: ClipEncoder,
        piece_frames: int,
        strict: bool,
        one_more: Callable[[], None],
    ) -> ShardIndex:
        """One tar and its part of the index."""
        entries: list[ShardSample] = []
        skipped: list[tuple[str, str]] = []

        def samples() -> Iterator[tuple[str, Mapping[str, bytes]]]:
            for candidate in self.reader.read_shard(shard):
                entry = self.reader.samples[candidate.sample_id].entry
                try:
                    files = self._encode_sample(candidate, encoder, piece_frames)
                except UnreachableSampleError:
                    raise
                except UnreadableSampleError as error:
                    if strict:
                        raise UnreadableClipError(entry.key, str(error)) from error
                    logger.warning("clip %s is unreadable, and has no latents: %s", entry.key, error)
                    skipped.append((entry.key, str(error)))
                    files = {"json": _json_of(entry)}
                entries.append(entry)
                yield entry.key, files
                one_more()

        places = write_tar(path, samples())
        return ShardIndex(
            tuple(replace(entry, shard=shard_name(shard), members=places[entry.key]) for entry in entries),
            tuple(skipped),
        )

    def _encode_sample(self, candidate: Candidate, encoder: ClipEncoder, piece_frames: int) -> dict[str, bytes]:
        members = self.reader.intact_members(candidate)
        spec, settings = self.reader.spec, self.settings
        files = {}
        with StoredVideo(members, spec) as video:
            plans = [
                video.plan(seed=settings.seed, epoch=epoch, sample_id=candidate.sample_id)
                for epoch in range(settings.num_epochs)
            ]
            if all(plan == plans[0] for plan in plans):
                del plans[1:]
            pieces = raw_pieces(spec, piece_frames)
            for epoch, plan in enumerate(plans):
                latents = encoder.latents(video.read(plan, piece.start, piece.stop) for piece in pieces)
                files[latents_name(epoch)] = pack_latents(latents, plan)
        files[PROMPT_EMBEDS] = pack_prompt_embeds(encoder.prompt_embeds(prompts_of(plans)))
        return files | {"json": members["json"]}


def raw_pieces(spec: ClipSpec, piece_frames: int) -> list[range]:
    """The raw frames of a clip in pieces of so many latent frames."""
    ratio, pieces = spec.temporal_ratio, []
    for first in range(0, spec.num_frames, piece_frames):
        last = min(first + piece_frames, spec.num_frames) - 1
        pieces.append(range(1 + ratio * (first - 1) if first else 0, 1 + ratio * last))
    return pieces


def _fingerprint(reader: ShardReader) -> str:
    """Of the videos: their places, keys and checksums in the shards."""
    digest = hashlib.blake2b(digest_size=16)
    for sample in reader.samples:
        digest.update(json.dumps(asdict(sample.entry), sort_keys=True).encode())
    return digest.hexdigest()


def _json_of(entry: ShardSample) -> bytes:
    fields = {"fps": entry.fps, "num_raw_frames": entry.num_raw_frames, "shots": [asdict(shot) for shot in entry.shots]}
    return json.dumps(fields).encode()


def _check_readable(index: ShardIndex) -> None:
    if len(index.skipped) == len(index.samples):
        key, reason = index.skipped[0]
        raise UnreadableClipError(key, f"none of the {len(index.samples)} clips is readable; the first: {reason}")
