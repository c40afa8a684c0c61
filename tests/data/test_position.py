"""The position in the data: where a resumed run goes on, in the middle of what a batch comes for, too."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer

from helpers.data_runs import SETTINGS, train
from helpers.runs import tiny_module
from longlive.data.datamodule import VideoDataModule
from longlive.data.position import PositionDataModule


class After(PositionDataModule):
    """Lightning has counted so many batches, the last of which wait for their optimizer step."""

    def __init__(self, num_batches: int, pending: int = 0, place: tuple[int, int] = (0, 1), **settings: Any) -> None:
        super().__init__(**{"num_frames": 12, "clip_frames": 4, "batch_size": 2} | settings)
        self.num_batches, self.pending, self.place = num_batches, pending, place

    def data_parallel(self) -> tuple[int, int]:
        return self.place

    def _num_trained_batches(self) -> int:
        return self.num_batches

    def _num_pending_batches(self) -> int:
        return self.pending


@pytest.mark.parametrize(
    ("num_batches", "pending", "samples", "clips"),
    [(0, 0, 0, 0), (2, 0, 0, 2), (3, 0, 8, 0), (7, 0, 16, 1), (7, 2, 8, 2)],
)
def test_a_position_counts_samples_of_all_ranks_whose_clips_are_all_trained(
    num_batches: int, pending: int, samples: int, clips: int
) -> None:
    """Two samples on each of four ranks, three clips each; pending batches have lost their gradients."""
    data = After(num_batches, pending, place=(3, 4))
    assert data.state_dict() == {"samples_consumed": samples, "clips_trained": clips, "num_batches": num_batches}


@pytest.mark.parametrize("rank", [0, 1])
def test_batches_go_on_from_a_position_on_any_number_of_ranks(rank: int) -> None:
    """Lightning restores its own count too: batches from before the resume would count twice."""
    resumed = After(7, place=(rank, 2))
    resumed.load_state_dict({"samples_consumed": 16, "clips_trained": 1, "num_batches": 7})
    assert list(islice(resumed.train_batches(), 3)) == [[16 + rank, 18 + rank]] * 2 + [[20 + rank, 22 + rank]]
    resumed.num_batches += 2
    assert resumed.state_dict() == {"samples_consumed": 20, "clips_trained": 0, "num_batches": 9}


def test_checkpoints_from_before_there_were_clips_are_read() -> None:
    resumed = After(5, clip_frames=None)
    resumed.load_state_dict({"samples_consumed": 10, "num_batches": 5})
    assert next(iter(resumed.train_batches())) == [10, 11]


@pytest.mark.parametrize(("reader", "workers"), [("indexed", 2), ("streamed", 0)])
def test_clips_of_a_video_are_steps_on_the_same_samples_in_resumed_runs_too(
    pristine_shards: Path, tmp_path: Path, reader: str, workers: int
) -> None:
    """A stream that goes on with other samples has their prompts and first frames."""

    def data() -> VideoDataModule:
        changes = {"reader": reader, "num_workers": workers, "clip_frames": 1}
        return VideoDataModule(pristine_shards, **SETTINGS | changes)

    once = train(VideoDataModule(pristine_shards, **SETTINGS | {"reader": reader}), 3).seen
    first = train(data(), 4, save=tmp_path / "stopped.ckpt").seen
    rest = train(data(), 9, checkpoint=tmp_path / "stopped.ckpt").seen
    assert first + rest == [samples for samples in once for _ in range(SETTINGS["num_frames"])]


def test_clips_of_a_video_are_refused_by_a_stage_that_makes_none(pristine_shards: Path) -> None:
    data, module = VideoDataModule(pristine_shards, **SETTINGS | {"clip_frames": 1}), tiny_module()
    trainer = Trainer(accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match=r"data\.clip_frames=1 brings every batch \d times"):
        trainer.fit(module, datamodule=data)
    assert module.network is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"clip_frames": 8}, "clip_frames=8 does not divide num_frames=12"),
        ({"clip_frames": 0}, "clip_frames=0 does not divide num_frames=12"),
    ],
    ids=str,
)
def test_sizes_that_cannot_work_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        After(0, **changes)
