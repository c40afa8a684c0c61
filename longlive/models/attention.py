"""Attention functions: visibility turned into arithmetic.

The network hands an attention function the queries and keys *before* rotation, so that a cache can store unrotated keys
and sequence parallelism can rotate before it exchanges. Three functions compute teacher forcing:

- `ChunkedAttention` (default): one dense `scaled_dot_product_attention` without a mask per rectangle of `visibility.py`.
  Exact, no wasted arithmetic, forward and backward on every device, and the fastest dense kernel of the machine runs.
- `FlexAttention`: the same predicate as a block mask for torch's FlexAttention, for CUDA. Its CPU kernel has no backward.
- `MaskedAttention`: one dense boolean mask over all tokens. The oracle of the tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention

from longlive.models.visibility import Rectangle, Segment, VisibilityRule, rectangles, token_mask
from longlive.models.wan.rope import Rotation
from longlive.typing import Heads, Int, Tensor


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


def dense_attention(query: Heads, key: Heads, value: Heads) -> Heads:
    """Every query sees every key; all `[b l n e]`."""
    attended = scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    return attended.transpose(1, 2)


class FullAttention:
    """Every token sees every token: the bidirectional network that Wan was trained as."""

    def __call__(self, query: Heads, key: Heads, value: Heads, rotation: Rotation, layer: int) -> Heads:
        return dense_attention(rotation.rotate(query), rotation.rotate(key), value)


class _TeacherForcingAttention:
    """What the teacher-forcing attention functions share: segments, shots, rule, and the check of what arrives.

    Args:
        segments: roles and chunks of the tokens, in the order in which they arrive.
        shot_index: shot of every chunk, one row per sample.
        rule: window and sinks.

    Raises:
        ValueError: if a chunk of the segments has no shot; later, if the tokens or samples that arrive are not those
            described.
    """

    def __init__(self, segments: Sequence[Segment], shot_index: Int[Tensor, "b chunk"], rule: VisibilityRule) -> None:
        self.segments = tuple(segments)
        self.shot_index = tuple(tuple(row) for row in shot_index.tolist())
        self.rule = rule
        self.num_tokens = [segment.num_tokens for segment in self.segments]
        samples: dict[tuple[Rectangle, ...], list[int]] = {}
        for sample, row in enumerate(self.shot_index):
            samples.setdefault(rectangles(self.segments, row, rule), []).append(sample)
        self.samples = samples
        """Samples by what they see: those of one entry are computed together."""

    def check(self, query: Heads) -> None:
        if query.shape[0] != len(self.shot_index) or query.shape[1] != sum(self.num_tokens):
            raise ValueError(
                f"queries of {query.shape[0]} samples x {query.shape[1]} tokens arrive, but visibility was made for "
                f"{len(self.shot_index)} x {sum(self.num_tokens)}; make it from this batch's segments and shot_index"
            )


class ChunkedAttention(_TeacherForcingAttention):
    """Exact teacher-forcing attention as dense rectangles."""

    def __call__(self, query: Heads, key: Heads, value: Heads, rotation: Rotation, layer: int) -> Heads:
        self.check(query)
        query, key = rotation.rotate(query), rotation.rotate(key)
        if len(self.samples) == 1:
            return self._attend(query, key, value, next(iter(self.samples)))
        parts, order = [], []
        for group, members in self.samples.items():
            index = torch.tensor(members, device=query.device)
            parts.append(self._attend(query[index], key[index], value[index], group))
            order += members
        inverse = torch.tensor(order, device=query.device).argsort()
        return torch.cat(parts)[inverse]

    def _attend(self, query: Heads, key: Heads, value: Heads, group: tuple[Rectangle, ...]) -> Heads:
        queries, keys, values = (x.split(self.num_tokens, dim=1) for x in (query, key, value))
        attended = [
            dense_attention(
                torch.cat([queries[i] for i in rectangle.queries], dim=1),
                torch.cat([keys[i] for i in rectangle.keys], dim=1),
                torch.cat([values[i] for i in rectangle.keys], dim=1),
            )
            for rectangle in group
        ]
        return torch.cat(attended, dim=1)


class MaskedAttention(_TeacherForcingAttention):
    """Teacher-forcing attention by a dense boolean mask: four times the work, and plain to read."""

    def __call__(self, query: Heads, key: Heads, value: Heads, rotation: Rotation, layer: int) -> Heads:
        self.check(query)
        mask = torch.stack([token_mask(self.segments, row, self.rule) for row in self.shot_index])
        attended = scaled_dot_product_attention(
            rotation.rotate(query).transpose(1, 2),
            rotation.rotate(key).transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=mask[:, None].to(query.device),
        )
        return attended.transpose(1, 2)
