"""Slots that outlive their eviction, for backward: activation checkpointing runs a pass again and must read what the
pass has read, when the ring has long gone on.

Nothing is copied for that. Every chunk is stored on its own, and the slots are names for chunks: writing a slot gives
its name to another chunk, and a view that was opened earlier still holds the old one. So a rollout whose graph is alive
holds the keys and values of its chunks once each, evicted ones too, and they go when the graph goes; without a graph
(a rollout for the critic, a long rollout's earlier clips), they go with the last view that sees them.

The price is that reading joins chunks instead of slicing a ring: one copy of what is visible, for the layer at hand.
"""

from collections.abc import Callable

import torch

from longlive.rollout.slots import SlotIndex, Slots, SlotStorage
from longlive.typing import Heads


class RetainedStorage(SlotStorage):
    """The slots of one layer, as chunks in any format.

    Args:
        batch_size, slots: how many.
        make_chunk: makes the storage of one chunk of every sample: one slot.
    """

    copies = True

    def __init__(self, batch_size: int, slots: int, make_chunk: Callable[[], SlotStorage]) -> None:
        self._make_chunk = make_chunk
        # Every slot has a shape before it has content; nobody writes to this one.
        self._chunks: tuple[tuple[SlotStorage, ...], ...] = ((make_chunk(),) * slots,) * batch_size

    def write(self, index: SlotIndex, keys: Heads, values: Heads) -> None:
        chunk = self._make_chunk()
        chunk.write(0, keys, values)
        slots = [index] * len(keys) if isinstance(index, int) else index.tolist()
        self._chunks = tuple(
            (*row[:slot], chunk, *row[slot + 1 :]) for row, slot in zip(self._chunks, slots, strict=True)
        )

    def read(self, num_slots: int, dtype: torch.dtype) -> tuple[Slots, Slots]:
        visible = [row[:num_slots] for row in self._chunks]
        stored = {chunk: chunk.read(1, dtype) for chunk in dict.fromkeys(chunk for row in visible for chunk in row)}
        if all(row == visible[0] for row in visible):
            keys, values = zip(*(stored[chunk] for chunk in visible[0]), strict=True)
            return torch.cat(keys, dim=1), torch.cat(values, dim=1)

        def gathered(which: int) -> Slots:
            rows = [torch.cat([stored[chunk][which][sample] for chunk in row]) for sample, row in enumerate(visible)]
            return torch.stack(rows)

        return gathered(0), gathered(1)

    def snapshot(self) -> "RetainedStorage":
        """The slots as they are now, whatever is written later; shares the chunks."""
        frozen = object.__new__(RetainedStorage)
        frozen._make_chunk, frozen._chunks = self._make_chunk, self._chunks
        return frozen

    @property
    def num_bytes(self) -> int:
        return sum(chunk.num_bytes for chunk in {chunk for row in self._chunks for chunk in row})
