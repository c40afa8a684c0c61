"""Slot tables: literal lists in, literal lists out, and the two facts of `sinks.py` against brute force."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longlive.models.visibility import VisibilityRule, visible_history
from longlive.rollout.sinks import SlotTable, absolute_position, free_slot, num_slots, place, relative_positions


def tables(shot_index: list[int], rule: VisibilityRule) -> list[SlotTable]:
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


@st.composite
def rules(draw: st.DrawFn) -> VisibilityRule:
    shot_sink = draw(st.booleans())
    sink_chunks = draw(st.integers(0, 3))
    return VisibilityRule(sink_chunks + shot_sink + draw(st.integers(1, 4)), sink_chunks, shot_sink)


shots = st.lists(st.booleans(), min_size=1, max_size=24).map(
    lambda cuts: [sum(cuts[: i + 1]) for i in range(len(cuts))]
)


@given(rules(), shots)
def test_what_a_chunk_sees_is_always_the_leading_slots(rule: VisibilityRule, shot_index: list[int]) -> None:
    """Catches an eviction of something visible, and a hole that would make the slice read a stale chunk."""
    for chunk, table in enumerate(tables(shot_index, rule)):
        visible = [*visible_history(chunk, shot_index, rule), chunk]
        assert sorted(table[: len(visible)]) == visible
        assert len(visible) == min(chunk + 1, rule.window_chunks or chunk + 1)


@given(rules(), shots)
def test_what_a_chunk_cannot_see_no_later_chunk_sees(rule: VisibilityRule, shot_index: list[int]) -> None:
    seen = [set(visible_history(chunk, shot_index, rule)) for chunk in range(len(shot_index))]
    for chunk in range(len(shot_index)):
        gone = set(range(chunk)) - seen[chunk]
        assert not any(gone & later for later in seen[chunk:])


@given(rules(), shots, shots)
def test_a_slot_does_not_depend_on_shots_to_come(rule: VisibilityRule, past: list[int], future: list[int]) -> None:
    """An interactive session cuts when it likes: no decision may look ahead."""
    together = past + [past[-1] + shot for shot in future]
    count = len(past)
    assert [t[:count] for t in tables(together, rule)[:count]] == [t[:count] for t in tables(past, rule)]


def test_absolute_positions_count_frames_and_shots() -> None:
    assert [absolute_position(c, [0, 0, 1, 2], 4, 8.0) for c in range(4)] == [0, 4, 16, 28]


def test_relative_positions_count_inside_the_list() -> None:
    """Sink 0, window 7 8, own chunk 9; the cut between 8 and 9 is in the list, those between 0 and 7 count once."""
    shot_index = [0, 0, 1, 1, 2, 3, 3, 3, 3, 4]
    assert relative_positions([0, 7, 8, 9], shot_index, 4, 0.0) == [0, 4, 8, 12]
    assert relative_positions([0, 7, 8, 9], shot_index, 4, 8.0) == [0, 12, 16, 28]
    assert relative_positions([9], shot_index, 4, 8.0) == [0]


@given(shots)
def test_relative_positions_are_absolute_while_nothing_is_evicted(shot_index: list[int]) -> None:
    shot_index = [shot - shot_index[0] for shot in shot_index]
    everything = range(len(shot_index))
    assert relative_positions(list(everything), shot_index, 4, 8.0) == [
        absolute_position(chunk, shot_index, 4, 8.0) for chunk in everything
    ]
