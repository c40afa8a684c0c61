"""Reading video files: frame-accurate, only the frames asked for, uint8.

Opening a video walks its packets once (no decoding beyond the first frame) and notes when every frame is shown, which
frames are key frames, and how the picture is turned. Two decoders stand behind one interface:

- **PyAV** reads everything: it seeks by that index, decodes on one thread, and picks frames by their time stamp.
- **decord**, on request, reads what it reads right: H.264, MPEG-4 and VP9 with closed groups of pictures, upright.
  HEVC and open groups (a frame shown before the key frame that is stored ahead of it) come out wrong without a word,
  AV1 does not open; the index knows, and PyAV reads those.

PyAV is the default because it is faster, once it converts colours with one converter per video on one thread (its own
`to_ndarray` makes a new, multi-threaded one per frame: six times slower for small frames). CPU time for opening and
reading all of an H.264 video from bytes, PyAV against decord, pixels equal: 45 frames of 64x64 1.2 : 4.0 ms, 81 of
416x240 15 : 23 ms, 81 of 832x480 57 : 118 ms.
"""

from __future__ import annotations

import io
import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from types import TracebackType

import av
import numpy as np
import torch
from av.container import InputContainer
from av.error import FFmpegError
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from longlive.typing import Tensor, UInt8

try:
    import decord
except ImportError:  # no wheel for this platform
    decord = None

VIDEO_SUFFIXES = ("mp4", "mkv", "webm", "mov")
DECODERS = ("pyav", "decord")
DECORD_CODECS = ("h264", "mpeg4", "vp9")

Frames = UInt8[Tensor, "t 3 H W"]


class UnreadableVideoError(Exception):
    """A file that is no video, is truncated, or has frames that cannot be decoded."""


@dataclass(frozen=True)
class VideoIndex:
    """What one walk over the packets tells, in the order in which frames are shown.

    Attributes:
        codec: ffmpeg's name of it, e.g. `"h264"`.
        height, width: of the upright picture, in pixels.
        quarter_turns: counter-clockwise turns that make the stored picture upright.
        pixel_aspect: width of an upright pixel over its height.
        pts: presentation time stamps, ascending, in units of `time_base`.
        key_frames: which frames are key frames, ascending.
        time_base: seconds per unit.
        fps: average frame rate.
        is_plain: every key frame is a clean start, and the container hides no frame.
    """

    codec: str
    height: int
    width: int
    quarter_turns: int
    pixel_aspect: float
    pts: tuple[int, ...]
    key_frames: tuple[int, ...]
    time_base: Fraction
    fps: float
    is_plain: bool

    @property
    def timestamps(self) -> np.ndarray:
        """Seconds after the first frame at which each frame appears, float64 `[num_raw_frames]`."""
        pts = np.asarray(self.pts, dtype=np.int64)
        return (pts - pts[0]).astype(np.float64) * float(self.time_base)


class VideoReader(ABC):
    """Random access to the frames of one video. Frames are counted in the order in which they are shown."""

    def __init__(self, index: VideoIndex) -> None:
        self.index = index

    @property
    def num_raw_frames(self) -> int:
        return len(self.index.pts)

    @property
    def fps(self) -> float:
        return self.index.fps

    @property
    def height(self) -> int:
        return self.index.height

    @property
    def width(self) -> int:
        return self.index.width

    @property
    def codec(self) -> str:
        return self.index.codec

    def read(self, indices: Sequence[int]) -> Frames:
        """The frames at `indices`, in that order; an index may repeat.

        Raises:
            IndexError: if an index is outside the video.
            UnreadableVideoError: if a frame cannot be decoded.
        """
        if len(indices) == 0:
            return torch.empty(0, 3, self.height, self.width, dtype=torch.uint8)
        if min(indices) < 0 or max(indices) >= self.num_raw_frames:
            raise IndexError(f"raw frames {min(indices)} .. {max(indices)} of a video that has {self.num_raw_frames}")
        return self._read([int(index) for index in indices])

    @abstractmethod
    def _read(self, indices: list[int]) -> Frames: ...

    def close(self) -> None:
        """Free the decoder; reading again opens it again."""
        return

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class DecordReader(VideoReader):
    """decord on one thread, for the videos that `decord_is_right` for."""

    def __init__(self, index: VideoIndex, source: bytes | str) -> None:
        super().__init__(index)
        try:
            self._video = decord.VideoReader(io.BytesIO(source) if isinstance(source, bytes) else source, num_threads=1)
        except decord.DECORDError as error:
            raise UnreadableVideoError(f"decord cannot open it: {error}") from error
        if len(self._video) != self.num_raw_frames:
            raise UnreadableVideoError(
                f"decord finds {len(self._video)} frames, the packets hold {self.num_raw_frames}"
            )

    def _read(self, indices: list[int]) -> Frames:
        try:
            frames = self._video.get_batch(indices).asnumpy()
        except decord.DECORDError as error:
            raise UnreadableVideoError(f"decord cannot decode it: {error}") from error
        return torch.from_numpy(frames).permute(0, 3, 1, 2)

    def close(self) -> None:
        self._video = None


