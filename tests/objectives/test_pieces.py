"""What a rank holds of two clips of four chunks, as literal lists."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from longlive.models.attention import ChunkedAttention
from longlive.models.visibility import Role, Segment, VisibilityRule
from longlive.objectives.pieces import HeldPieces
from longlive.parallel.layout import balanced_layout
from longlive.parallel.mesh import ALONE, SequenceShare

SHOTS = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 2]])
CPU = torch.device("cpu")
CLEAN, NOISY = Role.CLEAN, Role.NOISY


def held(sequence: SequenceShare = ALONE, **changes: Any) -> HeldPieces:
    return HeldPieces(SHOTS, 2, sequence, VisibilityRule(), **{"shot_rope_offset": 10.0} | changes)


def of_two(rank: int) -> HeldPieces:
    return held(SequenceShare(rank, 2, None, balanced_layout))


def test_one_rank_holds_all_but_the_clean_copy_that_nobody_sees() -> None:
    pieces = held()
    assert (pieces.chunks(CLEAN), pieces.chunks(NOISY)) == ((0, 1, 2), (0, 1, 2, 3))
    assert pieces.frames(CLEAN).tolist() == [0, 1, 2, 3, 4, 5]
    assert pieces.prompt_index(torch.tensor([[5, 6, 7, 8]])).tolist() == [[5, 6, 7, 5, 6, 7, 8]]


def test_one_of_two_ranks_holds_both_copies_of_its_half() -> None:
    pieces = of_two(1)
    assert (pieces.chunks(CLEAN), pieces.chunks(NOISY)) == ((2, 3), (2, 3))
    assert pieces.frames(NOISY).tolist() == [4, 5, 6, 7]
    assert pieces.prompt_index(torch.tensor([[5, 6, 7, 8]])).tolist() == [[7, 8, 7, 8]]
    assert pieces.frame_positions(CPU).tolist() == [[14, 15, 16, 17] * 2, [14, 15, 26, 27] * 2]


@pytest.mark.parametrize("pieces", [held(), of_two(0)], ids=["alone", "of two"])
def test_attention_is_made_for_the_pieces_of_all_ranks(pieces: HeldPieces) -> None:
    attention = pieces.attention(tokens_per_frame=3)
    assert isinstance(attention, ChunkedAttention)
    order = [(role, chunk) for ranks in ([0, 1], [2, 3]) for role in Role for chunk in ranks]
    if pieces.sequence is ALONE:
        order = [(role, chunk) for role in Role for chunk in range(4) if (role, chunk) != (CLEAN, 3)]
    assert attention.segments == tuple(Segment(role, chunk, 6) for role, chunk in order)
    assert attention.shot_index == SHOTS.tolist()


def test_past_chunks_are_history_at_the_positions_that_are_given() -> None:
    starts = torch.tensor([[0.0, 2.0, 30.0, 32.0], [0.0, 12.0, 14.0, 26.0]])
    pieces = held(num_past=1, starts=starts)
    assert (pieces.chunks(CLEAN), pieces.chunks(NOISY)) == ((0, 1, 2), (1, 2, 3))
    assert pieces.frame_positions(CPU)[0].tolist() == [0, 1, 2, 3, 30, 31, 2, 3, 30, 31, 32, 33]


def test_tokens_are_numbered_by_sample_and_place_in_the_clip() -> None:
    """Of a clip of 4 chunks with both copies, and of a chunk: 2 frames of 3 tokens each."""
    ids = torch.tensor([0, 10])
    ours = of_two(1).token_positions(ids, tokens_per_frame=3)
    assert ours[0].tolist() == [*range(12, 24), *range(36, 48)]
    assert ours[1].tolist() == [480 + number for number in ours[0].tolist()]
    assert of_two(1).chunk_token_positions(ids, tokens_per_frame=3).tolist() == [[3, 4, 5], [63, 64, 65]]
    assert held().chunk_token_positions(ids, tokens_per_frame=3)[0].tolist() == [0, 1, 2, 3, 4, 5]
