"""Whole rollouts: against a reference without a cache, and the promises about seeds, batches, length and bad input."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from longlive import rng
from longlive.diffusion.schedule import FlowSchedule
from longlive.diffusion.solver import make_solver
from longlive.models.attention import ChunkedAttention
from longlive.models.visibility import Role, Segment
from longlive.models.wan.model import CausalWan
from longlive.rollout.engine import ChunkReport, RolloutEngine, RolloutSettings
from longlive.typing import Tensor

FRAMES, SHAPE, CHUNKS = 2, (4, 4, 4), 6
SETTINGS = RolloutSettings(chunk_frames=FRAMES, num_steps=3, window=6, sink_frames=2)
PROMPTS = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0))
NEGATIVE = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(1))
PROMPT_INDEX = torch.tensor([[0, 0, 1, 1, 2, 2], [3, 3, 3, 1, 1, 0], [2, 2, 2, 2, 2, 2]])
SHOTS = torch.tensor([[0, 0, 1, 1, 2, 2], [0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0]])
IDS = [7, 3, 11]


def arguments(**changes: Any) -> dict[str, Any]:
    return {
        "prompt_embeds": PROMPTS,
        "prompt_index": PROMPT_INDEX,
        "shot_index": SHOTS,
        "latent_shape": SHAPE,
        "seed": 5,
        "sample_ids": IDS,
    } | changes


def generate(network: CausalWan, settings: RolloutSettings = SETTINGS, **changes: Any) -> Tensor:
    return RolloutEngine(network, settings, FlowSchedule()).generate(**arguments(**changes)).latents


def picked(rows: list[int], chunks: int = CHUNKS) -> dict[str, Any]:
    return {
        "prompt_index": PROMPT_INDEX[rows, :chunks],
        "shot_index": SHOTS[rows, :chunks],
        "sample_ids": [IDS[row] for row in rows],
    }


@torch.no_grad()
def reference(network: CausalWan, settings: RolloutSettings, sample: int) -> Tensor:
    """One sample without a cache: every solver step is a teacher-forcing forward of all that came before."""
    shots = SHOTS[sample : sample + 1]
    tokens = FRAMES * network.config.tokens_per_frame(*SHAPE[1:])
    video = torch.empty(1, 0, *SHAPE)

    def velocity(x: Tensor, timestep: float, chunk: int, prompts: Tensor, prompt_index: Tensor) -> Tensor:
        segments = [*(Segment(Role.CLEAN, c, tokens) for c in range(chunk)), Segment(Role.NOISY, chunk, tokens)]
        positions = torch.arange((chunk + 1) * FRAMES) + settings.shot_rope_offset * shots[
            :, : chunk + 1
        ].repeat_interleave(FRAMES, 1)
        timesteps = torch.cat([torch.zeros(1, chunk * FRAMES), torch.full((1, FRAMES), timestep)], dim=1)
        attention = ChunkedAttention(segments, shots, settings.rule)
        output = network(torch.cat([video, x], dim=1), timesteps, prompts, prompt_index, positions, attention)
        return output[:, -FRAMES:]

    for chunk in range(CHUNKS):
        x = rng.normal((FRAMES, *SHAPE), 5, "rollout", sample=IDS[sample], chunk=chunk)[None]
        solver = make_solver(settings.solver, settings.num_steps, FlowSchedule())
        for timestep, _ in solver:
            v = velocity(x, timestep, chunk, PROMPTS, PROMPT_INDEX[sample : sample + 1, : chunk + 1])
            if settings.guided:
                without = velocity(x, timestep, chunk, NEGATIVE, torch.zeros(1, 1, dtype=torch.int64))
                v = without + settings.guidance_scale * (v - without)
            x = solver.step(v, x)
        video = torch.cat([video, x], dim=1)
    return video


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"window": None, "sink_frames": 0},
        {"shot_sink": True, "shot_rope_offset": 8.0},
        {"guidance_scale": 3.0, "shot_sink": True},
        {"solver": "euler", "guidance_scale": 2.0, "window": None, "sink_frames": 0},
    ],
    ids=str,
)
def test_a_rollout_equals_one_that_recomputes_everything(network: CausalWan, changes: dict[str, Any]) -> None:
    """Catches branches, prompts, shots or samples that get mixed up, and a context pass that stores the wrong thing."""
    settings = replace(SETTINGS, **changes)
    ours = generate(network, settings, negative_embeds=NEGATIVE if settings.guided else None)
    for sample in range(len(IDS)):
        expected = reference(network, settings, sample)
        torch.testing.assert_close(ours[sample : sample + 1], expected, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_sample_does_not_depend_on_its_batch(network: CausalWan, relative: bool, scale: float) -> None:
    """Catches shots, prompts or noise taken from sample 0 for the whole batch (known mistakes 9 and 14)."""
    settings = replace(SETTINGS, shot_sink=True, relative_rope=relative, guidance_scale=scale, shot_rope_offset=4.0)
    negative = {"negative_embeds": NEGATIVE if settings.guided else None}
    together = generate(network, settings, **negative)
    for row in range(len(IDS)):
        alone = generate(network, settings, **picked([row]), **negative)
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-5)
    reordered = generate(network, settings, **picked([2, 0]), **negative)
    torch.testing.assert_close(reordered, together[[2, 0]], atol=1e-5, rtol=1e-5)


def test_a_shorter_rollout_is_a_prefix_of_a_longer_one(network: CausalWan) -> None:
    """Also without a window, where the longer one has a larger ring."""
    for settings in (SETTINGS, replace(SETTINGS, window=None, sink_frames=0)):
        whole = generate(network, settings)
        part = generate(network, settings, **picked([0, 1, 2], chunks=4))
        torch.testing.assert_close(part, whole[:, : 4 * FRAMES], atol=1e-6, rtol=1e-6)


def test_the_seed_and_the_sample_id_name_the_noise(network: CausalWan) -> None:
    first = generate(network)
    torch.manual_seed(1)
    assert torch.equal(generate(network), first)
    assert (generate(network, seed=6) - first).abs().amax((1, 2, 3, 4)).min() > 0.1
    assert (generate(network, sample_ids=[7, 3, 12]) - first).abs().amax((1, 2, 3, 4))[2] > 0.1


def test_a_prompt_acts_from_its_chunk_on(network: CausalWan) -> None:
    """Catches prompts that are shifted by a chunk, or of which only the first is used."""
    changed = PROMPT_INDEX.clone()
    changed[0, 3] = 3
    difference = (generate(network, prompt_index=changed) - generate(network)).abs().amax((2, 3, 4))
    assert (difference[0, : 3 * FRAMES] == 0).all()
    assert (difference[0, 3 * FRAMES :] > 0).all()
    assert (difference[1:] == 0).all()


def test_memory_does_not_grow_with_the_video(network: CausalWan) -> None:
    engine = RolloutEngine(network, replace(SETTINGS, num_steps=1, relative_rope=True), FlowSchedule())
    state = engine.start(SHAPE, 0, [0], max_chunks=3)
    size, storages = state.cache.num_bytes, [id(layer) for layer in state.cache.layers]
    for _ in range(25):
        condition = engine.open_chunk(state, PROMPTS, torch.tensor([0]), [0])
        engine.write(state, condition, engine.noise(state))
    assert state.cache.num_bytes == size
    assert [id(layer) for layer in state.cache.layers] == storages
    assert condition.view.frame_positions.max() < 6


def test_chunks_come_one_by_one_and_are_reported(network: CausalWan) -> None:
    """Catches a generator that computes everything first, and `no_grad` leaking to whoever consumes the chunks."""
    reports: list[ChunkReport] = []
    engine = RolloutEngine(network, SETTINGS, FlowSchedule())
    chunks = []
    for latents in engine.rollout(**arguments(), on_chunk=reports.append):
        chunks.append(latents)
        assert len(reports) == len(chunks)
        assert torch.is_grad_enabled()
        assert not latents.requires_grad
    assert [report.chunk for report in reports] == list(range(CHUNKS))
    assert all(report.seconds > 0 and report.num_chunks == CHUNKS for report in reports)
    generated = engine.generate(**arguments())
    assert torch.equal(torch.cat(chunks, dim=1), generated.latents)
    assert len(generated.chunk_seconds) == CHUNKS


def test_a_network_that_trains_is_not_given_gradients_unless_asked(network: CausalWan) -> None:
    """`generate` builds no graph; the denoise call on its own does, and the context pass never."""
    trained = copy.deepcopy(network).requires_grad_(True)
    engine = RolloutEngine(trained, SETTINGS, FlowSchedule())
    assert not engine.generate(**arguments()).latents.requires_grad

    state = engine.start(SHAPE, 0, [0], max_chunks=2)
    condition = engine.open_chunk(state, PROMPTS, torch.tensor([0]), [0])
    noise = engine.noise(state)
    velocity = engine.velocity(condition, noise, torch.full((1, FRAMES), 1000.0))
    engine.write(state, condition, noise - velocity.detach())
    assert velocity.requires_grad
    assert not any(tensor.requires_grad for layer in state.cache.layers for tensor in layer.read(1, torch.float32))
    velocity.sum().backward()
    assert all(p.grad is not None for p in trained.blocks[0].parameters())


def test_a_bfloat16_network_rolls_out_in_float32_latents(network: CausalWan) -> None:
    latents = generate(
        copy.deepcopy(network).bfloat16(), replace(SETTINGS, guidance_scale=2.0), negative_embeds=NEGATIVE
    )
    exact = generate(network, replace(SETTINGS, guidance_scale=2.0), negative_embeds=NEGATIVE)
    assert latents.dtype == torch.float32
    assert (latents - exact).abs().mean() < 0.1 * exact.abs().mean()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunk_frames": 0}, "chunk_frames=0"),
        ({"num_steps": 0}, "num_steps=0"),
        ({"solver": "heun"}, "unipc, euler"),
        ({"guidance_scale": -1.0}, "guidance_scale=-1"),
        ({"window": 7}, "window=7 is no multiple of chunk_frames=2; use 6 or 8"),
        ({"sink_frames": 3}, "sink_frames=3"),
        ({"window": 4, "sink_frames": 4}, "window_chunks=2 cannot hold"),
        ({"window": 4, "shot_sink": True}, "use at least 3"),
        ({"window": None}, "no effect without a window"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SETTINGS, **changes)


def test_frames_are_a_multiple_of_the_chunk() -> None:
    assert SETTINGS.num_chunks(12) == 6
    for frames in (0, 1, 13):
        with pytest.raises(ValueError, match=rf"num_frames={frames} .* use \d+ or \d+"):
            SETTINGS.num_chunks(frames)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_embeds": PROMPTS[:0]}, "no prompt"),
        ({"prompt_index": PROMPT_INDEX[:, :0], "shot_index": SHOTS[:, :0]}, "no prompt"),
        ({"shot_index": SHOTS[:, :3]}, "do not fit"),
        ({"sample_ids": [1, 2]}, "2 sample_ids do not fit"),
        ({"prompt_index": PROMPT_INDEX + 1}, "from 1 to 4, but there are 4 prompts"),
        ({"prompt_embeds": PROMPTS[..., :6]}, "prompt_embeds of 6 features: the network takes 8"),
        ({"latent_shape": (3, 4, 4)}, "3 channels: the network takes 4"),
        ({"latent_shape": (4, 5, 4)}, "height=5"),
        ({"negative_embeds": NEGATIVE}, "takes no negative_embeds"),
    ],
    ids=["no embeddings", "no chunks", "shots", "ids", "index", "features", "channels", "patches", "negative"],
)
def test_arguments_that_do_not_fit_are_refused_before_any_work(
    network: CausalWan, changes: dict[str, Any], message: str
) -> None:
    """The call itself raises, not the first chunk."""
    engine = RolloutEngine(network, SETTINGS, FlowSchedule())
    with pytest.raises(ValueError, match=message):
        engine.rollout(**arguments(**changes))


@pytest.mark.parametrize("negative", [None, NEGATIVE[:, :3]], ids=["missing", "short"])
def test_guidance_needs_a_fitting_negative_prompt(network: CausalWan, negative: Tensor | None) -> None:
    engine = RolloutEngine(network, replace(SETTINGS, guidance_scale=3.0), FlowSchedule())
    with pytest.raises(ValueError, match="negative_embeds"):
        engine.rollout(**arguments(negative_embeds=negative))
