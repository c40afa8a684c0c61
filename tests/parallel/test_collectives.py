"""The exchange against plain indexing, forward and backward, in groups that are not the whole world."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from helpers.distributed import run_on_ranks
from longlive.parallel.collectives import all_to_all, gather_parts, gather_sequence, scatter_sequence
from longlive.parallel.mesh import DATA, SEQUENCE, make_mesh
from longlive.typing import Tensor

BATCH, TOKENS, HEADS, WIDTH = 2, 6, 4, 3


def whole(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """All heads of all tokens, the same on every rank."""
    shape = (BATCH, TOKENS * 4, HEADS, WIDTH)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize(("world", "size"), [(2, 2), (4, 4), (4, 2)], ids=str)
def test_tokens_and_heads_change_places_and_come_back_and_so_do_gradients(world: int, size: int) -> None:
    """On 2 of 4 ranks, groups are neighbours: ranks 2 and 3 must not meet 0 and 1."""

    def run() -> None:
        mesh = make_mesh(world, size, "cpu")
        group, rank = mesh[SEQUENCE].get_group(), mesh[SEQUENCE].get_local_rank()
        data_rank = mesh[DATA].get_local_rank()
        assert dist.get_rank() == data_rank * size + rank
        clip = [whole(10 * data_rank + which)[:, : TOKENS * size] for which in range(3)]
        mine = slice(rank * TOKENS, (rank + 1) * TOKENS)
        heads = slice(rank * HEADS // size, (rank + 1) * HEADS // size)
        inputs = [x[:, mine].clone().requires_grad_() for x in clip]
        gathered = gather_sequence(inputs, group)
        for found, x in zip(gathered, clip, strict=True):
            assert torch.equal(found, x[:, :, heads])
        back = scatter_sequence(gathered[0] * gathered[1], group)
        assert torch.equal(back, (clip[0] * clip[1])[:, mine])

        weight = whole(99)[:, : TOKENS * size]
        # An expanded gradient, as a sum gives it, is not contiguous; the sum over k of the same one is.
        (scatter_sequence(gathered[0] * gathered[1], group) * weight[:, mine]).sum().backward()
        scatter_sequence(gathered[2], group).sum().backward()
        assert inputs[0].grad is not None
        assert torch.equal(inputs[0].grad, (clip[1] * weight)[:, mine])
        assert inputs[1].grad is not None
        assert torch.equal(inputs[1].grad, (clip[0] * weight)[:, mine])

    run_on_ranks(run, world)


def test_everybody_gets_all_parts_and_a_part_the_gradients_of_all() -> None:
    """Each rank weighs the parts otherwise: the gradient of its own is no multiple of what it made of it itself."""

    def run() -> None:
        assert dist.group.WORLD is not None
        rank = dist.get_rank()
        part = whole(rank).requires_grad_()
        parts = gather_parts(part, dist.group.WORLD)
        assert torch.equal(parts, torch.stack([whole(0), whole(1)]))
        ((parts[0] + 3 * parts[1]) * (10 + rank)).sum().backward()
        assert part.grad is not None
        assert (part.grad == (1, 3)[rank] * 21).all()

    run_on_ranks(run, 2)


def test_one_part_for_every_rank_is_asked_for() -> None:
    def run() -> None:
        assert dist.group.WORLD is not None
        with pytest.raises(ValueError, match="3 parts cannot be dealt out to 2 ranks"):
            all_to_all(torch.zeros(3, 2), dist.group.WORLD)

    run_on_ranks(run, 2)