class PyAVReader(VideoReader):
    """Seeks to the key frame at or before a wanted frame, decodes, and picks frames by their time stamp.

    A seek may land late (containers index by decoding time, and leading pictures need the group before): if a wanted
    frame does not come out, the same is tried from one key frame earlier, at last from the start of the file.
    """

    def __init__(self, index: VideoIndex, source: bytes | str) -> None:
        super().__init__(index)
        self._source = source
        self._container: InputContainer | None = None
        self._to_rgb = VideoReformatter()
        self._group_of = [bisect_right(index.key_frames, frame) - 1 for frame in range(len(index.pts))]

    def _read(self, indices: list[int]) -> Frames:
        wanted = sorted(set(indices))
        place = {index: position for position, index in enumerate(wanted)}
        frames = torch.empty(len(wanted), self.height, self.width, 3, dtype=torch.uint8)
        for run in self._runs(wanted):
            self._decode_run(run, frames[place[run[0]] :])
        if wanted != indices:
            frames = frames[[place[index] for index in indices]]
        return frames.permute(0, 3, 1, 2)

    def _runs(self, indices: list[int]) -> list[list[int]]:
        """Split ascending indices where a seek saves decoding: a whole group of pictures between two holds none."""
        runs = [[indices[0]]]
        for previous, index in pairwise(indices):
            if self._group_of[index] - self._group_of[previous] > 1:
                runs.append([])
            runs[-1].append(index)
        return runs

    def _decode_run(self, run: list[int], frames: Tensor) -> None:
        for group in range(self._group_of[run[0]], -2, -1):
            if self._decode_from(group, run, frames):
                return
        raise UnreadableVideoError(f"not all of the raw frames {run[0]} .. {run[-1]} can be decoded")

    def _decode_from(self, group: int, run: list[int], frames: Tensor) -> bool:
        """Decode a run into `frames` from a key frame on (-1: the file's start); False if one does not come out."""
        place = {self.index.pts[index]: position for position, index in enumerate(run)}
        num_found = 0
        try:
            if group < 0 or self._container is None:
                self.close()
                self._container = open_container(self._source)
            stream = self._container.streams.video[0]
            if group >= 0:
                self._container.seek(self.index.pts[self.index.key_frames[group]], stream=stream)
            for frame in self._container.decode(stream):
                if frame.pts in place and not frame.is_corrupt:
                    pixels = self._to_rgb.reformat(frame, format="rgb24", threads=1).to_ndarray()
                    upright = np.rot90(pixels, self.index.quarter_turns)
                    frames[place.pop(frame.pts)] = torch.from_numpy(np.ascontiguousarray(upright))
                    num_found += 1
                if num_found == len(run):
                    return True
                if frame.pts is not None and frame.pts > self.index.pts[run[-1]]:
                    return False
        except (FFmpegError, EOFError):
            return False
        return False

    def close(self) -> None:
        if self._container is not None:
            self._container.close()
            self._container = None


def open_container(source: bytes | str) -> InputContainer:
    """PyAV's container of a file, given by its content or its path; its video decodes on one thread."""
    container = av.open(io.BytesIO(source) if isinstance(source, bytes) else source, mode="r")
    if not container.streams.video:
        container.close()
        raise UnreadableVideoError("it holds no video stream")
    container.streams.video[0].codec_context.thread_count = 1
    return container


