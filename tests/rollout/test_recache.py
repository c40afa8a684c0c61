"""Prompt switches within a shot: where they are, and that a rebuilt cache is the one that the same frames make under the
new prompt."""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

from longlive.diffusion.schedule import FlowSchedule
from longlive.models.attention import dense_attention
from longlive.models.visibility import visible_history
from longlive.models.wan.model import CausalWan
from longlive.models.wan.rope import Rotation
from longlive.rollout.engine import RolloutEngine, RolloutSettings
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


def opened(network: CausalWan, settings: RolloutSettings, chunks: int = CHUNKS) -> tuple[RolloutEngine, Any, Any, Any]:
    """A rollout of random clean chunks up to the last one, which is opened; and all those chunks."""
    engine = RolloutEngine(network, settings, FlowSchedule())
    state = engine.start(SHAPE, 5, IDS, chunks)
    video = torch.randn(3, chunks * FRAMES, *SHAPE, generator=torch.Generator().manual_seed(3))
    negative = NEGATIVE if settings.guided else None
    for chunk in range(chunks):
        condition = engine.open_chunk(state, PROMPTS, PROMPT_INDEX[:, chunk], SHOTS[:, chunk].tolist(), negative)
        if chunk + 1 < chunks:
            engine.write(state, condition, video[:, chunk * FRAMES : (chunk + 1) * FRAMES])
    return engine, state, condition, video


def expected_velocity(
    network: CausalWan, settings: RolloutSettings, sample: int, video: Tensor, prompts: list[int], noisy: Tensor
) -> Tensor:
    """The last chunk's, without a cache: the frames it sees, and it, in one sequence."""
    last = CHUNKS - 1
    shots = SHOTS[sample].tolist()
    chunks = [*visible_history(last, shots, settings.rule), last]
    frames = torch.tensor([c * FRAMES + f for c in chunks[:-1] for f in range(FRAMES)])
    positions = torch.tensor([[c * FRAMES + f + 4.0 * shots[c] for c in chunks for f in range(FRAMES)]])
    if settings.relative_rope:
        # Frames without gaps; of these samples, only the cut of sample 2 is among the visible ones.
        cuts = torch.tensor([float(shots[c]) for c in chunks]).repeat_interleave(FRAMES)
        positions = (torch.arange(len(chunks) * FRAMES) + 4.0 * cuts)[None]
    timesteps = torch.cat([torch.zeros(1, len(frames)), torch.full((1, FRAMES), 700.0)], dim=1)
    sees = torch.ones(len(chunks), len(chunks), dtype=torch.bool).tril()
    tokens = FRAMES * network.config.tokens_per_frame(*SHAPE[1:])
    return network(
        torch.cat([video[sample : sample + 1, frames], noisy[sample : sample + 1]], dim=1),
        timesteps,
        PROMPTS,
        torch.tensor([[prompts[c] for c in chunks]]),
        positions,
        Masked(sees, tokens),
    )[:, -FRAMES:]


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("retain", [False, True])
def test_a_rebuilt_cache_is_that_of_the_same_frames_under_the_new_prompt(
    network: CausalWan, relative: bool, retain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sample 0 has one shot: all that is visible is rebuilt. The other samples must not notice."""
    settings = replace(SETTINGS, relative_rope=relative)
    start = RolloutEngine.start
    monkeypatch.setattr(RolloutEngine, "start", lambda *args: start(*args, retain=retain))
    noisy = torch.randn(3, FRAMES, *SHAPE, generator=torch.Generator().manual_seed(4))
    found = {}
    for kind in ("recache", "keep"):
        engine, _, condition, video = opened(network, replace(settings, prompt_switch=kind))
        found[kind] = engine.velocity(condition, noisy, torch.full((3, FRAMES), 700.0))
    expected = expected_velocity(network, settings, 0, video, [3] * CHUNKS, noisy)
    torch.testing.assert_close(found["recache"][:1], expected, atol=2e-5, rtol=1e-4)
    assert (found["keep"][:1] - expected).abs().max() > 1e-2
