"""Slot tables: literal lists in, literal lists out, and the two facts of `sinks.py` for every pattern of cuts."""

from collections.abc import Sequence
from itertools import accumulate, pairwise, product

import pytest

from longlive.models.visibility import VisibilityRule, visible_history
from longlive.rollout.sinks import SlotTable, absolute_position, free_slot, num_slots, place, relative_positions


def tables(shot_index: Sequence[int], rule: VisibilityRule) -> list[SlotTable]:
    """The table after every chunk."""
    table: SlotTable = (None,) * num_slots(rule, len(shot_index))
    result = []
    for chunk in range(len(shot_index)):
        table = place(table, free_slot(table, chunk, shot_index, rule), chunk)
        result.append(table)
    return result


def test_without_a_window_every_chunk_keeps_its_slot() -> None:
    assert tables([0, 0, 0], VisibilityRule()) == [(0, None, None), (0, 1, None), (0, 1, 2)]


def test_a_window_is_a_ring() -> None:
    assert tables([0] * 6, VisibilityRule(window_chunks=3))[2:] == [(0, 1, 2), (3, 1, 2), (3, 4, 2), (3, 4, 5)]


def test_global_sinks_stay_in_their_slots() -> None:
    rule = VisibilityRule(window_chunks=4, sink_chunks=1)
    assert tables([0] * 7, rule)[3:] == [(0, 1, 2, 3), (0, 4, 2, 3), (0, 4, 5, 3), (0, 4, 5, 6)]


def test_a_shot_sink_is_pinned_at_the_cut_and_released_at_the_next_one() -> None:
    """Shots 0 0 | 1 1 1 1 | 2 2 2. Chunk 2 opens shot 1 and stays until chunk 7; chunk 6 opens shot 2 and stays."""
    rule = VisibilityRule(window_chunks=4, sink_chunks=1, shot_sink=True)
    assert tables([0, 0, 1, 1, 1, 1, 2, 2, 2], rule) == [
        (0, None, None, None),
        (0, 1, None, None),
        (0, 1, 2, None),
        (0, 1, 2, 3),
        (0, 4, 2, 3),
        (0, 4, 2, 5),
        (0, 4, 6, 5),  # the cut: the window still holds the old shot, its sink is gone
        (0, 7, 6, 5),
        (0, 7, 6, 8),
    ]


def test_a_window_of_one_chunk_keeps_nothing() -> None:
    assert tables([0, 0, 0], VisibilityRule(window_chunks=1)) == [(0,), (1,), (2,)]


def test_a_chunk_that_is_written_again_keeps_its_slot() -> None:
    assert free_slot((0, 1, 2), 1, [0, 0, 0], VisibilityRule()) == 1


def test_a_table_that_is_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match="chunk=2 finds no free slot"):
        free_slot((0, 1), 2, [0, 0, 0], VisibilityRule())


def test_slots_are_the_window_or_a_shorter_video() -> None:
    assert num_slots(VisibilityRule(), 7) == 7
    assert num_slots(VisibilityRule(window_chunks=4), 7) == 4
    assert num_slots(VisibilityRule(window_chunks=4), 2) == 2
    with pytest.raises(ValueError, match="num_chunks=0"):
        num_slots(VisibilityRule(window_chunks=4), 0)


EVERY_RULE = [
    VisibilityRule(sinks + shot_sink + places, sinks, shot_sink)
    for sinks in range(3)
    for shot_sink in (False, True)
    for places in (1, 2, 3)
]
EVERY_CUT = [tuple(accumulate(cuts, initial=0)) for cuts in product((0, 1), repeat=8)]
"""Nine chunks, cut in every possible way."""


@pytest.mark.parametrize("rule", EVERY_RULE, ids=str)
def test_what_a_chunk_sees_is_always_the_leading_slots(rule: VisibilityRule) -> None:
    """Catches an eviction of something visible, and a hole that would make the slice read a stale chunk."""
    for shot_index in EVERY_CUT:
        for chunk, table in enumerate(tables(shot_index, rule)):
            visible = [*visible_history(chunk, shot_index, rule), chunk]
            assert sorted(table[: len(visible)]) == visible
            assert len(visible) == min(chunk + 1, rule.window_chunks)


@pytest.mark.parametrize("rule", EVERY_RULE, ids=str)
def test_what_a_chunk_cannot_see_no_later_chunk_sees(rule: VisibilityRule) -> None:
    """The eviction rule stands on it, because a session does not know the cuts to come."""
    for shot_index in EVERY_CUT:
        seen = [set(visible_history(chunk, shot_index, rule)) for chunk in range(len(shot_index))]
        for chunk, (now, later) in enumerate(pairwise(seen)):
            assert later <= now | {chunk}


def test_a_slot_is_chosen_from_the_shots_so_far() -> None:
    """An interactive session cuts when it likes: the choice works with, and does not change by, what comes later."""
    rule = VisibilityRule(window_chunks=4, sink_chunks=1, shot_sink=True)
    for shot_index in EVERY_CUT:
        for chunk, table in enumerate(tables(shot_index, rule)[:-1], start=1):
            known = shot_index[: chunk + 1]
            assert free_slot(table, chunk, known, rule) == free_slot(table, chunk, shot_index, rule)


def test_absolute_positions_count_frames_and_shots() -> None:
    assert [absolute_position(c, [0, 0, 1, 2], 4, 8.0) for c in range(4)] == [0, 4, 16, 28]


def test_relative_positions_count_inside_the_list() -> None:
    """Sink 0, window 7 8, own chunk 9; the cut between 8 and 9 is in the list, those between 0 and 7 count once."""
    shot_index = [0, 0, 1, 1, 2, 3, 3, 3, 3, 4]
    assert relative_positions([0, 7, 8, 9], shot_index, 4, 0.0) == [0, 4, 8, 12]
    assert relative_positions([0, 7, 8, 9], shot_index, 4, 8.0) == [0, 12, 16, 28]
    assert relative_positions([9], shot_index, 4, 8.0) == [0]


def test_relative_positions_are_absolute_while_nothing_is_evicted() -> None:
    for shot_index in EVERY_CUT:
        everything = range(len(shot_index))
        assert relative_positions(everything, shot_index, 4, 8.0) == [
            absolute_position(chunk, shot_index, 4, 8.0) for chunk in everything
        ]
