"""Attention functions: visibility turned into arithmetic.

The network hands an attention function the queries and keys *before* rotation, so that a cache can store unrotated keys
and sequence parallelism can rotate before it exchanges. Three functions compute teacher forcing, and agree:

- `ChunkedAttention` (default): one dense `scaled_dot_product_attention` without a mask per rectangle of
  `visibility.py`. Exact, no wasted arithmetic, forward and backward on every device, and the fastest dense kernel of
  the machine runs. Its price is memory: every rectangle holds a copy of the keys it sees, `n (n + 1)` chunks of keys
  for a clip of n chunks instead of `2 n`.
- `FlexAttention`: the same predicate as a block mask for torch's FlexAttention, for long clips on CUDA: no copies. On
  the CPU it has no backward.
- `MaskedAttention`: one dense boolean mask over all tokens. The oracle of the tests.

Keys are cut by `split` and joined by `cat` rather than sliced, because the gradient of a slice is a zero tensor of the
size of the whole sequence, and there would be one per rectangle.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Protocol, runtime_checkable

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from longlive.models.visibility import (
    Rectangle,
    Segment,
    VisibilityRule,
    rectangles,
    segment_mask,
    segment_of_token,
    token_mask,
)
from longlive.models.wan.rope import Rotation
from longlive.typing import Bool, Float, Heads, Int, Tensor


@runtime_checkable
class SelfAttention(Protocol):
    """What a transformer block calls for its self-attention."""

    def __call__(self, query: Heads, key: Heads, value: Heads, rotation: Rotation, layer: int) -> Heads:
        """Attend.

        Args:
            query, key, value: `[b l n e]`, queries and keys normalised but not rotated.
            rotation: the turns of the `l` tokens.
            layer: index of the transformer block, for functions that keep a cache.

        Returns:
            `[b l n e]`.
        """
        ...


def dense_attention(
    query: Heads,
    key: Float[Tensor, "b k n e"],
    value: Float[Tensor, "b k n e"],
    mask: Bool[Tensor, "#b 1 l k"] | None = None,
) -> Heads:
    """Every query sees every key, or those that the mask allows.

    On a CPU, bfloat16 is computed in float32: torch's bfloat16 kernel there takes four times as long in backward.
    """
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if query.device.type == "cpu" and query.dtype is torch.bfloat16:
        with torch.autocast("cpu", enabled=False):
            attended = scaled_dot_product_attention(query.float(), key.float(), value.float(), attn_mask=mask)
    else:
        attended = scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return attended.to(query.dtype).transpose(1, 2)


class TeacherForcingAttention(ABC):
    """What the three functions share: the description of the tokens, and the check that these tokens arrive.

    An instance is made for one batch. What is expensive to derive is cached by everything it depends on: segments, the
    sample's own shots, and the rule.

    Args:
        segments: roles and chunks of the tokens, in the order in which they arrive.
        shot_index: shot of every chunk, one row per sample.
        rule: window and sinks.

    Raises:
        ValueError: if a chunk of the segments has no shot; when called, if other tokens or samples arrive than were
            described.
    """

    def __init__(self, segments: Sequence[Segment], shot_index: Int[Tensor, "b chunk"], rule: VisibilityRule) -> None:
        self.segments = tuple(segments)
        self.shot_index: list[list[int]] = shot_index.tolist()
        self.rule = rule
        self.num_tokens = [segment.num_tokens for segment in self.segments]

    def __call__(self, query: Heads, key: Heads, value: Heads, rotation: Rotation, layer: int) -> Heads:
        """See `SelfAttention`."""
        return self.attend(rotation.rotate(query), rotation.rotate(key), value)

    @abstractmethod
    def attend(self, query: Heads, key: Heads, value: Heads) -> Heads:
        """Attend with queries and keys that are rotated already; sequence parallelism calls this after its exchange."""

    def check(self, query: Heads) -> None:
        """Raise the `ValueError` for queries that were not described."""
        if query.shape[0] != len(self.shot_index) or query.shape[1] != sum(self.num_tokens):
            raise ValueError(
                f"{query.shape[0]} samples x {query.shape[1]} tokens arrive, but visibility was made for "
                f"{len(self.shot_index)} x {sum(self.num_tokens)}; make it from this batch's segments and shot_index"
            )


class ChunkedAttention(TeacherForcingAttention):
    """Teacher-forcing attention as dense rectangles."""

    def __init__(self, segments: Sequence[Segment], shot_index: Int[Tensor, "b chunk"], rule: VisibilityRule) -> None:
        super().__init__(segments, shot_index, rule)
        self.samples_by_rectangles: dict[tuple[Rectangle, ...], list[int]] = {}
        for sample, shots in enumerate(self.shot_index):
            self.samples_by_rectangles.setdefault(rectangles(self.segments, shots, rule), []).append(sample)

    def attend(self, query: Heads, key: Heads, value: Heads) -> Heads:
        self.check(query)
        if len(self.samples_by_rectangles) == 1:
            return self._attend(query, key, value, *self.samples_by_rectangles)
        # Samples whose shots make them see the same chunks go through the kernels together.
        attended, order = [], []
        for group, samples in self.samples_by_rectangles.items():
            index = torch.tensor(samples, device=query.device)
            attended.append(self._attend(query[index], key[index], value[index], group))
            order += samples
        return torch.cat(attended)[torch.tensor(order, device=query.device).argsort()]

    def _attend(self, query: Heads, key: Heads, value: Heads, group: tuple[Rectangle, ...]) -> Heads:
        queries, keys, values = (x.split(self.num_tokens, dim=1) for x in (query, key, value))
        attended = [
            dense_attention(
                _join(queries, rectangle.queries), _join(keys, rectangle.keys), _join(values, rectangle.keys)
            )
            for rectangle in group
        ]
        return torch.cat(attended, dim=1)


def _join(segments: Sequence[Tensor], which: tuple[int, ...]) -> Tensor:
    return segments[which[0]] if len(which) == 1 else torch.cat([segments[index] for index in which], dim=1)


class MaskedAttention(TeacherForcingAttention):
    """Teacher-forcing attention by a dense boolean mask: up to four times the work, and plain to read."""

    def __init__(self, segments: Sequence[Segment], shot_index: Int[Tensor, "b chunk"], rule: VisibilityRule) -> None:
        super().__init__(segments, shot_index, rule)
        masks = {tuple(shots): token_mask(self.segments, shots, rule) for shots in self.shot_index}
        # One row of shots for all samples is one mask for all of them.
        rows = self.shot_index if len(masks) > 1 else self.shot_index[:1]
        self.mask = torch.stack([masks[tuple(shots)] for shots in rows])[:, None]

    def attend(self, query: Heads, key: Heads, value: Heads) -> Heads:
        self.check(query)
        self.mask = self.mask.to(query.device)
        return dense_attention(query, key, value, self.mask)


class FlexAttention(TeacherForcingAttention):
    """Teacher-forcing attention by torch's FlexAttention.

    The block mask is computed from the table of segments instead of from all pairs of tokens, so it costs little for
    sequences of any length.

    Args:
        compile: whether to compile the kernel, as training on CUDA needs; without, scores are materialised.

    Raises:
        ValueError: when gradients are asked for on the CPU, where FlexAttention has no backward.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        shot_index: Int[Tensor, "b chunk"],
        rule: VisibilityRule,
        compile: bool = True,
    ) -> None:
        super().__init__(segments, shot_index, rule)
        self.kernel: Any = _compiled_flex_attention() if compile else flex_attention
        self.block_mask: BlockMask | None = None

    def attend(self, query: Heads, key: Heads, value: Heads) -> Heads:
        self.check(query)
        needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
        if needs_gradient and query.device.type == "cpu":
            raise ValueError(
                "FlexAttention has no backward on device=cpu; train with ChunkedAttention there, or call it under "
                "torch.no_grad()"
            )
        if self.block_mask is None or self.block_mask.kv_indices.device != query.device:
            visible = torch.stack([segment_mask(self.segments, shots, self.rule) for shots in self.shot_index])
            self.block_mask = block_mask(visible.to(query.device), segment_of_token(self.segments).to(query.device))
        attended = self.kernel(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), block_mask=self.block_mask
        )
        return attended.transpose(1, 2)


