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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from longlive import rng
from longlive.data.batch import VideoBatch
from longlive.data.joined import JoinedVideo
from longlive.data.shards import video_members
from longlive.data.shots import ChunkSizes, ClipPlan, Shot, ShotRules, plan_clip, runs_of_shots
from longlive.data.sources import shots_from_caption
from longlive.data.video import UnreadableVideoError, check_decoder
from longlive.typing import Float, Tensor, UInt8


class UnreadableSampleError(Exception):
    """A sample that cannot be used; the reader takes the next one of the order."""


class UnreachableSampleError(UnreadableSampleError):
    """A sample whose shard cannot be read there, now: another attempt may succeed."""


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

    @property
    def frames(self) -> range:
        """The frames of the clip whose latents are owned here: those of the window, without its halo."""
        if self.window is None:
            return range(self.num_frames)
        return range(self.window.frame_offset, 1 + (self.window.stop - 1) // self.temporal_ratio)


@dataclass(frozen=True)
class VideoSample:
    """One sample of a batch; the fields are `VideoBatch`'s, without the batch dim. Only raw frames or latents may be a
    part."""

    prompts: tuple[str, ...]
    shot_index: tuple[int, ...]
    num_valid_frames: int
    sample_id: int
    raw_frames: UInt8[Tensor, "t 3 H W"] | None = None
    latents: Float[Tensor, "f c h w"] | None = None
    prompt_embeds: Mapping[str, Float[Tensor, "token d"]] | None = None
    frame_offset: int = 0


def collate(samples: Sequence[VideoSample]) -> VideoBatch:
    """Samples of one kind, size and window to a batch."""
    (frame_offset,) = {sample.frame_offset for sample in samples}
    raw_frames = [sample.raw_frames for sample in samples if sample.raw_frames is not None]
    latents = [sample.latents for sample in samples if sample.latents is not None]
    embeds = [sample.prompt_embeds for sample in samples if sample.prompt_embeds is not None]
    return VideoBatch(
        raw_frames=torch.stack(raw_frames) if raw_frames else None,
        latents=torch.stack(latents) if latents else None,
        prompt_embeds={text: tokens for each in embeds for text, tokens in each.items()} if embeds else None,
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


class StoredVideo:
    """The video of a sample, open, and the clips that can be cut from it.

    Args:
        members: content by suffix: a video, or several that are read as one, and `"json"`.
        spec: the clips that are wanted.

    Raises:
        UnreadableSampleError: if a member is missing or broken, or the json describes another video. So do the methods,
            if no clip can be planned or the video does not decode.
    """

    def __init__(self, members: Mapping[str, bytes], spec: ClipSpec) -> None:
        videos = video_members(members)
        if not videos or "json" not in members:
            raise UnreadableSampleError(f"it needs a video and a json; it has {sorted(members)}")
        self.spec = spec
        with _as_unreadable(), ExitStack() as stack:
            fields = json.loads(members["json"])
            num_raw_frames = int(fields["num_raw_frames"])
            self.shots: tuple[Shot, ...] = shots_from_caption({"shots": fields["shots"]}, num_raw_frames)
            contents = [members[suffix] for suffix in videos]
            self._video = stack.enter_context(JoinedVideo(contents, spec.decoder))
            if self._video.num_raw_frames != num_raw_frames:
                raise UnreadableSampleError(
                    f"the video has {self._video.num_raw_frames} raw frames, its json says {num_raw_frames}"
                )
            self._at_rate = resample(self._video.timestamps, self._video.last_fps, spec.fps)
            self._stack = stack.pop_all()

    def __enter__(self) -> StoredVideo:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def plan(self, *, seed: int, epoch: int, sample_id: int) -> ClipPlan:
        """The clip that an epoch reads; its positions are of the video at the wanted rate."""
        spec = self.spec
        with _as_unreadable():
            return plan_clip(
                runs_of_shots(self.shots, self._at_rate.tolist()),
                spec.num_frames // spec.chunk_frames,
                ChunkSizes(spec.chunk_frames, spec.temporal_ratio),
                spec.shot_rules,
                margin=round(spec.shot_rules.forced_cut_margin * spec.fps),
                draw=lambda high: rng.integer(high, seed, "crop", step=epoch, sample=sample_id),
            )

    def read(self, plan: ClipPlan, start: int, stop: int) -> UInt8[Tensor, "t 3 h w"]:
        """Raw frames `start .. stop - 1` of a clip."""
        wanted = [int(self._at_rate[position]) for position in plan.positions[start:stop]]
        with _as_unreadable():
            return self._video.read(wanted, self.spec.height, self.spec.width)


@contextmanager
def _as_unreadable() -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, TypeError, UnreadableVideoError) as error:
        raise UnreadableSampleError(f"{type(error).__name__}: {error}") from error


def decode_sample(
    members: Mapping[str, bytes], spec: ClipSpec, *, seed: int, epoch: int, sample_id: int
) -> VideoSample:
    """Decode one sample, or the window of it that `spec` wants.

    Args:
        members: see `StoredVideo`.
        spec: the clip that is wanted.
        seed, epoch, sample_id: name the choice of the clip in a longer video.

    Raises:
        UnreadableSampleError: as `StoredVideo`.
    """
    with StoredVideo(members, spec) as video:
        plan = video.plan(seed=seed, epoch=epoch, sample_id=sample_id)
        window = spec.window or ClipWindow(0, spec.num_raw_frames, frame_offset=0)
        return VideoSample(
            raw_frames=video.read(plan, window.start, window.stop),
            prompts=plan.prompts,
            shot_index=plan.shot_index,
            num_valid_frames=plan.num_valid_frames,
            sample_id=sample_id,
            frame_offset=window.frame_offset,
        )
