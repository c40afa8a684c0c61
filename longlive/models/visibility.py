"""Who may see whom: the one definition that training masks and the rollout cache share.

| query | sees clean c' | sees noisy c' |
|---|---|---|
| clean c | history of c, and c itself | never |
| noisy c | history of c | c itself |

The *history* of chunk c is the list of earlier chunks that a rollout still holds when it denoises c: all of them, or,
with a window, the sinks and the most recent ones (`visible_history`). Tokens are described by *segments*, runs of
consecutive tokens of one chunk and one role, in whatever order they arrive: `[all clean | all noisy]` on one rank,
`[clean | noisy]` of every rank in turn under Balanced SP. Visibility is constant between two segments, so it is a small
table of segments by segments, and attention is a list of dense rectangles. With n chunks of t tokens,
`n (n + 1) t^2` of `4 n^2 t^2` score entries are useful.

Nothing is needed for padding: padded frames end a clip, and no later chunk is there to see them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from itertools import groupby

import torch

from longlive.typing import Bool, Tensor


@dataclass(frozen=True)
class VisibilityRule:
    """Which earlier chunks a chunk may see.

    Attributes:
        window_chunks: how many chunks a query sees at most, everything counted: sinks, history and its own chunk.
            None: all earlier chunks.
        sink_chunks: the first chunks of the video, which stay visible.
        shot_sink: whether the first chunk of the current shot stays visible too.

    Raises:
        ValueError: if the window cannot hold the sinks and the chunk itself, or sinks are given without a window (they
            would change nothing).
    """

    window_chunks: int | None = None
    sink_chunks: int = 0
    shot_sink: bool = False

    def __post_init__(self) -> None:
        if self.sink_chunks < 0:
            raise ValueError(f"sink_chunks={self.sink_chunks} must be at least 0")
        if self.window_chunks is None:
            if self.sink_chunks or self.shot_sink:
                raise ValueError(
                    f"sink_chunks={self.sink_chunks}, shot_sink={self.shot_sink} have no effect without a window: "
                    "every chunk sees all earlier ones; set a window or remove the sinks"
                )
            return
        needed = self.sink_chunks + int(self.shot_sink) + 1
        if self.window_chunks < needed:
            raise ValueError(
                f"window_chunks={self.window_chunks} cannot hold {self.sink_chunks} sink chunks, "
                f"{int(self.shot_sink)} shot sink and the chunk itself; use at least {needed}"
            )

    @classmethod
    def from_frames(cls, window: int | None, sink_frames: int, shot_sink: bool, chunk_frames: int) -> VisibilityRule:
        """The rule for settings in frames.

        Raises:
            ValueError: if window or sink are no multiples of `chunk_frames`.
        """
        for name, frames in (("window", window), ("sink_frames", sink_frames)):
            if frames is not None and frames % chunk_frames:
                lower = frames // chunk_frames * chunk_frames
                raise ValueError(
                    f"{name}={frames} is no multiple of chunk_frames={chunk_frames}; use {lower} or "
                    f"{lower + chunk_frames}"
                )
        return cls(
            window_chunks=None if window is None else window // chunk_frames,
            sink_chunks=sink_frames // chunk_frames,
            shot_sink=shot_sink,
        )


def visible_history(chunk: int, shot_index: Sequence[int], rule: VisibilityRule) -> list[int]:
    """The earlier chunks that chunk `chunk` may see, ascending.

    Sinks come first: the first `sink_chunks` of the video and, with `shot_sink`, the first chunk of the current shot.
    What is left of `window_chunks - 1` places goes to the most recent other chunks.

    Args:
        chunk: index of the querying chunk.
        shot_index: shot of every chunk, at least up to `chunk`.
        rule: window and sinks.
    """
    if rule.window_chunks is None:
        return list(range(chunk))
    sinks = set(range(min(rule.sink_chunks, chunk)))
    if rule.shot_sink:
        first = chunk
        while first and shot_index[first - 1] == shot_index[chunk]:
            first -= 1
        if first < chunk:
            sinks.add(first)
    places = rule.window_chunks - 1 - len(sinks)
    others = [earlier for earlier in range(chunk) if earlier not in sinks]
    return sorted(sinks | set(others[len(others) - min(places, len(others)) :]))


class Role(Enum):
    """Which of the two copies of a chunk."""

    CLEAN = "clean"
    NOISY = "noisy"


@dataclass(frozen=True)
class Segment:
    """A run of consecutive tokens of one chunk and one role."""

    role: Role
    chunk: int
    num_tokens: int


@dataclass(frozen=True)
class Rectangle:
    """Queries that see exactly these keys. Both are ascending indices into the list of segments."""

    queries: tuple[int, ...]
    keys: tuple[int, ...]


def teacher_forcing_segments(num_chunks: int, tokens_per_chunk: int) -> tuple[Segment, ...]:
    """The order of one rank: all clean chunks, then all noisy ones."""
    return tuple(Segment(role, chunk, tokens_per_chunk) for role in Role for chunk in range(num_chunks))


@lru_cache(maxsize=256)
def _rectangles(
    segments: tuple[Segment, ...], shot_index: tuple[int, ...], rule: VisibilityRule
) -> tuple[Rectangle, ...]:
    keys_of = []
    for query in segments:
        history = set(visible_history(query.chunk, shot_index, rule))
        keys_of.append(
            tuple(
                index
                for index, key in enumerate(segments)
                if (key.chunk == query.chunk and key.role is query.role)
                or (key.chunk in history and key.role is Role.CLEAN)
            )
        )
    runs = groupby(range(len(segments)), key=keys_of.__getitem__)
    return tuple(Rectangle(tuple(queries), keys) for keys, queries in runs)


def rectangles(segments: Sequence[Segment], shot_index: Sequence[int], rule: VisibilityRule) -> tuple[Rectangle, ...]:
    """The dense parts of attention: together their queries are all segments, in order.

    Neighbouring segments that see the same keys share a rectangle.

    Raises:
        ValueError: if `shot_index` has no entry for a chunk of the segments.
    """
    last = max(segment.chunk for segment in segments)
    if last >= len(shot_index):
        raise ValueError(
            f"shot_index has {len(shot_index)} chunks, but the segments reach chunk {last}; give every chunk a shot"
        )
    return _rectangles(tuple(segments), tuple(shot_index), rule)


def segment_mask(
    segments: Sequence[Segment], shot_index: Sequence[int], rule: VisibilityRule
) -> Bool[Tensor, "segments segments"]:
    """Which segment (row) sees which (column)."""
    mask = torch.zeros(len(segments), len(segments), dtype=torch.bool)
    for rectangle in rectangles(segments, shot_index, rule):
        for query in rectangle.queries:
            mask[query, list(rectangle.keys)] = True
    return mask


def segment_of_token(segments: Sequence[Segment]) -> Tensor:
    """The segment that every token belongs to, int64 `[l]`."""
    return torch.repeat_interleave(
        torch.arange(len(segments)), torch.tensor([segment.num_tokens for segment in segments])
    )


def token_mask(segments: Sequence[Segment], shot_index: Sequence[int], rule: VisibilityRule) -> Bool[Tensor, "l l"]:
    """Which token (row) sees which (column), dense."""
    index = segment_of_token(segments)
    return segment_mask(segments, shot_index, rule)[index][:, index]


def count_useful_entries(segments: Sequence[Segment], shot_index: Sequence[int], rule: VisibilityRule) -> int:
    """Attention scores (query, key) of one head that visibility asks for."""
    tokens = [segment.num_tokens for segment in segments]
    return sum(
        sum(tokens[query] for query in rectangle.queries) * sum(tokens[key] for key in rectangle.keys)
        for rectangle in rectangles(segments, shot_index, rule)
    )


def count_entries(segments: Sequence[Segment]) -> int:
    """Attention scores of one head when every token sees every token."""
    return sum(segment.num_tokens for segment in segments) ** 2