@cache
def _compiled_flex_attention() -> Callable[..., Any]:
    """One compiled function for the whole process, because compiling takes seconds."""
    return torch.compile(flex_attention)


def block_mask(
    visible: Bool[Tensor, "b segments segments"], segment_of_token: Int[Tensor, " l"], block_size: int = 128
) -> BlockMask:
    """FlexAttention's description of which blocks of tokens are full, partial or empty.

    A block of queries against a block of keys covers a range of segments by a range of segments; how many of these
    pairs are visible follows from the table's summed areas, without looking at tokens.

    Args:
        visible: which segment (row) sees which (column), per sample.
        segment_of_token: ascending.
        block_size: tokens of a block, in both directions.
    """
    num_tokens, device = len(segment_of_token), visible.device
    starts = torch.arange(0, num_tokens, block_size, device=device)
    low = segment_of_token[starts]
    high = segment_of_token[(starts + block_size).clamp(max=num_tokens) - 1] + 1

    areas = torch.nn.functional.pad(visible.int().cumsum(1).cumsum(2), (1, 0, 1, 0))
    by_row = areas[:, high] - areas[:, low]
    seen = by_row[:, :, high] - by_row[:, :, low]
    pairs = (high - low)[:, None] * (high - low)[None]
    full = seen == pairs
    if num_tokens % block_size:
        # The last block reaches beyond the sequence, so the kernel has to look at its tokens.
        full[:, -1] = False
        full[:, :, -1] = False
    partial = (seen > 0) & ~full

    def blocks(table: Tensor) -> tuple[Tensor, Tensor]:
        indices = table.int().argsort(dim=-1, descending=True, stable=True)
        return table.sum(-1, dtype=torch.int32)[:, None], indices.int()[:, None]

    return BlockMask.from_kv_blocks(
        *blocks(partial),
        *blocks(full),
        BLOCK_SIZE=block_size,
        mask_mod=lambda sample, head, query, key: visible[sample, segment_of_token[query], segment_of_token[key]],
        seq_lengths=(num_tokens, num_tokens),
    )
