"""Rows that every rank has of its own, such as what it keeps of its samples, as one tensor of all ranks: a sharded
checkpoint then has each rank write its own, and read them back however many ranks there are."""

from __future__ import annotations

from torch.distributed.tensor import DTensor, Shard

from longlive.typing import Tensor


def over_ranks(rows: Tensor, like: Tensor) -> Tensor:
    """This rank's rows as its part of those of all ranks, which lie rank after rank; nothing is communicated.

    Args:
        rows: as many on every rank.
        like: a parameter. Where it is not sharded, this rank is alone, and the rows are returned as they are.
    """
    if not isinstance(like, DTensor):
        return rows
    mesh = like.device_mesh
    return DTensor.from_local(rows.to(like.to_local().device), mesh, [Shard(0)] * mesh.ndim, run_check=False)


def of_all_ranks(rows: Tensor) -> Tensor:
    """The rows of all ranks. Every rank must call it."""
    return rows.full_tensor() if isinstance(rows, DTensor) else rows
