"""The Wan codec at tiny random size: equal to diffusers, causal, and streaming without shared state."""

from pathlib import Path

import pytest
import torch

from longlive import rng
from longlive.codecs.halo import MeasuredHalo
from longlive.codecs.memory import LiveBytes
from longlive.codecs.wan import WanVideoCodec
from longlive.typing import Latents, Video


def random_video(num_raw_frames: int, batch_size: int = 1, height: int = 16, width: int = 16, seed: int = 0) -> Video:
    return rng.normal((batch_size, num_raw_frames, 3, height, width), seed, "test_video").clamp(-1, 1)


def random_latents(num_frames: int, batch_size: int = 1, height: int = 1, width: int = 1, seed: int = 0) -> Latents:
    return rng.normal((batch_size, num_frames, 4, height, width), seed, "test_latents")


@pytest.fixture(scope="module")
def codec() -> WanVideoCodec:
    return WanVideoCodec.tiny(seed=1)


def test_the_ti2v_5b_codec_has_its_published_size_on_meta() -> None:
    with torch.device("meta"):
        codec = WanVideoCodec.ti2v_5b()
    assert sum(parameter.numel() for parameter in codec.parameters()) == 704_688_668
    assert {parameter.device.type for parameter in codec.parameters()} == {"meta"}
    assert (codec.temporal_ratio, codec.spatial_ratio, codec.latent_channels, codec.halo_frames) == (4, 16, 48, 27)


def test_the_ti2v_5b_statistics_are_one_number_per_channel() -> None:
    with torch.device("meta"):
        config = WanVideoCodec.ti2v_5b().autoencoder.config
    assert len(config["latents_mean"]) == len(config["latents_std"]) == 48
    assert min(config["latents_std"]) > 0
    # The sums of the published tables: a dropped sign or a swapped pair of tables changes them.
    assert sum(config["latents_mean"]) == pytest.approx(-0.5589, abs=1e-6)
    assert sum(config["latents_std"]) == pytest.approx(32.5360, abs=1e-6)


def test_encode_equals_diffusers_posterior_mean_normalised_per_channel(codec: WanVideoCodec) -> None:
    video = random_video(9, batch_size=2, height=32, width=16)
    autoencoder = codec.autoencoder
    posterior_mean = torch.cat(
        [autoencoder.encode(clip.transpose(1, 2)).latent_dist.mode().transpose(1, 2) for clip in video.split(1)]
    )
    mean = torch.tensor(autoencoder.config["latents_mean"])[:, None, None]
    std = torch.tensor(autoencoder.config["latents_std"])[:, None, None]

    latents = codec.encode(video)

    assert latents.shape == (2, 3, 4, 2, 1)
    torch.testing.assert_close(latents, (posterior_mean - mean) / std, rtol=0, atol=1e-6)


def test_latents_of_a_clip_are_the_same_bits_alone_and_in_a_batch(codec: WanVideoCodec) -> None:
    """Kernels that are chosen for a batch round otherwise: latents that were stored would not be those of training."""
    video = random_video(9, batch_size=3, height=32, width=48)
    assert torch.equal(codec.encode(video), torch.cat([codec.encode(clip) for clip in video.split(1)]))


@pytest.mark.parametrize("pushes", [(1, 4, 4, 4), (5, 8), (9, 4)])
def test_pushes_of_a_stream_encoder_concatenate_to_the_whole_encode(
    codec: WanVideoCodec, pushes: tuple[int, ...]
) -> None:
    """To the bit; and two videos in turn do not see each other's past."""
    videos = random_video(13, batch_size=2).split(1)
    encoders = [codec.stream_encoder() for _ in videos]
    parts = [
        [encoder.push(part) for encoder, part in zip(encoders, each, strict=True)]
        for each in zip(*(video.split(pushes, dim=1) for video in videos), strict=True)
    ]
    for number, video in enumerate(videos):
        assert torch.equal(torch.cat([each[number] for each in parts], dim=1), codec.encode(video))


def test_a_stream_encoder_refuses_raw_frames_that_cannot_come_next(codec: WanVideoCodec) -> None:
    encoder = codec.stream_encoder()
    with pytest.raises(ValueError, match="num_raw_frames=4 is not 1"):
        encoder.push(random_video(4))
    encoder.push(random_video(5))
    with pytest.raises(ValueError, match=r"num_raw_frames=5 cannot follow: .* of 4; push 4 or 8"):
        encoder.push(random_video(5))


