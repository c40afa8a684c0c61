"""Drift of videos whose answer is known: computed by hand, or made to change in one way alone."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from helpers.distributed import run_on_ranks
from longlive import rng
from longlive.metrics.drift import NAMES, VideoDrift
from longlive.typing import Video

FPS = 8.0
DRIFTS = [f"{name}/drift" for name in NAMES]


def measured(videos: Video) -> dict[str, float]:
    metric = VideoDrift(FPS)
    metric.update(videos)
    return {name: float(value) for name, value in metric.compute().items()}


def flat(*colours: tuple[int, int, int]) -> Video:
    """A raw frame of every colour, in 0..255."""
    return (torch.tensor(colours, dtype=torch.float32) / 127.5 - 1)[None, :, :, None, None].expand(-1, -1, 3, 6, 8)


def texture(num_raw_frames: int = 32) -> Video:
    """One picture of pixels between a quarter and three quarters of the range, repeated."""
    picture = rng.normal((1, 1, 3, 16, 16), 0, "test_drift").clamp(-2, 2) / 4
    return picture.expand(-1, num_raw_frames, -1, -1, -1).clone()


def ramp(start: float, stop: float, num_raw_frames: int = 32) -> torch.Tensor:
    """A quarter at `start`, then straight to `stop` for the last quarter."""
    quarter = num_raw_frames // 4
    middle = torch.linspace(start, stop, num_raw_frames - 2 * quarter)
    values = torch.cat([torch.full((quarter,), start), middle, torch.full((quarter,), stop)])
    return values[None, :, None, None, None]


def test_the_four_numbers_of_flat_colours() -> None:
    """By hand. Red: rg = 255, yb = 127.5 everywhere, so colourfulness is 0.3 hypot(255, 127.5)."""
    result = measured(flat(*[(255, 0, 0)] * 8))
    assert result["colourfulness"] == pytest.approx(0.3 * math.hypot(255, 127.5))
    assert result["brightness"] == pytest.approx(0.299 * 255)
    assert (result["sharpness"], result["motion"]) == (pytest.approx(0, abs=1e-3), 0)
    grey = measured(flat(*[(100, 100, 100)] * 8))
    assert (grey["colourfulness"], grey["brightness"]) == (pytest.approx(0, abs=1e-4), pytest.approx(100))
    alternating = measured(flat(*[(0, 0, 0), (51, 51, 51)] * 8))
    assert alternating["motion"] == pytest.approx(51 * FPS), "51 levels in every raw frame"
    assert alternating["brightness"] == pytest.approx(25.5)


def test_colourfulness_and_sharpness_of_a_picture_as_numpy_has_them() -> None:
    """Independently: the published formula, and the Laplacian as a convolution."""
    pixels = (texture(8)[0, 0].numpy().astype(np.float64) + 1) * 127.5
    red, green, blue = pixels
    rg, yb = red - green, 0.5 * (red + green) - blue
    expected = math.sqrt(rg.std() ** 2 + yb.std() ** 2) + 0.3 * math.sqrt(rg.mean() ** 2 + yb.mean() ** 2)
    grey = 0.299 * red + 0.587 * green + 0.114 * blue
    laplacian = np.array(
        [
            [grey[y - 1, x] + grey[y + 1, x] + grey[y, x - 1] + grey[y, x + 1] - 4 * grey[y, x] for x in range(1, 15)]
            for y in range(1, 15)
        ]
    )
    result = measured(texture(8))
    assert result["colourfulness"] == pytest.approx(expected, rel=1e-4)
    assert result["sharpness"] == pytest.approx(laplacian.std(), rel=1e-4)


def test_a_video_that_stays_as_it_is_does_not_drift() -> None:
    moving = torch.stack([texture(1)[0, 0].roll(frame, dims=-1) for frame in range(32)])[None]
    for video in (texture(), moving):
        result = measured(video)
        assert [result[drift] for drift in DRIFTS[:1] + DRIFTS[2:]] == pytest.approx([0, 0, 0], abs=1e-3)
    assert measured(moving)["motion"] > 100


@pytest.mark.parametrize(
    ("change", "drifting", "sign"),
    [
        ("saturates", {"colourfulness"}, 1),
        ("fades to grey", {"colourfulness"}, -1),
        ("brightens", {"brightness"}, 1),
        ("blurs", {"sharpness"}, -1),
        ("stops", {"motion"}, -1),
    ],
)
def test_what_changes_drifts_and_nothing_else(change: str, drifting: set[str], sign: int) -> None:
    video = texture()
    grey = (video * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(2, keepdim=True)
    if change == "saturates":
        video = grey + (video - grey) * ramp(1.0, 1.4)
    elif change == "fades to grey":
        video = grey + (video - grey) * ramp(1.0, 0.2)
    elif change == "brightens":
        video = video + ramp(0.0, 0.3)
    elif change == "blurs":
        # A smaller contrast of the luma's finest pattern, on a flat ground: nothing else depends on it.
        checks = ((torch.arange(16)[:, None] + torch.arange(16)) % 2 * 2 - 1).float()
        video = (0.2 * checks * ramp(1.0, 0.2)).expand(-1, -1, 3, -1, -1)
    else:
        shift = ramp(1.0, 0.0).flatten().round().cumsum(0).long().tolist()
        video = torch.stack([video[0, 0].roll(place, dims=-1) for place in shift])[None]
    result = measured(video)
    for name in NAMES:
        drift, size = result[f"{name}/drift"], max(1.0, result[f"{name}/first_quarter"])
        if name in drifting:
            assert sign * drift > 0.1 * size, (name, drift)
        elif name == "sharpness" and change in ("saturates", "fades to grey"):
            assert abs(drift) < 0.02 * size  # of the luma, which grey keeps but for rounding
        else:
            assert abs(drift) < 0.02 * size + 0.5 * (name == "motion"), (name, drift)
        assert drift == pytest.approx(result[f"{name}/last_quarter"] - result[f"{name}/first_quarter"])


def test_curves_have_a_value_per_second() -> None:
    """2.5 seconds: brightness 10, 20, 30; then a shorter video, which ends before the third second."""
    levels = [10] * 8 + [20] * 8 + [30] * 4
    metric = VideoDrift(FPS)
    metric.update(flat(*[(level,) * 3 for level in levels]))
    curves = metric.per_second()
    assert curves["brightness"].tolist() == pytest.approx([10, 20, 30])
    assert curves["motion"].tolist() == pytest.approx([0, 10, 20]), "ten levels in one of 8 and of 4 raw frames, x 8"
    metric.update(flat(*[(50, 50, 50)] * 16))
    assert metric.per_second()["brightness"].tolist() == pytest.approx([30, 35, 30])
    assert set(curves) == set(NAMES)


def _drift_of_this_rank(parts: Sequence[Video]) -> dict[str, Any]:
    metric = VideoDrift(FPS)
    metric.update(parts[dist.get_rank()])
    return metric.compute()


def test_batches_and_ranks_add_up_to_the_whole() -> None:
    videos = torch.cat([texture() * ramp(1, 0.5), texture() + ramp(0, 0.2), -texture()])
    whole = measured(videos)
    parts, other = VideoDrift(FPS), VideoDrift(FPS)
    parts.update(videos[:1])
    other.update(videos[1:])
    parts.merge_state(other)
    assert {name: pytest.approx(float(value)) for name, value in parts.compute().items()} == whole
    for result in run_on_ranks(_drift_of_this_rank, 2, [videos[:1], videos[1:]]):
        assert {name: pytest.approx(float(value)) for name, value in result.items()} == whole
    parts.reset()
    assert int(parts.num_videos) == 0


@pytest.mark.parametrize("shape", [(7, 3, 6, 8), (8, 3, 2, 8), (28801, 3, 3, 3)], ids=str)
def test_videos_that_cannot_be_measured_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="drift is measured on 8 raw frames to 3600 seconds of at least 3 x 3"):
        VideoDrift(FPS).update(torch.zeros(1, *shape))
    with pytest.raises(ValueError, match=r"fps=1\.0 must be at least 2"):
        VideoDrift(1.0)
