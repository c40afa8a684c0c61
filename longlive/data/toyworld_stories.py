"""Stories of the toy world: clips of several shots in which a subject goes away and comes back.

A *subject* is a colour and a shape. The first shot shows it; every second shot shows another subject or, as often, the
same one; all the others show the first one again. The ground changes at every cut, so every cut can be seen, and
direction, speed and place are drawn anew in every shot. Shots last whole chunks, so cuts lie on the borders of the
chunks that training will see: at the end of the first chunk's `1 + r (k - 1)` raw frames, then every `r k`.

The truth about a story is known from its scenes and durations; `longlive.metrics.toyworld_stories` compares with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch

from longlive import rng
from longlive.data.prompts import StoryPrompt
from longlive.data.shots import ChunkSizes, Shot
from longlive.data.sources import SourceClip
from longlive.data.toyworld import COLOURS, FPS, GROUNDS, SHAPES, WORDINGS, Scene, random_scene, render
from longlive.typing import Tensor, UInt8


@dataclass(frozen=True)
class Story:
    """The truth of a clip: a scene per shot, and how many chunks each lasts."""

    scenes: tuple[Scene, ...]
    durations: tuple[int, ...]

    def prompt(self, name: str, wordings: Sequence[int] | None = None) -> StoryPrompt:
        """Its captions, in the wordings given; None: those that say the speed."""
        wordings = wordings or [0] * len(self.scenes)
        captions = tuple(scene.caption(wording) for scene, wording in zip(self.scenes, wordings, strict=True))
        return StoryPrompt(name, captions, self.durations)


def random_story(seed: int, sample: int, num_shots: int = 3, num_chunks: int = 6) -> Story:
    """A function of its arguments alone; all lengths of shots that make up the clip are as likely.

    Raises:
        ValueError: if there are more shots than chunks, or none.
    """
    check_lengths(num_shots, num_chunks)

    def draw(purpose: str, high: int, shot: int) -> int:
        return rng.integer(high, seed, f"toyworld_story_{purpose}", sample=sample, chunk=shot)

    scenes: list[Scene] = []
    for shot in range(num_shots):
        scene = random_scene(seed, sample, shot)
        if scenes:
            others = [ground for ground in GROUNDS if ground != scenes[-1].ground]
            colour, shape = scenes[0].colour, scenes[0].shape
            if shot % 2 and draw("same", 2, shot):
                subjects = [(c, s) for c in COLOURS for s in SHAPES if (c, s) != (colour, shape)]
                colour, shape = subjects[draw("subject", len(subjects), shot)]
            scene = replace(scene, colour=colour, shape=shape, ground=others[draw("ground", len(others), shot)])
        scenes.append(scene)
    order = torch.randperm(num_chunks - 1, generator=rng.generator(seed, "toyworld_story_cuts", sample=sample))
    cuts = sorted((order[: num_shots - 1] + 1).tolist())
    return Story(tuple(scenes), tuple(stop - start for start, stop in pairwise([0, *cuts, num_chunks])))


def render_story(story: Story, sizes: ChunkSizes) -> UInt8[Tensor, "t 3 64 64"]:
    """The raw frames, every shot from its scene's own first frame."""
    borders = shot_borders(story.durations, sizes)
    return torch.cat(
        [render(scene, stop - start) for scene, (start, stop) in zip(story.scenes, pairwise(borders), strict=True)]
    )


def shot_borders(durations: Sequence[int], sizes: ChunkSizes) -> list[int]:
    """Raw frames at which shots of so many chunks begin, and the one at which the last of them ends."""
    return [sizes.start(chunk) for chunk in accumulate(durations, initial=0)]


def check_lengths(num_shots: int, num_chunks: int) -> None:
    """Raise a `ValueError` unless every shot gets a chunk."""
    if not 1 <= num_shots <= num_chunks:
        raise ValueError(f"num_shots={num_shots} must be between 1 and num_chunks={num_chunks}: a shot lasts a chunk")


def random_story_prompts(num_prompts: int, seed: int, num_shots: int = 3, num_chunks: int = 6) -> list[StoryPrompt]:
    """Stories for evaluation, the speed always said."""
    return [
        random_story(seed, sample, num_shots, num_chunks).prompt(f"story-{sample:03d}") for sample in range(num_prompts)
    ]


class ToyWorldStories:
    """Clips for `longlive shards source=toyworld_stories`: clip `i` is a function of `(seed, i)` and the settings.

    Args:
        num_clips: clips in the data set.
        num_shots: shots of every clip.
        num_chunks: chunks of every clip, all shots together.
        chunk_frames: frames per chunk.
        temporal_ratio: raw frames per frame.
        seed: names the data set.

    Raises:
        ValueError: if there is no clip, or more shots than chunks.
    """

    fps = FPS

    def __init__(
        self,
        num_clips: int,
        num_shots: int = 3,
        num_chunks: int = 6,
        chunk_frames: int = 4,
        temporal_ratio: int = 4,
        seed: int = 0,
    ) -> None:
        if num_clips < 1:
            raise ValueError(f"num_clips={num_clips} is not positive")
        check_lengths(num_shots, num_chunks)
        self.num_clips, self.num_shots, self.num_chunks, self.seed = num_clips, num_shots, num_chunks, seed
        self.sizes = ChunkSizes(chunk_frames, temporal_ratio)

    def __len__(self) -> int:
        return self.num_clips

    def __getitem__(self, index: int) -> SourceClip:
        if not 0 <= index < self.num_clips:
            raise IndexError(f"clip {index} of a toy world of {self.num_clips} stories")
        story = random_story(self.seed, index, self.num_shots, self.num_chunks)
        wordings = [
            rng.integer(len(WORDINGS), self.seed, "toyworld_wording", sample=index, chunk=shot)
            for shot in range(self.num_shots)
        ]
        key = f"toyworld-story-{index:08d}"
        borders = pairwise(shot_borders(story.durations, self.sizes))
        captions = story.prompt(key, wordings).captions
        shots = tuple(Shot(*border, caption) for border, caption in zip(borders, captions, strict=True))
        return SourceClip(key=key, fps=self.fps, shots=shots, frames=render_story(story, self.sizes))
