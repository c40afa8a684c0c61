"""How a video changes as it goes on, measured on any video, whatever made it and whatever it shows.

Autoregressive rollouts drift: colours saturate or fade, detail is lost, motion dies down. Four numbers per raw frame
say so, on pixels from 0 to 255:

- *colourfulness* (Hasler and Süsstrunk 2003): with `rg = R - G` and `yb = (R + G) / 2 - B`, the root of the sum of
  their variances plus 0.3 times the root of the sum of their squared means;
- *sharpness*: standard deviation of the Laplacian of the luma (the four neighbours minus four times the pixel);
- *brightness*: mean luma, `0.299 R + 0.587 G + 0.114 B`;
- *motion*: mean absolute difference of the luma to the raw frame before, times the frame rate: levels per second. A cut
  counts as motion of that one frame.

They are compared between the first and the last quarter of a video, and kept per second of it for a curve. A drift
is no fault where the prompt asks for it; over many videos without cuts it should be zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torchmetrics import Metric

from longlive.typing import Float, Tensor, Video

NAMES = ("colourfulness", "sharpness", "brightness", "motion")
MAX_SECONDS = 3600


def colourfulness(pixels: Float[Tensor, "t 3 H W"]) -> Float[Tensor, " t"]:
    """Of every raw frame, from pixels in 0..255."""
    red, green, blue = (channel.flatten(1) for channel in pixels.unbind(dim=1))
    opponents = torch.stack([red - green, (red + green) / 2 - blue])
    spread = opponents.var(dim=-1, correction=0).sum(dim=0).sqrt()
    return spread + 0.3 * opponents.mean(dim=-1).square().sum(dim=0).sqrt()


def luma(pixels: Float[Tensor, "t 3 H W"]) -> Float[Tensor, "t H W"]:
    """Of every pixel (BT.601)."""
    red, green, blue = pixels.unbind(dim=1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def sharpness(grey: Float[Tensor, "t H W"]) -> Float[Tensor, " t"]:
    """Of every raw frame, from its luma; the border has no neighbours and is left out."""
    centre = grey[:, 1:-1, 1:-1]
    neighbours = grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:]
    return (neighbours - 4 * centre).flatten(1).std(dim=1, correction=0)


def motion(grey: Float[Tensor, "t H W"], fps: float) -> Float[Tensor, " t"]:
    """Of every raw frame, from its luma; NaN for the first."""
    change = (grey[1:] - grey[:-1]).abs().mean(dim=(1, 2)) * fps
    return torch.cat([change.new_full((1,), torch.nan), change])


class VideoDrift(Metric):
    """Means over videos of the four numbers (`NAMES`).

    `compute` returns a flat dict: `<name>` (whole video), `<name>/first_quarter`, `<name>/last_quarter`,
    `<name>/drift` (last minus first) and `num_videos`. `per_second` returns the curves.

    Args:
        fps: raw frames per second of the videos.

    Raises:
        ValueError: if `fps` is below 2: a second then shows no motion.
    """

    full_state_update = False
    quarters: Tensor
    seconds: Tensor
    num_seconds: Tensor
    num_videos: Tensor

    def __init__(self, fps: float | int = 24.0) -> None:
        super().__init__()
        if not fps >= 2:
            raise ValueError(f"fps={fps} must be at least 2: a second of a single raw frame shows no motion")
        self.fps = float(fps)
        self.add_state("quarters", torch.zeros(3, len(NAMES), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("seconds", torch.zeros(MAX_SECONDS, len(NAMES), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_seconds", torch.zeros(MAX_SECONDS, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_videos", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, videos: Video, prompts: Sequence[object] = ()) -> None:
        """Add videos in [-1, 1]; what they were made from does not matter.

        Raises:
            ValueError: if they have fewer than 8 raw frames, are smaller than 3 x 3 pixels, or longer than an hour.
        """
        num_raw_frames, height, width = videos.shape[1], *videos.shape[-2:]
        if num_raw_frames < 8 or min(height, width) < 3 or num_raw_frames > MAX_SECONDS * self.fps:
            raise ValueError(
                f"videos of {num_raw_frames} raw frames of {height} x {width} pixels: drift is measured on 8 raw "
                f"frames to {MAX_SECONDS} seconds of at least 3 x 3"
            )
        second = (torch.arange(num_raw_frames, dtype=torch.float64) / self.fps).long()
        quarter = num_raw_frames // 4
        for video in videos:
            values = self._measure(video).to(self.quarters)
            for row, span in enumerate((values, values[:quarter], values[-quarter:])):
                self.quarters[row] += span.nanmean(dim=0)
            for number in range(int(second[-1]) + 1):
                self.seconds[number] += values[second == number].nanmean(dim=0)
                self.num_seconds[number] += 1
            self.num_videos += 1

    def _measure(self, video: Float[Tensor, "t 3 H W"]) -> Float[Tensor, "t 4"]:
        pixels = (video.float().clamp(-1, 1) + 1) * 127.5
        grey = luma(pixels)
        return torch.stack(
            [colourfulness(pixels), sharpness(grey), grey.mean(dim=(1, 2)), motion(grey, self.fps)], dim=1
        )

    def compute(self) -> dict[str, Tensor]:
        """See the class docstring."""
        whole, first, last = self.quarters / self.num_videos
        result: dict[str, Tensor] = {}
        for column, name in enumerate(NAMES):
            result[name] = whole[column]
            result[f"{name}/first_quarter"] = first[column]
            result[f"{name}/last_quarter"] = last[column]
            result[f"{name}/drift"] = last[column] - first[column]
        result["num_videos"] = self.num_videos.clone()
        return result

    def per_second(self) -> dict[str, Float[Tensor, " second"]]:
        """The mean of every number in every second, over the videos that last as long. Of this process's videos; inside
        `sync_context()`, of all."""
        length = int((self.num_seconds > 0).sum())
        means = self.seconds[:length] / self.num_seconds[:length, None]
        return {name: means[:, column] for column, name in enumerate(NAMES)}
