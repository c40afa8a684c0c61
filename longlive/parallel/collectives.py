"""Differentiable communication inside a sequence group of P ranks.

Ulysses (arXiv 2309.14509) turns "all heads of my tokens" into "my heads of all tokens" and back. Both directions are
one all-to-all; the gradient of the one is the other. Queries, keys and values travel together, because three small
exchanges cost three latencies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from longlive.typing import Float, Heads, Tensor


def all_to_all(parts: Float[Tensor, "size ..."], group: dist.ProcessGroup) -> Float[Tensor, "size ..."]:
    """Part j goes to rank j of the group; part j of the result came from rank j.

    Raises:
        ValueError: if there is not one part for every rank.
    """
    size = group.size()
    if parts.shape[0] != size:
        raise ValueError(f"{parts.shape[0]} parts cannot be dealt out to {size} ranks; give one part for every rank")
    received: Tensor = _AllToAll.apply(parts, group)
    return received


class _AllToAll(torch.autograd.Function):
    """The gradient of an exchange is the exchange of the gradient.

    torch's functional collectives have a differentiable one, too. It returns before it is done, and on gloo its buffers
    may be freed by then: now and then the result was garbage, or the heap was.
    """

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        received = torch.empty_like(parts, memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, parts.contiguous(), group=group)
        return received

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return all_to_all(gradient, ctx.group), None


def gather_sequence(tensors: Sequence[Heads], group: dist.ProcessGroup) -> tuple[Float[Tensor, "b all_l share e"], ...]:
    """All heads of this rank's tokens become this rank's share of the heads of all tokens, rank after rank:
    `[b l n e]` to `[b P*l n/P e]`.

    Args:
        tensors: of one shape, such as queries, keys and values; they travel in one exchange.
        group: its ranks divide the heads.
    """
    by_head_share = [x.unflatten(2, (group.size(), -1)).permute(2, 0, 1, 3, 4) for x in tensors]
    by_source = all_to_all(torch.stack(by_head_share, dim=1), group)
    return tuple(x.transpose(0, 1).flatten(1, 2) for x in by_source.unbind(1))


def scatter_sequence(attended: Float[Tensor, "b all_l share e"], group: dist.ProcessGroup) -> Heads:
    """The way back: this rank's heads of all tokens become all heads of this rank's tokens."""
    by_owner = attended.unflatten(1, (group.size(), -1)).transpose(0, 1)
    by_head_share = all_to_all(by_owner, group)
    return by_head_share.permute(1, 2, 0, 3, 4).flatten(2, 3)


def gather_parts(part: Float[Tensor, ...], group: dist.ProcessGroup) -> Float[Tensor, "size ..."]:
    """The parts of all ranks, one of each and all of one shape. The gradient of a part is the sum of what all ranks
    made of it."""
    return all_to_all(part.expand(group.size(), *part.shape), group)
