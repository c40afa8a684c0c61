"""Sharded encoding: every sequence rank reads only the raw frames of its part of a clip, and encodes only its latents.

A codec is causal in time, so a part needs context from its left. Two ways to give it:

- *Exchange*, exact and without redundant work. The encoder runs layer by layer on the owned raw frames alone; what a
  causal convolution looks back to comes from the left neighbour. Wan's encoder takes all its left context through a
  feature cache, so a cache whose read receives and whose write sends is all that it takes (`NeighbourCache`). The ranks
  run as a wavefront, one layer apart. The price is memory: a window is encoded in one piece.
- *Halo*, for any codec. The window begins `halo` frames early, and their latents are dropped. The codec's receptive
  field is exact (27 frames for Wan2.2); `halo_errors` measures what less context costs. Encoding is done in groups of
  few raw frames, as ever.

Frame 0 is raw frame 0; frame f > 0 covers raw frames `r (f-1) + 1 .. r f` for the temporal ratio r. So the exchange's
window of frames `a .. b-1` is raw frames `r (a-1) + 1 .. r (b-1)`, and a halo's begins at a raw frame `r (s-1)`, which
stands alone as raw frame 0 of a video does: it gives one latent more to drop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
import torch.distributed as dist

from longlive.codecs.base import ResumableCodec, VideoCodec
from longlive.data.sample import ClipWindow
from longlive.typing import Latents, Tensor, Video

CODEC_CONTEXTS = ("auto", "exchange", "halo")

BFLOAT16_ROUNDING = 2.0**-8
"""Half the spacing of bfloat16 between 1 and 2, and so its largest rounding error there. Latents have about unit
variance, so an error below this is one that training in bfloat16 does not see."""


def exchange_window(frames: range, temporal_ratio: int) -> ClipWindow:
    """The raw frames of the owned frames, and no others.

    Raises:
        ValueError: if there are no frames.
    """
    _check_frames(frames)
    start = temporal_ratio * (frames.start - 1) + 1 if frames.start else 0
    return ClipWindow(start, temporal_ratio * (frames.stop - 1) + 1, frames.start)


def halo_window(frames: range, halo: int, temporal_ratio: int) -> ClipWindow:
    """The raw frames of the owned frames, of `halo` frames before them, and the one that stands for all before those.

    Raises:
        ValueError: if there are no frames, or the halo is negative.
    """
    _check_frames(frames)
    if halo < 0:
        raise ValueError(f"halo={halo} must be at least 0 frames")
    first = max(frames.start - halo, 0)
    start = temporal_ratio * (first - 1) if first else 0
    return ClipWindow(start, temporal_ratio * (frames.stop - 1) + 1, frames.start)


def clip_window(codec: VideoCodec, frames: range, context: str) -> ClipWindow:
    """The raw frames of a clip that `encode_window` needs with the same context.

    Raises:
        ValueError: if there are no frames, or the codec has no such context.
    """
    if codec_context(codec, context) == "halo":
        return halo_window(frames, codec.halo_frames, codec.temporal_ratio)
    return exchange_window(frames, codec.temporal_ratio)


def codec_context(codec: VideoCodec, wanted: str) -> str:
    """How a codec gets its left context: `exchange` or `halo`.

    Args:
        codec: only a `ResumableCodec` can exchange.
        wanted: `exchange`, `halo`, or `auto`: the exchange where the codec can.

    Raises:
        ValueError: if the codec cannot, or there is no such way.
    """
    if wanted not in CODEC_CONTEXTS:
        raise ValueError(f"codec_context={wanted!r} is unknown; use {', '.join(CODEC_CONTEXTS)}")
    can_exchange = isinstance(codec, ResumableCodec)
    if wanted == "exchange" and not can_exchange:
        raise ValueError(
            f"codec_context=exchange needs a codec that hands on a feature cache, as Wan's does; "
            f"{type(codec).__name__} has none: use codec_context=halo (its halo is {codec.halo_frames} frames)"
        )
    if wanted == "auto":
        return "exchange" if can_exchange else "halo"
    return wanted


def encode_window(
    codec: VideoCodec, video: Video, frames: range, context: str, group: dist.ProcessGroup | None
) -> Latents:
    """The latents of the owned frames, equal to the same part of the whole clip's encode.

    Args:
        codec: as on every rank.
        video: the raw frames of `clip_window(codec, frames, context)`.
        frames: owned frames of the clip.
        context: `exchange`, `halo`, or `auto` as in `codec_context`.
        group: with `exchange`, the ranks that share the clip, in the order of their frames; every one of them must
            call. Ranks that all own the clip from its start on exchange nothing. None: this process alone.

    Raises:
        ValueError: if the raw frames are not the window's, the windows do not adjoin, or a window's activations do not
            fit in memory. With `exchange` every rank of the group raises it.
    """
    context = codec_context(codec, context)
    if context == "exchange" and group is not None and group.size() > 1:
        assert isinstance(codec, ResumableCodec)
        return _exchange(codec, video, frames, group)
    window = clip_window(codec, frames, context)
    if context == "exchange" and window.start:
        raise ValueError(
            f"frames {frames.start} .. {frames.stop - 1} have a left neighbour, and this process is alone; give the "
            "group of the ranks that share the clip, or use context=halo"
        )
    if video.shape[1] != window.stop - window.start:
        raise ValueError(_wrong_raw_frames(video.shape[1], frames, window))
    return codec.encode(video)[:, -len(frames) :]


def _exchange(codec: ResumableCodec, video: Video, frames: range, group: dist.ProcessGroup) -> Latents:
    rank, ratio = group.rank(), codec.temporal_ratio
    parts = _gather_parts(codec, video, frames, group)
    check_parts(parts, ratio)
    next_start = parts[rank + 1].start if rank + 1 < len(parts) else 0
    if not frames.start and not next_start:
        return codec.encode(video)

    batch_size, _, _, height, width = video.shape

    def shapes(num_frames: int) -> Sequence[tuple[int, ...] | None]:
        return codec.feature_shapes(batch_size, height, width, num_frames)

    latents = []
    entries = codec.feature_cache()
    if not frames.start and len(frames) > 1:
        # Frame 0 stands alone in its group; only the rest of the window is one piece.
        latents.append(codec.encode_next(video[:, :1], entries))
        video = video[:, 1:]
    cache = NeighbourCache(
        entries,
        group,
        incoming=shapes(frames.start) if frames.start else None,
        outgoing=shapes(frames.stop) if next_start else None,
        dtype=codec.dtype,
        device=video.device,
    )
    latents.append(codec.encode_next(video, cache))
    cache.wait()
    return torch.cat(latents, dim=1)


class NeighbourCache:
    """The feature cache of one window: the first read of an entry receives it from the left neighbour, a write sends
    it to the right one.

    Both sides know the shapes beforehand, so there are no headers, and with nccl the CPU never waits for the GPU.

    Args:
        entries: the cache before the window, where this process knows it.
        group: its ranks hold adjacent windows.
        incoming: shapes of the left neighbour's entries, None if there is no left neighbour.
        outgoing: shapes that the right neighbour expects, None if there is no right neighbour.
        dtype, device: of what is received.
    """

    def __init__(
        self,
        entries: list[Any],
        group: dist.ProcessGroup,
        *,
        incoming: Sequence[tuple[int, ...] | None] | None,
        outgoing: Sequence[tuple[int, ...] | None] | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._entries = entries
        self._group = group
        self._incoming = dict(enumerate(incoming or ()))
        self._outgoing = outgoing
        self._options: dict[str, Any] = {"dtype": dtype, "device": device}
        self._sent: list[tuple[dist.Work, Tensor]] = []

    def __getitem__(self, index: int) -> Any:
        shape = self._incoming.pop(index, None)
        if shape is not None:
            entry = torch.empty(shape, **self._options)
            dist.recv(entry, group=self._group, group_src=self._group.rank() - 1)
            self._entries[index] = entry
        return self._entries[index]

    def __setitem__(self, index: int, value: Tensor) -> None:
        self._entries[index] = None  # nobody reads it here any more: a window is one piece
        if self._outgoing is not None:
            if tuple(value.shape) != self._outgoing[index]:
                raise ValueError(
                    f"entry {index} of the feature cache has shape {tuple(value.shape)}, the right neighbour expects "
                    f"{self._outgoing[index]}; this version of diffusers caches otherwise, use codec_context=halo"
                )
            value = value.contiguous()
            work = dist.isend(value, group=self._group, group_dst=self._group.rank() + 1)
            assert work is not None
            self._sent.append((work, value))

    def wait(self) -> None:
        """Until everything that was sent has left; its memory is kept until then."""
        for work, _ in self._sent:
            work.wait()
        self._sent.clear()


@dataclass(frozen=True)
class WindowPart:
    """What a rank is about to encode, in numbers, so that every rank can judge all of them.

    Attributes:
        start, stop: owned frames `start .. stop - 1`.
        num_raw_frames, batch_size, height, width: of the video that the rank was given.
        bytes_needed: peak of the activations.
        bytes_free: of the rank's memory, -1 if nobody knows.
    """

    start: int
    stop: int
    num_raw_frames: int
    batch_size: int
    height: int
    width: int
    bytes_needed: int = 0
    bytes_free: int = -1


def _gather_parts(
    codec: ResumableCodec, video: Video, frames: range, group: dist.ProcessGroup
) -> tuple[WindowPart, ...]:
    """Every rank's part. One small collective per encode: without it a rank that refuses would leave its neighbours
    waiting for ever."""
    batch_size, num_raw_frames, _, height, width = video.shape
    codec.check_size(height, width)
    window = exchange_window(frames, codec.temporal_ratio)
    free, needed = free_bytes(video.device), 0
    if free >= 0 and num_raw_frames == window.stop - window.start:
        # Frame 0 is encoded before the piece that the rest of its window is.
        piece = num_raw_frames if frames.start or len(frames) == 1 else num_raw_frames - 1
        needed = codec.encode_bytes(batch_size, piece, height, width)
    part = WindowPart(frames.start, frames.stop, num_raw_frames, batch_size, height, width, needed, free)
    mine = torch.tensor(astuple(part), dtype=torch.int64, device=video.device)
    gathered = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(gathered, mine, group=group)
    return tuple(WindowPart(*numbers) for numbers in torch.stack(gathered).tolist())


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on a GPU, those that PyTorch's allocator keeps in reserve included; -1 on other
    devices, where nobody knows."""
    if device.type != "cuda":
        return -1
    reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + reserved


