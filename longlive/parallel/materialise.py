"""Weights for a network that was built on meta and perhaps sharded there: no rank ever holds the whole of it.

Initial weights and files both hand out one named tensor at a time (`CausalWan.initial_weights`, `stored_weights`). A
rank takes its own rows of each. Of a file it reads no others; initial weights it draws whole, one tensor after the
other, so that numbers do not depend on how many ranks there are. So does a layer that keeps its weight in another form
(`PacksWeight`) get it whole.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch.distributed.tensor import DTensor, Shard

from longlive.data.weight_files import StoredTensor
from longlive.models.wan.model import CausalWan
from longlive.models.wan.weights import stored_weights
from longlive.typing import Tensor


@runtime_checkable
class PacksWeight(Protocol):
    """A layer that may keep its weight in another form, and does if `is_packed`."""

    @property
    def is_packed(self) -> bool: ...

    def pack(self, master: Tensor) -> None:
        """Take the weight: whole, whatever part of it the layer keeps on this rank."""


@torch.no_grad()
def materialise(
    network: CausalWan, device: torch.device | str, weights: str | Path | None = None, seed: int = 0
) -> None:
    """Give a network that was built on meta its memory and its weights, sharded or whole.

    Args:
        network: on meta, or its weights are lost; parameters keep their dtypes. Adapters get memory alone.
        device: where to.
        weights: files as `load_weights` takes them. None: `initial_weights(seed)`.
        seed: of the initial weights.

    Raises:
        ValueError: on every rank, if the weights are none of this network's; see `load_weights`.
    """
    with torch.device("meta"):
        # What adapters have wrapped goes by other names, but is found under the network's own.
        plain = CausalWan(network.config)
    tensors: Iterable[tuple[str, Tensor | StoredTensor]]
    tensors = plain.initial_weights(seed) if weights is None else stored_weights(plain, weights)
    network.to_empty(device=torch.device(device))
    packed = {
        f"{name.removesuffix('.base_layer')}.weight": layer  # what an adapter has wrapped
        for name, layer in network.named_modules()
        if isinstance(layer, PacksWeight) and layer.is_packed
    }
    for name, tensor in tensors:
        if name in packed:
            packed[name].pack(tensor[()])
            continue
        part, where = local_part(network.get_parameter(name))
        if part.numel():
            part.copy_(tensor[where])


def local_part(parameter: Tensor) -> tuple[Tensor, tuple[slice, ...]]:
    """This rank's part of a parameter, and which part of the whole it is. A plain tensor is all there.

    Raises:
        ValueError: for a DTensor that is neither replicated nor in runs of rows.
    """
    whole = tuple(slice(0, size) for size in parameter.shape)
    if not isinstance(parameter, DTensor):
        return parameter.detach(), whole
    part, where = parameter.to_local(), whole
    for axis, placement in enumerate(parameter.placements):
        if placement == Shard(0):
            rows = -(-parameter.shape[0] // parameter.device_mesh.size(axis))
            start = min(rows * parameter.device_mesh.get_local_rank(axis), parameter.shape[0])
            where = (slice(start, start + part.shape[0]), *whole[1:])
        elif not placement.is_replicate():
            raise ValueError(f"a parameter placed as {placement} is no run of rows; shard it by shard_network")
    return part, where
