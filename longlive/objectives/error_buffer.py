"""Past prediction errors on the host: a ring of entries for every timestep bucket, within a byte budget.

An entry belongs to one chunk and holds both of its errors, bfloat16 `[kind k c h w]`: that of the latent and that of
the noise (`error_recycling.py`). So the design's two buffers are the two halves of the entries of one.

The number of entries follows from the budget when the first one comes, because only then their size is known:

    entries per bucket = budget // (buckets * 2 kinds * 2 bytes * k c h w).

With chunks of [8, 48, 44, 80] and 50 buckets, one entry per bucket is 258 MiB. Memory is taken in blocks when entries
are written, and that of the oldest is used again. Saving copies no block but those that are not full.

An entry is known by its bucket and its *age rank* there (0: the oldest), never by where it lies, so a buffer that was
saved and loaded answers like the one that was saved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from longlive.typing import Float, Tensor

LATENT, NOISE = 0, 1
"""Kinds of errors: of the latent, of the noise."""

Entry = Float[Tensor, "kind k c h w"]
MEBIBYTE = 2**20
BLOCK = MEBIBYTE
"""Bytes of memory that are taken together, or one entry: a checkpoint of many small tensors takes seconds."""


class _Ring:
    """At most `capacity` entries, the newest; the i-th entry that was written is in slot `i % capacity`."""

    def __init__(self, capacity: int, shape: torch.Size) -> None:
        self.capacity, self.shape = capacity, shape
        self.block_size = min(capacity, max(1, BLOCK // (shape.numel() * torch.bfloat16.itemsize)))
        self.blocks: list[Tensor] = []
        self.num_written = 0

    def __len__(self) -> int:
        return min(self.num_written, self.capacity)

    def __getitem__(self, age_rank: int) -> Entry:
        return self._memory((self.num_written - len(self) + age_rank) % self.capacity)

    def append(self, entry: Entry) -> None:
        slot = self.num_written % self.capacity
        if slot == self.block_size * len(self.blocks):
            size = min(self.block_size, self.capacity - slot)
            self.blocks.append(torch.empty(size, *self.shape, dtype=torch.bfloat16))
        self._memory(slot).copy_(entry)
        self.num_written += 1

    def _memory(self, slot: int) -> Entry:
        return self.blocks[slot // self.block_size][slot % self.block_size]

    def state_dict(self) -> dict[str, Any]:
        *full, last = self.blocks
        used = len(self) - self.block_size * len(full)
        return {
            "blocks": [*full, last if used == len(last) else last[:used].clone()],
            "oldest": (self.num_written - len(self)) % self.capacity,
        }


def _by_age(state: Mapping[str, Any]) -> Iterator[Entry]:
    """The entries of a saved ring, the oldest first."""
    entries = [entry for block in state["blocks"] for entry in block]
    yield from entries[state["oldest"] :]
    yield from entries[: state["oldest"]]


class ErrorBuffer:
    """Rings of errors.

    Args:
        num_buckets: rings.
        budget_mib: the most memory that all entries take together.

    Raises:
        ValueError: if there is no bucket or no budget.
    """

    def __init__(self, num_buckets: int, budget_mib: float | int) -> None:
        if num_buckets < 1:
            raise ValueError(f"num_buckets={num_buckets} must be at least 1")
        if not budget_mib > 0:
            raise ValueError(f"budget_mib={budget_mib} must be positive")
        self.num_buckets = num_buckets
        self.budget_mib = budget_mib
        self.capacity = 0
        """Entries that a bucket holds at most; 0 before the first entry came."""
        self._rings: list[_Ring] = []

    def size(self, bucket: int) -> int:
        """Entries of a bucket."""
        return len(self._rings[bucket]) if self._rings else 0

    def __len__(self) -> int:
        return sum(map(len, self._rings))

    @property
    def nbytes(self) -> int:
        """Memory that was taken so far."""
        return sum(block.nbytes for ring in self._rings for block in ring.blocks)

    def locate(self, number: int) -> tuple[int, int]:
        """Bucket and age rank of one of all entries, counted bucket by bucket from 0."""
        for bucket, ring in enumerate(self._rings):
            if number < len(ring):
                return bucket, number
            number -= len(ring)
        raise IndexError("the buffer has fewer entries")

    def append(self, bucket: int, entry: Entry) -> None:
        """Copy an entry into a bucket, in place of its oldest if it is full.

        Raises:
            ValueError: if the budget holds less than one entry per bucket, or the entry has another size than those
                before it.
        """
        self._check_size(entry)
        self._rings[bucket].append(entry)

    def take(self, kind: int, places: Sequence[tuple[int, int]], pin: bool = False) -> Float[Tensor, "rows k c h w"]:
        """A copy of the errors of a kind at (bucket, age rank), one or more of them; in pinned memory if wanted."""
        errors = [self._rings[bucket][age_rank][kind] for bucket, age_rank in places]
        found = torch.empty(len(errors), *errors[0].shape, dtype=torch.bfloat16, pin_memory=pin)
        return torch.stack(errors, out=found)

    def _check_size(self, entry: Entry) -> None:
        if not self._rings:
            per_slot = self.num_buckets * entry.numel() * torch.bfloat16.itemsize
            self.capacity = int(self.budget_mib * MEBIBYTE) // per_slot
            if self.capacity < 1:
                raise ValueError(
                    f"budget_mib={self.budget_mib} holds no error of a chunk of {list(entry.shape[1:])} for each of "
                    f"{self.num_buckets} buckets; use at least {-(-per_slot // MEBIBYTE)}, or fewer buckets"
                )
            self._rings = [_Ring(self.capacity, entry.shape) for _ in range(self.num_buckets)]
        elif self._rings[0].shape != entry.shape:
            raise ValueError(
                f"the error of a chunk of {list(entry.shape[1:])} does not fit those in the buffer, of "
                f"{list(self._rings[0].shape[1:])}; keep the clips' size, or start a new run with initialise_from"
            )

    def state_dict(self) -> list[dict[str, Any]]:
        """The entries themselves, where they are, by bucket; empty buckets are empty."""
        return [ring.state_dict() if len(ring) else {} for ring in self._rings] or [{}] * self.num_buckets

    def load_state_dict(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Copy the entries of another buffer; of too many for this budget, the newest are kept.

        Raises:
            ValueError: if it has another number of buckets, or the budget holds less than one entry per bucket.
        """
        if len(state) != self.num_buckets:
            raise ValueError(
                f"num_buckets={self.num_buckets}, but the checkpoint's errors are in {len(state)} buckets; "
                f"use num_buckets={len(state)}"
            )
        fresh = ErrorBuffer(self.num_buckets, self.budget_mib)
        for bucket, ring in enumerate(state):
            for entry in _by_age(ring) if ring else ():
                fresh.append(bucket, entry)
        self.capacity, self._rings = fresh.capacity, fresh._rings
