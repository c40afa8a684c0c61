"""Where clips come from before they are shards: the clip that every source yields, and the folder source.

A source is a sequence: `len(source)` clips, `source[i]` the same clip every time. So an interrupted shard writer
continues where it stopped. A clip that cannot be read raises `UnreadableClipError`, which names it; the writer counts
and skips it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Protocol, runtime_checkable

from longlive.data.joined import JoinedVideo
from longlive.data.prompts import DURATIONS_NAME, StoryPrompt, is_case, read_case
from longlive.data.shots import ChunkSizes, Shot, check_shots
from longlive.data.video import VIDEO_SUFFIXES, UnreadableVideoError
from longlive.typing import Tensor, UInt8


class UnreadableClipError(ValueError):
    """A clip of a source that cannot become a sample."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"{key}: {reason}")
        self.key = key
        self.reason = reason


@dataclass(frozen=True)
class SourceClip:
    """One clip: raw frames to encode, or encoded files that are passed through unchanged.

    Attributes:
        key: unique name; no dot (WebDataset splits names there).
        fps: raw frames per second.
        shots: what it shows, ascending; raw frames are counted through all files.
        frames: uint8 `[t 3 H W]`, or None.
        video_bytes: an encoded video file, several that are read as one, or None.
        suffix: container of `video_bytes`.
    """

    key: str
    fps: float | int
    shots: tuple[Shot, ...]
    frames: UInt8[Tensor, "t 3 H W"] | None = None
    video_bytes: bytes | tuple[bytes, ...] | None = None
    suffix: str = "mp4"

    def __post_init__(self) -> None:
        if (self.frames is None) == (self.video_bytes is None):
            raise ValueError(f"clip {self.key!r} needs either frames or video_bytes, exactly one of them")
        if not self.key or "." in self.key:
            raise ValueError(f"key={self.key!r} must be a non-empty name without dots; replace them, e.g. by '_'")
        if self.suffix not in VIDEO_SUFFIXES:
            raise ValueError(f"suffix={self.suffix!r} of clip {self.key!r} is not one of {', '.join(VIDEO_SUFFIXES)}")

    @property
    def files(self) -> tuple[bytes, ...]:
        """The encoded video files; none, if it holds frames."""
        if self.video_bytes is None:
            return ()
        return (self.video_bytes,) if isinstance(self.video_bytes, bytes) else self.video_bytes


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


def shots_from_story(story: StoryPrompt, num_raw_frames: int, sizes: ChunkSizes | None) -> tuple[Shot, ...]:
    """Shots of a video whose captions are a prompt folder's: of equal length, or of as many chunks as it says.

    Args:
        story: captions, and durations in chunks.
        num_raw_frames: of the video.
        sizes: of chunks; None: not known.

    Raises:
        ValueError: if the durations cannot be told without the size of chunks, or the video is too short for them.
    """
    count = len(story.captions)
    if story.durations is None:
        starts = [shot * num_raw_frames // count for shot in range(count)]
    elif sizes is None:
        raise ValueError(
            f"{DURATIONS_NAME} of {story.name!r} counts chunks, whose size is not known here; give source.chunk_frames"
        )
    else:
        starts = [sizes.start(sum(story.durations[:shot])) for shot in range(count)]
    if any(later <= earlier for earlier, later in pairwise([*starts, num_raw_frames])):
        raise ValueError(f"the shots of {story.name!r} begin at {starts}; the video has {num_raw_frames} raw frames")
    ends = [*starts[1:], num_raw_frames]
    return tuple(Shot(*shot) for shot in zip(starts, ends, story.captions, strict=True))


class FolderSource:
    """Pairs of `video/<name>/<clip>.mp4` (or mkv, webm, mov) and `caption/<name>/<clip>.json` under one folder.

    Video files are passed through unchanged, in sorted order. A clip of several shots may have a folder
    `caption/<name>/<clip>/` instead, with a caption per shot (`prompts.py` describes it).

    Args:
        path: the folder.
        stories: the clips of every `<name>`, in the order of their numbers, are the shots of one sample.
        chunk_frames: frames per chunk of the network that the durations in `shot_durations.txt` are meant for; None: no
            clip has such a file.
        temporal_ratio: raw frames per frame of its codec.

    Raises:
        FileNotFoundError: if there is no `video` folder.
        ValueError: if it holds no clip, or two clips share a key.
    """

    def __init__(
        self, path: str | Path, *, stories: bool = False, chunk_frames: int | None = None, temporal_ratio: int = 4
    ) -> None:
        self.path = Path(path)
        self.sizes = None if chunk_frames is None else ChunkSizes(chunk_frames, temporal_ratio)
        videos = self.path / "video"
        if not videos.is_dir():
            raise FileNotFoundError(
                f"{videos} is no folder; expected video/<name>/*.mp4 and caption/<name>/*.json in {path}"
            )
        files = [file for file in videos.glob("*/*") if file.suffix[1:].lower() in VIDEO_SUFFIXES]
        if not files:
            raise ValueError(f"{videos} holds no clip; expected <name>/*.{{{','.join(VIDEO_SUFFIXES)}}}")
        files.sort(key=_number_of if stories else lambda file: file.parts)
        groups: dict[str, list[Path]] = {}
        for file in files:
            group = groups.setdefault(self._key(file.parent if stories else file), [])
            if group and not (stories and group[0].parent == file.parent):
                raise ValueError(f"{group[0]} and {file} share the key {self._key(file)!r}; rename one of them")
            group.append(file)
        self.clips = list(groups.items())

    def _key(self, path: Path) -> str:
        name = path.relative_to(self.path / "video")
        return str(name.with_suffix("") if path.is_file() else name).replace(".", "_")

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> SourceClip:
        """Read one clip, or the clips of one story.

        Raises:
            UnreadableClipError: if a caption is missing or broken, a video cannot be opened, or the files of a story
                are of several containers.
        """
        key, files = self.clips[index]
        try:
            contents = tuple(file.read_bytes() for file in files)
            shots: list[Shot] = []
            num_raw_frames = 0
            with JoinedVideo(contents) as joined:
                fps = joined.videos[0].fps
                for file, video in zip(files, joined.videos, strict=True):
                    shots += [
                        Shot(shot.start + num_raw_frames, shot.end + num_raw_frames, shot.caption)
                        for shot in self._shots(file, video.num_raw_frames)
                    ]
                    num_raw_frames += video.num_raw_frames
            suffixes = sorted({file.suffix[1:].lower() for file in files})
            if len(suffixes) > 1:
                raise ValueError(f"its files are {' and '.join(suffixes)}; the files of a story need one container")
        except (OSError, ValueError, TypeError, UnreadableVideoError) as error:
            raise UnreadableClipError(key, f"{type(error).__name__}: {error}") from error
        return SourceClip(
            key=key,
            fps=fps,
            shots=tuple(shots),
            video_bytes=contents[0] if len(contents) == 1 else contents,
            suffix=suffixes[0],
        )

    def _shots(self, video: Path, num_raw_frames: int) -> tuple[Shot, ...]:
        caption = self.path / "caption" / video.relative_to(self.path / "video").with_suffix("")
        if is_case(caption):
            return shots_from_story(read_case(caption), num_raw_frames, self.sizes)
        content = json.loads(caption.with_name(f"{caption.name}.json").read_text(encoding="utf-8"))
        return shots_from_caption(content, num_raw_frames)


def _number_of(file: Path) -> tuple[Path, int, str]:
    """`2.mp4` before `10.mp4`; files without a number come first, by name."""
    return file.parent, int(file.stem) if file.stem.isdecimal() else -1, file.name
