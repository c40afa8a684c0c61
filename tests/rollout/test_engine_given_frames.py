"""Image to video: what is given stays what it is, and the rest is what teacher forcing was trained to make of it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from longlive.codecs.dct import DCTCodec
from longlive.codecs.wan import WanVideoCodec
from longlive.data.batch import VideoBatch
from longlive.diffusion.schedule import FlowSchedule
from longlive.models.wan.config import WanConfig
from longlive.models.wan.model import CausalWan
from longlive.modules.teacher_forcing import TeacherForcingModule
from longlive.rollout.engine import RolloutEngine, RolloutSettings
from longlive.rollout.video import encode_given, generate_videos, to_uint8
from longlive.text.toy import ToyTextEncoder
from longlive.typing import Tensor

FRAMES, SHAPE, IDS = 2, (4, 4, 4), [7, 3]
SETTINGS = RolloutSettings(chunk_frames=FRAMES, num_steps=3, window=4)
PROMPTS = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
NEGATIVE = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(1))
PROMPT_INDEX = torch.tensor([[0, 0, 1, 1], [2, 1, 1, 0]])
SHOTS = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 2]])
GIVEN = torch.randn(2, 8, *SHAPE, generator=torch.Generator().manual_seed(2))


def arguments(rows: list[int], settings: RolloutSettings, **changes: Any) -> dict[str, Any]:
    return {
        "prompt_embeds": PROMPTS,
        "prompt_index": PROMPT_INDEX[rows],
        "shot_index": SHOTS[rows],
        "latent_shape": SHAPE,
        "seed": 5,
        "sample_ids": [IDS[row] for row in rows],
        "negative_embeds": NEGATIVE if settings.guided else None,
    } | changes


def roll_out(network: CausalWan, settings: RolloutSettings, rows: list[int], num_given: int) -> Tensor:
    given = GIVEN[rows, :num_given] if num_given else None
    return RolloutEngine(network, settings, FlowSchedule()).generate(**arguments(rows, settings, given=given)).latents


@pytest.mark.parametrize("solver", ["unipc", "euler"])
@pytest.mark.parametrize("num_given", [1, 2, 3, 4, 8])
def test_given_frames_stay_what_they_are_to_the_bit(network: CausalWan, num_given: int, solver: str) -> None:
    """One more solver step, or one rounding, and the first frame is no longer the image."""
    latents = roll_out(network, replace(SETTINGS, solver=solver, guidance_scale=3.0), [0, 1], num_given)
    assert torch.equal(latents[:, :num_given], GIVEN[:, :num_given])
    free = roll_out(network, replace(SETTINGS, solver=solver, guidance_scale=3.0), [0, 1], 0)
    if num_given < 8:
        assert (latents[:, num_given:] - free[:, num_given:]).abs().amax((2, 3, 4)).min() > 1e-3, (
            "and all else sees them"
        )


def test_every_call_sees_the_given_frames_clean_at_timestep_zero(
    network: CausalWan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained like this. Noised like the others, or at their timestep, the network takes the image for noise."""
    calls: list[tuple[Tensor, Tensor]] = []
    real = RolloutEngine.velocity

    def noted(engine: RolloutEngine, condition: Any, x: Tensor, timesteps: Tensor) -> Tensor:
        calls.append((x, timesteps))
        return real(engine, condition, x, timesteps)

    monkeypatch.setattr(RolloutEngine, "velocity", noted)
    roll_out(network, SETTINGS, [0, 1], 3)
    assert len(calls) == 3 * SETTINGS.num_steps, "a chunk of given frames alone needs no denoising"
    for number, (x, timesteps) in enumerate(calls):
        if number < SETTINGS.num_steps:  # of the second chunk, whose first frame is given
            assert torch.equal(x[:, :1], GIVEN[:, 2:3])
            assert (timesteps[:, 0] == 0).all()
            assert (timesteps[:, 1] > 0).all()
        else:
            assert (timesteps > 0).all()


