"""The toy world's codec: equal to cosines written out, causal, streaming, and good enough for the world it is for."""

import math
from functools import cache

import pytest
import torch

from longlive import rng
from longlive.codecs.dct import CHANNELS, MEAN, STD, DCTCodec, colour_matrix, dct_matrix
from longlive.data.toyworld import ToyWorldSource
from longlive.typing import Latents, Tensor, Video


@pytest.fixture(scope="module")
def codec() -> DCTCodec:
    return DCTCodec()


def random_video(num_raw_frames: int, batch_size: int = 2, height: int = 16, width: int = 24) -> Video:
    """Mid-range pixels, so that decoding never meets the limits of RGB."""
    return 0.3 * rng.normal((batch_size, num_raw_frames, 3, height, width), 0, "test_video").clamp(-2, 2)


def random_latents(num_frames: int, batch_size: int = 2, seed: int = 0) -> Latents:
    return rng.normal((batch_size, num_frames, 16, 2, 3), seed, "test_latents")


@cache
def toy_videos(num_clips: int) -> Video:
    source = ToyWorldSource(num_clips=num_clips, num_raw_frames=45, seed=0)
    frames = [clip.frames for clip in source]
    return torch.stack([clip for clip in frames if clip is not None]).float() / 127.5 - 1


def cosines(size: int) -> Tensor:
    """Orthonormal DCT-II, from its definition."""
    rows = [
        [math.cos(math.pi * k * (i + 0.5) / size) * math.sqrt((2 if k else 1) / size) for i in range(size)]
        for k in range(size)
    ]
    return torch.tensor(rows, dtype=torch.float64)


def colours() -> Tensor:
    third, half, sixth = 3**-0.5, 2**-0.5, 6**-0.5
    rows = [[third, third, third], [half, 0, -half], [-sixth, 2 * sixth, -sixth]]
    return torch.tensor(rows, dtype=torch.float64)


def all_coefficients(video: Video) -> Tensor:
    """The whole transform in float64: `[b f colour temporal vertical horizontal h w]`, nothing left out."""
    padded = torch.cat([video[:, :1]] * 3 + [video], dim=1).double()
    batch, raw, _, height, width = padded.shape
    groups = padded.reshape(batch, raw // 4, 4, 3, height // 8, 8, width // 8, 8)
    return torch.einsum("bftchywx,kt,ac,uy,vx->bfakuvhw", groups, cosines(4), colours(), cosines(8), cosines(8))


def from_coefficients(coefficients: Tensor) -> Tensor:
    """The inverse of `all_coefficients`, the three repetitions of the first raw frame dropped."""
    groups = torch.einsum("bfakuvhw,kt,ac,uy,vx->bftchywx", coefficients, cosines(4), colours(), cosines(8), cosines(8))
    batch, frames, _, _, rows, _, columns, _ = groups.shape
    return groups.reshape(batch, 4 * frames, 3, 8 * rows, 8 * columns)[:, 3:]


def test_the_bases_are_orthonormal(codec: DCTCodec) -> None:
    for matrix in (dct_matrix(4), dct_matrix(8), colour_matrix()):
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(len(matrix), dtype=torch.float64), atol=1e-14, rtol=0)
    basis = torch.einsum("cpt,payx->ctayx", codec.mixing, codec.filters).flatten(1)
    assert basis.shape == (16, 4 * 3 * 8 * 8)
    torch.testing.assert_close(basis @ basis.T, torch.eye(16), atol=1e-5, rtol=0)


def test_encoding_equals_cosines_written_out(codec: DCTCodec) -> None:
    """Catches swapped rows and columns, a wrong order of channels, and a first frame at another scale."""
    video = random_video(9)
    coefficients = all_coefficients(video)
    kept = torch.stack([coefficients[:, :, a, k, u, v] for a, k, u, v in CHANNELS], dim=2)
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (MEAN, STD))
    latents = codec.encode(video)
    assert latents.shape == (2, 3, 16, 2, 3)
    assert latents.is_contiguous()
    torch.testing.assert_close(latents.double(), (kept - mean) / std, atol=1e-5, rtol=1e-5)


