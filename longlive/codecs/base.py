"""The contract of a video codec: raw frames to latents and back, causal in time.

Raw frame 0 becomes frame 0; frame f > 0 covers the raw frames `r (f-1) + 1 .. r f` for the temporal ratio r. So
`raw frames = 1 + r (frames - 1)`, and a prefix of a video encodes to a prefix of its latents.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from longlive.typing import Latents, RawFrames, Tensor, Video


def num_raw_frames(num_frames: int, temporal_ratio: int) -> int:
    """Raw frames of a clip of `num_frames` latent frames: `1 + r (frames - 1)`."""
    return 1 + temporal_ratio * (num_frames - 1)


def num_frames(num_raw_frames: int, temporal_ratio: int) -> int:
    """Latent frames of a clip of raw frames.

    Raises:
        ValueError: if the raw frames are not `1 + r k`; the message names the nearest legal counts.
    """
    extra = (num_raw_frames - 1) % temporal_ratio
    if num_raw_frames < 1 or extra:
        lower = max(num_raw_frames - extra, 1)
        raise ValueError(
            f"num_raw_frames={num_raw_frames} is not 1 + {temporal_ratio} k, which a codec with temporal ratio "
            f"{temporal_ratio} needs; use {lower} or {lower + temporal_ratio}"
        )
    return 1 + (num_raw_frames - 1) // temporal_ratio


def to_unit_range(raw_frames: RawFrames) -> Video:
    """uint8 pixels to [-1, 1], float32."""
    return raw_frames.float().div_(127.5).sub_(1)


class StreamDecoder(ABC):
    """Decodes latents as they come. What it returns, concatenated, equals `decode` of all latents at once."""

    @abstractmethod
    def push(self, latents: Latents) -> Video:
        """Decode the next frames; the first push of a video returns `1 + r (f - 1)` raw frames, later ones `r f`."""


class StreamEncoder(ABC):
    """Encodes raw frames as they come. What it returns, concatenated, equals `encode` of all raw frames at once: of one
    video bit by bit, of a batch to rounding."""

    @abstractmethod
    def push(self, video: Video) -> Latents:
        """Encode the next raw frames: `1 + r k` in the first push of a video, `r k` in later ones.

        Raises:
            ValueError: for another number of raw frames, or a size that `encode` refuses.
        """


class VideoCodec(nn.Module, ABC):
    """Raw frames <-> latents. Frozen: its parameters never train.

    Attributes:
        temporal_ratio: raw frames per frame after the first.
        spatial_ratio: pixels per latent pixel, in each direction.
        latent_channels: channels of a latent.
        halo_frames: extra frames of left context with which an encode of a window is as good as one of the whole
            video (0: none needed): exact, or below the error of a measurement.
    """

    temporal_ratio: int
    spatial_ratio: int
    latent_channels: int
    halo_frames: int

    @abstractmethod
    def encode(self, video: Video) -> Latents:
        """Latents, normalised per channel to about zero mean and unit variance. Those of a clip do not depend on the
        clips that are in a batch with it.

        Raises:
            ValueError: if the raw frames are not `1 + temporal_ratio k`, or height and width are no multiples of
                `spatial_ratio`.
        """

    @abstractmethod
    def stream_encoder(self) -> StreamEncoder:
        """A fresh encoder for one video (or one batch of videos in step). Encoders of one codec do not disturb each
        other."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Names what latents depend on, weights and settings: two codecs with one fingerprint make equal latents, on
        equal hardware and libraries. Reads all those weights."""

    @abstractmethod
    def decode(self, latents: Latents) -> Video:
        """RGB in [-1, 1]."""

    @abstractmethod
    def stream_decoder(self) -> StreamDecoder:
        """A fresh decoder for one video (or one batch of videos in step). Decoders of one codec do not disturb each
        other."""

    def check_video(self, video: Video) -> None:
        """Raise the `ValueError` of `encode` before any work."""
        num_frames(video.shape[1], self.temporal_ratio)
        self.check_size(*video.shape[-2:])

    def check_size(self, height: int, width: int) -> None:
        """Raise a `ValueError` unless height and width, in pixels, are multiples of `spatial_ratio`."""
        ratio = self.spatial_ratio
        if height % ratio or width % ratio:
            raise ValueError(
                f"height={height}, width={width} are no multiples of the codec's spatial_ratio={ratio}; "
                f"use {max(height - height % ratio, ratio)}, {max(width - width % ratio, ratio)}"
            )


@runtime_checkable
class FeatureCache(Protocol):
    """What an encoder's causal convolutions remember of the frames so far: an entry for each, `None` before frame 0.

    A list will do. The encoder reads an entry (once or several times) and then writes it, entry after entry.
    """

    def __getitem__(self, index: int, /) -> Any: ...

    def __setitem__(self, index: int, value: Any, /) -> None: ...


class ResumableCodec(VideoCodec):
    """A codec whose encoder has all its left context in a feature cache: an encode can go on where another stopped."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Dtype of the work inside, and of the feature cache."""

    @abstractmethod
    def feature_cache(self) -> list[Any]:
        """A fresh cache: what is encoded with it first is raw frame 0."""

    @abstractmethod
    def encode_next(self, video: Video, cache: FeatureCache) -> Latents:
        """Encode the next raw frames in one piece, reading and advancing `cache`.

        Args:
            video: raw frame 0 alone while the cache is fresh, else whole groups of `temporal_ratio`.
            cache: of the raw frames before.

        Raises:
            ValueError: for another number of raw frames, or a size that `encode` refuses.
        """

    def stream_encoder(self) -> StreamEncoder:
        return _ResumingEncoder(self)

    @abstractmethod
    def feature_shapes(
        self, batch_size: int, height: int, width: int, num_frames: int
    ) -> tuple[tuple[int, ...] | None, ...]:
        """Shapes of the feature cache's entries after `num_frames` frames of this size in pixels; None: never used."""

    @abstractmethod
    def encode_bytes(self, batch_size: int, num_raw_frames: int, height: int, width: int) -> int:
        """Peak of the bytes that an `encode_next` of so many raw frames holds beyond weights and its input."""


