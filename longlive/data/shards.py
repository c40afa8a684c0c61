"""Video shards: of `<key>.mp4` + `<key>.json`, or `<key>.0.mp4`, `<key>.1.mp4`, ... of several files that are read as
one (a story).

Shard `s` holds the clips `s n .. (s + 1) n - 1` of the source. Encoding is deterministic, so a set whose writing was
interrupted and continued (`shard_set.py`) equals an uninterrupted one byte for byte.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import webdataset
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from longlive.data.joined import JoinedVideo
from longlive.data.shard_index import INDEX_NAME, ShardIndex, ShardSample, check_unique, shard_name, write_tar
from longlive.data.shard_set import ShardSetWriter
from longlive.data.shots import Shot, check_shots
from longlive.data.sources import ClipSource, SourceClip, UnreadableClipError
from longlive.data.video import VIDEO_SUFFIXES, UnreadableVideoError
from longlive.data.video_writer import write_mp4

logger = logging.getLogger(__name__)


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
        strict: raise on the first unreadable clip, also one that an earlier run has skipped. Otherwise it is logged,
            listed in the index and skipped.
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
    plan = {"num_clips": num_clips, "clips_per_shard": clips_per_shard, "quality": quality} | {
        f"{which}_clip": _fingerprint(source, index) for which, index in (("first", 0), ("last", num_clips - 1))
    }
    directory = Path(directory)
    writer = ShardSetWriter(directory, plan, -(-num_clips // clips_per_shard))
    index = writer.finished()
    if index is not None:
        return index.checked(strict)
    writer.begin()

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not progress) as bar:
        task = bar.add_task(f"shards in {directory.name}", total=num_clips)
        for shard in range(writer.num_shards):
            clips = range(shard * clips_per_shard, min((shard + 1) * clips_per_shard, num_clips))

            def make(path: Path, shard: int = shard, clips: range = clips) -> ShardIndex:
                return _write_shard(path, source, clips, shard, quality, strict, lambda: bar.advance(task))

            writer.write(shard, make)
            bar.update(task, completed=clips.stop)

    def check(index: ShardIndex) -> None:
        if not index.samples:
            key, reason = index.skipped[0]
            raise UnreadableClipError(key, f"none of the {num_clips} clips is readable; the first: {reason}")
        check_unique(sample.key for sample in index.samples)

    index = writer.finish(check)
    assert index is not None  # all shards are written
    if index.skipped:
        logger.warning(
            "%d of %d clips were skipped; %s lists them", len(index.skipped), num_clips, directory / INDEX_NAME
        )
    return index.checked(strict)


def _write_shard(
    path: Path,
    source: ClipSource,
    clips: range,
    shard: int,
    quality: int,
    strict: bool,
    advance: Callable[[], object],
) -> ShardIndex:
    """One tar and its part of the index."""
    metadata: dict[str, dict[str, Any]] = {}
    skipped: list[tuple[str, str]] = []

    def samples() -> Iterator[tuple[str, Mapping[str, bytes]]]:
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
                check_unique([*metadata, clip.key])
                metadata[clip.key] = fields
                yield clip.key, {**videos, "json": json.dumps(fields).encode()}
            advance()

    places = write_tar(path, samples())
    return ShardIndex(
        tuple(
            ShardSample(
                key=key,
                shard=shard_name(shard),
                members=places[key],
                num_raw_frames=fields["num_raw_frames"],
                fps=fields["fps"],
                shots=tuple(Shot(**shot) for shot in fields["shots"]),
            )
            for key, fields in metadata.items()
        ),
        tuple(skipped),
    )


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
