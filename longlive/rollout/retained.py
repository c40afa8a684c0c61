"""Slots that outlive their eviction, for backward: activation checkpointing runs a pass again and must read what the
pass has read, when the ring has long gone on.

Nothing is copied for that. Every chunk is stored on its own, and the slots are names for chunks: writing a slot gives
its name to another chunk, and a view that was opened earlier still holds the old one. So a rollout whose graph is alive
holds the keys and values of its chunks once each, evicted ones too, and they go when the graph goes; without a graph
(a rollout for the critic, a long rollout's earlier clips), they go with the last view that sees them.

The price is that reading joins chunks instead of slicing a ring: one copy of what is visible, for the layer at hand.
"""

from collections.abc import Callable, Mapping

import torch

from longlive.rollout.slots import SlotIndex, Slots, SlotStorage, by_sample
from longlive.typing import Heads, Tensor


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
        empty = make_chunk()
        self._chunks: tuple[tuple[SlotStorage, ...], ...] = ((empty,) * slots,) * batch_size
        self.slot_dim = empty.slot_dim

    def write(self, index: SlotIndex, keys: Heads, values: Heads) -> None:
        chunk = self._make_chunk()
        chunk.write(0, keys, values)
        samples, slots = (
            (range(len(keys)), [index] * len(keys))
            if isinstance(index, int)
            else (each.tolist() for each in by_sample(index))
        )
        rows = list(self._chunks)
        for sample, slot in zip(samples, slots, strict=True):
            rows[sample] = (*rows[sample][:slot], chunk, *rows[sample][slot + 1 :])
        self._chunks = tuple(rows)

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
        frozen._make_chunk, frozen._chunks, frozen.slot_dim = self._make_chunk, self._chunks, self.slot_dim
        return frozen

    def tensors(self) -> dict[str, Tensor]:
        """Copies, slot by slot, as one storage of all slots would hold them."""
        stored = {chunk: chunk.tensors() for row in self._chunks for chunk in row}
        return {
            name: torch.cat(
                [
                    torch.cat([stored[chunk][name][sample, None] for chunk in row], dim=self.slot_dim)
                    for sample, row in enumerate(self._chunks)
                ]
            )
            for name in stored[self._chunks[0][0]]
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        row = []
        for slot in range(len(self._chunks[0])):
            row.append(self._make_chunk())
            row[-1].load({name: whole.narrow(self.slot_dim, slot, 1) for name, whole in tensors.items()})
        self._chunks = (tuple(row),) * len(self._chunks)

    @property
    def num_bytes(self) -> int:
        return sum(chunk.num_bytes for chunk in {chunk for row in self._chunks for chunk in row})
