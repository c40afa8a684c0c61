"""Visibility: literal tables in, literal lists out."""

import pytest
import torch

from longlive.models.visibility import (
    Rectangle,
    Role,
    Segment,
    VisibilityRule,
    count_entries,
    count_useful_entries,
    rectangles,
    segment_mask,
    segment_of_token,
    teacher_forcing_segments,
    token_mask,
    visible_history,
)

ONE_SHOT = (0,) * 8
THREE_SHOTS = (0, 0, 0, 1, 1, 2, 2, 2)
CLEAN, NOISY = Role.CLEAN, Role.NOISY


@pytest.mark.parametrize(
    ("chunk", "shot_index", "rule", "expected"),
    [
        (0, ONE_SHOT, VisibilityRule(), []),
        (4, ONE_SHOT, VisibilityRule(), [0, 1, 2, 3]),
        (2, ONE_SHOT, VisibilityRule(window_chunks=3), [0, 1]),
        (5, ONE_SHOT, VisibilityRule(window_chunks=3), [3, 4]),
        (5, ONE_SHOT, VisibilityRule(window_chunks=1), []),
        (5, ONE_SHOT, VisibilityRule(window_chunks=4, sink_chunks=1), [0, 3, 4]),
        (2, ONE_SHOT, VisibilityRule(window_chunks=4, sink_chunks=2), [0, 1]),
        (7, ONE_SHOT, VisibilityRule(window_chunks=3, sink_chunks=2), [0, 1]),
        (1, ONE_SHOT, VisibilityRule(window_chunks=5, sink_chunks=3), [0]),
        # In shot 0 the shot's first chunk is the video's first chunk: one sink, so one more place for recent chunks.
        (2, THREE_SHOTS, VisibilityRule(window_chunks=3, sink_chunks=1, shot_sink=True), [0, 1]),
        # At a cut the new shot has no earlier chunk: global sink, then the window, which still holds the old shot.
        (5, THREE_SHOTS, VisibilityRule(window_chunks=4, sink_chunks=1, shot_sink=True), [0, 3, 4]),
        (6, THREE_SHOTS, VisibilityRule(window_chunks=4, sink_chunks=1, shot_sink=True), [0, 4, 5]),
        (7, THREE_SHOTS, VisibilityRule(window_chunks=4, sink_chunks=1, shot_sink=True), [0, 5, 6]),
        (7, THREE_SHOTS, VisibilityRule(window_chunks=2, shot_sink=True), [5]),
        (7, THREE_SHOTS, VisibilityRule(window_chunks=3, shot_sink=False), [5, 6]),
        # A shot that comes back under the same number is another run of chunks, with its own first chunk.
        (4, (0, 0, 1, 0, 0), VisibilityRule(window_chunks=2, shot_sink=True), [3]),
    ],
)
def test_history_is_the_sinks_and_the_most_recent_other_chunks(chunk, shot_index, rule, expected):
    assert visible_history(chunk, shot_index, rule) == expected


def test_history_never_exceeds_the_window_and_uses_all_of_it():
    """Catches a window that forgets to count the sinks or the chunk itself: rollout would hold other slots."""
    rule = VisibilityRule(window_chunks=4, sink_chunks=1, shot_sink=True)
    assert [len(visible_history(chunk, THREE_SHOTS, rule)) for chunk in range(8)] == [0, 1, 2, 3, 3, 3, 3, 3]


def test_a_rule_in_frames_becomes_a_rule_in_chunks():
    rule = VisibilityRule.from_frames(window=32, sink_frames=8, shot_sink=True, chunk_frames=8)
    assert rule == VisibilityRule(window_chunks=4, sink_chunks=1, shot_sink=True)
    assert VisibilityRule.from_frames(None, 0, False, chunk_frames=8) == VisibilityRule()


@pytest.mark.parametrize(
    ("window", "sink_frames", "message"),
    [
        (30, 8, "window=30 is no multiple of chunk_frames=8; use 24 or 32"),
        (32, 5, "sink_frames=5 is no multiple of chunk_frames=8; use 0 or 8"),
        (16, 16, "window_chunks=2 cannot hold 2 sink chunks, 0 shot sink and the chunk itself; use at least 3"),
        (None, 8, "have no effect without a window"),
        (32, -8, "sink_chunks=-1 must be at least 0"),
        (0, 0, "use at least 1"),
    ],
)
def test_settings_that_make_no_rule_are_refused(window, sink_frames, message):
    with pytest.raises(ValueError, match=message):
        VisibilityRule.from_frames(window, sink_frames, False, chunk_frames=8)


def test_a_shot_sink_without_a_window_is_refused():
    with pytest.raises(ValueError, match="shot_sink=True have no effect"):
        VisibilityRule(shot_sink=True)