def test_a_codecs_fingerprint_is_that_of_what_latents_depend_on() -> None:
    """Latents of other weights, or another dtype, would be taken for this codec's."""
    codec = WanVideoCodec.tiny()
    names = {codec.fingerprint, WanVideoCodec.tiny().fingerprint}
    assert len(names) == 1
    decoder = WanVideoCodec.tiny()
    next(decoder.autoencoder.decoder.parameters()).data += 1
    assert decoder.fingerprint in names, "a decoder makes no latents"
    weight = WanVideoCodec.tiny()
    next(weight.autoencoder.encoder.parameters()).data[0, 0, 0] += 1e-6
    scaled = WanVideoCodec.tiny()
    scaled.autoencoder.register_to_config(latents_std=[1.0] * 4)
    others = [weight, scaled, WanVideoCodec.tiny(dtype=torch.bfloat16), WanVideoCodec.tiny(seed=1)]
    assert len(names | {other.fingerprint for other in others}) == 5


def test_decode_equals_diffusers_decode_of_denormalised_latents(codec: WanVideoCodec) -> None:
    """Would catch a normalisation applied twice, or inverted with the wrong sign."""
    latents = random_latents(3, batch_size=2, height=2)
    mean = torch.tensor(codec.autoencoder.config["latents_mean"])[:, None, None]
    std = torch.tensor(codec.autoencoder.config["latents_std"])[:, None, None]
    expected = codec.autoencoder.decode((latents * std + mean).transpose(1, 2)).sample.transpose(1, 2)

    video = codec.decode(latents)

    assert video.shape == (2, 9, 3, 32, 16)
    assert (video.abs() < 1).float().mean() > 0.5, "a saturated decode would compare nothing"
    torch.testing.assert_close(video, expected, rtol=0, atol=1e-6)


def test_a_prefix_of_a_video_encodes_to_a_prefix_of_its_latents(codec: WanVideoCodec) -> None:
    video = random_video(17)
    torch.testing.assert_close(codec.encode(video[:, :9]), codec.encode(video)[:, :3], rtol=0, atol=1e-5)


def test_a_change_in_a_raw_frame_reaches_its_own_latent_and_no_earlier_one(codec: WanVideoCodec) -> None:
    video = random_video(13)
    changed = video.clone()
    changed[:, 5] = -changed[:, 5]  # raw frames 5..8 are frame 2
    difference = (codec.encode(video) - codec.encode(changed)).abs().amax((0, 2, 3, 4))
    assert (difference[:2] == 0).all()
    assert difference[2] > 1e-3


@pytest.mark.parametrize("num_res_blocks", [1, 2])
def test_halo_frames_are_exactly_what_a_window_needs(num_res_blocks: int) -> None:
    """Too small a halo gives latents that are silently off, by anything from rounding to visible; too large costs work.

    In float64, because the last of the halo carries only 1e-10 of a random network's signal.
    """
    codec = WanVideoCodec.tiny(seed=2, num_res_blocks=num_res_blocks, dtype=torch.float64)
    owned = codec.halo_frames + 2
    video = random_video(1 + 4 * (owned + 1)).double()

    def encode_mean(start: int) -> torch.Tensor:
        return codec.autoencoder.encode(video[:, start:].transpose(1, 2)).latent_dist.mean[:, :, -2:]

    whole = encode_mean(0)
    exact = encode_mean(4 * (owned - codec.halo_frames - 1))
    short = encode_mean(4 * (owned - codec.halo_frames))
    assert (whole - exact).abs().max() < 1e-14
    assert (whole - short).abs().max() > 1e-13


@pytest.mark.parametrize("pushes", [(1, 1, 1, 1, 1), (2, 3), (4, 1), (5,)])
def test_pushes_of_a_stream_decoder_concatenate_to_the_whole_decode(
    codec: WanVideoCodec, pushes: tuple[int, ...]
) -> None:
    latents = random_latents(5, batch_size=2)
    decoder = codec.stream_decoder()
    parts = [decoder.push(part) for part in latents.split(pushes, dim=1)]
    assert [part.shape[1] for part in parts] == [4 * frames - 3 * (i == 0) for i, frames in enumerate(pushes)]
    torch.testing.assert_close(torch.cat(parts, dim=1), codec.decode(latents), rtol=0, atol=1e-5)


