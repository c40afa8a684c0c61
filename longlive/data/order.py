"""Who reads what, and when: pure functions of (seed, epoch, position, data rank, data size), and the batch samplers.

An optimizer step trains on a *global batch*: data ranks x clips per rank x batches whose gradients are accumulated.

A *position* counts samples over all ranks since the first step of a run. Data rank r of R reads the positions
r, r + R, r + 2R, ... in batches of B, so step i consumes the positions `i B R .. (i + 1) B R - 1` whatever R is.

The indexed reader looks a position up in one global order: the epochs' permutations, one after the other. The streamed
reader cannot jump, so a data rank splits its shards into a few *lanes*, each read front to back: batch i of the rank
comes from lane `i mod L`. L depends on the shards alone, so the order does not depend on the number of workers; where
that number divides L, no worker reads what another one reads too.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import Sampler

from longlive import rng


def epoch_order(num_samples: int, seed: int, epoch: int) -> Sequence[int]:
    """The indexed reader's order of one epoch: a permutation of all samples."""
    return rng.permutation(num_samples, seed, "data_order", step=epoch).tolist()


def samples_at(positions: Sequence[int], num_samples: int, seed: int) -> list[int]:
    """The indexed reader's sample at each position, if all samples are readable: which ones a run has seen."""
    orders = {epoch: epoch_order(num_samples, seed, epoch) for epoch in {p // num_samples for p in positions}}
    return [orders[position // num_samples][position % num_samples] for position in positions]


def num_lanes(num_shards: int, data_size: int) -> int:
    """Lanes per data rank: 8, 4, 2 or 1, the most that give every lane four shards, so that lanes are of like length.

    Raises:
        ValueError: if there are fewer shards than data ranks.
    """
    if num_shards < data_size:
        raise ValueError(
            f"streamed reading needs a shard per data rank, got {num_shards} shards for {data_size} ranks; "
            "write more shards (smaller clips_per_shard), or read them with reader=indexed from a local directory"
        )
    return next((lanes for lanes in (8, 4, 2) if 4 * lanes * data_size <= num_shards), 1)


def lane_shards(num_shards: int, seed: int, epoch: int, lane: int, lanes: int) -> list[int]:
    """Shards of one lane, of all ranks' `lanes`, in one epoch: every `lanes`-th of a permutation of all shards."""
    return rng.permutation(num_shards, seed, "shard_order", step=epoch).tolist()[lane::lanes]


def accumulation(global_batch_size: int, batch_size: int, data_size: int) -> int:
    """Batches of `batch_size` clips that each of `data_size` data ranks accumulates to a global batch.

    Raises:
        ValueError: if they do not divide it; names the nearest values that they do.
    """
    per_batch = batch_size * data_size
    if global_batch_size < 1 or global_batch_size % per_batch:
        lower = global_batch_size // per_batch * per_batch
        legal = f"{lower} or {lower + per_batch}" if lower > 0 else f"{per_batch}"
        fitting = [size for size in range(1, batch_size) if global_batch_size % (size * data_size) == 0]
        raise ValueError(
            f"global_batch_size={global_batch_size} is no multiple of {per_batch} = batch_size={batch_size} x "
            f"{data_size} data rank{'s' if data_size > 1 else ''}; use global_batch_size={legal}"
            + (f", or batch_size={fitting[-1]}" if fitting and global_batch_size > 0 else "")
        )
    return global_batch_size // per_batch


def place_in_lane(position: int, data_size: int, batch_size: int, lanes: int) -> tuple[int, int]:
    """Lane of its rank, and offset in that lane's endless stream, of a position."""
    batch, place = divmod(position // data_size, batch_size)
    turn, lane = divmod(batch, lanes)
    return lane, turn * batch_size + place


def buffer_shuffle(num_samples: int, buffer_size: int, generator: torch.Generator) -> list[int]:
    """The order in which a shuffle buffer lets go what comes in as 0, 1, 2, ...

    The buffer fills, then lets one go for every one that comes in: at place p of the order stands one of 0 .. p +
        buffer_size.
    """
    draws = torch.rand(num_samples, generator=generator, dtype=torch.float64).tolist()
    order: list[int] = []
    waiting: list[int] = []
    for arrival in range(num_samples + buffer_size):
        if arrival < num_samples:
            waiting.append(arrival)
        if waiting and arrival >= buffer_size:
            chosen = int(draws[len(order)] * len(waiting))
            waiting[chosen], waiting[-1] = waiting[-1], waiting[chosen]
            order.append(waiting.pop())
    return order


class PositionBatches(Sampler[list[int]]):
    """Endless batches of positions of one data rank.

    Args:
        start: asked at the beginning of every iteration: samples consumed so far, over all ranks.
        batch_size: samples per batch of this rank.
        data_rank, data_size: which share of the positions is this rank's.
    """

    def __init__(self, start: Callable[[], int], batch_size: int, data_rank: int, data_size: int) -> None:
        self.start, self.batch_size, self.data_rank, self.data_size = start, batch_size, data_rank, data_size

    def __iter__(self) -> Iterator[list[int]]:
        first = self.start()
        global_batch = self.batch_size * self.data_size
        while True:
            yield list(range(first + self.data_rank, first + global_batch, self.data_size))
            first += global_batch


class RepeatedBatches(Sampler[list[int]]):
    """Every batch of another sampler several times in a row.

    Args:
        batches: the other sampler.
        times: how often each comes.
        before: asked at the beginning of every iteration: how often the first one came before it.
    """

    def __init__(self, batches: Sampler[list[int]], times: int, before: Callable[[], int]) -> None:
        self.batches, self.times, self.before = batches, times, before

    def __iter__(self) -> Iterator[list[int]]:
        came = self.before()
        for batch in self.batches:
            yield from [batch] * (self.times - came)
            came = 0


class FinitePositionBatches(Sampler[list[int]]):
    """The batches that cover `num_samples` positions.

    Every rank gets the same number of full batches, so the last ones may hold positions beyond the end; the readers
    mark those as padding.
    """

    def __init__(self, num_samples: int, batch_size: int, data_rank: int, data_size: int) -> None:
        self.batch_size, self.data_rank, self.data_size = batch_size, data_rank, data_size
        self.num_batches = -(-num_samples // (batch_size * data_size))

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[int]]:
        global_batch = self.batch_size * self.data_size
        for first in range(0, self.num_batches * global_batch, global_batch):
            yield list(range(first + self.data_rank, first + global_batch, self.data_size))
