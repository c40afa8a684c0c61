"""What every codec inherits: how frames are counted, and which videos are refused before any work."""

import pytest
import torch

from longlive.codecs.base import StreamDecoder, StreamEncoder, VideoCodec, num_frames, num_raw_frames
from longlive.typing import Latents, Video


class CountingCodec(VideoCodec):
    """The least that a codec is; counts how often it has worked."""

    temporal_ratio, spatial_ratio, latent_channels, halo_frames = 4, 16, 1, 0
    num_encodes = 0

    def encode(self, video: Video) -> Latents:
        self.check_video(video)
        self.num_encodes += 1
        return video[:, ::4, :1, ::16, ::16]

    def decode(self, latents: Latents) -> Video:
        raise AssertionError("no test decodes")

    def stream_encoder(self) -> StreamEncoder:
        raise AssertionError("no test streams")

    def stream_decoder(self) -> StreamDecoder:
        raise AssertionError("no test decodes")

    @property
    def fingerprint(self) -> str:
        return "counting"


def test_raw_frames_and_frames_count_each_other() -> None:
    assert [num_raw_frames(frames, 4) for frames in (1, 2, 3, 12)] == [1, 5, 9, 45]
    assert [num_frames(raw, 4) for raw in (1, 5, 9, 45)] == [1, 2, 3, 12]
    assert [num_frames(raw, 2) for raw in (1, 3, 5)] == [1, 2, 3]
    assert [num_frames(raw, 1) for raw in (1, 2, 3)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("raw_frames", "ratio", "nearest"),
    [(2, 4, "1 or 5"), (4, 4, "1 or 5"), (8, 4, "5 or 9"), (44, 4, "41 or 45"), (46, 4, "45 or 49"), (4, 2, "3 or 5")],
)
def test_other_numbers_of_raw_frames_are_refused_with_the_nearest_ones(
    raw_frames: int, ratio: int, nearest: str
) -> None:
    with pytest.raises(ValueError, match=rf"num_raw_frames={raw_frames} is not 1 \+ {ratio} k.* use {nearest}$"):
        num_frames(raw_frames, ratio)


@pytest.mark.parametrize("raw_frames", [0, -3])
def test_a_video_has_at_least_one_raw_frame(raw_frames: int) -> None:
    """-3 is `1 + 4 k` too."""
    with pytest.raises(ValueError, match=f"num_raw_frames={raw_frames} .* use 1 or 5"):
        num_frames(raw_frames, 4)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 4, 3, 32, 32), "num_raw_frames=4"),
        ((1, 5, 3, 40, 32), "height=40, width=32 are no multiples of the codec's spatial_ratio=16; use 32, 32"),
        ((1, 5, 3, 32, 63), "height=32, width=63 .* use 32, 48"),
        ((1, 5, 3, 8, 20), "height=8, width=20 .* use 16, 16"),
    ],
    ids=["frames", "height", "width", "smaller than a latent pixel"],
)
def test_a_video_that_does_not_fit_is_refused_before_any_work(shape: tuple[int, ...], message: str) -> None:
    codec = CountingCodec()
    with pytest.raises(ValueError, match=message):
        codec.encode(torch.zeros(shape))
    assert codec.num_encodes == 0
    assert codec.encode(torch.zeros(1, 5, 3, 32, 48)).shape == (1, 2, 1, 2, 3)
