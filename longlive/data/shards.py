"""WebDataset shards: `shard-000000.tar`, ... of `<key>.mp4` + `<key>.json`, and one index, `shards.json`. A sample of
several files that are read as one (a story) holds `<key>.0.mp4`, `<key>.1.mp4`, ...

The index says for every sample where its members lie in which shard, so a local reader needs no tar parser and a
remote one knows every shard's length without opening it. It also keeps their checksums. Damage then makes a sample
unreadable for whoever reads any part of it: ranks that decode different windows of a clip agree on skipping it.

Writing survives a kill at any moment. Shard `s` holds the clips `s n .. (s + 1) n - 1` of the source. It is written
under a hidden name; when it is complete, the tar is renamed, then its part of the index becomes visible (`.parts/`). A
restart skips the shards whose part exists and writes the others again; encoding is deterministic, so the result equals
an uninterrupted run byte for byte. `shards.json` comes last and the parts go. What the interrupted run was asked for
is kept too (`.parts/plan.json`): continuing with other settings, or another source, is an error and no mixture.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import shutil
import tarfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import webdataset
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from longlive.data.atomic import write_aside
from longlive.data.joined import JoinedVideo
from longlive.data.shots import Shot, check_shots
from longlive.data.sources import ClipSource, SourceClip, UnreadableClipError
from longlive.data.video import VIDEO_SUFFIXES, UnreadableVideoError
from longlive.data.video_writer import write_mp4

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
INDEX_NAME = "shards.json"
_PARTS_NAME = ".parts"


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
    """What `shards.json` holds: samples in the order of the shards, and the clips that were skipped."""

    samples: tuple[ShardSample, ...]
    skipped: tuple[tuple[str, str], ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "samples": [asdict(sample) for sample in self.samples],
            "skipped": [{"key": key, "reason": reason} for key, reason in self.skipped],
        }

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
        return cls(samples, skipped)


def write_shards(
    source: ClipSource,
    directory: str | Path,
    *,
    clips_per_shard: int = 64,
    quality: int = 18,
    strict: bool = False,
    progress: bool = True,
) -> ShardIndex:
    """Write a source as shards, or continue an interrupted run; a finished one is left as it is.

    Args:
        source: clips; `source[i]` must be the same clip in every run.
        directory: made if it does not exist.
        clips_per_shard: source clips per tar.
        quality: x264's constant rate factor for clips that are encoded here.
        strict: raise on the first unreadable clip. Otherwise it is logged, listed in the index and skipped.
        progress: show a progress bar.

    Returns:
        The index, as in `shards.json`.

    Raises:
        ValueError: if the source is empty, or `directory` holds shards of other settings or another source.
        UnreadableClipError: in strict mode; if no clip at all is readable, always.
    """
    if clips_per_shard < 1:
        raise ValueError(f"clips_per_shard={clips_per_shard} must be at least 1")
    num_clips = len(source)
    if num_clips == 0:
        raise ValueError("the source holds no clip; nothing to write")
    directory = Path(directory)
    parts = directory / _PARTS_NAME
    plan = {"num_clips": num_clips, "clips_per_shard": clips_per_shard, "quality": quality} | {
        f"{which}_clip": _fingerprint(source, index) for which, index in (("first", 0), ("last", num_clips - 1))
    }
    finished = directory / INDEX_NAME
    if finished.exists():
        content = json.loads(finished.read_text())
        _check_plan(content.get("plan"), plan, directory, "holds finished shards")
        shutil.rmtree(parts, ignore_errors=True)
        return ShardIndex.from_json(content, str(finished))
    parts.mkdir(parents=True, exist_ok=True)
    if (parts / "plan.json").exists():
        _check_plan(json.loads((parts / "plan.json").read_text()), plan, directory, "holds an interrupted run")
    else:
        _write_json(parts / "plan.json", plan)

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    samples: list[ShardSample] = []
    skipped: list[tuple[str, str]] = []
    with Progress(*columns, disable=not progress) as bar:
        task = bar.add_task(f"shards in {directory.name}", total=num_clips)
        for shard, first in enumerate(range(0, num_clips, clips_per_shard)):
            clips = range(first, min(first + clips_per_shard, num_clips))
            part = parts / f"{shard:06d}.json"
            if not part.exists():
                written = _write_shard(source, clips, directory, shard, quality, strict, lambda: bar.advance(task))
                _write_json(part, written.to_json())
            bar.update(task, completed=clips.stop)
            index = ShardIndex.from_json(json.loads(part.read_text()), str(part))
            samples += index.samples
            skipped += index.skipped
    if not samples:
        raise UnreadableClipError(
            skipped[0][0], f"none of the {num_clips} clips is readable; the first: {skipped[0][1]}"
        )
    index = ShardIndex(tuple(samples), tuple(skipped))
    _check_unique(index)
    if skipped:
        logger.warning("%d of %d clips were skipped; %s lists them", len(skipped), num_clips, finished)
    _write_json(finished, index.to_json() | {"plan": plan})
    shutil.rmtree(parts)
    return index


def _write_shard(
    source: ClipSource,
    clips: range,
    directory: Path,
    shard: int,
    quality: int,
    strict: bool,
    advance: Callable[[], object],
) -> ShardIndex:
    """One tar, complete or absent, and its part of the index."""
    name = f"shard-{shard:06d}.tar"
    metadata: dict[str, dict[str, Any]] = {}
    skipped: list[tuple[str, str]] = []
    with write_aside(directory / name) as temporary:
        # One ShardWriter per tar: it would start the next one by its own count, and name it its own way.
        with (
            temporary.open("wb") as file,
            webdataset.ShardWriter(
                "%d", maxcount=len(clips) + 1, maxsize=float("inf"), opener=lambda _: file, verbose=0, mtime=0
            ) as writer,
        ):
            for clip_index in clips:
                try:
                    clip = source[clip_index]
                    videos, fields = _encode_clip(clip, quality)
                except UnreadableClipError as error:
                    if strict:
                        raise
                    logger.warning("skipped an unreadable clip: %s", error)
                    skipped.append((error.key, error.reason))
                else:
                    if clip.key in metadata:
                        raise ValueError(f"two clips of the source share the key {clip.key!r}; keys must be unique")
                    metadata[clip.key] = fields
                    writer.write({"__key__": clip.key, **videos, "json": json.dumps(fields).encode()})
                advance()
        places = scan_tar(temporary)
    samples = tuple(
        ShardSample(
            key=key,
            shard=name,
            members=places[key],
            num_raw_frames=fields["num_raw_frames"],
            fps=fields["fps"],
            shots=tuple(Shot(**shot) for shot in fields["shots"]),
        )
        for key, fields in metadata.items()
    )
    return ShardIndex(samples, tuple(skipped))


def _encode_clip(clip: SourceClip, quality: int) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The video files of a clip by suffix, and the fields of its json."""
    try:
        if clip.frames is not None:
            file = io.BytesIO()
            write_mp4(file, clip.frames, clip.fps, quality=quality)
            videos, num_raw_frames = {clip.suffix: file.getvalue()}, len(clip.frames)
        else:
            names = [clip.suffix] if len(clip.files) == 1 else [f"{n}.{clip.suffix}" for n in range(len(clip.files))]
            videos = dict(zip(names, clip.files, strict=True))
            with JoinedVideo(clip.files) as video:
                num_raw_frames = video.num_raw_frames
        check_shots(clip.shots, num_raw_frames)
    except (UnreadableVideoError, ValueError) as error:
        raise UnreadableClipError(clip.key, str(error)) from error
    return videos, {
        "fps": float(clip.fps),
        "num_raw_frames": num_raw_frames,
        "shots": [asdict(shot) for shot in clip.shots],
    }


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


