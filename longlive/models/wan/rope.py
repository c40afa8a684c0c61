"""Rotary positions in three directions (frame, row, column), with explicit frame positions.

A head's features are taken in neighbouring pairs; pair k of a direction turns by the angle `position * 10000^(-k / K)`
where K is the number of pairs of that direction. Of the `head_dim / 2` pairs, rows and columns get a third each
(rounded down) and frames the rest, as in Wan (`rope_apply` in wan/modules/model.py of Wan2.2).

Differences to Wan's code: angles are float64 in tables of a few numbers per frame, row and column, computed once per
forward pass, and tokens are turned in float32 (Wan multiplies in complex128). Frame positions are an argument, because
the chunks of a rollout, the two copies of teacher forcing and the shots of a clip all choose their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Real

from longlive.typing import Float, Heads, Tensor

BASE = 10000.0


def pairs_per_direction(head_dim: int) -> tuple[int, int, int]:
    """How many pairs of a head turn with the frame, the row and the column."""
    third = head_dim // 6
    return head_dim // 2 - 2 * third, third, third


class _Rotate(torch.autograd.Function):
    """Turn neighbouring pairs. The gradient is the turn back, so only the tables are kept for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, signed_sin)
        return _turn(x, cos, signed_sin)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, signed_sin = ctx.saved_tensors
        return _turn(gradient, cos, -signed_sin), None, None


def _turn(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """`(a, b) -> (a cos - b sin, b cos + a sin)` for neighbouring pairs, as `x cos + swapped(x) (-sin, sin)`."""
    pairs = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2))
    swapped = torch.stack((pairs[..., 1], pairs[..., 0]), dim=-1).flatten(-2)
    return torch.addcmul(pairs.flatten(-2) * cos, swapped, signed_sin).to(x.dtype)


@dataclass(frozen=True)
class Rotation:
    """The turn of every token: float32 cosines and sines `[b l head_dim/2]`."""

    cos: Float[Tensor, "b l pairs"]
    sin: Float[Tensor, "b l pairs"]

    @cached_property
    def _per_feature(self) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines for every feature `[b l 1 e]`: made once, used by every layer."""
        cos = self.cos.repeat_interleave(2, dim=-1)
        signed_sin = torch.stack((-self.sin, self.sin), dim=-1).flatten(-2)
        return cos[:, :, None], signed_sin[:, :, None]

    def rotate(self, x: Heads) -> Heads:
        """Turn queries or keys `[b l n e]`; computed in float32 or wider, returned in their own dtype."""
        return _Rotate.apply(x, *self._per_feature)

    def __getitem__(self, tokens: slice) -> Rotation:
        """The turns of a run of tokens."""
        return Rotation(self.cos[:, tokens], self.sin[:, tokens])


def rotation(frame_positions: Real[Tensor, "b f"], height: int, width: int, head_dim: int) -> Rotation:
    """Turns for the tokens of `f` frames of `height x width` patches, frame by frame, row by row.

    Args:
        frame_positions: position of every frame in time; any real numbers, not necessarily consecutive.
        height, width: rows and columns of patches.
        head_dim: features of an attention head; even.
    """
    positions = (
        frame_positions.double(),
        torch.arange(height, dtype=torch.float64, device=frame_positions.device),
        torch.arange(width, dtype=torch.float64, device=frame_positions.device),
    )
    angles = []
    for position, pairs in zip(positions, pairs_per_direction(head_dim), strict=True):
        steps = torch.arange(pairs, dtype=torch.float64, device=position.device)
        angles.append(position[..., None] * BASE ** (-steps / pairs))

    batch, frames = frame_positions.shape
    shape = (batch, frames, height, width)

    def table(function: Callable[[Tensor], Tensor]) -> Tensor:
        frame, row, column = (function(angle).float() for angle in angles)
        parts = (frame[:, :, None, None], row[None, None, :, None], column[None, None, None])
        return torch.cat([part.expand(*shape, -1) for part in parts], dim=-1).flatten(1, 3)

    return Rotation(table(torch.cos), table(torch.sin))
