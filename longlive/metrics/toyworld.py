"""Accuracy in the toy world, measured from pixels alone.

Nothing here knows the codec or the network. A frame's ground is its median colour; what differs from it is the shape,
softly weighted. From that weight come the shape's colour (weighted mean), its place on the torus (circular mean, which
survives wrapping), its motion (wrapped differences of places), and its form (weights shifted to a common centre,
averaged over time, correlated with the four true masks). Averaging over time makes each decision robust to single bad
frames; decisions are taken for the whole video and for each quarter of it. *Drift* is the last quarter minus the
first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn
from torchmetrics import Metric

from longlive.data.prompts import StoryPrompt
from longlive.data.toyworld import COLOURS, DIRECTIONS, GROUNDS, SHAPES, SIZE, SPEEDS, Scene, parse_caption, shape_mask
from longlive.typing import Float, Int, Tensor, Video

ATTRIBUTES = ("colour", "shape", "direction", "ground")
NUM_QUARTERS = 4
SPANS = ("video", *(f"quarter_{quarter + 1}" for quarter in range(NUM_QUARTERS)))

FOREGROUND = 0.30
"""A pixel further than this from the ground colour (RGB in [-1, 1], root mean square) belongs to the shape."""
FEWEST_PIXELS, MOST_PIXELS = 60.0, 1800.0
"""A frame with less or more foreground shows no single shape, and counts as wrong in colour, shape and direction."""


@dataclass(frozen=True)
class Measurement:
    """What a run of raw frames shows: indices into the toy world's names, -1 where nothing could be made out, and the
    speed in pixels per raw frame."""

    colour: int
    shape: int
    direction: int
    ground: int
    speed: float


def _palette(colours: dict[str, tuple[int, int, int]]) -> Float[Tensor, "k 3"]:
    return torch.tensor(list(colours.values()), dtype=torch.float32) / 127.5 - 1


def _templates() -> Float[Tensor, "shapes H W"]:
    """The four true masks, each shifted so that its own circular mean lies in the middle."""
    centre = torch.tensor([SIZE / 2])
    masks = torch.cat([shape_mask(shape, centre, centre) for shape in SHAPES])
    return shift_to_centre(masks, circular_mean(masks))


def circular_mean(weights: Float[Tensor, "t H W"]) -> Float[Tensor, "t 2"]:
    """Where the weight lies on the torus, `(x, y)` in pixels: the angle of each axis's first Fourier coefficient."""
    angle = 2 * math.pi / SIZE * torch.arange(SIZE, device=weights.device)
    places = []
    for marginal in (weights.sum(dim=-2), weights.sum(dim=-1)):
        phase = torch.atan2((marginal * angle.sin()).sum(-1), (marginal * angle.cos()).sum(-1))
        places.append(phase * SIZE / (2 * math.pi))
    return torch.stack(places, dim=-1)


def shift_to_centre(weights: Float[Tensor, "t H W"], places: Float[Tensor, "t 2"]) -> Float[Tensor, "t H W"]:
    """Weights moved on the torus, by fractions of a pixel, so that `places` come to the middle."""
    frequency = torch.fft.fftfreq(SIZE, device=weights.device)
    move = SIZE / 2 - places
    phase = move[:, 1, None, None] * frequency[:, None] + move[:, 0, None, None] * frequency[None, :]
    spectrum = torch.fft.fft2(weights) * torch.exp(-2j * math.pi * phase)
    return torch.fft.ifft2(spectrum).real


def wrap(difference: Tensor) -> Tensor:
    """A difference of places, the short way round the torus."""
    return (difference + SIZE / 2) % SIZE - SIZE / 2


