"""The same number however the videos are spread over ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from helpers.distributed import run_on_ranks
from longlive.objectives.diversity import diversity
from longlive.typing import Tensor

VIDEOS = 5 + torch.randn(4, 6, 3, 2, 2, generator=torch.Generator().manual_seed(0))


def over_ranks(value: Tensor) -> Tensor:
    total = value.clone()
    dist.all_reduce(total)
    return total


def of_four_ranks() -> tuple[float | None, float | None, float | None]:
    """Each has a video of its own, two and two have the same ones, and all have the same one."""
    rank = dist.get_rank()
    return (
        diversity(VIDEOS[rank : rank + 1], over_ranks),
        diversity(VIDEOS[rank // 2 * 2 :][:2], over_ranks, copies=2),
        diversity(VIDEOS[:1], over_ranks, copies=4),
    )


def test_it_is_that_of_all_ranks_videos() -> None:
    """A rank's own does not exist where it has one video, and would change with the number of ranks."""
    expected = pytest.approx(float(VIDEOS.double().std(dim=0).mean()), rel=1e-5)
    assert diversity(VIDEOS, lambda value: value) == expected
    assert run_on_ranks(of_four_ranks, 4) == [(expected, expected, None)] * 4


def test_one_video_has_none() -> None:
    assert diversity(VIDEOS[:1], lambda value: value) is None
