"""Shots of a clip, and what they say about its chunks.

A shot is a run of source raw frames with one caption. Training sees *chunks*, and a chunk never straddles a scene cut:
a clip is filled chunk by chunk from one shot, and what is left of the shot when it holds no further chunk is dropped
(less than a chunk; a gap in time that no one sees, because it lies at the cut). So every cut lies on a chunk border and
every chunk has exactly one prompt. A shot of more than `max_chunks_per_shot` chunks is cut by force: some raw frames
are dropped, and what follows counts as the next shot, so that long takes teach cuts too.

The first chunk of every shot but the first says so: its prompt is the scene-cut phrase and the caption
(`chunk_prompts`, which training and rollout share; design: LongLive-2.0, arXiv 2605.18739).
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

SCENE_CUT_PHRASE = "The scene transitions. "


@dataclass(frozen=True)
class ShotRules:
    """What becomes of the shots of a clip.

    Attributes:
        scene_cut_phrase: goes before the caption in the first chunk of every shot but the first. Rollouts of the
            trained network use the same one. Empty: none.
        max_chunks_per_shot: longer shots are cut by force after so many chunks; None: never.
        forced_cut_margin: seconds that are dropped at a forced cut, so that it is one to the eye.
    """

    scene_cut_phrase: str = SCENE_CUT_PHRASE
    max_chunks_per_shot: int | None = None
    forced_cut_margin: float | int = 1.0

    def __post_init__(self) -> None:
        if self.max_chunks_per_shot is not None and self.max_chunks_per_shot < 1:
            raise ValueError(f"max_chunks_per_shot={self.max_chunks_per_shot} must be at least 1, or null for no limit")
        if self.forced_cut_margin < 0:
            raise ValueError(f"forced_cut_margin={self.forced_cut_margin} seconds must be at least 0")


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


def chunk_prompts(shots: Sequence[tuple[str, int]], scene_cut_phrase: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Prompt and shot number of every chunk, in training and in rollout.

    Args:
        shots: caption and number of chunks of every shot.
        scene_cut_phrase: goes before the caption in the first chunk of every shot but the first.

    Returns:
        `prompts[chunk]` and `shot_index[chunk]`.
    """
    prompts: list[str] = []
    shot_index: list[int] = []
    for number, (caption, num_chunks) in enumerate(shots):
        first = f"{scene_cut_phrase}{caption}" if number else caption
        prompts += [first, *[caption] * (num_chunks - 1)][:num_chunks]
        shot_index += [number] * num_chunks
    return tuple(prompts), tuple(shot_index)


@dataclass(frozen=True)
class ChunkSizes:
    """How many raw frames chunks cover: frame 0 is raw frame 0, frame f > 0 the raw frames `r (f-1) + 1 .. r f`.

    Attributes:
        chunk_frames: frames per chunk.
        temporal_ratio: r, raw frames per frame.
    """

    chunk_frames: int
    temporal_ratio: int

    def num_raw_frames(self, chunk: int) -> int:
        """Of chunk number `chunk`."""
        return self.chunk_frames * self.temporal_ratio - (self.temporal_ratio - 1 if chunk == 0 else 0)

    def num_frames(self, chunk: int, num_raw_frames: int) -> int:
        """Frames that the first raw frames of a chunk fill."""
        return (num_raw_frames + (self.temporal_ratio - 1 if chunk == 0 else 0)) // self.temporal_ratio

    def start(self, chunk: int) -> int:
        """The first raw frame of a chunk."""
        return 0 if chunk == 0 else chunk * self.chunk_frames * self.temporal_ratio - (self.temporal_ratio - 1)


@dataclass(frozen=True)
class Run:
    """Positions `start .. stop - 1` of a video, all of one shot."""

    start: int
    stop: int
    caption: str


@dataclass(frozen=True)
class ClipPlan:
    """A clip chosen from a video.

    Attributes:
        positions: where in the video each raw frame of the clip is; a clip that is not full repeats the last one.
        prompts, shot_index: of every chunk; shots are numbered from 0 in the order in which the clip shows them.
        num_valid_frames: frames before the padding.
    """

    positions: tuple[int, ...]
    prompts: tuple[str, ...]
    shot_index: tuple[int, ...]
    num_valid_frames: int