def index_video(source: bytes | str) -> VideoIndex:
    """Walk the packets of a video once.

    Raises:
        UnreadableVideoError: if it is no video, holds no frame, or is truncated.
    """
    try:
        with open_container(source) as container:
            stream = container.streams.video[0]
            num_bytes = len(source) if isinstance(source, bytes) else Path(source).stat().st_size
            if any(entry.pos + entry.size > num_bytes for entry in stream.index_entries):
                raise UnreadableVideoError(f"it is truncated: its own table points beyond its {num_bytes} bytes")
            first_frame = None
            packets: list[tuple[int, bool]] = []
            is_clean = True  # every key frame clears the decoder, and no frame is hidden
            for packet in container.demux(stream):
                if first_frame is None:
                    first_frame = next(iter(packet.decode()), None)
                if packet.is_discard:
                    is_clean = False
                elif packet.size:
                    if packet.is_corrupt or packet.pts is None:
                        raise UnreadableVideoError(f"packet {len(packets)} is corrupt or has no time stamp")
                    packets.append((packet.pts, packet.is_keyframe))
                    is_clean &= not packet.is_keyframe or clears_decoder(packet)
            if first_frame is None or not packets:
                raise UnreadableVideoError("no frame of it can be decoded")
            return _index_of(stream, packets, first_frame, is_clean)
    except (FFmpegError, EOFError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise UnreadableVideoError(f"PyAV cannot read it: {error}") from error


def clears_decoder(packet: av.Packet) -> bool:
    """Whether nothing after a key frame can refer to anything before it.

    In H.264 only an IDR picture (NAL unit type 5) does that; x264's open groups begin with another kind of picture that
    containers mark as a key frame all the same (ITU-T H.264, 7.4.1.2.4). The other codecs that decord may read have but
    one kind.
    """
    context = packet.stream.codec_context
    if context.codec.canonical_name != "h264":
        return True
    content = bytes(packet)
    extradata = context.extradata or b""
    if not extradata or extradata[0] != 1:  # byte stream format: start codes
        return any(unit[:1] and unit[0] & 31 == 5 for unit in content.split(b"\0\0\1")[1:])
    length_size = (extradata[4] & 3) + 1  # as in mp4: each unit after its length (ISO/IEC 14496-15)
    start = 0
    while start + length_size < len(content):
        if content[start + length_size] & 31 == 5:
            return True
        start += length_size + int.from_bytes(content[start : start + length_size], "big")
    return False


def _index_of(
    stream: VideoStream, packets: list[tuple[int, bool]], first_frame: av.VideoFrame, is_clean: bool
) -> VideoIndex:
    pts = sorted(stamp for stamp, _ in packets)
    if len(set(pts)) != len(pts):
        raise UnreadableVideoError("two of its frames have the same time stamp")
    # A frame that is stored after a key frame but shown before it belongs to an open group of pictures.
    latest_key, has_open_group = -math.inf, False
    for stamp, is_key in packets:
        has_open_group |= stamp < latest_key
        latest_key = stamp if is_key else latest_key
    position = {stamp: frame for frame, stamp in enumerate(pts)}
    key_frames = sorted({0} | {position[stamp] for stamp, is_key in packets if is_key})
    time_base = stream.time_base or Fraction(1, 1)
    duration = float((pts[-1] - pts[0]) * time_base)
    quarter_turns = round(first_frame.rotation / 90) % 4
    height, width = first_frame.height, first_frame.width
    pixel_aspect = float(stream.sample_aspect_ratio or 1)
    if quarter_turns % 2:
        height, width, pixel_aspect = width, height, 1 / pixel_aspect
    return VideoIndex(
        codec=stream.codec_context.codec.canonical_name,
        height=height,
        width=width,
        quarter_turns=quarter_turns,
        pixel_aspect=pixel_aspect,
        pts=tuple(pts),
        key_frames=tuple(key_frames),
        time_base=time_base,
        fps=float(stream.average_rate or 0) or ((len(pts) - 1) / duration if duration else 1.0),
        is_plain=is_clean and not has_open_group and packets[0][1],
    )


def decord_is_right(index: VideoIndex) -> bool:
    """Whether decord reads a video frame by frame as it is."""
    return index.codec in DECORD_CODECS and index.is_plain and index.quarter_turns == 0


def check_decoder(decoder: str) -> None:
    """Raise a `ValueError` for a decoder that is unknown or not installed."""
    if decoder not in DECODERS:
        raise ValueError(f"decoder={decoder!r} is unknown; use one of {', '.join(DECODERS)}")
    if decoder == "decord" and decord is None:
        raise ValueError("decoder='decord' is not installed here (it has wheels for x86-64 only); use 'pyav'")


def open_video(source: bytes | str | Path, decoder: str = "pyav") -> VideoReader:
    """A reader for a video, given by its content or its path.

    Args:
        source: content or path.
        decoder: `"pyav"`; or `"decord"`: decord where it is right, PyAV elsewhere.

    Raises:
        FileNotFoundError: if the path does not exist.
        ValueError: if the decoder is unknown or not installed.
        UnreadableVideoError: if it is no readable video.
    """
    check_decoder(decoder)
    content = str(source) if isinstance(source, Path) else source
    index = index_video(content)
    if decoder == "decord" and decord_is_right(index):
        return DecordReader(index, content)
    return PyAVReader(index, content)
