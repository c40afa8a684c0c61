"""Stories of the toy world, measured from pixels: are the cuts where they should be, does every shot show what its own
caption says, and is the subject that returns the one that left?

*Cuts* are found without looking at the prompt (`find_cuts`): raw frames that differ from the one before by more than
`LEAST_CHANGE` on average, and by more than `TIMES_OTHERS` as much as any other one near them; of motion, flicker and
noise there is always more nearby. A cut is *right* if it lies within one frame (`temporal_ratio` raw frames) of the
border of a chunk that opens a shot; every other one is false.

*Prompts* are judged per shot: the raw frames between two borders, as the prompt has them, against the shot's caption.

*Identity* asks about every later shot whose caption brings the first shot's subject (colour and shape) back after at
least one shot in between. It is kept if colour and shape of that shot, as measured, are those of the first shot, as
measured, and those of the caption. `identity_as_generated` leaves the caption out: a wrong subject that comes back the
same counts there.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torchmetrics import Metric

from longlive.data.prompts import StoryPrompt
from longlive.data.shots import ChunkSizes
from longlive.data.toyworld import parse_caption
from longlive.data.toyworld_stories import shot_borders
from longlive.metrics.toyworld import ATTRIBUTES, Measurement, measure, truth
from longlive.typing import Float, Tensor, Video

LEAST_CHANGE = 0.25
"""Mean absolute difference of two raw frames, in [-1, 1]: a change of ground makes 0.6 and more, a fast shape 0.05."""
TIMES_OTHERS = 2.0
"""How many times as great as all changes near it a cut must be."""
NEIGHBOURHOOD = 12
"""Raw frames before and after that are near; one chunk of the toy world is longer."""
FADE = 2
"""Raw frames that a cut may take; the changes within it are its own."""

MAX_SHOTS = 64


def find_cuts(video: Float[Tensor, "t 3 H W"]) -> list[int]:
    """The raw frames that show another scene than the one before them."""
    change = (video[1:] - video[:-1]).abs().float().mean(dim=(1, 2, 3))
    cuts = []
    for place, size in enumerate(change.tolist()):
        near = range(max(0, place - NEIGHBOURHOOD), min(len(change), place + NEIGHBOURHOOD + 1))
        own = float(change[max(0, place - FADE) : place + FADE + 1].max())
        others = max((float(change[other]) for other in near if abs(other - place) > FADE), default=0.0)
        if size >= own and size > max(LEAST_CHANGE, TIMES_OTHERS * others):
            cuts.append(place + 1)
    return cuts


def returning_shots(captions: Sequence[str]) -> list[int]:
    """The shots in which, by the captions, the subject of the first shot is back after a shot in between."""
    subjects = [(scene.colour, scene.shape) for scene in map(parse_caption, captions)]
    return [shot for shot, subject in enumerate(subjects) if shot >= 2 and subject == subjects[0]]


class ToyWorldStoryAccuracy(Metric):
    """How well videos follow their stories.

    `compute` returns a flat dict: `cut` (share of the prompted cuts that were found at the right chunk), `cuts_exact`
    (share of the videos with all of their cuts right and no false one), `false_cuts` (per video); `colour`, `shape`,
    `direction`, `ground` (share of all shots) and `<attribute>/shot_<n>`; `identity` and `identity_as_generated` (share
    of the returns); `num_videos`. What no prompt asks for is absent.

    Args:
        chunk_frames: frames per chunk; durations of stories are counted in chunks.
        temporal_ratio: raw frames per frame.
    """

    full_state_update = False
    correct: Tensor
    num_shots: Tensor
    cuts: Tensor
    returns: Tensor
    num_videos: Tensor

    def __init__(self, chunk_frames: int = 4, temporal_ratio: int = 4) -> None:
        super().__init__()
        if chunk_frames < 1 or temporal_ratio < 1:
            raise ValueError(f"chunk_frames={chunk_frames} and temporal_ratio={temporal_ratio} must be at least 1")
        self.sizes = ChunkSizes(chunk_frames, temporal_ratio)
        self.add_state("correct", torch.zeros(MAX_SHOTS, len(ATTRIBUTES)), dist_reduce_fx="sum")
        self.add_state("num_shots", torch.zeros(MAX_SHOTS), dist_reduce_fx="sum")
        self.add_state("cuts", torch.zeros(4), dist_reduce_fx="sum")  # prompted, right, false, videos without a fault
        self.add_state("returns", torch.zeros(3), dist_reduce_fx="sum")  # prompted, kept, kept as generated
        self.add_state("num_videos", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, videos: Video, stories: Sequence[StoryPrompt | str]) -> None:
        """Add videos in [-1, 1] and the stories that they were made from.

        Raises:
            ValueError: if there are not as many stories as videos, one does not say how long its shots are or is
                not as long as its video, or a caption is none of the toy world's.
        """
        if len(videos) != len(stories):
            raise ValueError(f"{len(videos)} videos and {len(stories)} stories: give one story per video")
        for video, story in zip(videos, stories, strict=True):
            if not isinstance(story, StoryPrompt) or story.durations is None:
                raise ValueError(f"{story!r} is no story that says how many chunks each of its shots lasts")
            borders = shot_borders(story.durations, self.sizes)
            if borders[-1] != len(video) or len(story.captions) > MAX_SHOTS:
                raise ValueError(
                    f"story {story.name!r} has {len(story.captions)} shots and {borders[-1]} raw frames, its video has "
                    f"{len(video)}; they must be as long as each other, and have no more than {MAX_SHOTS} shots"
                )
            self._add_cuts(find_cuts(video), borders[1:-1])
            shown = [measure(video[start:stop])[0] for start, stop in pairwise(borders)]
            self._add_shots(shown, story.captions)
            self.num_videos += 1

    def _add_cuts(self, found: list[int], prompted: list[int]) -> None:
        near = self.sizes.temporal_ratio
        right = sum(any(abs(cut - border) <= near for cut in found) for border in prompted)
        false = sum(all(abs(cut - border) > near for border in prompted) for cut in found)
        exact = right == len(prompted) and not false
        self.cuts += torch.tensor([len(prompted), right, false, exact], device=self.cuts.device)

    def _add_shots(self, shown: Sequence[Measurement], captions: Sequence[str]) -> None:
        device = self.correct.device
        for shot, (measurement, caption) in enumerate(zip(shown, captions, strict=True)):
            found = torch.tensor([getattr(measurement, attribute) for attribute in ATTRIBUTES])
            self.correct[shot] += (found == truth(parse_caption(caption))).to(device)
            self.num_shots[shot] += 1
        subjects = [(measurement.colour, measurement.shape) for measurement in shown]
        expected = tuple(truth(parse_caption(captions[0]))[:2].tolist())
        for shot in returning_shots(captions):
            same = subjects[shot] == subjects[0] and -1 not in subjects[0]
            self.returns += torch.tensor([1, same and subjects[0] == expected, same], device=device)

    def compute(self) -> dict[str, Tensor]:
        """See the class docstring."""
        result: dict[str, Tensor] = {}
        prompted, right, false, exact = self.cuts
        if prompted:
            result["cut"] = right / prompted
        result["cuts_exact"] = exact / self.num_videos
        result["false_cuts"] = false / self.num_videos
        for column, attribute in enumerate(ATTRIBUTES):
            result[attribute] = self.correct[:, column].sum() / self.num_shots.sum()
            for shot in range(int((self.num_shots > 0).sum())):
                result[f"{attribute}/shot_{shot + 1}"] = self.correct[shot, column] / self.num_shots[shot]
        num_returns, kept, kept_as_generated = self.returns
        if num_returns:
            result["identity"] = kept / num_returns
            result["identity_as_generated"] = kept_as_generated / num_returns
        result["num_videos"] = self.num_videos.clone()
        return result
