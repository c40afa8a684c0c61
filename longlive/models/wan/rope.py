"""Rotary positions in three directions (frame, row, column), with explicit frame positions.

A head's features are taken in neighbouring pairs; pair k of a direction turns by the angle `position * 10000^(-k / K)`
where K is the number of pairs of that direction. Of the `head_dim / 2` pairs, rows and columns get a third each (rounded
down) and frames the rest, as in Wan (`rope_apply` in wan/modules/model.py of Wan2.2).

Differences to Wan's code: angles are computed in float64 once per call on tables of a few numbers per frame, row and column,
and the rotation of the tokens is float32 arithmetic (Wan multiplies in complex128). Frame positions are an argument, because
chunks of a rollout, the two copies of teacher forcing and the shots of a clip all choose their own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Real

from longlive.typing import Float, Heads, Tensor

BASE = 10000.0


def pairs_per_direction(head_dim: int) -> tuple[int, int, int]:
    """How many pairs of a head turn with the frame, the row and the column."""
    third = head_dim // 6
    return head_dim // 2 - 2 * third, third, third


class _Rotate(torch.autograd.Function):
    """Turn neighbouring pairs. The gradient is the turn back, so nothing but the tables is kept for backward."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors  # type: ignore[attr-defined]
        return _turn(gradient, cos, -sin), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x` `[... e]` and tables `[... e/2]` that broadcast against it."""
    even, odd = x.unflatten(-1, (-1, 2)).float().unbind(-1)
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).to(x.dtype)


@dataclass(frozen=True)
class Rotation:
    """The turn of every token: float32 cosines and sines `[b l head_dim/2]`."""

    cos: Float[Tensor, "b l pairs"]
    sin: Float[Tensor, "b l pairs"]

    def rotate(self, x: Heads) -> Heads:
        """Turn queries or keys `[b l n e]`; computed in float32, returned in their own dtype."""
        return _Rotate.apply(x, self.cos[:, :, None], self.sin[:, :, None])  # type: ignore[no-any-return,no-untyped-call]

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

    def table(function: type[torch.cos] | object) -> Tensor:
        frame, row, column = (function(angle).float() for angle in angles)  # type: ignore[operator]
        parts = (frame[:, :, None, None], row[None, None, :, None], column[None, None, None])
        return torch.cat([part.expand(*shape, -1) for part in parts], dim=-1).flatten(1, 3)

    return Rotation(table(torch.cos), table(torch.sin))