class _ResumingEncoder(StreamEncoder):
    """The feature cache of the raw frames so far is its whole state."""

    def __init__(self, codec: ResumableCodec) -> None:
        self._codec = codec
        self._cache = codec.feature_cache()
        self._has_begun = False

    def push(self, video: Video) -> Latents:
        ratio, num_raw_frames = self._codec.temporal_ratio, video.shape[1]
        check_next(num_raw_frames, ratio, self._has_begun)
        self._codec.check_size(*video.shape[-2:])
        groups = video.split([*([] if self._has_begun else [1]), *[ratio] * (num_raw_frames // ratio)], dim=1)
        self._has_begun = True
        return torch.cat([self._codec.encode_next(group, self._cache) for group in groups], dim=1)


def check_next(num_raw_frames: int, temporal_ratio: int, has_begun: bool) -> None:
    """Raise the `ValueError` of a stream encoder for a number of raw frames that cannot come next."""
    if not has_begun:
        num_frames(num_raw_frames, temporal_ratio)
    elif num_raw_frames < 1 or num_raw_frames % temporal_ratio:
        lower = num_raw_frames // temporal_ratio * temporal_ratio
        raise ValueError(
            f"num_raw_frames={num_raw_frames} cannot follow: after its first push an encode goes on with whole groups "
            f"of {temporal_ratio}; push {f'{lower} or ' if lower > 0 else ''}{lower + temporal_ratio}"
        )


def hash_of_weights(settings: str, weights: Iterable[tuple[str, Tensor]]) -> str:
    """A hash of settings and of every bit of the weights, with their names, shapes and dtypes."""
    digest = hashlib.blake2b(settings.encode(), digest_size=16)
    for name, weight in weights:
        digest.update(f"/{name}/{weight.dtype}/{tuple(weight.shape)}/".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
