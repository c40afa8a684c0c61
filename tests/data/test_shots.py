"""Shots become chunks: literal lists in, literal lists out, and a plain search beside them."""

import random
from itertools import pairwise

import pytest

from longlive.data.shots import (
    SCENE_CUT_PHRASE,
    ChunkSizes,
    ClipPlan,
    Run,
    Shot,
    ShotRules,
    check_shots,
    chunk_prompts,
    plan_clip,
    runs_of_shots,
)

SIZES = ChunkSizes(chunk_frames=2, temporal_ratio=4)
"""Chunks of 5, 8, 8, ... raw frames."""
CUT = ShotRules("Cut. ")


def plan(runs: list[Run], num_chunks: int, rules: ShotRules = CUT, margin: int = 3, start: int = 0) -> ClipPlan:
    return plan_clip(runs, num_chunks, SIZES, rules, margin, draw=lambda number: start)


def runs(*borders: int) -> list[Run]:
    """Shots that follow one another, called a, b, c, ..."""
    return [Run(*span, caption) for *span, caption in zip(borders, borders[1:], "abcdefgh", strict=False)]


def test_chunks_own_raw_frames_as_a_causal_codec_makes_them() -> None:
    for chunk_frames, borders in ((2, [0, 5, 13, 21]), (1, [0, 1, 5, 9]), (4, [0, 13, 29, 45])):
        sizes = ChunkSizes(chunk_frames, 4)
        assert [sizes.start(chunk) for chunk in range(4)] == borders
        assert [sizes.num_raw_frames(chunk) for chunk in range(3)] == [
            later - earlier for earlier, later in pairwise(borders)
        ]
    assert [SIZES.num_frames(0, number) for number in range(6)] == [0, 1, 1, 1, 1, 2]
    assert [SIZES.num_frames(1, number) for number in range(9)] == [0, 0, 0, 0, 1, 1, 1, 1, 2]


def test_the_first_chunk_of_every_shot_but_the_first_says_that_the_scene_changes() -> None:
    assert chunk_prompts([("a", 2), ("b", 1), ("a", 3)], "Cut. ") == (
        ("a", "a", "Cut. b", "Cut. a", "a", "a"),
        (0, 0, 1, 2, 2, 2),
    )
    assert chunk_prompts([("a", 1), ("b", 2)], "") == (("a", "b", "b"), (0, 1, 1))
    assert chunk_prompts([("a", 2)], "Cut. ") == (("a", "a"), (0, 0))
    assert SCENE_CUT_PHRASE == "The scene transitions. ", "published networks were trained with it"


def test_shots_become_runs_of_positions_in_the_resampled_video() -> None:
    """At half the rate a cut comes at half the position; frames without a caption belong to nobody."""
    shots = (Shot(0, 10, "a"), Shot(10, 20, "b"), Shot(24, 30, "c"), Shot(31, 32, "seen by no raw frame"))
    assert runs_of_shots(shots, range(0, 40, 2)) == [Run(0, 5, "a"), Run(5, 10, "b"), Run(12, 15, "c")]
    assert runs_of_shots((Shot(2, 4, "a"),), [0, 0, 1, 2, 2, 3, 3, 4]) == [Run(3, 7, "a")]


def test_cuts_on_chunk_borders_lose_nothing() -> None:
    assert plan(runs(0, 5, 13, 29), 4) == ClipPlan(
        tuple(range(29)), ("a", "Cut. b", "Cut. c", "c"), (0, 1, 2, 2), num_valid_frames=8
    )


def test_what_is_left_of_a_shot_before_a_cut_is_dropped() -> None:
    """Seven raw frames hold no second chunk: it would show both shots."""
    assert plan(runs(0, 12, 30), 3).positions == (*range(5), *range(12, 28))


def test_a_shot_that_holds_no_chunk_is_left_out() -> None:
    """And leaves no hole in the shot numbers; what comes after it is still a cut."""
    found = plan(runs(0, 5, 12, 20, 24, 40), 4)
    assert found.positions == (*range(5), *range(12, 20), *range(24, 40))
    assert (found.prompts, found.shot_index) == (("a", "Cut. c", "Cut. e", "e"), (0, 1, 2, 2))
    assert plan(runs(0, 4, 30), 2).prompts == ("b", "b")


def test_shots_of_the_same_caption_stay_two_shots() -> None:
    found = plan([Run(0, 5, "same"), Run(5, 13, "same")], 2)
    assert (found.prompts, found.shot_index) == (("same", "Cut. same"), (0, 1))


def test_a_long_shot_is_cut_by_force_with_a_margin_between() -> None:
    rules = ShotRules("Cut. ", max_chunks_per_shot=2)
    found = plan(runs(0, 60), 5, rules)
    assert found.positions == (*range(13), *range(16, 32), *range(35, 43))
    assert (found.prompts, found.shot_index) == (("a", "a", "Cut. a", "a", "Cut. a"), (0, 0, 1, 1, 2))
    assert plan(runs(0, 60), 5, ShotRules("Cut. ", max_chunks_per_shot=5)).shot_index == (0,) * 5