def check_parts(parts: Sequence[WindowPart], temporal_ratio: int) -> None:
    """Raise the `ValueError` of an exchange, the same on every rank, before anything is sent.

    The parts must begin at frame 0 or where the left neighbour's end, hold the raw frames of their windows, have one
    batch size, height and width, and fit in memory.
    """
    for rank, part in enumerate(parts):
        frames = range(part.start, part.stop)
        where = f"sequence rank {rank}: "
        end = parts[rank - 1].stop if rank else 0
        if part.start not in (0, end):
            raise ValueError(
                f"{where}it owns frames {part.start} .. {part.stop - 1}, and its left neighbour's end at {end}; "
                f"adjacent ranks exchange adjacent parts: begin at {end}"
            )
        window = exchange_window(frames, temporal_ratio)
        if part.num_raw_frames != window.stop - window.start:
            raise ValueError(where + _wrong_raw_frames(part.num_raw_frames, frames, window))
        size, expected = astuple(part)[3:6], astuple(parts[0])[3:6]
        if size != expected:
            raise ValueError(
                f"{where}batch size, height and width are {size}, those of sequence rank 0 are {expected}; the ranks "
                "of a group read the same clips at the same size"
            )
        if 0 <= part.bytes_free < part.bytes_needed:
            raise ValueError(
                f"{where}encoding {part.num_raw_frames} raw frames of {part.height} x {part.width} (batch size "
                f"{part.batch_size}) in one piece needs {part.bytes_needed / 2**30:.2f} GiB of activations, and "
                f"{part.bytes_free / 2**30:.2f} GiB are free; use codec_context=halo (encodes in small groups), more "
                "sequence ranks, or smaller clips"
            )


