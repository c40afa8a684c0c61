"""What is kept of a network's weights that do not change any more.

    precision    linear layers that it multiplies in low precision     other linear layers
    32-true      -                                                     float32
    bf16-mixed   -                                                     bfloat16
    nvfp4        codes, scales, amax: 0.5625 bytes per weight          bfloat16
    fp8          float32                                               bfloat16

Autocast rounds the weight and the bias of a linear layer to bfloat16 at every product. Rounded once instead, they give
the same products bit for bit, in half the memory and without the rounding. Everything else computes in float32 from
what it holds (the timestep's layers, norms, modulation), or holds next to nothing (the patches' embedding), and stays
float32. FP8 scales float32 weights, whose rounding to bfloat16 first would give other numbers.
"""

from __future__ import annotations

import torch
from lightning.pytorch.plugins import Precision
from torch import nn

from longlive.precision.plugin import LinearPrecision


def freeze(network: nn.Module, precision: Precision | str | None) -> None:
    """Keep of the frozen linear layers what products read, in place; layers that learn stay. Before sharding; weights
    may be on meta.

    Args:
        network: converted by its precision.
        precision: `32-true`, `bf16-mixed` or a plugin, in whose context the network always runs. None: not known, and
            so everything is kept.
    """
    if isinstance(precision, LinearPrecision):
        precision.freeze(network)
    elif precision != "bf16-mixed":
        return
    for layer in network.modules():
        # Subclasses multiply in their own way.
        if type(layer) is nn.Linear and not layer.weight.requires_grad:
            layer.to(torch.bfloat16)
