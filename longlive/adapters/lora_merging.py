"""An adapter in the weights of its base: `W + alpha / rank B A`, and no adapter any more.

Merging is for masters. The product is computed in float32 and rounded once to the dtype of W; what is packed to four
bits has no master left, and would lose most of a small product.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from longlive.adapters.lora import adapted_layers, matrices, wrapped_layers
from longlive.typing import Tensor


@torch.no_grad()
def merge_adapter(network: nn.Module, name: str | None) -> None:
    """Make a whole network its own base with one adapter merged into it; all adapters are gone afterwards.

    Args:
        network: on one device; its weights change in place.
        name: None: the base alone stays.

    Raises:
        ValueError: if there is no such adapter, or a layer's weight is packed; the network is untouched then.
    """
    merged = {} if name is None else adapted_layers(network, name)
    for layer_name, layer in merged.items():
        if getattr(layer.get_base_layer(), "weight", None) is None:
            raise ValueError(
                f"{layer_name} has no master weight: it is packed, and an adapter is merged into masters before they "
                "are packed; load the base again without packing it"
            )
    for layer_name, layer in wrapped_layers(network).items():
        base = layer.get_base_layer()
        if name is not None and layer_name in merged:
            down, up = matrices(layer, name)
            weight = cast(Tensor, base.weight)
            weight.copy_(merge(weight, down, up, layer.scaling[name]))
        parent, _, child = layer_name.rpartition(".")
        setattr(network.get_submodule(parent), child, base)


@torch.no_grad()
def merge(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """`W + scale B A` in float32, rounded once to the dtype of W."""
    return torch.add(weight.float(), up.float() @ down.float(), alpha=scale).to(weight.dtype)