@pytest.mark.parametrize("changes", [{}, {"shot_sink": True, "shot_rope_offset": 8.0, "guidance_scale": 3.0}], ids=str)
def test_a_sample_with_its_image_and_its_cuts_does_not_depend_on_the_batch(
    network: CausalWan, changes: dict[str, Any]
) -> None:
    """Known mistakes 9 and 14: images, cuts or prompts of the first sample used for all."""
    settings = replace(SETTINGS, **changes)
    together = roll_out(network, settings, [0, 1], 1)
    for row in range(2):
        torch.testing.assert_close(together[row : row + 1], roll_out(network, settings, [row], 1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(roll_out(network, settings, [1, 0], 1), together[[1, 0]], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num_given", [1, 3])
def test_a_cached_rollout_equals_the_teacher_forcing_forward(num_given: int) -> None:
    """The module's own inputs and forward on one side; the engine's calls on the other, on the same noisy latents."""
    module = TeacherForcingModule(
        model=WanConfig.tiny(num_layers=2, dim=48, ffn_dim=64, num_heads=2, text_dim=8, freq_dim=16),
        codec=DCTCodec(),
        text_encoder=ToyTextEncoder(embed_dim=8),
        schedule=FlowSchedule(),
        chunk_frames=FRAMES,
        optimizer=partial(torch.optim.SGD, lr=0.1),
        window=4,
        shot_sink=True,
        shot_rope_offset=8.0,
        given_frames=num_given,
    )
    module.configure_model()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.trained_network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    names = ("a red circle", "a blue square", "a green cross")
    batch = VideoBatch(
        latents=torch.randn(2, 8, 16, 4, 4, generator=generator),
        prompts=tuple(tuple(names[index] for index in row) for row in PROMPT_INDEX.tolist()),
        shot_index=SHOTS,
        num_valid_frames=torch.tensor([8, 8]),
        sample_ids=torch.tensor(IDS),
    )
    assert batch.latents is not None
    inputs = module.make_inputs(batch.latents, batch, step=0)
    embeds, index = module.embed(batch.prompts)
    with torch.no_grad():
        expected = module.predict(inputs, batch, embeds, index)
        noisy = inputs.latents[:, inputs.num_history_frames :]
        assert torch.equal(noisy[:, :num_given], batch.latents[:, :num_given])
        settings = RolloutSettings(FRAMES, window=4, shot_sink=True, shot_rope_offset=8.0)
        engine = module.rollout_engine(settings)
        state = engine.start((16, 4, 4), 0, IDS, max_chunks=4)
        for chunk in range(4):
            frames = slice(chunk * FRAMES, (chunk + 1) * FRAMES)
            condition = engine.open_chunk(state, embeds, index[:, chunk], SHOTS[:, chunk].tolist())
            velocity = engine.velocity(condition, noisy[:, frames], inputs.target_timesteps[:, frames])
            torch.testing.assert_close(velocity, expected[:, frames], atol=2e-5, rtol=1e-4)
            engine.write(state, condition, batch.latents[:, frames])


@pytest.mark.parametrize("codec", [DCTCodec(), WanVideoCodec.tiny(seed=1)], ids=["dct", "wan"])
def test_a_video_begins_with_the_image_as_the_codec_knows_it(codec: Any) -> None:
    """To the bit: the first raw frame of the video is what the codec makes of the image alone."""
    config = WanConfig.tiny(
        num_layers=1, dim=48, ffn_dim=64, num_heads=2, text_dim=8, freq_dim=16,
        in_channels=codec.latent_channels, out_channels=codec.latent_channels,
    )  # fmt: skip
    network = CausalWan(config)
    network.init_weights(seed=0)
    engine = RolloutEngine(network.requires_grad_(False).eval(), SETTINGS, FlowSchedule())
    size = 4 * codec.spatial_ratio
    images = torch.rand(2, 1, 3, size, size, generator=torch.Generator().manual_seed(3)) * 2 - 1
    prompts = [["a red circle"] * 2, ["a blue square"] * 2]
    encoder = ToyTextEncoder(embed_dim=8, num_tokens=4)
    videos, _ = generate_videos(
        engine, codec, encoder, prompts, (4, 4), seed=0, sample_ids=[0, 1], first_raw_frames=images
    )
    given = encode_given(codec, images, torch.device("cpu"))
    assert given.shape[1] == 1
    assert (to_uint8(codec.decode(given)).int() - videos[:, :1].int()).abs().max() <= 1
    clip = torch.cat([images, torch.rand(2, 4, 3, size, size) * 2 - 1], dim=1)
    torch.testing.assert_close(codec.encode(clip)[:, :1], given, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="are no first frames of videos"):
        generate_videos(engine, codec, encoder, prompts, (2, 4), seed=0, sample_ids=[0, 1], first_raw_frames=images)


@pytest.mark.parametrize("shape", [(2, 1, 4, 4, 2), (2, 9, 4, 4, 4), (2, 0, 4, 4, 4)], ids=str)
def test_given_frames_that_do_not_fit_are_refused_before_any_work(network: CausalWan, shape: tuple[int, ...]) -> None:
    engine = RolloutEngine(network, SETTINGS, FlowSchedule())
    with pytest.raises(ValueError, match=r"are no first frames of videos \(2, 8, 4, 4, 4\); .* at most 8"):
        engine.rollout(**arguments([0, 1], SETTINGS, given=torch.zeros(shape)))
