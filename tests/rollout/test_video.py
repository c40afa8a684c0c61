"""From prompts to pixels: what comes chunk by chunk is the decode of the whole, and the clock is right."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from longlive.codecs.base import to_unit_range
from longlive.codecs.dct import DCTCodec
from longlive.codecs.wan import WanStreamDecoder, WanVideoCodec
from longlive.diffusion.schedule import FlowSchedule
from longlive.models.wan.model import CausalWan
from longlive.rollout.engine import ChunkReport, RolloutEngine, RolloutSettings
from longlive.rollout.video import Timings, decode_chunk, generate_videos, to_uint8
from longlive.text.toy import ToyTextEncoder
from longlive.typing import RawFrames

SETTINGS = RolloutSettings(chunk_frames=2, num_steps=2, window=4)
PROMPTS = [["a red circle", "a red circle", "a blue square"], ["a green cross", "a red circle", "a green cross"]]
INDEX = torch.tensor([[0, 0, 1], [2, 0, 2]])
DISTINCT = ["a red circle", "a blue square", "a green cross"]
IDS = [5, 2]
TEXT_ENCODER = ToyTextEncoder(embed_dim=8, num_tokens=4)


@pytest.fixture(scope="module")
def codec() -> WanVideoCodec:
    """A codec whose stream decoder has a state."""
    return WanVideoCodec.tiny(seed=1)


def generate(
    network: CausalWan, codec: WanVideoCodec, settings: RolloutSettings = SETTINGS, **changes: Any
) -> tuple[RawFrames, Timings]:
    arguments: dict[str, Any] = {"prompts": PROMPTS, "latent_size": (2, 4), "seed": 5, "sample_ids": IDS} | changes
    engine = RolloutEngine(network, settings, FlowSchedule())
    return generate_videos(engine, codec, TEXT_ENCODER, **arguments)


def expected(
    network: CausalWan, codec: WanVideoCodec, settings: RolloutSettings = SETTINGS, **changes: Any
) -> RawFrames:
    """All latents first, then one decode of the whole, rounded by numpy."""
    arguments: dict[str, Any] = {
        "prompt_embeds": TEXT_ENCODER.encode(DISTINCT),
        "prompt_index": INDEX,
        "shot_index": torch.zeros_like(INDEX),
        "latent_shape": (4, 2, 4),
        "seed": 5,
        "sample_ids": IDS,
    } | changes
    latents = RolloutEngine(network, settings, FlowSchedule()).generate(**arguments).latents
    pixels = (codec.decode(latents).numpy().astype("float64") + 1) / 2 * 255
    return torch.from_numpy(pixels.round().clip(0, 255).astype("uint8"))


def assert_same_pixels(video: RawFrames, other: RawFrames) -> None:
    """Equal but for a rounding that falls on the other side."""
    difference = (video.int() - other.int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 1e-3


def test_a_video_is_the_decode_of_the_whole_rollout(network: CausalWan, codec: WanVideoCodec) -> None:
    """Catches chunks that are decoded afresh (seams, lost raw frames), prompts that are shifted, pixels that wrap."""
    video, _ = generate(network, codec)
    assert video.dtype == torch.uint8
    assert video.device.type == "cpu"
    assert video.shape == (2, 1 + 4 * (6 - 1), 3, 32, 64)
    assert ((video > 0) & (video < 255)).float().mean() > 0.5, "saturated pixels would compare nothing"
    assert_same_pixels(video, expected(network, codec))


def test_shots_guidance_and_the_negative_prompt_reach_the_rollout(network: CausalWan, codec: WanVideoCodec) -> None:
    settings = replace(SETTINGS, guidance_scale=3.0, shot_sink=True, shot_rope_offset=8.0)
    shots = torch.tensor([[0, 0, 1], [0, 1, 2]])
    video, _ = generate(network, codec, settings, shot_index=shots, negative_prompt="a grey triangle")
    negative = TEXT_ENCODER.encode(["a grey triangle"])
    assert_same_pixels(video, expected(network, codec, settings, shot_index=shots, negative_embeds=negative))
    for change in ({"negative_prompt": "a grey triangle"}, {"shot_index": shots}):
        other, _ = generate(network, codec, settings, **change)
        assert (other.int() - video.int()).abs().max() > 5


def test_seed_and_sample_ids_name_the_video(network: CausalWan, codec: WanVideoCodec) -> None:
    video, _ = generate(network, codec)
    torch.manual_seed(1)
    assert torch.equal(generate(network, codec)[0], video)
    second, _ = generate(network, codec, prompts=PROMPTS[1:], sample_ids=IDS[1:])
    assert_same_pixels(second, video[1:])
    assert not torch.equal(generate(network, codec, seed=6)[0], video)


def test_the_precision_of_the_network_is_not_that_of_the_codec() -> None:
    """Encoding has none of it either: pixels of one level more or less, by what the network multiplied in."""
    codec = DCTCodec()
    latents = torch.randn(1, 4, codec.latent_channels, 4, 4, generator=torch.Generator().manual_seed(0))
    decoder = codec.stream_decoder()
    with torch.autocast("cpu", torch.bfloat16):
        parts = [decode_chunk(decoder, chunk) for chunk in latents.split(2, dim=1)]
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(torch.cat(parts, dim=1), to_uint8(codec.decode(latents)))


def test_a_codec_is_given_the_latents_without_autocast(
    network: CausalWan, codec: WanVideoCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside: list[bool] = []
    push = WanStreamDecoder.push

    def watched(decoder: WanStreamDecoder, latents: torch.Tensor) -> torch.Tensor:
        inside.append(torch.is_autocast_enabled("cpu"))
        return push(decoder, latents)

    monkeypatch.setattr(WanStreamDecoder, "push", watched)
    with torch.autocast("cpu", torch.bfloat16):
        generate(network, codec, on_chunk=lambda report: inside.append(torch.is_autocast_enabled("cpu")))
    assert inside == [True, False] * 3


def test_timings_are_positive_and_consistent(
    network: CausalWan, codec: WanVideoCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock of its own: each look at it is a second later, so every span is known exactly."""
    reports: list[ChunkReport] = []
    _, timings = generate(network, codec, on_chunk=reports.append)
    assert [report.chunk for report in reports] == [0, 1, 2]
    assert all(report.seconds > 0 for report in reports)
    assert timings.loop == pytest.approx(sum(report.seconds for report in reports))
    assert timings.streaming >= timings.loop
    assert timings.raw_frames == 2 * 21

    ticks = itertools.count()
    monkeypatch.setattr("time.perf_counter", lambda: float(next(ticks)))
    _, timings = generate(network, codec)
    assert timings.loop == 3
    assert timings.streaming > timings.loop
    rates = timings.to_json()
    assert rates["loop_raw_frames_per_second"] == 42 / 3
    assert rates["streaming_raw_frames_per_second"] == 42 / timings.streaming
    assert (rates["loop"], rates["streaming"], rates["raw_frames"]) == (3, timings.streaming, 42)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "no prompt: give at least one"),
        ([[], []], "no prompt: give at least one"),
        ([["a"], []], r"different numbers of prompts, \[0, 1\]"),
        ([["a", "b"], ["a"]], r"different numbers of prompts, \[1, 2\]"),
    ],
    ids=["no row", "empty rows", "an empty row", "uneven rows"],
)
def test_every_chunk_of_every_video_needs_a_prompt(
    network: CausalWan, codec: WanVideoCodec, prompts: list[list[str]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        generate(network, codec, prompts=prompts, sample_ids=list(range(len(prompts))))


def test_pixels_are_rounded_and_clipped() -> None:
    """Truncation darkens by half a level; without the clip, 1.01 wraps to black."""
    values = torch.tensor([-1.5, -1.0, -0.999, -0.5, 0.0, 0.5, 0.999, 1.0, 1.01, 9.0])
    video = values.view(1, 10, 1, 1, 1).expand(1, 10, 3, 1, 1)
    assert to_uint8(video)[0, :, 0, 0, 0].tolist() == [0, 0, 0, 64, 128, 191, 255, 255, 255, 255]
    assert torch.equal(to_uint8(video.bfloat16())[0, :, 0], to_uint8(video.bfloat16().float())[0, :, 0])


def test_every_pixel_value_survives_the_way_to_floats_and_back() -> None:
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, 16, 16).expand(1, 1, 3, 16, 16)
    assert torch.equal(to_uint8(to_unit_range(values)), values)
