"""Slots that outlive their eviction hold what the ring would hold, and what it held."""

from functools import partial

import pytest
import torch

from longlive.rollout.retained import RetainedStorage
from longlive.rollout.slots import CacheDtype, SlotIndex, make_storage
from longlive.typing import Tensor

SIZES = (2, 16)
"""Heads and features."""
INDICES: tuple[SlotIndex, ...] = (0, 1, torch.tensor([2, 1]), torch.tensor([0, 2]), 1)


def chunk(number: int) -> Tensor:
    return torch.randn(2, 4, *SIZES, generator=torch.Generator().manual_seed(number))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "nvfp4"], ids=str)
def test_it_reads_as_the_ring_does_and_a_snapshot_as_it_did(dtype: CacheDtype) -> None:
    """Also where samples put one chunk into different slots."""
    ring = make_storage(2, 3, 4, *SIZES, dtype, "cpu")
    retained = RetainedStorage(2, 3, partial(make_storage, 2, 1, 4, *SIZES, dtype, "cpu"))
    snapshots, expected = [], []
    for number, index in enumerate(INDICES):
        for storage in (ring, retained):
            storage.write(index, chunk(number), chunk(10 + number))
        for num_slots in (1, 3):
            for ours, theirs in zip(
                retained.read(num_slots, torch.float32), ring.read(num_slots, torch.float32), strict=True
            ):
                assert torch.equal(ours, theirs)
        snapshots.append(retained.snapshot())
        expected.append([x.clone() for x in ring.read(3, torch.float32)])
    for snapshot, (keys, values) in zip(snapshots, expected, strict=True):
        read_keys, read_values = snapshot.read(3, torch.float32)
        assert torch.equal(read_keys, keys)
        assert torch.equal(read_values, values)
        read_keys.zero_()
        assert torch.equal(snapshot.read(3, torch.float32)[0], keys)


@pytest.mark.parametrize("dtype", [torch.bfloat16, "nvfp4"], ids=str)
def test_what_it_stores_can_be_taken_over(dtype: CacheDtype) -> None:
    """By another one, and by a ring; a checkpoint holds it. Also writes of one sample alone."""
    make = partial(make_storage, 2, slots=3, tokens=4, num_heads=2, head_dim=16, dtype=dtype, device="cpu")
    ring, retained = make(), RetainedStorage(2, 3, partial(make, slots=1))
    alone = (torch.tensor([1]), torch.tensor([0]))
    for number, index in enumerate((*INDICES, alone, (torch.tensor([], dtype=torch.int64),) * 2)):
        for storage in (ring, retained):
            storage.write(index, chunk(number), chunk(10 + number))
    stored = retained.tensors()
    assert stored.keys() == ring.tensors().keys()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in ring.tensors().items())
    for other in (make(), RetainedStorage(2, 3, partial(make, slots=1))):
        other.load(stored)
        for ours, theirs in zip(other.read(3, torch.float32), ring.read(3, torch.float32), strict=True):
            assert torch.equal(ours, theirs)


def test_a_chunk_is_held_once_whatever_holds_it() -> None:
    made = []

    def make() -> object:
        made.append(make_storage(2, 1, 4, *SIZES, torch.float32, "cpu"))
        return made[-1]

    retained = RetainedStorage(2, 3, make)
    for number, index in enumerate(INDICES):
        retained.write(index, chunk(number), chunk(number))
    assert len(made) == 1 + len(INDICES)
    chunks = {held for row in retained.snapshot()._chunks for held in row}
    assert len(chunks) == 4  # of sample 0: 3, 4, 2; of sample 1: 0, 4, 3
    assert retained.num_bytes == 4 * made[0].num_bytes
