"""Who owns what, written out; and that every copy of every chunk has exactly one owner."""

import pytest

from longlive.models.visibility import Role, VisibilityRule, count_useful_entries, teacher_forcing_segments
from longlive.parallel.layout import (
    MakeLayout,
    SequenceLayout,
    balanced_layout,
    check_heads,
    check_rollout,
    check_world,
    contiguous_layout,
    name_divisors,
    whole_layout,
)

LAYOUTS = {"balanced": balanced_layout, "contiguous": contiguous_layout}


def written(layout: SequenceLayout) -> list[str]:
    """`c0 n0` for the clean and noisy copy of chunk 0."""
    return [" ".join(f"{piece.role.value[0]}{piece.chunk}" for piece in rank) for rank in layout.pieces]


def test_a_rank_alone_leaves_out_the_clean_copy_that_nobody_sees() -> None:
    assert written(whole_layout(4)) == ["c0 c1 c2 n0 n1 n2 n3"]
    assert written(whole_layout(1)) == ["n0"]
    with pytest.raises(ValueError, match="balanced_sp"):
        whole_layout(4, 2)


def test_balanced_ranks_own_both_copies_of_the_same_chunks() -> None:
    assert written(balanced_layout(4, 1)) == ["c0 c1 c2 c3 n0 n1 n2 n3"]
    assert written(balanced_layout(4, 2)) == ["c0 c1 n0 n1", "c2 c3 n2 n3"]
    assert written(balanced_layout(4, 4)) == ["c0 n0", "c1 n1", "c2 n2", "c3 n3"]


def test_contiguous_ranks_own_runs_of_all_clean_then_all_noisy() -> None:
    assert written(contiguous_layout(4, 2)) == ["c0 c1 c2 c3", "n0 n1 n2 n3"]
    assert written(contiguous_layout(4, 4)) == ["c0 c1", "c2 c3", "n0 n1", "n2 n3"]
    assert written(contiguous_layout(3, 2)) == ["c0 c1 c2", "n0 n1 n2"]


@pytest.mark.parametrize("make_layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 12])
def test_every_copy_has_one_owner_and_all_ranks_hold_as_many(make_layout: MakeLayout, size: int) -> None:
    layout = make_layout(12, size)
    assert layout.size == size
    pieces = [(piece.role, piece.chunk) for rank in layout.pieces for piece in rank]
    assert sorted(pieces, key=str) == sorted(((role, chunk) for role in Role for chunk in range(12)), key=str)
    assert {len(rank) for rank in layout.pieces} == {24 // size}


@pytest.mark.parametrize("make_layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_rank_holds_its_history_before_its_targets(make_layout: MakeLayout) -> None:
    """The network's output is cut behind the history."""
    for size in (1, 2, 3, 4, 6):
        layout = make_layout(12, size)
        for rank, pieces in enumerate(layout.pieces):
            assert [piece.chunk for piece in pieces] == [
                *layout.of_role(rank, Role.CLEAN),
                *layout.of_role(rank, Role.NOISY),
            ]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_balanced_ranks_have_equal_targets_frames_and_tokens(size: int) -> None:
    layout = balanced_layout(8, size)
    frames = [layout.frames(rank, 4) for rank in range(size)]
    assert [frame for part in frames for frame in part] == list(range(32))
    assert {len(part) for part in frames} == {32 // size}
    assert {len(layout.of_role(rank, Role.NOISY)) for rank in range(size)} == {8 // size}


def test_contiguous_ranks_hold_latents_of_the_whole_clip_and_half_of_them_no_target() -> None:
    layout = contiguous_layout(8, 4)
    assert [layout.frames(rank, 4) for rank in range(4)] == [range(32)] * 4
    assert [len(layout.of_role(rank, Role.NOISY)) for rank in range(4)] == [0, 0, 4, 4]


@pytest.mark.parametrize("make_layout", LAYOUTS.values(), ids=LAYOUTS)
def test_the_delivered_sequence_asks_for_the_same_attention_as_one_rank(make_layout: MakeLayout) -> None:
    rule = VisibilityRule(window_chunks=4, sink_chunks=1, shot_sink=True)
    shots = (0, 0, 1, 1, 1, 2, 2, 2)
    delivered = make_layout(8, 4).delivered(6)
    one_rank = teacher_forcing_segments(8, 6)
    assert set(delivered) == set(one_rank)
    assert count_useful_entries(delivered, shots, rule) == count_useful_entries(one_rank, shots, rule)


def test_what_does_not_divide_is_refused_with_the_sizes_that_do() -> None:
    with pytest.raises(
        ValueError, match="sequence_parallel_size=4 does not divide the 6 chunks of a clip; use 1, 2, 3"
    ):
        balanced_layout(6, 4)
    with pytest.raises(ValueError, match="sequence_parallel_size=5 does not divide the 12 copies of the chunks"):
        contiguous_layout(6, 5)
    with pytest.raises(ValueError, match=r"size=3 does not divide model\.num_heads=4; use 1, 2 or 4: every rank"):
        check_heads(4, 3)
    with pytest.raises(ValueError, match=r"size=3 does not divide both chunk_frames=4 and .*=6; use 1 or 2: in a roll"):
        check_rollout(4, 6, 3)
    with pytest.raises(ValueError, match=r"size=4 does not divide both chunk_frames=4 and .*=6; use 1 or 2: in a roll"):
        check_rollout(4, 6, 4)
    with pytest.raises(ValueError, match="size=3 does not divide the 8 processes of this run; use 1, 2, 4 or 8"):
        check_world(8, 3)
    assert name_divisors(1) == "1"
