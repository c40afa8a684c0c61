"""Rings of errors: what is kept, in which order, and in how much memory."""

from __future__ import annotations

import gc

import pytest
import torch

from longlive.objectives.error_buffer import LATENT, MEBIBYTE, NOISE, ErrorBuffer
from longlive.typing import Tensor

SHAPE = (2, 2, 3, 4, 4)
BYTES = 2 * 2 * 3 * 4 * 4 * 2


def entry(value: float) -> Tensor:
    """The error of the latent is `value` everywhere, that of the noise `-value`."""
    return value * torch.tensor([1.0, -1.0]).view(2, 1, 1, 1, 1).expand(SHAPE)


def values(buffer: ErrorBuffer, kind: int = LATENT) -> list[list[float]]:
    """The entries of every bucket, from the oldest to the newest."""
    found = []
    for bucket in range(buffer.num_buckets):
        places = [(bucket, rank) for rank in range(buffer.size(bucket))]
        found.append(buffer.take(kind, places)[:, 0, 0, 0, 0].tolist() if places else [])
    return found


def filled(numbers: dict[int, int], capacity: int = 3) -> ErrorBuffer:
    """So many entries per bucket, valued 100 bucket + 0, 1, 2, ..."""
    buffer = ErrorBuffer(3, 3 * capacity * BYTES / MEBIBYTE)
    for bucket, number in numbers.items():
        for index in range(number):
            buffer.append(bucket, entry(100.0 * bucket + index))
    return buffer


def test_a_bucket_keeps_its_newest_entries_in_their_order() -> None:
    buffer = filled({0: 2, 2: 5})
    assert buffer.capacity == 3
    assert len(buffer) == 5
    assert values(buffer) == [[0, 1], [], [202, 203, 204]]
    assert values(buffer, NOISE) == [[0, -1], [], [-202, -203, -204]]
    assert [buffer.locate(number) for number in range(5)] == [(0, 0), (0, 1), (2, 0), (2, 1), (2, 2)]
    with pytest.raises(IndexError):
        buffer.locate(5)


def test_an_entry_is_a_copy() -> None:
    """Else a later step's errors, computed in the same memory, overwrite those of an earlier one."""
    buffer, error = filled({}), entry(1)
    buffer.append(0, error)
    error.fill_(7)
    taken = buffer.take(LATENT, [(0, 0)])
    taken.fill_(9)
    assert values(buffer) == [[1], [], []]


@pytest.mark.parametrize("extra", [0.0, 0.9])
def test_the_number_of_entries_follows_from_the_budget(extra: float) -> None:
    buffer = ErrorBuffer(4, (5 + extra) * 4 * BYTES / MEBIBYTE)
    for index in range(40):
        buffer.append(index % 4, entry(index))
    assert [buffer.size(bucket) for bucket in range(4)] == [5] * 4
    assert buffer.nbytes == 4 * 5 * BYTES


def alive() -> int:
    """Bytes of all tensors of this process."""
    gc.collect()
    storages = [thing.untyped_storage() for thing in gc.get_objects() if type(thing) is torch.Tensor]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def test_the_tensors_of_the_process_grow_by_no_more_than_the_budget() -> None:
    """Known mistake 23. Three times as many entries as the budget holds, and a state beside them."""
    budget = 48
    error = torch.ones(2, 4, 16, 64, 64)
    before = alive()
    buffer = ErrorBuffer(6, budget)
    for index in range(3 * 48):
        buffer.append(index % 6, error)
    state = buffer.state_dict()
    assert alive() - before == buffer.nbytes == budget * MEBIBYTE
    assert sum(len(block) for ring in state for block in ring["blocks"]) == 48


def test_a_loaded_buffer_answers_as_the_saved_one_and_goes_on_like_it() -> None:
    saved, loaded = filled({0: 2, 2: 5}), filled({1: 1})
    loaded.load_state_dict(saved.state_dict())
    assert values(loaded) == values(saved)
    for buffer in (saved, loaded):
        buffer.append(2, entry(9))
        buffer.append(0, entry(8))
    assert values(loaded) == values(saved) == [[0, 1, 8], [], [203, 204, 9]]


@pytest.mark.parametrize("number", [1, 4, 5, 20, 23])
def test_rings_of_several_blocks_keep_their_order(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Blocks of 4 entries in a ring of 10: not yet full, full, and begun anew in the middle of a block."""
    monkeypatch.setattr("longlive.objectives.error_buffer.BLOCK", 4 * BYTES)
    saved, loaded = filled({1: number}, capacity=10), filled({}, capacity=10)
    expected = [100.0 + index for index in range(number)][-10:]
    assert values(saved) == [[], expected, []]
    state = saved.state_dict()
    assert sum(len(block) for block in state[1]["blocks"]) == len(expected)
    loaded.load_state_dict(state)
    assert values(loaded) == [[], expected, []]
    assert saved.nbytes <= 10 * BYTES


def test_a_smaller_budget_keeps_the_newest() -> None:
    loaded = filled({}, capacity=2)
    loaded.load_state_dict(filled({0: 1, 2: 5}).state_dict())
    assert values(loaded) == [[0], [], [203, 204]]


def test_an_empty_buffer_can_be_saved() -> None:
    loaded = filled({1: 1})
    loaded.load_state_dict(filled({}).state_dict())
    assert len(loaded) == 0


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="num_buckets=0 must be at least 1"):
        ErrorBuffer(0, 1)
    with pytest.raises(ValueError, match="budget_mib=0 must be positive"):
        ErrorBuffer(1, 0)
    with pytest.raises(ValueError, match=r"budget_mib=1 holds no error of a chunk of \[8, 48, 4, 4\] .* at least 3,"):
        ErrorBuffer(100, 1).append(0, torch.ones(2, 8, 48, 4, 4))
    with pytest.raises(
        ValueError, match=r"chunk of \[2, 3, 4, 5\] does not fit those in the buffer, of \[2, 3, 4, 4\]"
    ):
        filled({0: 1}).append(0, torch.ones(2, 2, 3, 4, 5))
    with pytest.raises(ValueError, match="num_buckets=3, but the checkpoint's errors are in 5 buckets"):
        filled({}).load_state_dict(ErrorBuffer(5, 1).state_dict())
