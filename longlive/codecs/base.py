"""The contract of a video codec: raw frames to latents and back, causal in time.

Raw frame 0 becomes frame 0; frame f > 0 covers the raw frames `r (f-1) + 1 .. r f` for the temporal ratio r. So
`raw frames = 1 + r (frames - 1)`, and a prefix of a video encodes to a prefix of its latents.
"""

from abc import ABC, abstractmethod
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from longlive.typing import Latents, Video


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


class StreamDecoder(ABC):
    """Decodes latents as they come. What it returns, concatenated, equals `decode` of all latents at once."""

    @abstractmethod
    def push(self, latents: Latents) -> Video:
        """Decode the next frames; the first push of a video returns `1 + r (f - 1)` raw frames, later ones `r f`."""


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
        """Latents, normalised per channel to about zero mean and unit variance.

        Raises:
            ValueError: if the raw frames are not `1 + temporal_ratio k`, or height and width are no multiples of
                `spatial_ratio`.
        """

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

    @abstractmethod
    def feature_shapes(
        self, batch_size: int, height: int, width: int, num_frames: int
    ) -> tuple[tuple[int, ...] | None, ...]:
        """Shapes of the feature cache's entries after `num_frames` frames of this size in pixels; None: never used."""

    @abstractmethod
    def encode_bytes(self, batch_size: int, num_raw_frames: int, height: int, width: int) -> int:
        """Peak of the bytes that an `encode_next` of so many raw frames holds beyond weights and its input."""
