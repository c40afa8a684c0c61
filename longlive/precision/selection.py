"""Which linear layers multiply in low precision, and why the others do not.

A layer is chosen by its name in the network, with shell patterns. The defaults name every linear layer of the
transformer blocks: queries, keys, values and outputs of both attentions, and the feed-forward's two. Everything else
stays as it is: embeddings and head are small and see raw inputs, the timestep's layers are float32 by design, norms and
modulation are no matrix products, and attention itself multiplies two activations.

Names are compared from their end, so that `blocks.*.ffn.0` means the same layer in a network, in a module that holds it
and under peft, which moves a layer it adapts to `<name>.base_layer`. An adapter's own matrices match no default.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.conv import _ConvNd

BLOCK_LINEARS = ("blocks.*.self_attn.[qkvo]", "blocks.*.cross_attn.[qkvo]", "blocks.*.ffn.[02]")
"""Every linear layer of Wan's blocks: 10 per block, 300 in the 5B model."""

_BLOCK = re.compile(r"(?:^|\.)blocks\.(\d+)\.")


@dataclass(frozen=True)
class Layer:
    """A layer that multiplies by a matrix.

    Attributes:
        name: in the module that was looked at.
        in_features, out_features: of the product.
        reason: why it stays in high precision; None: it is wrapped.
    """

    name: str
    in_features: int
    out_features: int
    reason: str | None = None


@dataclass(frozen=True)
class LayerSelection:
    """Which layers are wrapped.

    Attributes:
        multiple: of which both sizes of a weight must be multiples: what the format's products take.
        layers: shell patterns of names.
        keep_last_blocks_bf16: share of the blocks, the last ones, that stay in bfloat16; rounded up to whole blocks.
            Pretraining in NVFP4 keeps 0.15 (arXiv 2509.25149).

    Raises:
        ValueError: for a share outside [0, 1), or no pattern.
    """

    multiple: int
    layers: Sequence[str] = BLOCK_LINEARS
    keep_last_blocks_bf16: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.keep_last_blocks_bf16 < 1:
            raise ValueError(
                f"keep_last_blocks_bf16={self.keep_last_blocks_bf16} must be at least 0 and below 1: a share of the "
                "blocks"
            )
        if isinstance(self.layers, str) or not self.layers:
            raise ValueError(f"layers={self.layers!r} must be a list of name patterns, as {list(BLOCK_LINEARS)}")

    def of(self, module: nn.Module, wrapped: type[nn.Linear] = nn.Linear) -> tuple[Layer, ...]:
        """Every layer with a weight matrix in `module`, in its order.

        Args:
            module: a network, sharded or not, or what holds one.
            wrapped: the class of layers that are wrapped already.

        Raises:
            ValueError: for a pattern that names none of them.
        """
        found = {
            name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear | _ConvNd) and name
        }
        for pattern in self.layers:
            if not any(_matches(name, pattern) for name in found):
                near = sorted({_BLOCK.sub(".blocks.*.", f".{_plain(name)}").lstrip(".") for name in found})
                raise ValueError(f"layers: no layer is named {pattern!r}; there are {', '.join(near)}")
        num_blocks = max((_block(name) for name in found), default=-1) + 1
        # Rounded first: 0.1 of 30 blocks is a little more than 3 in floating point.
        first_kept = num_blocks - math.ceil(round(self.keep_last_blocks_bf16 * num_blocks, 6))
        return tuple(
            Layer(name, *_features(layer), reason=self._reason(name, layer, first_kept, wrapped))
            for name, layer in found.items()
        )

    def _reason(self, name: str, layer: nn.Linear | _ConvNd, first_kept: int, wrapped: type[nn.Linear]) -> str | None:
        if not any(_matches(name, pattern) for pattern in self.layers):
            return "not among `layers`"
        if type(layer) not in (nn.Linear, wrapped):
            return f"a {type(layer).__name__} multiplies in its own way"
        if _block(name) >= first_kept:
            return f"in the last blocks (keep_last_blocks_bf16={self.keep_last_blocks_bf16:g})"
        for side, size in zip(("in_features", "out_features"), _features(layer), strict=True):
            if size % self.multiple:
                return f"{side}={size} is no multiple of {self.multiple}"
        return None


@dataclass(frozen=True)
class LayerGroup:
    """Layers that differ in their block alone: `blocks.0-29.ffn.0`."""

    name: str
    number: int
    in_features: int
    out_features: int
    reason: str | None


def grouped(layers: Iterable[Layer]) -> list[LayerGroup]:
    """A table short enough to read: equal layers of several blocks in one row, wrapped ones first."""
    groups: dict[tuple[str, int, int, str | None], list[int]] = {}
    for layer in layers:
        pattern = _BLOCK.sub(lambda match: match[0].replace(match[1], "{}"), layer.name)
        key = (pattern, layer.in_features, layer.out_features, layer.reason)
        groups.setdefault(key, []).append(_block(layer.name))
    rows = [
        LayerGroup(pattern.format(_ranges(blocks)), len(blocks), ins, outs, reason)
        for (pattern, ins, outs, reason), blocks in groups.items()
    ]
    return sorted(rows, key=lambda row: row.reason is not None)


def _plain(name: str) -> str:
    return name.removesuffix(".base_layer")


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(f".{_plain(name)}", f"*.{pattern}")


def _block(name: str) -> int:
    """Index of the block that a layer is in; -1: in none."""
    match = _BLOCK.search(name)
    return int(match[1]) if match else -1


def _features(layer: nn.Linear | _ConvNd) -> tuple[int, int]:
    """Columns and rows of the weight as a matrix."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.in_channels * math.prod(layer.kernel_size), layer.out_channels


def _ranges(numbers: Sequence[int]) -> str:
    """`0-3,5` of 0, 1, 2, 3, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
