"""What a shard set is: `shard-000000.tar`, ... of samples, and one index, `shards.json`.

The index says for every sample where its members lie in which shard, so a local reader needs no tar parser and a
remote one knows every shard's length without opening it. It also keeps their checksums. Damage then makes a sample
unreadable for whoever reads any part of it: ranks that read different windows of a clip agree on skipping it.
"""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import webdataset

from longlive.data.shots import Shot
from longlive.data.sources import UnreadableClipError

FORMAT_VERSION = 1
INDEX_NAME = "shards.json"


@dataclass(frozen=True, slots=True)
class Member:
    """Where the content of one file lies in its tar, and its CRC-32 (None in sets written before there was one)."""

    offset: int
    num_bytes: int
    crc32: int | None = None

    def holds(self, content: bytes) -> bool:
        """Whether content is what was written."""
        return len(content) == self.num_bytes and self.crc32 in (None, zlib.crc32(content))


@dataclass(frozen=True, slots=True)
class ShardSample:
    """One line of the index. `members` maps a suffix (`"mp4"`, `"json"`) to its place in the tar."""

    key: str
    shard: str
    members: Mapping[str, Member]
    num_raw_frames: int
    fps: float | int
    shots: tuple[Shot, ...]


@dataclass(frozen=True)
class ShardIndex:
    """What `shards.json` holds.

    Attributes:
        samples: in the order of the shards.
        skipped: clips that could not be read, and why.
        latents: None: the samples hold videos; else latents, and these fields say which (`latents.py`).
    """

    samples: tuple[ShardSample, ...]
    skipped: tuple[tuple[str, str], ...] = ()
    latents: Mapping[str, Any] | None = None

    def checked(self, strict: bool) -> ShardIndex:
        """Itself; in strict mode an `UnreadableClipError`, if a clip was skipped, by whatever run."""
        if strict and self.skipped:
            raise UnreadableClipError(*self.skipped[0])
        return self

    def to_json(self) -> dict[str, Any]:
        content = {
            "format_version": FORMAT_VERSION,
            "samples": [asdict(sample) for sample in self.samples],
            "skipped": [{"key": key, "reason": reason} for key, reason in self.skipped],
        }
        return content if self.latents is None else content | {"latents": dict(self.latents)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any], origin: str) -> ShardIndex:
        """Parse; `origin` names the file in errors.

        Raises:
            ValueError: if the format version is not ours, or a field is missing.
        """
        version = content.get("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{origin} has format_version={version}, this release reads {FORMAT_VERSION}; write the shards again"
            )
        try:
            samples = tuple(
                ShardSample(
                    key=sample["key"],
                    shard=sample["shard"],
                    members={suffix: Member(**member) for suffix, member in sample["members"].items()},
                    num_raw_frames=sample["num_raw_frames"],
                    fps=sample["fps"],
                    shots=tuple(Shot(**shot) for shot in sample["shots"]),
                )
                for sample in content["samples"]
            )
            skipped = tuple((clip["key"], clip["reason"]) for clip in content["skipped"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"{origin} is no index of shards: {error!r}; write the shards again") from error
        return cls(samples, skipped, content.get("latents"))


def shard_name(shard: int) -> str:
    """File name of shard number `shard`."""
    return f"shard-{shard:06d}.tar"


def write_tar(path: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> dict[str, dict[str, Member]]:
    """Write samples, each a key and its files by suffix, as they come.

    Returns:
        Where every member lies, as `scan_tar`.
    """
    with path.open("wb") as file, webdataset.TarWriter(file, encoder=False, mtime=0) as writer:
        for key, files in samples:
            writer.write({"__key__": key, **files})
    return scan_tar(path)


def scan_tar(path: Path) -> dict[str, dict[str, Member]]:
    """Where every member lies, and its checksum: key -> suffix -> place."""
    places: dict[str, dict[str, Member]] = {}
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            key, _, suffix = member.name.partition(".")
            file = tar.extractfile(member)
            assert file is not None  # a shard holds plain files
            places.setdefault(key, {})[suffix] = Member(member.offset_data, member.size, zlib.crc32(file.read()))
    return places


def check_unique(keys: Iterable[str]) -> None:
    """Raise a `ValueError` if a key comes twice."""
    seen: set[str] = set()
    for key in keys:
        if key in seen:
            raise ValueError(f"two clips of the source share the key {key!r}; keys must be unique")
        seen.add(key)
