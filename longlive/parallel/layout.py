"""Who owns what: the copies of the chunks that every sequence rank holds, as data.

A clip of n chunks is a sequence of 2n *pieces*: every chunk clean (history) and noisy (target). A layout deals them
out:

- `whole` (no sequence parallelism): all of them on one rank, but for the last chunk's clean copy, which nobody sees.
- `balanced` (Balanced SP, LongLive-2.0, arXiv 2605.18739): rank r owns the clean *and* the noisy copy of the same run
  of n/P chunks, so targets, loss, codec work and memory are equal on all ranks.
- `contiguous` (the conventional split, for comparison): `[all clean | all noisy]` cut into P equal runs. Half the ranks
  hold only history; and as a rank's noisy chunks are others' clean ones, everybody encodes the whole clip.

Around attention an all-to-all delivers the ranks' pieces one rank after the other (`delivered`); visibility is
evaluated on that order, so nothing is ever permuted. Everything here is a pure function of rank and size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd

from longlive.models.visibility import Role, Segment


@dataclass(frozen=True)
class Piece:
    """One copy of one chunk."""

    role: Role
    chunk: int


@dataclass(frozen=True)
class SequenceLayout:
    """Pieces and frames of every sequence rank.

    Attributes:
        pieces: `pieces[rank]`, in the order in which the rank's local sequence holds them.
        chunks: `chunks[rank]`: the run of chunks whose latents the rank encodes.
    """

    pieces: tuple[tuple[Piece, ...], ...]
    chunks: tuple[range, ...]

    @property
    def size(self) -> int:
        """Sequence ranks."""
        return len(self.pieces)

    def frames(self, rank: int, chunk_frames: int) -> range:
        """The frames whose latents a rank encodes."""
        return range(self.chunks[rank].start * chunk_frames, self.chunks[rank].stop * chunk_frames)

    def of_role(self, rank: int, role: Role) -> tuple[int, ...]:
        """The chunks that a rank holds in a role, in the order of its local sequence."""
        return tuple(piece.chunk for piece in self.pieces[rank] if piece.role is role)

    def targeting(self, first: int) -> SequenceLayout:
        """The same without the noisy copies of the chunks before `first`, which are history alone."""
        pieces = tuple(
            tuple(piece for piece in mine if piece.role is Role.CLEAN or piece.chunk >= first) for mine in self.pieces
        )
        return SequenceLayout(pieces, self.chunks)

    def delivered(self, tokens_per_chunk: int) -> tuple[Segment, ...]:
        """The whole sequence in the order in which the all-to-all delivers it: rank after rank."""
        return tuple(Segment(piece.role, piece.chunk, tokens_per_chunk) for rank in self.pieces for piece in rank)


def _pieces(role: Role, chunks: range) -> tuple[Piece, ...]:
    return tuple(Piece(role, chunk) for chunk in chunks)


def whole_layout(num_chunks: int, size: int = 1) -> SequenceLayout:
    """One rank owns everything that is seen or scored: a target sees the clean copies of the chunks before it only, so
    the last one's is left out (a quarter of a clip of two chunks). Sequence ranks keep it, so that their shares are
    equal.

    Raises:
        ValueError: if there is more than one rank.
    """
    if size != 1:
        raise ValueError(f"sequence_parallel_size={size}: one rank holds the whole clip; split it with balanced_sp")
    pieces = _pieces(Role.CLEAN, range(num_chunks - 1)) + _pieces(Role.NOISY, range(num_chunks))
    return SequenceLayout((pieces,), (range(num_chunks),))


def balanced_layout(num_chunks: int, size: int) -> SequenceLayout:
    """Every rank owns both copies of its own run of chunks.

    Raises:
        ValueError: if the ranks do not divide the chunks.
    """
    check_divides(num_chunks, size, "chunks")
    share = num_chunks // size
    chunks = tuple(range(rank * share, (rank + 1) * share) for rank in range(size))
    return SequenceLayout(tuple(_pieces(Role.CLEAN, run) + _pieces(Role.NOISY, run) for run in chunks), chunks)


def contiguous_layout(num_chunks: int, size: int) -> SequenceLayout:
    """`[all clean | all noisy]` cut into equal runs; every rank encodes the whole clip.

    Raises:
        ValueError: if the ranks do not divide the copies of the chunks.
    """
    check_divides(2 * num_chunks, size, "copies of the chunks")
    whole = range(num_chunks)
    sequence = _pieces(Role.CLEAN, whole) + _pieces(Role.NOISY, whole)
    share = len(sequence) // size
    return SequenceLayout(tuple(sequence[rank * share : (rank + 1) * share] for rank in range(size)), (whole,) * size)


MakeLayout = Callable[[int, int], SequenceLayout]
"""`(num_chunks, size)` to a layout."""


def check_divides(num_parts: int, size: int, name: str) -> None:
    """Raise a `ValueError` that names the legal sizes unless the ranks divide the parts."""
    if size < 1 or num_parts % size:
        raise ValueError(
            f"sequence_parallel_size={size} does not divide the {num_parts} {name} of a clip; "
            f"use {name_divisors(num_parts)}, or clips of another length"
        )


def check_heads(num_heads: int, size: int) -> None:
    """Raise a `ValueError` that names the legal sizes unless the ranks divide the attention heads."""
    if size < 1 or num_heads % size:
        raise ValueError(
            f"sequence_parallel_size={size} does not divide model.num_heads={num_heads}; "
            f"use {name_divisors(num_heads)}: every rank attends with an equal share of the heads"
        )


def check_rollout(chunk_frames: int, num_heads: int, size: int) -> None:
    """Raise a `ValueError` that names the legal sizes unless the ranks can share a rollout: the frames of a chunk, and
    in attention the heads."""
    if size < 1 or chunk_frames % size or num_heads % size:
        raise ValueError(
            f"sequence_parallel_size={size} does not divide both chunk_frames={chunk_frames} and "
            f"model.num_heads={num_heads}; use {name_divisors(gcd(chunk_frames, num_heads))}: in a rollout every rank "
            "has an equal share of a chunk's frames, and of the heads"
        )


def check_world(world_size: int, size: int) -> None:
    """Raise a `ValueError` that names the legal sizes unless the sequence ranks divide the processes."""
    if size < 1 or world_size % size:
        raise ValueError(
            f"sequence_parallel_size={size} does not divide the {world_size} processes of this run; "
            f"use {name_divisors(world_size)}, or another number of devices"
        )


def name_divisors(number: int) -> str:
    """`1, 2 or 4` for 4."""
    *others, last = [str(divisor) for divisor in range(1, number + 1) if number % divisor == 0]
    return f"{', '.join(others)} or {last}" if others else last