def test_decoding_equals_cosines_written_out(codec: DCTCodec) -> None:
    latents = 0.2 * random_latents(3)
    coefficients = torch.zeros(2, 3, 3, 4, 8, 8, 2, 3, dtype=torch.float64)
    for channel, (a, k, u, v) in enumerate(CHANNELS):
        coefficients[:, :, a, k, u, v] = latents[:, :, channel].double() * STD[channel] + MEAN[channel]
    video = codec.decode(latents)
    assert video.shape == (2, 9, 3, 16, 24)
    assert video.abs().max() < 1, "a clamped pixel would compare nothing"
    torch.testing.assert_close(video.double(), from_coefficients(coefficients), atol=1e-5, rtol=0)


def test_decoding_an_encoding_is_a_projection(codec: DCTCodec) -> None:
    """What is kept comes back exactly: latents of a decoded video are the latents, and decode to the same pixels."""
    video = random_video(13)
    latents = codec.encode(video)
    once = codec.decode(latents)
    torch.testing.assert_close(codec.encode(once), latents, atol=1e-5, rtol=0)
    torch.testing.assert_close(codec.decode(codec.encode(once)), once, atol=1e-6, rtol=0)
    assert (once - video).square().mean() > 0.5 * video.square().mean(), "noise is mostly outside its span"
    torch.testing.assert_close(((video - once)[:, 1:] * once[:, 1:]).mean(), torch.tensor(0.0), atol=1e-6, rtol=0)


def test_a_constant_video_comes_back_exactly(codec: DCTCodec) -> None:
    colour = torch.tensor([0.5, -0.25, 0.125]).view(1, 1, 3, 1, 1)
    video = colour.expand(1, 5, 3, 16, 16)
    torch.testing.assert_close(codec.decode(codec.encode(video)), video, atol=1e-5, rtol=0)


def test_decoded_pixels_stay_in_range(codec: DCTCodec) -> None:
    video = codec.decode(20 * random_latents(2))
    assert float(video.min()) == -1
    assert float(video.max()) == 1


def test_the_toy_world_keeps_over_29_decibels(codec: DCTCodec) -> None:
    """100 clips; of their mean squared error, and of a typical clip."""
    videos = toy_videos(200)[:100]
    errors = (codec.decode(codec.encode(videos)) - videos).double().square().mean((1, 2, 3, 4))
    assert 10 * math.log10(4 / float(errors.mean())) > 29
    assert 10 * math.log10(4 / float(errors.median())) > 29
    assert 10 * math.log10(4 / float(errors.max())) > 25


def test_the_kept_channels_are_the_16_of_greatest_energy(codec: DCTCodec) -> None:
    energy = all_coefficients(toy_videos(200)[:60]).square().mean((0, 1, 6, 7))
    greatest = energy.flatten().argsort(descending=True)[:16]
    found = {tuple(int(i) for i in torch.unravel_index(index, energy.shape)) for index in greatest}
    assert found == set(CHANNELS)
    assert len(CHANNELS) == len(MEAN) == len(STD) == 16


def test_latents_of_the_toy_world_have_mean_zero_and_variance_one(codec: DCTCodec) -> None:
    """Measured again over 200 clips. A channel at another scale stays below the noise and is never learned."""
    latents = codec.encode(toy_videos(200))
    mean, std = latents.mean((0, 1, 3, 4)), latents.std((0, 1, 3, 4))
    torch.testing.assert_close(mean, torch.zeros(16), atol=0.06, rtol=0)
    torch.testing.assert_close(std, torch.ones(16), atol=0.08, rtol=0)
    assert latents[:, 0, 6].abs().max() < 1e-5, "a lone first frame has no motion inside it"


def test_a_prefix_of_a_video_encodes_to_a_prefix_of_its_latents(codec: DCTCodec) -> None:
    video = random_video(17)
    whole = codec.encode(video)
    for frames in range(1, 5):
        torch.testing.assert_close(codec.encode(video[:, : 1 + 4 * (frames - 1)]), whole[:, :frames], atol=1e-6, rtol=0)


def test_a_change_in_a_raw_frame_reaches_its_own_frame_alone(codec: DCTCodec) -> None:
    """So no halo is needed: `halo_frames` is 0."""
    video = random_video(13)
    changed = video.clone()
    changed[:, 5] += 0.1  # raw frames 5..8 are frame 2
    difference = (codec.encode(video) - codec.encode(changed)).abs().amax((0, 2, 3, 4))
    assert difference[[0, 1, 3]].max() == 0
    assert difference[2] > 1e-2
    assert codec.halo_frames == 0