def test_interleaved_stream_decoders_and_whole_calls_do_not_disturb_each_other(codec: WanVideoCodec) -> None:
    """diffusers keeps one feature cache per autoencoder: two users of it would decode each other's past."""
    first, second = random_latents(4, seed=1), random_latents(4, seed=2)
    decoders = codec.stream_decoder(), codec.stream_decoder()
    parts: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for frame in range(4):
        for latents, decoder, decoded in zip((first, second), decoders, parts, strict=True):
            decoded.append(decoder.push(latents[:, frame : frame + 1]))
            codec.encode(random_video(5))
            codec.decode(random_latents(2, seed=3))
    for latents, decoded in zip((first, second), parts, strict=True):
        torch.testing.assert_close(torch.cat(decoded, dim=1), codec.decode(latents), rtol=0, atol=1e-5)
    assert not torch.allclose(codec.decode(first), codec.decode(second), atol=1e-2)


@pytest.mark.parametrize("num_raw_frames", [2, 4, 8, 10])
def test_raw_frames_that_are_not_one_plus_four_k_are_refused(codec: WanVideoCodec, num_raw_frames: int) -> None:
    """diffusers drops the surplus frames without a word."""
    with pytest.raises(ValueError, match=f"num_raw_frames={num_raw_frames} is not 1 \\+ 4 k"):
        codec.encode(random_video(num_raw_frames))


def test_sizes_off_the_spatial_ratio_and_foreign_latents_are_refused(codec: WanVideoCodec) -> None:
    with pytest.raises(ValueError, match="height=24, width=16 are no multiples of the codec's spatial_ratio=16"):
        codec.encode(random_video(5, height=24))
    with pytest.raises(ValueError, match="latents have 3 channels, this codec has latent_channels=4"):
        codec.decode(random_latents(2)[:, :, :3])
    with pytest.raises(ValueError, match="num_frames=0"):
        codec.decode(random_latents(2)[:, :0])


def test_the_codec_stays_frozen_and_in_evaluation_mode_inside_a_training_module(codec: WanVideoCodec) -> None:
    owner = torch.nn.ModuleDict({"codec": codec}).train()
    assert not any(module.training for module in owner["codec"].modules())
    assert not any(parameter.requires_grad for parameter in owner.parameters())
    assert not codec.encode(random_video(5)).requires_grad


def test_bfloat16_weights_give_float32_results_close_to_float32_weights(codec: WanVideoCodec) -> None:
    half = WanVideoCodec.tiny(seed=1, dtype=torch.bfloat16)
    video, latents = random_video(9), random_latents(3)
    assert half.dtype == torch.bfloat16
    for result, expected in (
        (half.encode(video), codec.encode(video)),
        (half.decode(latents), codec.decode(latents)),
    ):
        assert result.dtype == torch.float32
        error = (result - expected).abs().mean() / expected.std()
        assert 0 < error < 0.05