def measure(video: Float[Tensor, "t 3 H W"]) -> list[Measurement]:
    """What a video shows: as a whole, then in each of its quarters (`SPANS`).

    Raises:
        ValueError: if the frames are not 64 x 64 or fewer than two per quarter.
    """
    if video.shape[-2:] != (SIZE, SIZE) or video.shape[0] < 2 * NUM_QUARTERS:
        raise ValueError(
            f"the toy world is measured on {SIZE} x {SIZE} pixels and at least {2 * NUM_QUARTERS} raw frames, "
            f"got {tuple(video.shape)}"
        )
    video = video.float().clamp(-1, 1)
    ground = video.flatten(2).median(dim=-1).values
    contrast = (video - ground[:, :, None, None]).square().mean(dim=1).sqrt()
    weights = ((contrast - FOREGROUND) / FOREGROUND).clamp(0, 1)
    area = weights.sum(dim=(1, 2))
    seen = (area >= FEWEST_PIXELS) & (area <= MOST_PIXELS)
    places = circular_mean(weights)
    centred = shift_to_centre(weights, places)
    colours = (video * weights[:, None]).sum(dim=(2, 3)) / area[:, None].clamp_min(1e-6)

    def one(frames: slice) -> Measurement:
        valid = seen[frames]
        ground_index = _nearest(ground[frames].mean(dim=0), _palette(GROUNDS))
        if valid.float().mean() < 0.5:
            return Measurement(colour=-1, shape=-1, direction=-1, ground=ground_index, speed=0.0)
        mean_colour = colours[frames][valid].mean(dim=0)
        form = centred[frames][valid].mean(dim=0)
        step = wrap(places[frames][1:] - places[frames][:-1])[valid[1:] & valid[:-1]]
        velocity = step.mean(dim=0) if len(step) else torch.zeros(2)
        axis = int(velocity.abs().argmax())
        towards = torch.zeros(2)
        towards[axis] = torch.sign(velocity[axis])
        steps = torch.tensor(list(DIRECTIONS.values()), dtype=torch.float32)
        still = bool(velocity.abs().max() < 0.1)
        return Measurement(
            colour=_nearest(mean_colour, _palette(COLOURS)),
            shape=_most_alike(form, _templates().to(form.device)),
            direction=-1 if still else int((steps @ towards).argmax()),
            ground=ground_index,
            speed=float(velocity.abs().max()),
        )

    length = video.shape[0]
    borders = [quarter * length // NUM_QUARTERS for quarter in range(NUM_QUARTERS + 1)]
    quarters = [slice(start, end) for start, end in pairwise(borders)]
    return [one(span) for span in (slice(0, length), *quarters)]


def _nearest(colour: Tensor, palette: Tensor) -> int:
    return int((palette.to(colour.device) - colour).square().sum(dim=-1).argmin())


def _most_alike(form: Float[Tensor, "H W"], templates: Float[Tensor, "k H W"]) -> int:
    """The template of greatest normalised correlation."""
    flat = templates.flatten(1) - templates.flatten(1).mean(dim=1, keepdim=True)
    return int((nn.functional.normalize(flat, dim=1) @ (form - form.mean()).flatten()).argmax())


def truth(scene: Scene) -> Int[Tensor, " 4"]:
    """The indices that a scene should be measured as, in the order of `ATTRIBUTES`."""
    return torch.tensor(
        [
            list(COLOURS).index(scene.colour),
            SHAPES.index(scene.shape),
            list(DIRECTIONS).index(scene.direction),
            list(GROUNDS).index(scene.ground),
        ]
    )


class ToyWorldAccuracy(Metric):
    """Share of videos that show what their prompt says, per attribute and quarter, with speed error and drift.

    `compute` returns a flat dict: `colour`, `shape`, `direction`, `ground` (whole video), `<attribute>/quarter_1..4`,
    `<attribute>/drift` (quarter 4 minus quarter 1), `speed_error` and `speed_error/quarter_i` (mean absolute error in
    pixels per raw frame, over the prompts that say a speed; absent if none does), and `num_videos`.
    """

    full_state_update = False
    correct: Tensor
    speed_error: Tensor
    num_videos: Tensor
    num_speeds: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("correct", torch.zeros(len(SPANS), len(ATTRIBUTES)), dist_reduce_fx="sum")
        self.add_state("speed_error", torch.zeros(len(SPANS)), dist_reduce_fx="sum")
        self.add_state("num_videos", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("num_speeds", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, videos: Video, prompts: Sequence[str | StoryPrompt]) -> None:
        """Add videos in [-1, 1] and the prompts they were made from.

        Raises:
            ValueError: if there are not as many prompts as videos, or a prompt is none of the toy world's or a story.
        """
        if len(videos) != len(prompts):
            raise ValueError(f"{len(videos)} videos and {len(prompts)} prompts: give one prompt per video")
        for video, prompt in zip(videos, prompts, strict=True):
            if not isinstance(prompt, str):
                raise ValueError(f"{prompt.name!r} is a story of several shots; metric=toyworld_stories measures those")
            scene = parse_caption(prompt)
            expected = truth(scene).to(self.correct.device)
            for span, found in enumerate(measure(video)):
                shown = [getattr(found, attribute) for attribute in ATTRIBUTES]
                self.correct[span] += torch.tensor(shown, device=self.correct.device) == expected
                if scene.speed is not None:
                    self.speed_error[span] += abs(found.speed - SPEEDS[scene.speed])
            self.num_videos += 1
            self.num_speeds += scene.speed is not None

    def compute(self) -> dict[str, Tensor]:
        """See the class docstring."""
        accuracy = self.correct / self.num_videos
        speed_error = self.speed_error / self.num_speeds
        result: dict[str, Tensor] = {}
        for column, attribute in enumerate(ATTRIBUTES):
            for span, name in enumerate(SPANS):
                result[attribute if name == "video" else f"{attribute}/{name}"] = accuracy[span, column]
            result[f"{attribute}/drift"] = accuracy[-1, column] - accuracy[1, column]
        for span, name in enumerate(SPANS if self.num_speeds else ()):
            result["speed_error" if name == "video" else f"speed_error/{name}"] = speed_error[span]
        result["num_videos"] = self.num_videos.clone()
        return result
