"""Ulysses around an attention function: the network keeps calling `attention(query, key, value, ...)` with its own
tokens, and every rank attends over the whole clip with its share of the heads.

Self-attention is the only place where tokens of different ranks meet. Queries and keys are rotated before they travel,
so positions are the owner's business; the inner function sees tokens in the order of `SequenceLayout.delivered`, for
which its visibility was made.
"""

from __future__ import annotations

import torch.distributed as dist

from longlive.models.attention import SelfAttention, TeacherForcingAttention
from longlive.models.wan.rope import Rotation
from longlive.parallel.collectives import gather_sequence, scatter_sequence
from longlive.parallel.layout import check_heads
from longlive.typing import Heads


class UlyssesAttention:
    """Sequence-parallel self-attention.

    Args:
        inner: attention over the delivered sequence.
        group: the sequence group.
    """

    def __init__(self, inner: TeacherForcingAttention, group: dist.ProcessGroup) -> None:
        self.inner = inner
        self.group = group

    def __call__(self, query: Heads, key: Heads, value: Heads, rotation: Rotation, layer: int) -> Heads:
        """See `SelfAttention`.

        Raises:
            ValueError: if the ranks do not divide the heads.
        """
        check_heads(query.shape[2], self.group.size())
        query, key, value = gather_sequence([rotation.rotate(query), rotation.rotate(key), value], self.group)
        return scatter_sequence(self.inner.attend(query, key, value), self.group)


class UlyssesUnrotated:
    """The same for an inner function that rotates by itself, because it stores keys that are not: a cache.

    Args:
        inner: over the tokens of all ranks, rank after rank.
        rotation: the turns of these tokens.
        group: the sequence group.
    """

    def __init__(self, inner: SelfAttention, rotation: Rotation, group: dist.ProcessGroup) -> None:
        self.inner = inner
        self.rotation = rotation
        self.group = group

    def __call__(self, query: Heads, key: Heads, value: Heads, rotation: Rotation, layer: int) -> Heads:
        """See `SelfAttention`; `rotation`, of this rank's tokens, is not needed."""
        query, key, value = gather_sequence([query, key, value], self.group)
        return scatter_sequence(self.inner(query, key, value, self.rotation, layer), self.group)


def exchanged_bytes(batch_size: int, local_tokens: int, dim: int, itemsize: int, size: int) -> int:
    """Bytes that one rank sends to others for one layer's forward: queries, keys and values, then the output. Backward
    sends as many again."""
    return 4 * batch_size * local_tokens * dim * itemsize * (size - 1) // size
