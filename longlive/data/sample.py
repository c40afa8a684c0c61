"""One sample: the members of a tar become raw frames, prompts and shots of the size that training asks for.

Time first: the source's frames are resampled to the config's rate by their time stamps, a run of the clip's length is
chosen (by `rng` from the sample and the epoch; `shots.py` says how it goes round cuts), and only those frames are
decoded. A clip that is too short repeats its last frame, and says how many frames are real. Then space: the centre is
cut to the wanted aspect ratio and scaled.

Under sequence parallelism a rank wants a `ClipWindow` of the clip: it decodes and returns only those raw frames. The
choice of the clip, its prompts, shots and padding do not depend on the window, so all sequence ranks agree on them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from longlive import rng
from longlive.data.batch import VideoBatch
from longlive.data.joined import JoinedVideo
from longlive.data.shards import video_members
from longlive.data.shots import ChunkSizes, Shot, ShotRules, plan_clip, runs_of_shots
from longlive.data.sources import shots_from_caption
from longlive.data.video import UnreadableVideoError, check_decoder
from longlive.typing import Tensor, UInt8


class UnreadableSampleError(Exception):
    """A sample that cannot be used; the reader takes the next one of the order."""


@dataclass(frozen=True)
class ClipWindow:
    """The part of every clip that a sequence rank reads.

    Attributes:
        start, stop: raw frames `start .. stop - 1` of the clip are read.
        frame_offset: the first frame whose latent the rank owns. The window may begin before its raw frames: a halo.
    """

    start: int
    stop: int
    frame_offset: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise ValueError(
                f"the window of raw frames {self.start} .. {self.stop - 1} is empty or begins before the clip; "
                "use 0 <= start < stop"
            )
        if self.frame_offset < 0:
            raise ValueError(f"frame_offset={self.frame_offset} must be at least 0")


@runtime_checkable
class ReadsWindows(Protocol):
    """A module whose ranks read parts of a clip."""

    def clip_window(self, num_frames: int) -> ClipWindow | None:
        """What this rank reads of clips of `num_frames` frames; None: all of it."""
        ...


@dataclass(frozen=True)
class ClipSpec:
    """The clip that training asks for.

    Attributes:
        num_frames: latent frames; the clip has `1 + temporal_ratio (num_frames - 1)` raw frames.
        chunk_frames: frames per chunk.
        height, width: pixels.
        fps: raw frames per second.
        temporal_ratio: the codec's.
        decoder: as `open_video`'s.
        window: the part that is read here; None: the whole clip.
        shot_rules: what becomes of the shots of a video.
    """

    num_frames: int
    chunk_frames: int
    height: int
    width: int
    fps: float | int
    temporal_ratio: int = 4
    decoder: str = "pyav"
    window: ClipWindow | None = None
    shot_rules: ShotRules = field(default_factory=ShotRules)

    def __post_init__(self) -> None:
        check_decoder(self.decoder)
        for name in ("num_frames", "chunk_frames", "height", "width", "fps", "temporal_ratio"):
            value = getattr(self, name)
            if not value > 0:
                raise ValueError(f"{name}={value} must be positive")
        if self.num_frames % self.chunk_frames:
            lower = self.num_frames // self.chunk_frames * self.chunk_frames
            raise ValueError(
                f"num_frames={self.num_frames} is no multiple of chunk_frames={self.chunk_frames}; "
                f"use {f'{lower} or ' if lower else ''}{lower + self.chunk_frames}"
            )
        if self.window is not None and (
            self.window.stop > self.num_raw_frames or self.window.frame_offset >= self.num_frames
        ):
            raise ValueError(
                f"{self.window} reaches beyond the clip's {self.num_raw_frames} raw frames or {self.num_frames} "
                "frames; use a window inside the clip"
            )

    @property
    def num_raw_frames(self) -> int:
        """Of the whole clip."""
        return 1 + self.temporal_ratio * (self.num_frames - 1)


@dataclass(frozen=True)
class VideoSample:
    """One sample of a batch; the fields are `VideoBatch`'s, without the batch dim. Only `raw_frames` may be a part."""

    raw_frames: UInt8[Tensor, "t 3 H W"]
    prompts: tuple[str, ...]
    shot_index: tuple[int, ...]
    num_valid_frames: int
    sample_id: int
    frame_offset: int = 0