def _check_frames(frames: range) -> None:
    if not 0 <= frames.start < frames.stop or frames.step != 1:
        raise ValueError(f"frames={frames} must be a run of at least one frame, from 0 on")


def _wrong_raw_frames(given: int, frames: range, window: ClipWindow) -> str:
    return (
        f"num_raw_frames={given}, but frames {frames.start} .. {frames.stop - 1} need the "
        f"{window.stop - window.start} raw frames {window.start} .. {window.stop - 1} of the clip; read the window "
        "that clip_window gives for the same context"
    )


def halo_errors(
    codec: VideoCodec, videos: Sequence[Video], starts: Sequence[int], advance: Callable[[], None] = lambda: None
) -> list[float]:
    """What a halo of 0, 1, 2 .. frames costs: the largest absolute difference to the latents of the whole encode.

    One encode from frame `s` on tells all of it: its latent of frame `s + H` is the first that a window with halo H
    owns, and those after it are the rest.

    Args:
        codec: in the dtype in which to compare.
        videos: whole clips of one length.
        starts: first frames `s` of the windows, 2 or later (a window from 1 on begins at raw frame 0: nothing is cut
            off), so that at least one frame is left.
        advance: called after each of the `len(videos) * (1 + len(starts))` encodes.

    Raises:
        ValueError: if there are no videos, or a start is out of range.
    """
    ratio = codec.temporal_ratio
    num_frames = min((1 + (video.shape[1] - 1) // ratio for video in videos), default=0)
    if not videos or not starts or min(starts) < 2 or max(starts) >= num_frames:
        raise ValueError(f"starts={list(starts)} must lie in 2 .. {num_frames - 1} for clips of {num_frames} frames")
    errors = [0.0] * (num_frames - max(starts))
    for video in videos:
        whole = codec.encode(video)
        advance()
        for start in starts:
            window = codec.encode(video[:, ratio * (start - 1) :])[:, 1:]
            difference = (window - whole[:, start:]).abs().amax((0, 2, 3, 4))
            # A halo of H frames owns frame `start + H` and all later ones.
            for halo in range(len(errors)):
                errors[halo] = max(errors[halo], difference[halo:].max().item())
            advance()
    return errors


def smallest_halo(errors: Sequence[float], bound: float = BFLOAT16_ROUNDING) -> int:
    """The smallest halo whose error is below the bound.

    Raises:
        ValueError: if none is.
    """
    for halo, error in enumerate(errors):
        if error < bound:
            return halo
    raise ValueError(
        f"no halo of 0 .. {len(errors) - 1} frames has an error below {bound:g}, the last has {errors[-1]:g}; measure "
        "longer clips"
    )
