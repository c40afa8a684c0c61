"""Past prediction errors on the host: a ring of entries for every timestep bucket, within a byte budget.

An entry belongs to one chunk and holds both of its errors, bfloat16 `[kind k c h w]`: that of the latent and that of
the noise (`error_recycling.py`). So the design's two buffers are the two halves of the entries of one.

The number of entries follows from the budget when the first one comes, because only then their size is known:

    entries per bucket = budget // (buckets * 2 kinds * 2 bytes * k c h w).

With chunks of [8, 48, 44, 80] and 50 buckets, one entry per bucket is 258 MiB. Memory is taken when entries are
written, and that of the oldest is used again; saving copies nothing.

An entry is known by its bucket and its *age rank* there (0: the oldest), never by where it lies, so a buffer that was
saved and loaded answers like the one that was saved.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch

from longlive.typing import Float, Tensor

LATENT, NOISE = 0, 1
"""Kinds of errors: of the latent, of the noise."""

Entry = Float[Tensor, "kind k c h w"]
MEBIBYTE = 2**20


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
        self._rings: list[deque[Tensor]] = [deque() for _ in range(num_buckets)]
        self._shape: torch.Size | None = None

    def size(self, bucket: int) -> int:
        """Entries of a bucket."""
        return len(self._rings[bucket])

    def __len__(self) -> int:
        return sum(map(len, self._rings))

    @property
    def nbytes(self) -> int:
        """Of all entries."""
        return sum(entry.nbytes for ring in self._rings for entry in ring)

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
        ring = self._rings[bucket]
        is_full = len(ring) == self.capacity
        memory = ring.popleft() if is_full else torch.empty(entry.shape, dtype=torch.bfloat16)
        ring.append(memory.copy_(entry))

    def take(self, kind: int, places: Sequence[tuple[int, int]], pin: bool = False) -> Float[Tensor, "rows k c h w"]:
        """A copy of the errors of a kind at (bucket, age rank), one or more of them; in pinned memory if wanted."""
        errors = [self._rings[bucket][age_rank][kind] for bucket, age_rank in places]
        found = torch.empty(len(errors), *errors[0].shape, dtype=torch.bfloat16, pin_memory=pin)
        return torch.stack(errors, out=found)

    def _check_size(self, entry: Entry) -> None:
        if self._shape is None:
            per_slot = self.num_buckets * entry.numel() * torch.bfloat16.itemsize
            capacity = int(self.budget_mib * MEBIBYTE) // per_slot
            if capacity < 1:
                raise ValueError(
                    f"budget_mib={self.budget_mib} holds no error of a chunk of {list(entry.shape[1:])} for each of "
                    f"{self.num_buckets} buckets; use at least {-(-per_slot // MEBIBYTE)}, or fewer buckets"
                )
            self.capacity, self._shape = capacity, entry.shape
        elif self._shape != entry.shape:
            raise ValueError(
                f"the error of a chunk of {list(entry.shape[1:])} does not fit those in the buffer, of "
                f"{list(self._shape[1:])}; keep the clips' size, or start a new run with initialise_from"
            )

    def state_dict(self) -> list[list[Tensor]]:
        """The entries themselves, by bucket, the oldest first."""
        return [list(ring) for ring in self._rings]

    def load_state_dict(self, state: Sequence[Sequence[Tensor]]) -> None:
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
        for bucket, entries in enumerate(state):
            for entry in entries:
                fresh.append(bucket, entry)
        self.capacity, self._rings, self._shape = fresh.capacity, fresh._rings, fresh._shape