def collate(samples: Sequence[VideoSample]) -> VideoBatch:
    """Samples of one size and window to a batch."""
    (frame_offset,) = {sample.frame_offset for sample in samples}
    return VideoBatch(
        raw_frames=torch.stack([sample.raw_frames for sample in samples]),
        prompts=tuple(sample.prompts for sample in samples),
        shot_index=torch.tensor([sample.shot_index for sample in samples], dtype=torch.int64),
        num_valid_frames=torch.tensor([sample.num_valid_frames for sample in samples], dtype=torch.int64),
        sample_ids=torch.tensor([sample.sample_id for sample in samples], dtype=torch.int64),
        frame_offset=frame_offset,
    )


def resample(timestamps: np.ndarray, source_fps: float | int, fps: float | int) -> np.ndarray:
    """Which source frame each frame of a video at another rate shows: the nearest in time, the earlier one of two.

    Args:
        timestamps: seconds after the first frame, ascending, `[source frames]`; they need not be evenly spaced.
        source_fps: average rate at the end; the last frame is shown for `1 / source_fps` seconds.
        fps: wanted rate.

    Returns:
        Source frame indices, int64, one for every `k / fps` before the video's end.
    """
    tolerance = 1e-3  # seconds; containers round time stamps to milliseconds, which must not decide ties
    duration = float(timestamps[-1]) + 1 / source_fps
    times = np.arange(max(1, int((duration + tolerance) * fps))) / fps
    midpoints = (timestamps[:-1] + timestamps[1:]) / 2
    return np.searchsorted(midpoints + tolerance, times, side="left")


def decode_sample(
    members: Mapping[str, bytes], spec: ClipSpec, *, seed: int, epoch: int, sample_id: int
) -> VideoSample:
    """Decode one sample, or the window of it that `spec` wants.

    Args:
        members: content by suffix: a video, or several that are read as one, and `"json"`.
        spec: the clip that is wanted.
        seed, epoch, sample_id: name the choice of the clip in a longer video.

    Raises:
        UnreadableSampleError: if a member is missing or broken, the video does not decode, or the json describes
            another video.
    """
    videos = video_members(members)
    if not videos or "json" not in members:
        raise UnreadableSampleError(f"it needs a video and a json; it has {sorted(members)}")
    try:
        fields = json.loads(members["json"])
        num_raw_frames = int(fields["num_raw_frames"])
        shots: tuple[Shot, ...] = shots_from_caption({"shots": fields["shots"]}, num_raw_frames)
        with JoinedVideo([members[suffix] for suffix in videos], spec.decoder) as video:
            if video.num_raw_frames != num_raw_frames:
                raise UnreadableSampleError(
                    f"the video has {video.num_raw_frames} raw frames, its json says {num_raw_frames}"
                )
            at_rate = resample(video.timestamps, video.last_fps, spec.fps)
            plan = plan_clip(
                runs_of_shots(shots, at_rate.tolist()),
                spec.num_frames // spec.chunk_frames,
                ChunkSizes(spec.chunk_frames, spec.temporal_ratio),
                spec.shot_rules,
                margin=round(spec.shot_rules.forced_cut_margin * spec.fps),
                draw=lambda high: rng.integer(high, seed, "crop", step=epoch, sample=sample_id),
            )
            window = spec.window or ClipWindow(0, spec.num_raw_frames, frame_offset=0)
            wanted = [int(at_rate[position]) for position in plan.positions[window.start : window.stop]]
            frames = video.read(wanted, spec.height, spec.width)
    except (ValueError, KeyError, TypeError, UnreadableVideoError) as error:
        raise UnreadableSampleError(f"{type(error).__name__}: {error}") from error
    return VideoSample(
        raw_frames=frames,
        prompts=plan.prompts,
        shot_index=plan.shot_index,
        num_valid_frames=plan.num_valid_frames,
        sample_id=sample_id,
        frame_offset=window.frame_offset,
    )