def test_latents_do_not_depend_on_an_autocast_around_the_codec(codec: WanVideoCodec) -> None:
    """Online latents (inside a mixed-precision step) would differ from pre-encoded ones."""
    video = random_video(5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        latents = codec.encode(video)
        decoded = codec.decode(latents)
    torch.testing.assert_close(latents, codec.encode(video), rtol=0, atol=0)
    torch.testing.assert_close(decoded, codec.decode(latents), rtol=0, atol=0)


def test_tiny_depends_on_its_seed_alone() -> None:
    torch.manual_seed(0)
    first = WanVideoCodec.tiny(seed=5).encode(random_video(5))
    torch.manual_seed(1)
    assert torch.equal(first, WanVideoCodec.tiny(seed=5).encode(random_video(5)))
    assert not torch.equal(first, WanVideoCodec.tiny(seed=6).encode(random_video(5)))


@pytest.mark.parametrize("layout", [".", "vae"])
def test_a_diffusers_folder_loads_to_the_same_codec(codec: WanVideoCodec, tmp_path: Path, layout: str) -> None:
    codec.autoencoder.save_pretrained(tmp_path / layout)
    loaded = WanVideoCodec.from_pretrained(tmp_path)
    video = random_video(5)
    torch.testing.assert_close(loaded.encode(video), codec.encode(video), rtol=0, atol=1e-6)
    assert WanVideoCodec.from_pretrained(str(tmp_path), dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_folder_without_a_codec_or_with_other_weights_is_refused(codec: WanVideoCodec, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        WanVideoCodec.from_pretrained(tmp_path)
    codec.autoencoder.save_pretrained(tmp_path)
    WanVideoCodec.tiny(num_res_blocks=2).autoencoder.save_config(tmp_path)
    with pytest.raises(ValueError, match=r"missing \['decoder\."):
        WanVideoCodec.from_pretrained(tmp_path)


@pytest.mark.parametrize("pieces", [(1, 4, 4, 4), (1, 12), (1, 8, 4)])
def test_an_encode_goes_on_where_another_stopped(codec: WanVideoCodec, pieces: tuple[int, ...]) -> None:
    video, cache = random_video(13, batch_size=2), codec.feature_cache()
    latents = torch.cat([codec.encode_next(piece, cache) for piece in video.split(pieces, dim=1)], dim=1)
    torch.testing.assert_close(latents, codec.encode(video), rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_raw_frames", [0, 2, 5, 9])
def test_pieces_that_are_no_whole_groups_are_refused(codec: WanVideoCodec, num_raw_frames: int) -> None:
    with pytest.raises(ValueError, match=f"num_raw_frames={num_raw_frames} cannot follow: .* whole groups of 4"):
        codec.encode_next(random_video(13)[:, :num_raw_frames], codec.feature_cache())
    with pytest.raises(ValueError, match="width=24 are no multiples"):
        codec.encode_next(random_video(1, width=24), codec.feature_cache())


def test_feature_shapes_are_those_of_a_cache_after_so_many_frames(codec: WanVideoCodec) -> None:
    """A rank that expected another shape would read another tensor's bytes, or wait for ever."""
    video, cache = random_video(13, batch_size=2, height=32, width=48), codec.feature_cache()
    for num_frames, piece in enumerate(video.split([1, 4, 4, 4], dim=1), start=1):
        codec.encode_next(piece, cache)
        shapes = tuple(None if entry is None else tuple(entry.shape) for entry in cache)
        assert codec.feature_shapes(2, 32, 48, num_frames) == shapes
    assert sum(shape is not None for shape in shapes) == 16
    assert codec.feature_shapes(1, 32, 48, 2) != codec.feature_shapes(1, 32, 48, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch_size", "num_raw_frames", "height", "width"), [(1, 1, 32, 32), (2, 4, 32, 16), (1, 24, 16, 48)]
)
def test_encode_bytes_are_what_an_encode_holds(
    dtype: torch.dtype, batch_size: int, num_raw_frames: int, height: int, width: int
) -> None:
    """Counted while it really computes. The encoder's own peak is in the dry run; what comes after it is small."""
    codec = WanVideoCodec.tiny(dtype=dtype)
    cache = codec.feature_cache()
    if num_raw_frames > 1:
        codec.encode_next(random_video(1, batch_size, height, width), cache)
    video = random_video(num_raw_frames, batch_size, height, width).to(dtype)
    with LiveBytes() as live:
        codec.encode_next(video, cache)
    assert codec.encode_bytes(batch_size, num_raw_frames, height, width) == pytest.approx(live.peak, rel=0.05)


def test_encode_bytes_of_the_ti2v_5b_codec_need_neither_weights_nor_work() -> None:
    """24 frames of 704 x 1280 in one piece, in bfloat16; the widest tensor is 160 channels of half the pixels."""
    with torch.device("meta"):
        codec = WanVideoCodec.ti2v_5b(torch.bfloat16)
    widest = 160 * 96 * 352 * 640 * 2
    assert 5 < codec.encode_bytes(1, 96, 704, 1280) / widest < 10
    assert codec.encode_bytes(1, 96, 704, 1280) == pytest.approx(24 * codec.encode_bytes(1, 4, 704, 1280), rel=0.3)


def test_a_measured_halo_is_read_with_the_codec(codec: WanVideoCodec, tmp_path: Path) -> None:
    codec.autoencoder.save_pretrained(tmp_path / "vae")
    assert WanVideoCodec.from_pretrained(tmp_path).halo_frames == codec.exact_halo_frames == 19
    MeasuredHalo(12, 0.003, 2**-8, {"dtype": "float32"}).write(tmp_path / "vae")
    measured = WanVideoCodec.from_pretrained(tmp_path)
    assert (measured.halo_frames, measured.exact_halo_frames) == (12, 19)
    MeasuredHalo(20, 0.0, 2**-8, {}).write(tmp_path / "vae")
    with pytest.raises(ValueError, match=r"halo_frames=20 .* outside 0 \.\. 19"):
        WanVideoCodec.from_pretrained(tmp_path)
