"""What encoding costs a rank: raw frames read, memory, arithmetic, and the context that neighbours send each other."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from math import prod

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from longlive.codecs.base import ResumableCodec, VideoCodec, num_raw_frames
from longlive.codecs.base import num_frames as frames_of
from longlive.data.sample import ClipWindow
from longlive.parallel.codec_halo import clip_window


@dataclass(frozen=True)
class EncodeCost:
    """Of one micro-batch on one rank.

    Attributes:
        window: the raw frames that it reads of every clip; None: it reads latents.
        frames: frames whose latents it keeps.
        encoded_frames: frames that it encodes for that, context included.
        flops: of the encode.
        peak_bytes: of the tensors alive in it beyond weights; None where the codec cannot say.
        sent_bytes: of causal convolutions' inputs, to the right neighbour.
    """

    window: ClipWindow | None
    frames: int
    encoded_frames: int
    flops: int
    peak_bytes: int | None
    sent_bytes: int

    @property
    def raw_frames(self) -> int:
        return 0 if self.window is None else self.window.stop - self.window.start


@dataclass(frozen=True)
class FrameFlops:
    """FLOPs of encoding the first frame of a clip, and every later one."""

    first: int
    later: int


def count_frame_flops(codec: VideoCodec, height: int, width: int) -> FrameFlops:
    """Counted by encoding with tensors that have shapes and no contents. The codec's own weights may be on meta."""
    shapes_only = copy.deepcopy(codec)

    def count(num_frames: int) -> int:
        raw_frames = num_raw_frames(num_frames, codec.temporal_ratio)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            shapes_only.encode(torch.empty(1, raw_frames, 3, height, width))
        return int(counter.get_total_flops())

    with FakeTensorMode():
        for module in shapes_only.modules():
            for name, weight in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype), requires_grad=False))
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
        # The second frame has a full left context, and all later ones are like it.
        first, both = count(1), count(2)
    return FrameFlops(first, both - first)


def encode_cost(
    codec: VideoCodec,
    flops: FrameFlops,
    frames: range,
    context: str,
    *,
    batch_size: int,
    num_frames: int,
    height: int,
    width: int,
) -> EncodeCost:
    """The cost of encoding the frames that a rank owns, for the clips of a micro-batch.

    Args:
        flops: `count_frame_flops` at this size.
        frames: whose latents the rank keeps, of clips of `num_frames`.
        context: `exchange` or `halo`, as `codec_halo.codec_context` returns it.
        height, width: pixels.
    """
    ratio = codec.temporal_ratio
    window = clip_window(codec, frames, context)
    raw_frames = window.stop - window.start
    # A window that begins with the clip, or with a halo, begins with a lone raw frame.
    alone = context == "halo" or frames.start == 0
    encoded = frames_of(raw_frames, ratio) if alone else raw_frames // ratio
    clip_flops = flops.first + (encoded - 1) * flops.later if alone else encoded * flops.later
    sent, peak = 0, None
    if isinstance(codec, ResumableCodec):
        split = context == "exchange" and len(frames) < num_frames
        if split and frames.stop < num_frames:
            shapes = codec.feature_shapes(batch_size, height, width, frames.stop)
            sent = codec.dtype.itemsize * sum(prod(shape) for shape in shapes if shape is not None)
        groups = raw_frames // ratio * ratio
        in_one_piece = groups if split else min(groups, ratio)
        peak = codec.encode_bytes(batch_size, in_one_piece or 1, height, width)
    return EncodeCost(window, len(frames), encoded, batch_size * clip_flops, peak, sent)


def no_encode(frames: range) -> EncodeCost:
    """Of a rank that owns `frames` and reads their latents."""
    return EncodeCost(None, len(frames), 0, 0, 0, 0)
