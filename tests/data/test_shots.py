"""Prompts and shots of chunks: literal lists in, literal lists out."""

import pytest

from longlive.data.shots import Shot, check_shots, raw_frames_of_chunk, shots_of_chunks


def test_chunks_own_raw_frames_as_a_causal_codec_makes_them() -> None:
    assert [raw_frames_of_chunk(chunk, 2, 4) for chunk in range(3)] == [range(0, 5), range(5, 13), range(13, 21)]
    assert [raw_frames_of_chunk(chunk, 1, 4) for chunk in range(3)] == [range(0, 1), range(1, 5), range(5, 9)]
    assert [raw_frames_of_chunk(chunk, 4, 4) for chunk in range(2)] == [range(0, 13), range(13, 29)]


def test_a_chunk_takes_the_shot_that_covers_most_of_it() -> None:
    shots = (Shot(0, 8, "a"), Shot(8, 20, "b"), Shot(20, 30, "c"))
    # chunks cover the raw frames 0-4, 5-12, 13-20
    assert shots_of_chunks(shots, range(21), 2, 4) == (("a", "b", "b"), (0, 1, 1))


def test_ties_go_to_the_earlier_shot() -> None:
    shots = (Shot(0, 9, "a"), Shot(9, 21, "b"))
    # chunk 1 covers 5-12: four raw frames of each
    assert shots_of_chunks(shots, range(21), 2, 4) == (("a", "a", "b"), (0, 0, 1))


def test_shots_are_numbered_from_zero_in_the_order_in_which_chunks_show_them() -> None:
    """A temporal crop starts in the middle; a shot that no chunk shows leaves no hole in the numbers."""
    shots = (Shot(0, 50, "a"), Shot(50, 105, "b"), Shot(105, 107, "short"), Shot(107, 200, "c"))
    assert shots_of_chunks(shots, range(98, 98 + 21), 2, 4) == (("b", "c", "c"), (0, 1, 1))


def test_captions_of_the_same_text_in_two_shots_stay_two_shots() -> None:
    shots = (Shot(0, 5, "same"), Shot(5, 21, "same"))
    assert shots_of_chunks(shots, range(21), 2, 4) == (("same", "same", "same"), (0, 1, 1))


def test_chunks_without_a_caption_continue_the_one_before() -> None:
    assert shots_of_chunks((Shot(0, 5, "a"), Shot(13, 21, "b")), range(21), 2, 4) == (("a", "a", "b"), (0, 0, 1))
    assert shots_of_chunks((Shot(13, 21, "b"),), range(21), 2, 4) == (("b", "b", "b"), (0, 0, 0))


def test_coverage_counts_source_frames_after_resampling() -> None:
    """At half the rate, chunk 1 shows the source frames 10-24 and not 5-12."""
    shots = (Shot(0, 10, "a"), Shot(10, 60, "b"))
    assert shots_of_chunks(shots, range(0, 42, 2), 2, 4) == (("a", "b", "b"), (0, 1, 1))


def test_a_repeated_last_frame_belongs_to_its_shot() -> None:
    shots = (Shot(0, 5, "a"), Shot(5, 7, "b"))
    indices = [min(index, 6) for index in range(21)]
    assert shots_of_chunks(shots, indices, 2, 4) == (("a", "b", "b"), (0, 1, 1))


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
