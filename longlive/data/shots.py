"""Shots of a clip, and what they say about its chunks.

A shot is a run of source raw frames with one caption. A chunk belongs to the shot that covers most of its raw frames
(the earlier one if two cover the same number), so every chunk has exactly one prompt, and a scene cut always lies on a
chunk border.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Shot:
    """Source raw frames `start .. end - 1` and what they show."""

    start: int
    end: int
    caption: str

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise ValueError(
                f"shot start={self.start}, end={self.end}: a shot needs 0 <= start < end (end is exclusive)"
            )


def check_shots(shots: Sequence[Shot], num_raw_frames: int) -> None:
    """Raise a `ValueError` unless the shots are a non-empty, ascending list without overlap inside the clip."""
    if not shots:
        raise ValueError("a clip needs at least one shot with a caption; give {'caption': ...} or {'shots': [...]}")
    for earlier, later in pairwise(shots):
        if later.start < earlier.end:
            raise ValueError(
                f"shot [{later.start}, {later.end}) starts before [{earlier.start}, {earlier.end}) ends; "
                "sort the shots by start and let each end where the next begins"
            )
    if shots[-1].end > num_raw_frames:
        raise ValueError(
            f"the last shot ends at raw frame {shots[-1].end}, but the clip has {num_raw_frames}; "
            f"end (exclusive) must be at most {num_raw_frames}"
        )


def raw_frames_of_chunk(chunk: int, chunk_frames: int, temporal_ratio: int) -> range:
    """Raw frames of one chunk: frame 0 is raw frame 0, frame f > 0 covers the raw frames `r (f-1) + 1 .. r f`."""
    first_frame, last_frame = chunk * chunk_frames, (chunk + 1) * chunk_frames - 1
    first = 0 if first_frame == 0 else temporal_ratio * (first_frame - 1) + 1
    return range(first, temporal_ratio * last_frame + 1)


def shots_of_chunks(
    shots: Sequence[Shot], raw_indices: Sequence[int], chunk_frames: int, temporal_ratio: int
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Prompt and shot number of every chunk.

    Args:
        shots: of the source clip, ascending.
        raw_indices: the source raw frame behind each raw frame of the sample, `1 + r (frames - 1)` of them.
        chunk_frames: frames per chunk.
        temporal_ratio: r, raw frames per frame.

    Returns:
        `prompts[chunk]` and `shot_index[chunk]`; shots are numbered from 0 in the order in which chunks show them. A
        chunk that no shot covers (a gap in the captions) continues the chunk before it, or takes the first shot.
    """
    num_frames = 1 + (len(raw_indices) - 1) // temporal_ratio
    owners: list[int] = []
    for chunk in range(num_frames // chunk_frames):
        coverage: Counter[int] = Counter()
        for raw_frame in raw_frames_of_chunk(chunk, chunk_frames, temporal_ratio):
            source_frame = raw_indices[raw_frame]
            coverage.update(number for number, shot in enumerate(shots) if shot.start <= source_frame < shot.end)
        if coverage:
            owners.append(min(coverage, key=lambda number: (-coverage[number], number)))
        else:
            owners.append(owners[-1] if owners else 0)
    numbers = {owner: number for number, owner in enumerate(dict.fromkeys(owners))}
    return tuple(shots[owner].caption for owner in owners), tuple(numbers[owner] for owner in owners)