@pytest.mark.parametrize("pushes", [(1, 2, 4), (4, 2, 1), (1,) * 7, (7,)])
def test_pushes_of_a_stream_decoder_concatenate_to_the_whole_decode(codec: DCTCodec, pushes: tuple[int, ...]) -> None:
    latents = random_latents(7)
    decoder = codec.stream_decoder()
    parts = [decoder.push(part) for part in latents.split(pushes, dim=1)]
    assert [part.shape[1] for part in parts] == [
        4 * count - (3 if not index else 0) for index, count in enumerate(pushes)
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), codec.decode(latents), atol=1e-6, rtol=0)


def test_two_stream_decoders_do_not_disturb_each_other(codec: DCTCodec) -> None:
    """State on the codec instead of the decoder would make the second video lose, or gain, its first frame."""
    first, second = random_latents(4, seed=1), random_latents(4, seed=2)
    decoders = codec.stream_decoder(), codec.stream_decoder()
    parts: tuple[list[Video], list[Video]] = ([], [])
    for start in (0, 2):
        for decoder, latents, collected in zip(decoders, (first, second), parts, strict=True):
            collected.append(decoder.push(latents[:, start : start + 2]))
        codec.decode(second)
    for latents, collected in zip((first, second), parts, strict=True):
        torch.testing.assert_close(torch.cat(collected, dim=1), codec.decode(latents), atol=1e-6, rtol=0)


def test_a_sample_does_not_depend_on_its_batch(codec: DCTCodec) -> None:
    video = random_video(9, batch_size=3)
    latents = codec.encode(video)
    for sample in range(3):
        alone = codec.encode(video[sample : sample + 1])
        torch.testing.assert_close(alone, latents[sample : sample + 1], atol=1e-6, rtol=0)
        torch.testing.assert_close(codec.decode(alone), codec.decode(latents)[sample : sample + 1], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 8, 3, 16, 16), "num_raw_frames=8 .* use 5 or 9"),
        ((1, 0, 3, 16, 16), "num_raw_frames=0 .* use 1 or 5"),
        ((1, 5, 3, 20, 16), "height=20, width=16 .* use 16, 16"),
        ((1, 5, 3, 16, 31), "height=16, width=31 .* use 16, 24"),
    ],
)
def test_videos_that_do_not_fit_are_refused(codec: DCTCodec, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        codec.encode(torch.zeros(shape))


def test_the_codec_is_analytic_and_keeps_the_dtype(codec: DCTCodec) -> None:
    """No weights: nothing of it belongs into a checkpoint."""
    assert not list(codec.parameters())
    assert not codec.state_dict()
    for dtype in (torch.float64, torch.bfloat16):
        latents = codec.encode(random_video(5).to(dtype))
        assert latents.dtype == codec.decode(latents).dtype == dtype


@pytest.mark.parametrize("pushes", [(1, 4, 4, 4), (5, 8), (9, 4)])
def test_pushes_of_a_stream_encoder_concatenate_to_the_whole_encode(pushes):
    codec, video = DCTCodec(), torch.rand(1, 13, 3, 16, 24) * 2 - 1
    encoder = codec.stream_encoder()
    parts = [encoder.push(part) for part in video.split(pushes, dim=1)]
    assert torch.equal(torch.cat(parts, dim=1), codec.encode(video))
    with pytest.raises(ValueError, match=r"num_raw_frames=1 cannot follow: .* push 4"):
        encoder.push(video[:, :1])


def test_latents_of_a_clip_are_the_same_bits_alone_and_in_a_batch():
    """Kernels that are chosen for a batch round otherwise: latents that were stored would not be those of training."""
    video = torch.rand(5, 5, 3, 8, 8) * 2 - 1
    assert torch.equal(DCTCodec().encode(video), torch.cat([DCTCodec().encode(clip) for clip in video.split(1)]))


def test_all_codecs_of_the_toy_world_have_one_fingerprint():
    changed = DCTCodec()
    changed.std[0] += 1e-3
    assert DCTCodec().fingerprint == DCTCodec().fingerprint != changed.fingerprint
