"""How much videos differ from each other: their standard deviation over samples, mean over a video.

    d = mean sqrt( sum |x_i - mean x|^2 / (n - 1) )        i: samples; the outer mean: frames, channels, pixels

The samples are those of all ranks, so a batch has the same d however it is spread, and one sample per rank will do.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from longlive.typing import Latents, Tensor


def diversity(videos: Latents, sum_over_ranks: Callable[[Tensor], Tensor], copies: int = 1) -> float | None:
    """The diversity of all ranks' videos; None: there is one alone.

    Args:
        videos: of this rank.
        sum_over_ranks: of tensors of one shape.
        copies: ranks that have the same videos.
    """
    samples = videos.detach().float()
    count = sum_over_ranks(torch.tensor(float(len(samples)), device=samples.device)) / copies
    if count < 2:
        return None
    mean = sum_over_ranks(samples.sum(dim=0)) / (copies * count)
    variance = sum_over_ranks((samples - mean).square().sum(dim=0)) / (copies * (count - 1))
    return float(variance.sqrt().mean())
