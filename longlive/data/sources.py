"""Where clips come from before they are shards: the clip that every source yields, and the folder source.

A source is a sequence: `len(source)` clips, `source[i]` the same clip every time. So an interrupted shard writer
continues where it stopped. A clip that cannot be read raises `UnreadableClipError`, which names it; the writer counts
and skips it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from longlive.data.shots import Shot, check_shots
from longlive.data.video import VIDEO_SUFFIXES, UnreadableVideoError, open_video
from longlive.typing import Tensor, UInt8


class UnreadableClipError(Exception):
    """A clip of a source that cannot become a sample."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"{key}: {reason}")
        self.key = key
        self.reason = reason


@dataclass(frozen=True)
class SourceClip:
    """One clip: raw frames to encode, or an encoded file that is passed through unchanged.

    Attributes:
        key: unique name; no dot (WebDataset splits names there).
        fps: raw frames per second.
        shots: what it shows, ascending.
        frames: uint8 `[t 3 H W]`, or None.
        video_bytes: an encoded video file, or None.
        suffix: container of `video_bytes`.
    """

    key: str
    fps: float | int
    shots: tuple[Shot, ...]
    frames: UInt8[Tensor, "t 3 H W"] | None = None
    video_bytes: bytes | None = None
    suffix: str = "mp4"

    def __post_init__(self) -> None:
        if (self.frames is None) == (self.video_bytes is None):
            raise ValueError(f"clip {self.key!r} needs either frames or video_bytes, exactly one of them")
        if not self.key or "." in self.key:
            raise ValueError(f"key={self.key!r} must be a non-empty name without dots; replace them, e.g. by '_'")
        if self.suffix not in VIDEO_SUFFIXES:
            raise ValueError(f"suffix={self.suffix!r} of clip {self.key!r} is not one of {', '.join(VIDEO_SUFFIXES)}")


@runtime_checkable
class ClipSource(Protocol):
    """A deterministic sequence of clips."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> SourceClip: ...


def shots_from_caption(caption: object, num_raw_frames: int) -> tuple[Shot, ...]:
    """Shots of `{"caption": text}` (one shot over the whole clip) or `{"shots": [{start, end, caption}, ...]}`.

    Raises:
        ValueError: if it holds neither or both, or the shots do not fit the clip.
    """
    if not isinstance(caption, Mapping) or ("caption" in caption) == ("shots" in caption):
        raise ValueError(
            f"a caption file holds either 'caption' or 'shots', exactly one of them; got {str(caption)[:200]}"
        )
    if "caption" in caption:
        shots: tuple[Shot, ...] = (Shot(0, num_raw_frames, str(caption["caption"])),)
    else:
        try:
            shots = tuple(Shot(int(shot["start"]), int(shot["end"]), str(shot["caption"])) for shot in caption["shots"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"every shot needs 'start', 'end' and 'caption'; got {caption['shots']!r}") from error
    check_shots(shots, num_raw_frames)
    return shots


class FolderSource:
    """Pairs of `video/<name>/<clip>.mp4` (or mkv, webm, mov) and `caption/<name>/<clip>.json` under one folder.

    Video files are passed through unchanged, in sorted order.

    Raises:
        FileNotFoundError: if there is no `video` folder.
        ValueError: if it holds no clip, or two clips share a key.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        videos = self.path / "video"
        if not videos.is_dir():
            raise FileNotFoundError(
                f"{videos} is no folder; expected video/<name>/*.mp4 and caption/<name>/*.json in {path}"
            )
        self.videos = sorted(
            (file for file in videos.glob("*/*") if file.suffix[1:].lower() in VIDEO_SUFFIXES),
            key=lambda file: file.parts,
        )
        if not self.videos:
            raise ValueError(f"{videos} holds no clip; expected <name>/*.{{{','.join(VIDEO_SUFFIXES)}}}")
        owners: dict[str, Path] = {}
        for video in self.videos:
            other = owners.setdefault(self._key(video), video)
            if other is not video:
                raise ValueError(f"{other} and {video} share the key {self._key(video)!r}; rename one of them")

    def _key(self, video: Path) -> str:
        return str(video.relative_to(self.path / "video").with_suffix("")).replace(".", "_")

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> SourceClip:
        """Read one clip.

        Raises:
            UnreadableClipError: if the caption is missing or broken, or the video cannot be opened.
        """
        video = self.videos[index]
        key = self._key(video)
        caption_file = self.path / "caption" / video.relative_to(self.path / "video").with_suffix(".json")
        try:
            caption = json.loads(caption_file.read_text(encoding="utf-8"))
            content = video.read_bytes()
            with open_video(content) as reader:
                fps, num_raw_frames = reader.fps, reader.num_raw_frames
            shots = shots_from_caption(caption, num_raw_frames)
        except (OSError, ValueError, TypeError, UnreadableVideoError) as error:
            raise UnreadableClipError(key, f"{type(error).__name__}: {error}") from error
        return SourceClip(key=key, fps=fps, shots=shots, video_bytes=content, suffix=video.suffix[1:].lower())
