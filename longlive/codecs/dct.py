"""The toy world's codec: a truncated discrete cosine transform, causal in time. Analytic, exact in its own span, no
weights.

Raw frames are grouped as every codec of this library does (the first alone, then fours). RGB is rotated to luma and
two chroma axes by an orthonormal matrix; each group is transformed over its 4 raw frames and over blocks of 8 x 8
pixels by orthonormal DCT-II matrices; the 16 coefficients that hold most of the toy world's energy are kept, shifted
and scaled per channel to zero mean and unit variance. Decoding is the transpose. The lone first frame is treated as
four equal ones, so it has the same channels at the same scale; a group never looks at another, so encoding and
decoding need no context at all (halo 0).

Why 16: a token is 2 x 2 latent pixels, and a velocity model passes a token's whole noise through its residual stream:
64 values fit a width of 128, three times as many do not. Why per channel: with one global scale the high frequencies
stay far below the noise and are never learned.
"""

import math

import torch
import torch.nn.functional as F

from longlive.codecs.base import StreamDecoder, StreamEncoder, VideoCodec, check_next, hash_of_weights
from longlive.typing import Float, Latents, Tensor, Video

GROUP = 4
BLOCK = 8

CHANNELS: tuple[tuple[int, int, int, int], ...] = (
    # (colour axis, temporal, vertical, horizontal frequency): the 16 of greatest energy over the toy world
    (0, 0, 0, 0),
    (0, 0, 0, 1),
    (0, 0, 1, 0),
    (0, 0, 1, 1),
    (0, 0, 0, 2),
    (0, 0, 2, 0),
    (0, 1, 0, 0),
    (0, 1, 0, 1),
    (0, 1, 1, 0),
    (1, 0, 0, 0),
    (1, 0, 0, 1),
    (1, 0, 1, 0),
    (1, 1, 0, 0),
    (2, 0, 0, 0),
    (2, 0, 0, 1),
    (2, 0, 1, 0),
)
MEAN = (*(0.7479, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0), *(-0.1578, 0.0, 0.0, 0.0), *(-0.1261, 0.0, 0.0))
STD = (
    *(17.5435, 1.5565, 1.6029, 0.6659, 0.4638, 0.4749, 0.8944, 0.5394, 0.5143),
    *(3.3648, 1.0623, 1.0978, 0.6039),
    *(2.5596, 0.8192, 0.8354),
)
"""Measured over 2000 clips of the toy world; means that are zero by its symmetry are written as zero."""


def dct_matrix(size: int) -> Float[Tensor, "k i"]:
    """Orthonormal DCT-II: row k is the cosine of frequency k. float64."""
    frequency = torch.arange(size, dtype=torch.float64)[:, None]
    position = torch.arange(size, dtype=torch.float64)[None]
    matrix = torch.cos(math.pi * (2 * position + 1) * frequency / (2 * size)) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


def colour_matrix() -> Float[Tensor, "3 3"]:
    """Orthonormal rows: luma, red against blue, green against both. float64."""
    rows = torch.tensor([[1, 1, 1], [1, 0, -1], [-1, 2, -1]], dtype=torch.float64)
    return rows / rows.norm(dim=1, keepdim=True)


class DCTCodec(VideoCodec):
    """See the module docstring. Latents are `[b f 16 H/8 W/8]`."""

    temporal_ratio = GROUP
    spatial_ratio = BLOCK
    latent_channels = len(CHANNELS)
    halo_frames = 0

    filters: Tensor
    mixing: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        colour, temporal, spatial = colour_matrix(), dct_matrix(GROUP), dct_matrix(BLOCK)
        # Colour and space are one strided convolution per raw frame, time is a small mixing of its outputs.
        planes = list(dict.fromkeys((a, u, v) for a, _, u, v in CHANNELS))
        filters = torch.stack([torch.einsum("a,y,x->ayx", colour[a], spatial[u], spatial[v]) for a, u, v in planes])
        mixing = torch.zeros(len(CHANNELS), len(planes), GROUP, dtype=torch.float64)
        for channel, (a, k, u, v) in enumerate(CHANNELS):
            mixing[channel, planes.index((a, u, v))] = temporal[k]
        self.register_buffer("filters", filters.float(), persistent=False)
        self.register_buffer("mixing", mixing.float(), persistent=False)
        self.register_buffer("mean", torch.tensor(MEAN).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(-1, 1, 1), persistent=False)

    def encode(self, video: Video) -> Latents:
        self.check_video(video)
        return torch.cat([self.stream_encoder().push(clip) for clip in video.split(1)])

    def stream_encoder(self) -> StreamEncoder:
        return _DCTStreamEncoder(self)

    @property
    def fingerprint(self) -> str:
        return f"dct-{hash_of_weights('', self.named_buffers())}"

    def _encode_group(self, group: Video) -> Latents:
        """The frame of 4 raw frames."""
        # In memory of their own: matrix products round by how their operands are aligned.
        planes = F.conv2d(group.flatten(0, 1).clone(), self.filters.to(group.dtype), stride=BLOCK)
        planes = planes.unflatten(0, (len(group), GROUP))
        latents = torch.einsum("btphw,cpt->bchw", planes, self.mixing.to(group.dtype))[:, None]
        return (latents - self.mean.to(group.dtype)) / self.std.to(group.dtype)

    def decode(self, latents: Latents) -> Video:
        return self._decode_groups(latents)[:, GROUP - 1 :].clamp(-1, 1)

    def stream_decoder(self) -> StreamDecoder:
        return _DCTStreamDecoder(self)

    def _decode_groups(self, latents: Latents) -> Video:
        """All `4 f` raw frames of the groups; of a video's first group, the last one is the lone first frame."""
        values = latents * self.std.to(latents.dtype) + self.mean.to(latents.dtype)
        planes = torch.einsum("bfchw,cpt->bftphw", values, self.mixing.to(latents.dtype))
        frames = F.conv_transpose2d(planes.flatten(0, 2), self.filters.to(latents.dtype), stride=BLOCK)
        return frames.unflatten(0, (len(latents), -1))


class _DCTStreamEncoder(StreamEncoder):
    """Groups are independent: all it remembers is whether the lone first frame has passed.

    It encodes group by group: kernels that are chosen for several at once round otherwise.
    """

    def __init__(self, codec: DCTCodec) -> None:
        self.codec = codec
        self.has_begun = False

    def push(self, video: Video) -> Latents:
        check_next(video.shape[1], GROUP, self.has_begun)
        self.codec.check_size(*video.shape[-2:])
        if not self.has_begun:
            video = torch.cat([video[:, :1].expand(-1, GROUP - 1, -1, -1, -1), video], dim=1)
        self.has_begun = True
        return torch.cat([self.codec._encode_group(group) for group in video.split(GROUP, dim=1)], dim=1)


class _DCTStreamDecoder(StreamDecoder):
    """Groups are independent: all it remembers is whether the lone first frame has passed."""

    def __init__(self, codec: DCTCodec) -> None:
        self.codec = codec
        self.started = False

    def push(self, latents: Latents) -> Video:
        skip = 0 if self.started else GROUP - 1
        self.started = True
        return self.codec._decode_groups(latents)[:, skip:].clamp(-1, 1)