def test_real_cuts_start_the_count_of_chunks_again() -> None:
    found = plan(runs(0, 13, 29), 4, ShotRules("Cut. ", max_chunks_per_shot=2))
    assert (found.positions, found.shot_index) == (tuple(range(29)), (0, 0, 1, 1))


@pytest.mark.parametrize(
    ("num_raw_frames", "num_valid"), [(1, 1), (4, 1), (5, 2), (8, 2), (9, 3), (12, 3), (13, 4), (20, 5)]
)
def test_a_video_that_is_too_short_repeats_its_last_frame_and_says_so(num_raw_frames: int, num_valid: int) -> None:
    """Only there may a chunk be filled in part: what follows is padding and no other shot."""
    assert plan(runs(0, num_raw_frames), 3) == ClipPlan(
        tuple(min(position, num_raw_frames - 1) for position in range(21)), ("a",) * 3, (0,) * 3, num_valid
    )


def test_the_last_shot_may_end_within_a_chunk_and_no_other() -> None:
    found = plan(runs(0, 8, 22), 4)
    assert found.positions == (*range(5), *range(8, 22), *[21] * 10)
    assert (found.shot_index, found.num_valid_frames) == ((0, 1, 1, 1), 2 + 2 + 1)


def test_a_last_shot_without_one_whole_frame_is_left_out() -> None:
    found = plan(runs(0, 5, 8), 2)
    assert (found.positions, found.prompts, found.num_valid_frames) == ((*range(5), *[4] * 8), ("a", "a"), 2)
    forced = plan(runs(0, 11), 2, ShotRules("Cut. ", max_chunks_per_shot=1))
    assert (forced.positions, forced.prompts, forced.num_valid_frames) == ((*range(5), *[4] * 8), ("a", "a"), 2)


def simulate(runs: list[Run], start: int, num_chunks: int, limit: int | None, margin: int) -> list[int] | None:
    """Frame by frame, without any arithmetic on lengths: the positions of a full clip from `start`, or None."""
    inside = [run for run in runs if run.start <= start < run.stop]
    if not inside:
        return None
    run, position, in_shot, found = inside[0], start, 0, []
    for chunk in range(num_chunks):
        size = 5 if chunk == 0 else 8
        if in_shot == limit:
            position, in_shot = position + margin, 0
        while position + size > run.stop:
            later = [other for other in runs if other.start > run.start]
            if not later or chunk == 0:
                return None
            run, in_shot = later[0], 0
            position = run.start
        found += range(position, position + size)
        position, in_shot = position + size, in_shot + 1
    return found


@pytest.mark.parametrize("limit", [None, 1, 2])
def test_every_start_that_fills_the_clip_can_be_drawn_and_no_other(limit: int | None) -> None:
    """Against a search; a start too many would train on padding, a start too few never on some frames."""
    numbers = random.Random(3)
    some_full = 0
    for _ in range(60):
        borders, found = [numbers.randrange(4)], []
        for caption in "abcd"[: numbers.randrange(1, 5)]:
            found.append(Run(borders[-1], borders[-1] + numbers.randrange(1, 30), caption))
            borders.append(found[-1].stop + numbers.randrange(3))
        expected = [clip for start in range(borders[-1]) if (clip := simulate(found, start, 4, limit, 3))]
        asked: list[int] = []
        rules = ShotRules("Cut. ", max_chunks_per_shot=limit)
        plan_clip(found, 4, SIZES, rules, 3, draw=lambda number, asked=asked: asked.append(number) or 0)
        assert asked == ([len(expected)] if len(expected) > 1 else [])
        for number, clip in enumerate(expected):
            chosen = plan(found, 4, rules, start=number)
            assert list(chosen.positions) == clip
            assert chosen.num_valid_frames == 8
            some_full += 1
            for chunk in range(4):
                span = chosen.positions[SIZES.start(chunk) : SIZES.start(chunk + 1)]
                (caption,) = {run.caption for run in found for position in span if run.start <= position < run.stop}
                assert chosen.prompts[chunk].removeprefix("Cut. ") == caption
    assert some_full > 100


def test_a_video_without_any_captioned_frame_is_refused() -> None:
    with pytest.raises(ValueError, match="no raw frame lies in a shot"):
        plan([], 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_chunks_per_shot": 0}, "max_chunks_per_shot=0 must be at least 1, or null"),
        ({"forced_cut_margin": -1.0}, r"forced_cut_margin=-1\.0 seconds must be at least 0"),
    ],
)
def test_impossible_rules_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShotRules(**settings)


@pytest.mark.parametrize(
    ("shots", "message"),
    [
        ((), "at least one shot"),
        ((Shot(0, 5, "a"), Shot(4, 9, "b")), r"shot \[4, 9\) starts before \[0, 5\) ends"),
        ((Shot(0, 11, "a"),), "ends at raw frame 11, but the clip has 10"),
    ],
)
def test_shots_that_do_not_fit_a_clip_are_refused(shots: tuple[Shot, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_shots(shots, 10)


def test_a_shot_needs_a_beginning_before_its_end() -> None:
    with pytest.raises(ValueError, match="0 <= start < end"):
        Shot(3, 3, "a")