def load_index(location: str | Path) -> ShardIndex:
    """The index of a shard set.

    Args:
        location: a directory, the URL of one (`https://host/folder`), or a WebDataset command with `{}` where the
            file's name goes (`pipe:aws s3 cp s3://bucket/folder/{} -`).

    Raises:
        FileNotFoundError: if the directory or its index is missing.
        ValueError: if the index is broken, of another version, or lists no sample.
    """
    origin = locate(location, INDEX_NAME)
    if is_local(location):
        if not Path(location).is_dir():
            raise FileNotFoundError(f"{location} is no directory; `longlive shards` writes one")
        if not Path(origin).exists():
            raise FileNotFoundError(
                f"{location} holds no {INDEX_NAME}: `longlive shards` did not write it or was interrupted; "
                "run it, it continues where it stopped"
            )
        text = Path(origin).read_bytes()
    else:
        with webdataset.gopen(origin) as stream:
            text = stream.read()
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{origin} is no json ({error}); write the shards again") from error
    index = ShardIndex.from_json(content, origin)
    if not index.samples:
        raise ValueError(f"{origin} lists no sample: the shard set is empty")
    return index


def is_local(location: str | Path) -> bool:
    """Whether files can be opened by path and offset there."""
    return isinstance(location, Path) or not ("://" in location or location.startswith("pipe:"))


def locate(location: str | Path, name: str) -> str:
    """Path or URL of one file of a shard set."""
    text = str(location)
    return text.replace("{}", name) if "{}" in text else f"{text.rstrip('/')}/{name}"


def video_members(members: Sequence[str] | Mapping[str, Any]) -> list[str]:
    """Which members of a sample are its video: `["mp4"]`, or `["0.mp4", "1.mp4", ...]` of several that are one."""
    videos = [suffix.split(".") for suffix in members]
    videos = [parts for parts in videos if parts[-1] in VIDEO_SUFFIXES and (len(parts) == 1 or parts[0].isdecimal())]
    return [".".join(parts) for parts in sorted(videos, key=lambda parts: len(parts) > 1 and int(parts[0]))]


def _fingerprint(source: ClipSource, index: int) -> str:
    """A hash of one clip's content: notices that a run is continued with another source."""
    try:
        clip = source[index]
    except UnreadableClipError as error:
        return f"unreadable {error.key}"
    digest = hashlib.blake2b(repr((clip.key, clip.fps, clip.shots, clip.suffix)).encode(), digest_size=16)
    for content in (*clip.files, clip.frames.numpy().tobytes() if clip.frames is not None else b""):
        digest.update(content)
    return digest.hexdigest()


def _check_plan(found: Mapping[str, Any] | None, asked: Mapping[str, Any], directory: Path, what: str) -> None:
    if found is None:
        raise ValueError(f"{directory} {what} that this writer did not make; choose another directory")
    different = [
        f"{name}: {found.get(name)} there, {value} now" for name, value in asked.items() if found.get(name) != value
    ]
    if different:
        raise ValueError(
            f"{directory} {what} of other settings or another source ({'; '.join(different)}); "
            "use the same ones to continue it, or choose another directory"
        )


def _check_unique(index: ShardIndex) -> None:
    seen: set[str] = set()
    for sample in index.samples:
        if sample.key in seen:
            raise ValueError(f"two clips of the source share the key {sample.key!r}; keys must be unique")
        seen.add(sample.key)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with write_aside(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1))