def test_teacher_forcing_is_all_clean_then_all_noisy():
    assert teacher_forcing_segments(2, 5) == (
        Segment(CLEAN, 0, 5),
        Segment(CLEAN, 1, 5),
        Segment(NOISY, 0, 5),
        Segment(NOISY, 1, 5),
    )


def test_rectangles_of_teacher_forcing():
    assert rectangles(teacher_forcing_segments(3, 5), ONE_SHOT, VisibilityRule()) == (
        Rectangle((0,), (0,)),
        Rectangle((1,), (0, 1)),
        Rectangle((2,), (0, 1, 2)),
        Rectangle((3,), (3,)),
        Rectangle((4,), (0, 4)),
        Rectangle((5,), (0, 1, 5)),
    )


def test_rectangles_follow_the_order_of_the_segments():
    """Catches a table that assumes the order of one rank: Balanced SP delivers the copies rank by rank."""
    interleaved = [Segment(role, chunk, 5) for chunk in range(3) for role in Role]
    assert rectangles(interleaved, ONE_SHOT, VisibilityRule()) == (
        Rectangle((0,), (0,)),
        Rectangle((1,), (1,)),
        Rectangle((2,), (0, 2)),
        Rectangle((3,), (0, 3)),
        Rectangle((4,), (0, 2, 4)),
        Rectangle((5,), (0, 2, 5)),
    )


def test_rectangles_with_window_and_sink():
    rule = VisibilityRule(window_chunks=3, sink_chunks=1)
    assert rectangles(teacher_forcing_segments(4, 1), ONE_SHOT, rule)[3] == Rectangle((3,), (0, 2, 3))
    assert rectangles(teacher_forcing_segments(4, 1), ONE_SHOT, rule)[7] == Rectangle((7,), (0, 2, 7))


def test_a_chunk_cut_into_two_segments_is_one_rectangle():
    segments = (Segment(CLEAN, 0, 2), Segment(CLEAN, 0, 3), Segment(NOISY, 0, 5))
    assert rectangles(segments, (0,), VisibilityRule()) == (Rectangle((0, 1), (0, 1)), Rectangle((2,), (2,)))


def test_the_segment_mask_is_the_table_of_the_source():
    """Noisy c sees clean c' < c and itself; clean c sees clean c' <= c; nothing else sees noise."""
    assert segment_mask(teacher_forcing_segments(3, 1), ONE_SHOT, VisibilityRule()).int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [1, 0, 0, 0, 1, 0],
        [1, 1, 0, 0, 0, 1],
    ]


def test_the_token_mask_repeats_the_segment_mask():
    segments = (Segment(CLEAN, 0, 2), Segment(NOISY, 0, 1), Segment(NOISY, 1, 2))
    assert segment_of_token(segments).tolist() == [0, 0, 1, 2, 2]
    assert token_mask(segments, (0, 0), VisibilityRule()).int().tolist() == [
        [1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [1, 1, 0, 1, 1],
        [1, 1, 0, 1, 1],
    ]


def test_useful_entries_are_counted_as_the_source_says():
    chunks, tokens = 12, 128
    segments = teacher_forcing_segments(chunks, tokens)
    useful = count_useful_entries(segments, (0,) * chunks, VisibilityRule())
    assert useful == chunks * (chunks + 1) * tokens**2
    assert count_entries(segments) == 4 * chunks**2 * tokens**2
    assert round(100 * useful / count_entries(segments)) == 27


@pytest.mark.parametrize(
    "rule",
    [VisibilityRule(), VisibilityRule(2), VisibilityRule(4, 1), VisibilityRule(4, 1, True), VisibilityRule(3, 0, True)],
)
def test_useful_entries_are_the_entries_of_the_mask(rule):
    segments = [Segment(role, chunk, 2 + chunk % 3) for chunk in range(8) for role in Role]
    mask = token_mask(segments, THREE_SHOTS, rule)
    assert count_useful_entries(segments, THREE_SHOTS, rule) == int(mask.sum())
    assert bool(torch.diagonal(mask).all())


def test_another_length_or_rule_or_shot_table_gives_another_mask():
    """Catches tables cached by less than they depend on."""
    rule = VisibilityRule(window_chunks=2, shot_sink=True)
    masks = [
        token_mask(teacher_forcing_segments(8, 1), ONE_SHOT, rule),
        token_mask(teacher_forcing_segments(8, 1), THREE_SHOTS, rule),
        token_mask(teacher_forcing_segments(8, 1), THREE_SHOTS, VisibilityRule(window_chunks=2)),
        token_mask(teacher_forcing_segments(8, 2), ONE_SHOT, rule),
    ]
    assert all(
        first.shape != second.shape or not torch.equal(first, second)
        for index, first in enumerate(masks)
        for second in masks[:index]
    )


def test_segments_beyond_the_shot_table_are_refused():
    with pytest.raises(ValueError, match="shot_index has 2 chunks, but the segments reach chunk 2"):
        rectangles(teacher_forcing_segments(3, 1), (0, 0), VisibilityRule())