def runs_of_shots(shots: Sequence[Shot], source_frames: Sequence[int]) -> list[Run]:
    """The shots of a resampled video. Raw frames that no shot covers belong to no run.

    Args:
        shots: of the source, ascending.
        source_frames: the source's raw frame at every position, ascending.
    """

    starts = [shot.start for shot in shots]

    def owner(position: int) -> int:
        number = bisect_right(starts, source_frames[position]) - 1
        return number if number >= 0 and source_frames[position] < shots[number].end else -1

    runs = []
    for number, group in groupby(range(len(source_frames)), key=owner):
        if number >= 0:
            positions = list(group)
            runs.append(Run(positions[0], positions[-1] + 1, shots[number].caption))
    return runs


def plan_clip(
    runs: Sequence[Run],
    num_chunks: int,
    sizes: ChunkSizes,
    rules: ShotRules,
    margin: int,
    draw: Callable[[int], int],
) -> ClipPlan:
    """Choose a clip of `num_chunks` chunks.

    It starts anywhere in a shot from where it can be filled; if it can be filled from nowhere, it takes all whole
    chunks from the video's start, what is left of the last shot, and padding.

    Args:
        runs: the shots of the video.
        num_chunks: of the clip.
        sizes: of chunks.
        rules: for cuts.
        margin: raw frames that are dropped at a forced cut.
        draw: `draw(n)` chooses one of n starts, 0 to n - 1.

    Raises:
        ValueError: if no shot covers any raw frame.
    """
    if not runs:
        raise ValueError("no raw frame lies in a shot; give the clip a caption")
    limit = rules.max_chunks_per_shot

    def length(count: int, first: int) -> int:
        """Raw frames of a run that `count` chunks take, from chunk number `first` on."""
        chunks = sizes.num_raw_frames(first) + (count - 1) * sizes.num_raw_frames(1)
        return chunks + (margin * ((count - 1) // limit) if limit else 0)

    def capacity(run: Run) -> int:
        count = 0
        while count < num_chunks and length(count + 1, 1) <= run.stop - run.start:
            count += 1
        return count

    # A run's chunks do not depend on what comes before it, so the starts that fill the clip are, in every run, the
    # first few of its positions.
    rest = 0
    num_starts: list[int] = []
    for run in reversed(runs):
        needed = max(1, num_chunks - rest)
        num_starts.insert(0, max(0, run.stop - run.start - length(needed, 0) + 1))
        rest += capacity(run)
    first, offset = 0, 0
    if any(num_starts):
        offset = draw(sum(num_starts)) if sum(num_starts) > 1 else 0
        while offset >= num_starts[first]:
            offset -= num_starts[first]
            first += 1
    return _fill(runs[first:], offset, num_chunks, sizes, rules, margin)


def _fill(
    runs: Sequence[Run], offset: int, num_chunks: int, sizes: ChunkSizes, rules: ShotRules, margin: int
) -> ClipPlan:
    """The clip that starts `offset` positions after the first run does."""
    positions: list[int] = []
    shots: list[tuple[str, int]] = []
    num_valid_frames = chunk = 0
    for run in runs:
        position = run.start + (offset if run is runs[0] else 0)
        in_shot = 0
        while chunk < num_chunks:
            if in_shot == rules.max_chunks_per_shot:
                position, in_shot = position + margin, 0
            size = min(sizes.num_raw_frames(chunk), run.stop - position)
            num_frames = sizes.num_frames(chunk, max(0, size))
            # Only the last shot may end within a chunk: after it comes padding.
            if num_frames < sizes.chunk_frames and (run is not runs[-1] or size < 1 or not (num_frames or in_shot)):
                break
            positions += range(position, position + size)
            shots = [*shots[:-1], (run.caption, in_shot + 1)] if in_shot else [*shots, (run.caption, 1)]
            num_valid_frames += num_frames
            position, in_shot, chunk = position + size, in_shot + 1, chunk + 1
    shots[-1] = (shots[-1][0], shots[-1][1] + num_chunks - chunk)
    padding = sizes.start(num_chunks) - len(positions)
    prompts, shot_index = chunk_prompts(shots, rules.scene_cut_phrase)
    return ClipPlan((*positions, *[positions[-1]] * padding), prompts, shot_index, num_valid_frames)
