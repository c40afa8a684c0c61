"""The toy world: a deterministic video world whose truth can be read off its pixels.

One coloured shape moves straight over a plain ground, 64 x 64 pixels, 24 frames per second, wrapping at the borders.
Everything that the caption says (colour, shape, direction, speed, ground) can be measured in a generated video, so a
model trained here gets accuracies instead of opinions (`longlive.metrics.toyworld`). A clip is a list of shots; each
shot has its own scene.

A scene at raw frame `t` is a pure function of `(scene, t)`: clips of any length are rendered without state.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from longlive import rng
from longlive.data.requests import VideoRequest
from longlive.data.shots import Shot
from longlive.data.sources import SourceClip
from longlive.typing import Float, Tensor, UInt8

SIZE = 64
FPS = 24.0
RADIUS = 12.0
"""Half the size of a shape, in pixels."""
EDGE = 3.0
"""Pixels over which an edge fades: soft enough for a codec of low frequencies, sharp enough to tell shapes apart."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 40, 40),
    "green": (30, 170, 60),
    "blue": (50, 70, 230),
    "yellow": (240, 215, 40),
    "purple": (165, 45, 205),
    "cyan": (40, 205, 220),
}
GROUNDS: dict[str, tuple[int, int, int]] = {"dark": (24, 24, 28), "grey": (122, 122, 126), "light": (238, 238, 234)}
SHAPES = ("circle", "square", "triangle", "cross")
DIRECTIONS: dict[str, tuple[int, int]] = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}
"""Unit step (x, y); y grows downwards."""
SPEEDS: dict[str, float] = {"slowly": 1.0, "quickly": 2.0}
"""Pixels per raw frame."""

CELL, STRIDE = 32, 4
"""Where a shape starts is the only choice that a caption leaves open: across its motion in the middle of one of two
cells of 32 pixels, along it at any multiple of 4 pixels, so that every stretch of a clip starts where another clip
does."""

WORDINGS = (
    "a {colour} {shape} moves {speed} {direction} over a {ground} ground",
    "a {colour} {shape} moves {direction} over a {ground} ground",
    "{colour} {shape} moving {speed} {direction} on a {ground} ground",
    "over a {ground} ground, a {colour} {shape} {speed} moves {direction}",
)


@dataclass(frozen=True)
class Scene:
    """One shot's truth. `speed` is None where a caption does not say it."""

    colour: str
    shape: str
    direction: str
    ground: str
    speed: str | None = "slowly"
    x: float = SIZE / 2
    y: float = SIZE / 2

    def caption(self, wording: int = 0) -> str:
        """Plain English; `wording` chooses among `WORDINGS`. A scene without a speed gets the wording without one."""
        if self.speed is None:
            wording = 1
        return WORDINGS[wording % len(WORDINGS)].format(
            colour=self.colour, shape=self.shape, direction=self.direction, ground=self.ground, speed=self.speed
        )


def parse_caption(caption: str) -> Scene:
    """The scene that a caption asks for, whatever its wording.

    Raises:
        ValueError: if it does not name exactly one colour, shape, direction and ground of the toy world.
    """
    words = re.findall(r"[a-z]+", caption.lower())

    def the_one(kind: str, names: Sequence[str]) -> str:
        found = [word for word in words if word in names]
        if len(set(found)) != 1:
            raise ValueError(f"caption {caption!r} names {found or 'no'} {kind}; name one of {', '.join(names)}")
        return found[0]

    speeds = [word for word in words if word in SPEEDS]
    return Scene(
        colour=the_one("colour", list(COLOURS)),
        shape=the_one("shape", SHAPES),
        direction=the_one("direction", list(DIRECTIONS)),
        ground=the_one("ground", list(GROUNDS)),
        speed=speeds[0] if speeds else None,
    )


def shape_coverage(shape: str, dx: Tensor, dy: Tensor) -> Tensor:
    """How much of each pixel the shape covers, 0 to 1, from pixel offsets to its centre.

    The distance to the edge is taken as the maximum over half planes (square, triangle, the bars of the cross).
    """
    if shape == "circle":
        distance = torch.sqrt(dx * dx + dy * dy) - RADIUS
    elif shape == "square":
        distance = torch.maximum(dx.abs(), dy.abs()) - 0.88 * RADIUS
    elif shape == "triangle":  # tip up; centred by its bounding box, so that no direction has a head start
        slope = 2.0 * RADIUS / (1.1 * RADIUS)  # rise of a side over half the base
        sides = (slope * dx.abs() - (dy + RADIUS)) / math.sqrt(1.0 + slope * slope)
        distance = torch.maximum(sides, dy - 0.9 * RADIUS)
    elif shape == "cross":
        arm = 0.33 * RADIUS
        across = torch.maximum(dx.abs() - RADIUS, dy.abs() - arm)
        along = torch.maximum(dy.abs() - RADIUS, dx.abs() - arm)
        distance = torch.minimum(across, along)
    else:
        raise ValueError(f"shape={shape!r} is no shape of the toy world; use one of {', '.join(SHAPES)}")
    return (0.5 - distance / EDGE).clamp(0.0, 1.0)


