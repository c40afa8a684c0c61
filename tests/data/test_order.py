"""The arithmetic of positions: literal lists, for every number of ranks."""

import pytest
import torch

from longlive.data.order import (
    FinitePositionBatches,
    PositionBatches,
    accumulation,
    buffer_shuffle,
    epoch_order,
    lane_shards,
    num_lanes,
    place_in_lane,
)


def first_batches(batches: PositionBatches, count: int) -> list[list[int]]:
    return [batch for batch, _ in zip(batches, range(count), strict=False)]


def test_a_rank_reads_every_size_th_position() -> None:
    assert first_batches(PositionBatches(lambda: 0, 2, 0, 1), 3) == [[0, 1], [2, 3], [4, 5]]
    assert first_batches(PositionBatches(lambda: 0, 2, 0, 3), 2) == [[0, 3], [6, 9]]
    assert first_batches(PositionBatches(lambda: 0, 2, 2, 3), 2) == [[2, 5], [8, 11]]
    assert first_batches(PositionBatches(lambda: 12, 2, 1, 2), 2) == [[13, 15], [17, 19]]


@pytest.mark.parametrize("data_size", [1, 2, 4])
def test_a_step_consumes_the_same_positions_for_any_number_of_ranks(data_size: int) -> None:
    ranks = [first_batches(PositionBatches(lambda: 8, 8 // data_size, rank, data_size), 3) for rank in range(data_size)]
    for step in range(3):
        positions = sorted(position for rank in ranks for position in rank[step])
        assert positions == list(range(8 + 8 * step, 16 + 8 * step))


def test_accumulation_fills_up_the_global_batch() -> None:
    assert [accumulation(64, 2, ranks) for ranks in (1, 2, 8, 32)] == [32, 16, 4, 1]
    assert accumulation(6, 3, 2) == 1


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            (10, 2, 4),
            "global_batch_size=10 is no multiple of 8 = batch_size=2 x 4 data ranks; use global_batch_size=8 or 16$",
        ),
        ((12, 2, 4), "use global_batch_size=8 or 16, or batch_size=1$"),
        ((24, 9, 2), "18 = batch_size=9 x 2 data ranks; use global_batch_size=18 or 36, or batch_size=6$"),
        ((3, 4, 1), "4 = batch_size=4 x 1 data rank; use global_batch_size=4, or batch_size=3$"),
        ((0, 4, 2), "global_batch_size=0 is no multiple of 8 .* use global_batch_size=8$"),
        ((-8, 4, 2), "global_batch_size=-8 is no multiple of 8 .* use global_batch_size=8$"),
    ],
)
def test_a_global_batch_that_the_ranks_do_not_divide_names_the_nearest_that_they_do(
    sizes: tuple[int, int, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        accumulation(*sizes)


def test_the_start_is_asked_for_at_every_iteration() -> None:
    """Lightning iterates the same loader again after `limit_train_batches`."""
    start = 0
    batches = PositionBatches(lambda: start, 2, 0, 1)
    assert first_batches(batches, 1) == [[0, 1]]
    start = 6
    assert first_batches(batches, 1) == [[6, 7]]


def test_every_rank_gets_equally_many_full_batches_of_a_finite_set() -> None:
    """Ranks with different numbers of batches hang in the first collective."""
    ranks = [list(FinitePositionBatches(7, 2, rank, 2)) for rank in range(2)]
    assert ranks == [[[0, 2], [4, 6]], [[1, 3], [5, 7]]]
    assert [len(FinitePositionBatches(count, 2, 0, 2)) for count in (1, 4, 5, 8, 9)] == [1, 1, 2, 2, 3]


def test_an_epoch_is_a_permutation_that_its_number_and_the_seed_choose() -> None:
    """`set_epoch` forgotten: the same order every epoch."""
    orders = [tuple(epoch_order(20, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(20)) for order in orders)
    assert len(set(orders)) == 4
    assert tuple(epoch_order(20, 0, 0)) == orders[0]


def test_lanes_depend_on_shards_and_ranks_alone() -> None:
    assert [num_lanes(shards, 1) for shards in (1, 7, 8, 16, 31, 32, 1000)] == [1, 1, 2, 4, 4, 8, 8]
    assert [num_lanes(shards, 2) for shards in (2, 15, 16, 64)] == [1, 1, 2, 8]
    with pytest.raises(ValueError, match="got 3 shards for 4 ranks"):
        num_lanes(3, 4)


def test_lanes_share_the_shards_of_an_epoch_out() -> None:
    for epoch in range(3):
        lanes = [lane_shards(10, 0, epoch, lane, 4) for lane in range(4)]
        assert sorted(shard for lane in lanes for shard in lane) == list(range(10))
        assert [len(lane) for lane in lanes] == [3, 3, 2, 2]
    assert lane_shards(10, 0, 0, 0, 4) != lane_shards(10, 0, 1, 0, 4)


def test_batches_go_round_the_lanes() -> None:
    # one rank, batches of 2, 2 lanes: positions 0 1 | 2 3 | 4 5 | 6 7 belong to the lanes 0 | 1 | 0 | 1
    assert [place_in_lane(position, 1, 2, 2) for position in range(8)] == [
        (0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (0, 3), (1, 2), (1, 3),
    ]  # fmt: skip
    # rank 1 of 3 reads the positions 1, 4, 7, ...
    assert [place_in_lane(position, 3, 2, 2) for position in (1, 4, 7, 10)] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_a_shuffle_buffer_mixes_within_its_size() -> None:
    order = buffer_shuffle(100, 8, torch.Generator().manual_seed(0))
    assert sorted(order) == list(range(100))
    assert all(number <= place + 8 for place, number in enumerate(order))
    assert order != list(range(100))
    assert order == buffer_shuffle(100, 8, torch.Generator().manual_seed(0))
    assert max(place - number for place, number in enumerate(order)) > 8
    assert sorted(buffer_shuffle(3, 8, torch.Generator().manual_seed(0))) == [0, 1, 2]
