"""From the rank that computed an error to the host memory of every rank.

An optimizer step has one or more batches. Before the forward pass of each, all ranks learn which rank will hold the
errors of which chunks (`StepErrors.announce`); so when the step ends, every rank knows without asking what comes from
whom (`send`), and nothing waits for the device in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import torch
import torch.distributed as dist

from longlive.typing import Float, Int, Tensor

EntryOfChunk = Float[Tensor, "kind k c h w"]


@dataclass(frozen=True, order=True)
class ChunkName:
    """A chunk of a clip whose error may be recorded, and the bucket that the error belongs to."""

    sample: int
    chunk: int
    bucket: int


@dataclass(frozen=True)
class Arrival:
    """Errors on their way to the host, one of each name."""

    names: Sequence[ChunkName]
    _errors: Float[Tensor, "names kind k c h w"]
    _event: torch.cuda.Event | None

    def wait(self) -> Float[Tensor, "names kind k c h w"]:
        """The errors, once they are there."""
        if self._event is not None:
            self._event.synchronize()
        return self._errors


class StepErrors:
    """The errors that one optimizer step may record, so far."""

    def __init__(self) -> None:
        self._names: dict[int, list[ChunkName]] = {}
        """By the rank that holds their errors."""
        self._held: dict[ChunkName, EntryOfChunk] = {}
        self._none: Float[Tensor, "none kind k c h w"] = torch.empty(0, 2, 0, 0, 0, 0)
        """Has the shape, dtype and device of errors."""

    @property
    def samples(self) -> set[int]:
        """Of all ranks."""
        return {name.sample for names in self._names.values() for name in names}

    def announce(self, names: Sequence[ChunkName], most: int, device: torch.device) -> None:
        """Tell all ranks what this one will hold of a batch. Every rank must call it.

        Args:
            names: at most `most` of them, which is the same number on all ranks.
            device: where collectives find their tensors.
        """
        table = torch.full((most, 3), -1, dtype=torch.int64)
        rows = [(name.sample, name.chunk, name.bucket) for name in names]
        table[: len(rows)] = torch.tensor(rows, dtype=torch.int64).view(-1, 3)
        for rank, rows in enumerate(_of_all_ranks(table, device).tolist()):
            self._names.setdefault(rank, []).extend(ChunkName(*row) for row in rows if row[0] >= 0)

    def missing(self, wanted: AbstractSet[int], samples: Sequence[int]) -> list[ChunkName]:
        """What this rank announced of these samples, if they are wanted, and does not hold yet."""
        ours = dict.fromkeys(self._names[_rank()])
        return [n for n in ours if n.sample in wanted and n.sample in samples and n not in self._held]

    def hold(self, errors: dict[ChunkName, EntryOfChunk], like: Float[Tensor, "none kind k c h w"]) -> None:
        """Add errors that were announced.

        Args:
            errors: by name.
            like: an empty tensor, otherwise of their shape, dtype and device; ranks without errors need it, too.
        """
        self._held |= errors
        self._none = like

    def drop_all_but(self, wanted: AbstractSet[int]) -> None:
        """Forget the errors of other samples."""
        self._held = {name: error for name, error in self._held.items() if name.sample in wanted}

    def send(self, wanted: AbstractSet[int]) -> list[Arrival]:
        """Send the errors of some samples to all ranks, rank after rank. Every rank must call it with the same ones."""
        arrivals, sent = [], set[ChunkName]()
        for rank, held in sorted(self._names.items()):
            # A clip that the step drew twice has the same errors twice.
            names = [name for name in dict.fromkeys(held) if name.sample in wanted and name not in sent]
            sent.update(names)
            if names:
                is_ours = rank == _rank()
                memory = self._none.new_empty(len(names), *self._none.shape[1:])
                errors = torch.stack([self._held[name] for name in names]) if is_ours else memory
                arrivals.append(_to_host(names, _broadcast(errors, rank)))
        return arrivals


def _to_host(names: Sequence[ChunkName], errors: Tensor) -> Arrival:
    if not errors.is_cuda:
        return Arrival(names, errors, None)
    host = torch.empty(errors.shape, dtype=errors.dtype, pin_memory=True)
    host.copy_(errors, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return Arrival(names, host, event)


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _of_all_ranks(table: Int[Tensor, "rows 3"], device: torch.device) -> Int[Tensor, "ranks rows 3"]:
    """On the CPU; they travel by the device."""
    if not (dist.is_available() and dist.is_initialized()):
        return table[None]
    tables = table.new_empty(dist.get_world_size(), *table.shape, device=device)
    dist.all_gather(list(tables.unbind()), table.to(device))
    return tables.cpu()


def _broadcast(errors: Tensor, rank: int) -> Tensor:
    """A rank's errors; the others give memory for them."""
    if dist.is_available() and dist.is_initialized():
        # As bytes: not every backend knows bfloat16.
        dist.broadcast(errors.view(torch.uint8), src=rank)
    return errors