def shape_mask(shape: str, x: Tensor, y: Tensor) -> Float[Tensor, "t 64 64"]:
    """Coverage of every pixel for shape centres `x, y` of shape `[t]`, on the torus."""
    pixels = torch.arange(SIZE, dtype=torch.float32)
    half = SIZE / 2
    dx = (pixels[None, None, :] - x[:, None, None] + half) % SIZE - half
    dy = (pixels[None, :, None] - y[:, None, None] + half) % SIZE - half
    return shape_coverage(shape, *torch.broadcast_tensors(dx, dy))


def render(scene: Scene, num_raw_frames: int, start: int = 0) -> UInt8[Tensor, "t 3 64 64"]:
    """Raw frames `start .. start + num_raw_frames - 1` of a scene. A scene without a speed moves slowly."""
    step_x, step_y = DIRECTIONS[scene.direction]
    travelled = SPEEDS[scene.speed or "slowly"] * torch.arange(start, start + num_raw_frames, dtype=torch.float32)
    coverage = shape_mask(scene.shape, scene.x + step_x * travelled, scene.y + step_y * travelled)[:, None]
    ground = torch.tensor(GROUNDS[scene.ground], dtype=torch.float32).view(1, 3, 1, 1)
    colour = torch.tensor(COLOURS[scene.colour], dtype=torch.float32).view(1, 3, 1, 1)
    return (ground + coverage * (colour - ground)).round().to(torch.uint8)


def random_scene(seed: int, sample: int, shot: int = 0) -> Scene:
    """Every attribute drawn evenly and independently; a function of its arguments alone."""

    def draw(purpose: str, high: int) -> int:
        return rng.integer(high, seed, f"toyworld_{purpose}", sample=sample, chunk=shot)

    along = STRIDE * draw("along", SIZE // STRIDE) - 0.5
    across = (draw("across", SIZE // CELL) + 0.5) * CELL - 0.5
    direction = list(DIRECTIONS)[draw("direction", len(DIRECTIONS))]
    is_horizontal = DIRECTIONS[direction][0] != 0
    return Scene(
        colour=list(COLOURS)[draw("colour", len(COLOURS))],
        shape=SHAPES[draw("shape", len(SHAPES))],
        direction=direction,
        ground=list(GROUNDS)[draw("ground", len(GROUNDS))],
        speed=list(SPEEDS)[draw("speed", len(SPEEDS))],
        x=along if is_horizontal else across,
        y=across if is_horizontal else along,
    )


def random_caption(seed: int, sample: int, shot: int = 0) -> str:
    """The caption of `random_scene` with the same arguments, in a drawn wording."""
    wording = rng.integer(len(WORDINGS), seed, "toyworld_wording", sample=sample, chunk=shot)
    return random_scene(seed, sample, shot).caption(wording)


def random_prompts(num_prompts: int, seed: int) -> list[str]:
    """Prompts for evaluation, the speed always said, one scene each."""
    return [random_scene(seed, sample).caption(0) for sample in range(num_prompts)]


def image_prompt(caption: str) -> VideoRequest:
    """A caption with a first frame that shows what it says, where `parse_caption` puts it."""
    return VideoRequest(caption, render(parse_caption(caption), 1)[0])


def random_image_prompts(num_prompts: int, seed: int) -> list[VideoRequest]:
    """The same prompts, each with the first frame of its scene: image to video."""
    scenes = [random_scene(seed, sample) for sample in range(num_prompts)]
    return [VideoRequest(scene.caption(0), render(scene, 1)[0]) for scene in scenes]


class ToyWorldSource:
    """Clips for `longlive shards source=toyworld`: clip `i` is a function of `(seed, i)` and the settings.

    Args:
        num_clips: clips in the data set.
        num_raw_frames: raw frames per clip, all shots together.
        shots_per_clip: the clip is cut into this many runs of (nearly) equal length, each a scene of its own.
        seed: names the data set.
    """

    fps = FPS

    def __init__(self, num_clips: int, num_raw_frames: int, shots_per_clip: int = 1, seed: int = 0) -> None:
        if num_clips < 1:
            raise ValueError(f"num_clips={num_clips} is not positive")
        if not 1 <= shots_per_clip <= num_raw_frames:
            raise ValueError(
                f"shots_per_clip={shots_per_clip} does not fit into num_raw_frames={num_raw_frames}; "
                f"use 1 to {num_raw_frames}"
            )
        self.num_clips = num_clips
        self.num_raw_frames = num_raw_frames
        self.shots_per_clip = shots_per_clip
        self.seed = seed

    def __len__(self) -> int:
        return self.num_clips

    def __getitem__(self, index: int) -> SourceClip:
        if not 0 <= index < self.num_clips:
            raise IndexError(f"clip {index} of a toy world of {self.num_clips} clips")
        borders = [shot * self.num_raw_frames // self.shots_per_clip for shot in range(self.shots_per_clip + 1)]
        shots = tuple(
            Shot(start=start, end=end, caption=random_caption(self.seed, index, shot))
            for shot, (start, end) in enumerate(pairwise(borders))
        )
        scenes = [random_scene(self.seed, index, shot) for shot in range(self.shots_per_clip)]
        frames = torch.cat([render(scene, shot.end - shot.start) for scene, shot in zip(scenes, shots, strict=True)])
        return SourceClip(key=f"toyworld-{index:08d}", fps=self.fps, shots=shots, frames=frames)
