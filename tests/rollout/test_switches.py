"""Prompt switches within a shot: where they are, and that a rebuilt cache is the one that the same frames make under
the new prompt."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from longlive.diffusion.schedule import FlowSchedule
from longlive.models.attention import dense_attention
from longlive.models.wan.model import CausalWan
from longlive.models.wan.rope import Rotation
from longlive.rollout.engine import ChunkCondition, RolloutEngine, RolloutSettings
from longlive.rollout.state import RolloutState
from longlive.rollout.switches import cached_prompts, switches
from longlive.typing import Heads, Tensor

FRAMES, SHAPE, CHUNKS = 2, (4, 4, 4), 7
SETTINGS = RolloutSettings(
    chunk_frames=FRAMES, num_steps=2, window=8, sink_frames=2, shot_rope_offset=4.0, prompt_switch="recache"
)
PROMPTS = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0))
NEGATIVE = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(1))
PROMPT_INDEX = torch.tensor([[0, 0, 0, 0, 0, 0, 3], [1, 1, 1, 2, 2, 2, 2], [2, 2, 2, 1, 1, 1, 3]])
SHOTS = torch.tensor([[0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1, 1]])
"""In the last chunk, the samples 0 and 2 switch: one in its only shot, one in its second. Sample 1 switched before."""
IDS = [7, 3, 11]
VIDEO = torch.randn(3, CHUNKS * FRAMES, *SHAPE, generator=torch.Generator().manual_seed(3))
NOISY = torch.randn(3, FRAMES, *SHAPE, generator=torch.Generator().manual_seed(4))


def test_a_switch_is_a_new_prompt_within_a_shot() -> None:
    """Not the cut itself, and not the end of the scene-cut phrase, which the first chunk of a later shot has."""
    shots = [0, 0, 0, 1, 1, 1, 2, 3, 3]
    prompts = [0, 1, 1, 2, 3, 4, 3, 5, 4]
    assert [chunk for chunk in range(9) if switches(chunk, prompts, shots)] == [1, 5]
    assert cached_prompts(1, prompts, shots) == [1]
    assert cached_prompts(5, prompts, shots) == [1, 1, 1, 4, 4]
    assert cached_prompts(8, prompts, shots) == [1, 1, 1, 4, 4, 4, 3, 5]


class Masked:
    """Attention over whole chunks in one sequence: each sees those before it that it may."""

    def __init__(self, sees: Tensor, tokens: int) -> None:
        self.mask = sees.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)[None, None]

    def __call__(self, query: Heads, key: Heads, value: Heads, rotation: Rotation, layer: int) -> Heads:
        return dense_attention(rotation.rotate(query), rotation.rotate(key), value, self.mask)


def opened(
    network: CausalWan, settings: RolloutSettings, samples: list[int] | None = None, **start: Any
) -> tuple[RolloutEngine, RolloutState, ChunkCondition]:
    """A rollout of the random clean chunks up to the last one, which is opened."""
    rows = samples or [0, 1, 2]
    engine = RolloutEngine(network, settings, FlowSchedule())
    state = engine.start(SHAPE, 5, [IDS[row] for row in rows], CHUNKS, **start)
    negative = NEGATIVE if settings.guided else None
    for chunk in range(CHUNKS):
        shots = SHOTS[rows, chunk].tolist()
        condition = engine.open_chunk(state, PROMPTS, PROMPT_INDEX[rows, chunk], shots, negative)
        if chunk + 1 < CHUNKS:
            engine.write(state, condition, VIDEO[rows, chunk * FRAMES : (chunk + 1) * FRAMES])
    return engine, state, condition


def velocity(network: CausalWan, settings: RolloutSettings, samples: list[int] | None = None, **start: Any) -> Tensor:
    """Of the last chunk."""
    engine, _, condition = opened(network, settings, samples, **start)
    noisy = NOISY[samples or [0, 1, 2]]
    return engine.velocity(condition, noisy, torch.full(noisy.shape[:2], 700.0))


def expected_velocity(network: CausalWan, settings: RolloutSettings, sample: int) -> Tensor:
    """The last chunk's, without a cache: the frames it sees and it in one sequence, all of its shot under its prompt.

    It sees the chunks 0, 4 and 5; those of an earlier shot go by the prompt that they were made with.
    """
    chunks, shots = [0, 4, 5, 6], SHOTS[sample].tolist()
    frames = torch.tensor([c * FRAMES + f for c in chunks for f in range(FRAMES)])
    cuts = torch.tensor([float(shots[c]) for c in chunks]).repeat_interleave(FRAMES)
    # Relative positions are counted as if nothing had been evicted between the frames.
    indices = torch.arange(len(chunks) * FRAMES) if settings.relative_rope else frames
    timesteps = torch.cat([torch.zeros(1, 3 * FRAMES), torch.full((1, FRAMES), 700.0)], dim=1)
    prompts = [3 if shots[c] == shots[6] else int(PROMPT_INDEX[sample, c]) for c in chunks]
    return network(
        torch.cat([VIDEO[sample, None, frames[: 3 * FRAMES]], NOISY[sample, None]], dim=1),
        timesteps,
        PROMPTS,
        torch.tensor([prompts]),
        (indices + 4.0 * cuts)[None],
        Masked(torch.ones(4, 4, dtype=torch.bool).tril(), FRAMES * network.config.tokens_per_frame(*SHAPE[1:])),
    )[:, -FRAMES:]


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("retain", [False, True])
def test_a_rebuilt_cache_is_that_of_the_same_frames_under_the_new_prompt(
    network: CausalWan, relative: bool, retain: bool
) -> None:
    """What is seen of the shot is rebuilt, and what is seen of an earlier one is not."""
    settings = replace(SETTINGS, relative_rope=relative)
    found = velocity(network, settings, retain=retain)
    kept = velocity(network, replace(settings, prompt_switch="keep"), retain=retain)
    for sample in (0, 2):
        expected = expected_velocity(network, settings, sample)
        torch.testing.assert_close(found[sample : sample + 1], expected, atol=2e-5, rtol=1e-4)
        assert (kept[sample] - expected).abs().max() > 1e-2


@pytest.mark.parametrize("cache_dtype", [None, "nvfp4"])
@pytest.mark.parametrize("retain", [False, True])
def test_a_sample_does_not_notice_the_switches_of_another(
    network_for_blocks: CausalWan, cache_dtype: Any, retain: bool
) -> None:
    settings = replace(SETTINGS, cache_dtype=cache_dtype)
    together = velocity(network_for_blocks, settings, retain=retain)
    for sample in range(3):
        alone = velocity(network_for_blocks, settings, [sample], retain=retain)
        torch.testing.assert_close(together[sample : sample + 1], alone, atol=1e-5, rtol=1e-5)


def test_the_unconditional_branch_keeps_its_cache(network: CausalWan) -> None:
    """Its prompt has not changed. At scale 0 it is all there is."""
    unconditional = replace(SETTINGS, guidance_scale=0.0)
    kept = velocity(network, replace(unconditional, prompt_switch="keep"))
    assert torch.equal(velocity(network, unconditional), kept)
    guided = velocity(network, replace(SETTINGS, guidance_scale=3.0))
    expected = kept + 3 * (velocity(network, SETTINGS) - kept)
    torch.testing.assert_close(guided, expected, atol=5e-5, rtol=1e-4)


def test_a_rank_without_a_switch_runs_the_network_as_often_as_one_with(network: CausalWan) -> None:
    """Ranks that share a network's parts wait for each other in every call."""
    calls: list[Tensor] = []
    counted = copy.deepcopy(network)
    counted.register_forward_hook(lambda module, args, output: calls.append(output))
    numbers = []
    for sample, recaches in ((1, ()), (1, (3, 6)), (0, ()), (0, (3, 6))):
        calls.clear()
        found = velocity(counted, SETTINGS, [sample], recaches=recaches)
        numbers.append(len(calls))
        assert torch.equal(found, velocity(network, SETTINGS, [sample]))
    # Six chunks are written and one is denoised. Three are rebuilt before chunk 3, and three before chunk 6.
    assert numbers == [7 + 3, 7 + 6, 7 + 3, 7 + 6]


def test_generation_rebuilds_where_the_prompt_switches_and_nowhere_else(network: CausalWan) -> None:
    videos = {}
    for kind in ("keep", "recache"):
        engine = RolloutEngine(network, replace(SETTINGS, prompt_switch=kind), FlowSchedule())
        videos[kind] = engine.generate(PROMPTS, PROMPT_INDEX, SHOTS, SHAPE, 5, IDS).latents
    changed = (videos["recache"] - videos["keep"]).abs().amax((2, 3, 4)) > 1e-3
    first = [[chunk for chunk in range(CHUNKS) if row[chunk * FRAMES]] for row in changed.tolist()]
    assert first == [[6], [3, 4, 5, 6], [6]]


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="prompt_switch='rebuild' is unknown; use keep or recache"):
        replace(SETTINGS, prompt_switch="rebuild")
