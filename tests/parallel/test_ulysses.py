"""Attention over a group against the dense mask on one rank."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from helpers.distributed import run_on_ranks
from longlive.models.attention import ChunkedAttention, MaskedAttention
from longlive.models.visibility import VisibilityRule
from longlive.models.wan.rope import rotation
from longlive.parallel.layout import MakeLayout, balanced_layout, contiguous_layout
from longlive.parallel.ulysses import UlyssesAttention
from longlive.typing import Tensor

CHUNKS, TOKENS = 4, 3
SHOTS = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])
RULE = VisibilityRule(window_chunks=3, sink_chunks=1)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("make_layout", [balanced_layout, contiguous_layout], ids=["balanced", "contiguous"])
def test_a_group_attends_as_one_rank_does(make_layout: MakeLayout, size: int) -> None:
    """Two samples with other cuts. Positions are those of the owner: every chunk has another one, in any order."""
    layout = make_layout(CHUNKS, size)
    segments = layout.delivered(TOKENS)
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, 2 * CHUNKS * TOKENS, 4, 8, generator=generator, dtype=torch.float64)
    positions = torch.tensor([segment.chunk for segment in segments]).repeat_interleave(TOKENS).expand(2, -1)
    expected = MaskedAttention(segments, SHOTS, RULE)(query, key, value, rotation(positions, 1, 1, 8), layer=0)

    def run() -> Tensor:
        assert dist.group.WORLD is not None
        share = 2 * CHUNKS * TOKENS // size
        mine = slice(dist.get_rank() * share, (dist.get_rank() + 1) * share)
        attention = UlyssesAttention(ChunkedAttention(segments, SHOTS, RULE), dist.group.WORLD)
        turns = rotation(positions[:, mine], 1, 1, 8)
        return attention(query[:, mine], key[:, mine], value[:, mine], turns, layer=0)

    torch.testing.assert_close(torch.cat(run_on_ranks(run, size), dim=1), expected, atol=1e-6, rtol=1e-6)


def test_heads_that_the_ranks_do_not_divide_are_refused() -> None:
    def run() -> None:
        assert dist.group.WORLD is not None
        segments = balanced_layout(2, 2).delivered(1)
        attention = UlyssesAttention(ChunkedAttention(segments, SHOTS[:, :2], VisibilityRule()), dist.group.WORLD)
        x = torch.zeros(2, 2, 3, 8)
        with pytest.raises(ValueError, match="sequence_parallel_size=2 does not divide"):
            attention(x, x, x, rotation(torch.zeros(2, 2), 1, 1, 8), layer=0)

    run_on_ranks(run, 2)
