"""A rollout that ranks share against the same one on one rank: latents, gradients and what a rank's cache holds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from helpers.distributed import run_on_ranks
from longlive.diffusion.schedule import FlowSchedule
from longlive.models.wan.model import CausalWan
from longlive.parallel.mesh import ALONE, SequenceShare
from longlive.rollout.engine import RolloutEngine, RolloutSettings
from longlive.rollout.student import StudentRollout
from longlive.typing import Tensor

FRAMES, SHAPE, CHUNKS, SIZE = 2, (4, 4, 4), 5, 2
SETTINGS = RolloutSettings(chunk_frames=FRAMES, num_steps=2, window=6, shot_sink=True, shot_rope_offset=4.0)
PROMPTS = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
PROMPT_INDEX = torch.tensor([[0, 0, 1, 1, 2], [2, 1, 1, 1, 0]])
SHOTS = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]])
"""Cut at different chunks: the samples' tables differ, and slots are evicted in both."""
IDS = [7, 3]
GIVEN = torch.randn(2, 1, *SHAPE, generator=torch.Generator().manual_seed(3))
WEIGHTS = torch.randn(2, CHUNKS * FRAMES, *SHAPE, generator=torch.Generator().manual_seed(2))
BORDER = 3
"""Frames in the first rank's loss: a part of a chunk, so that a chunk's gradient comes from both ranks."""

CASES: dict[str, dict[str, Any]] = {
    "window and shot sink": {},
    "everything": {"window": None, "shot_sink": False},
    "sinks and a given frame": {"sink_frames": 2, "solver": "euler", "given": GIVEN},
    "relative positions": {"relative_rope": True},
    "NVFP4 slots": {"cache_dtype": "nvfp4"},
    "relative NVFP4 slots": {"cache_dtype": "nvfp4", "relative_rope": True},
}


@dataclass
class Made:
    """Latents of a rollout, gradients of a loss on them, and bytes of the cache."""

    latents: Tensor
    gradients: dict[str, Tensor]
    num_bytes: int


def share() -> SequenceShare:
    """This process's, of a group of all."""
    return SequenceShare(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)


def roll_out(
    network: CausalWan, sequence: SequenceShare, given: Tensor | None = None, checkpointed: bool = False, **changes: Any
) -> Made:
    """A student's rollout, and the gradients that this rank sums up. In float64, because two float32 numbers that
    differ in their last bit may be far apart in NVFP4."""
    student = copy.deepcopy(network).double().requires_grad_(True)
    if checkpointed:
        for block in student.blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    engine = RolloutEngine(student, replace(SETTINGS, **changes), FlowSchedule(), sequence)
    rollout = StudentRollout(engine, exit_per="chunk")
    state = rollout.start(SHAPE, seed=5, sample_ids=IDS, max_chunks=CHUNKS, step=4, purpose="student_rollout")
    clip = rollout.clip(state, PROMPTS.double(), PROMPT_INDEX, SHOTS, given)
    assert len(set(clip.exit_steps)) == 2
    mine = (slice(None), slice(BORDER), slice(BORDER, None))[0 if sequence.size == 1 else 1 + sequence.rank]
    (clip.latents * WEIGHTS)[:, mine].sum().backward()
    gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    return Made(clip.latents.detach(), gradients, engine.cache_bytes((4, 4), 2, CHUNKS))


@pytest.fixture(scope="module")
def split(network_for_blocks: CausalWan) -> dict[str, list[Made]]:
    """By case, what every rank made; activations are recomputed."""

    def run() -> dict[str, Made]:
        return {name: roll_out(network_for_blocks, share(), checkpointed=True, **case) for name, case in CASES.items()}

    ranks = run_on_ranks(run, SIZE)
    return {name: [rank[name] for rank in ranks] for name in CASES}


@pytest.mark.parametrize("case", CASES)
def test_a_shared_rollout_is_that_of_one_rank_and_so_are_its_gradients(
    network_for_blocks: CausalWan, split: dict[str, list[Made]], case: str
) -> None:
    """Each rank's loss reads other frames. Catches gradients that stay on the rank of the loss, heads or frames that
    change places, keys that are rotated twice, and collectives in another order when blocks run again."""
    expected, found = roll_out(network_for_blocks, ALONE, **CASES[case]), split[case]
    assert torch.equal(found[0].latents, found[1].latents)
    torch.testing.assert_close(found[0].latents, expected.latents, atol=1e-5, rtol=1e-5)
    scale = max(float(gradient.abs().max()) for gradient in expected.gradients.values())
    assert scale > 1e-2
    for name, gradient in expected.gradients.items():
        assert (sum(rank.gradients[name] for rank in found) - gradient).abs().max() <= 1e-5 * scale, name
    assert [rank.num_bytes for rank in found] == [expected.num_bytes // SIZE] * SIZE


def test_a_video_is_generated_alike_with_guidance_too(network: CausalWan) -> None:
    settings = replace(SETTINGS, guidance_scale=3.0)

    def generate(of_group: Callable[[], SequenceShare] = share) -> Tensor:
        engine = RolloutEngine(network, settings, FlowSchedule(), of_group())
        negative = torch.ones(1, 5, 8)
        return engine.generate(PROMPTS, PROMPT_INDEX, SHOTS, SHAPE, 5, IDS, negative, given=GIVEN).latents

    expected = generate(lambda: ALONE)
    for latents in run_on_ranks(generate, SIZE):
        torch.testing.assert_close(latents, expected, atol=1e-4, rtol=1e-4)
