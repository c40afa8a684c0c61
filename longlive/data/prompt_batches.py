"""Batches of prompts alone: what a training that generates its own videos needs.

Prompts come in the epochs' permutations, by position, as clips do (`order.py`): the position is all that a checkpoint
keeps, and data rank r of R reads the positions r, r + R, ... A sample's id is its position, so that a prompt that comes
again starts from other noise.

Where videos are made in clips, one in a step (`modules.streaming`), a batch comes for all steps that its videos take.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.strategies import ParallelStrategy
from torch.utils.data import DataLoader, Dataset

from longlive.data.order import PositionBatches, RepeatedBatches, epoch_order
from longlive.data.prompts import StoryPrompt
from longlive.data.sample import ReadsWindows
from longlive.data.shots import SCENE_CUT_PHRASE
from longlive.typing import Int, Tensor


@dataclass(frozen=True)
class PromptBatch:
    """Videos to generate.

    Attributes:
        prompts: `prompts[sample][chunk]`.
        shot_index: shot of every chunk, `[b chunk]`, counted from 0 in each sample.
        sample_ids: global ids, int64 `[b]`: they name the random draws of a sample.
        height, width: pixels.
    """

    prompts: tuple[tuple[str, ...], ...]
    shot_index: Int[Tensor, "b chunk"]
    sample_ids: Int[Tensor, " b"]
    height: int
    width: int

    @property
    def batch_size(self) -> int:
        return len(self.prompts)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> PromptBatch:
        """The same batch: its small tables stay on the CPU, to be read there."""
        return self


class PromptDataset(Dataset[tuple[int, tuple[str, ...], tuple[int, ...]]]):
    """The endless stream of prompts by position: id, prompt of every chunk, shot of every chunk."""

    def __init__(self, stories: Sequence[StoryPrompt], scene_cut_phrase: str, seed: int) -> None:
        self.stories = [story.chunks(scene_cut_phrase) for story in stories]
        self.seed = seed
        self._epoch = -1
        self._order: Sequence[int] = ()

    def __getitem__(self, position: int) -> tuple[int, tuple[str, ...], tuple[int, ...]]:
        epoch, place = divmod(position, len(self.stories))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, epoch_order(len(self.stories), self.seed, epoch)
        prompts, shots = self.stories[self._order[place]]
        return position, tuple(prompts), tuple(shots)


class PromptDataModule(LightningDataModule):
    """Batches of prompts.

    Args:
        prompts: texts, or stories of several shots.
        num_frames: latent frames of the videos, a multiple of `chunk_frames`.
        chunk_frames: frames per chunk.
        height, width: pixels of the videos.
        fps: of the videos, for those who write them.
        clip_frames: of the videos, that are made in a step: a batch comes `num_frames / clip_frames` times. None: all.
        batch_size: prompts per data rank and step.
        scene_cut_phrase: begins the first prompt of every shot but the first; the one of training.
        scene_cuts: whether the captions of a story are of shots; else of one shot, in which the prompt switches.
        seed: of the order.

    Raises:
        ValueError: if there is no prompt, sizes do not fit, or a story does not fit the videos' length.
    """

    def __init__(
        self,
        prompts: Sequence[str | StoryPrompt],
        *,
        num_frames: int,
        chunk_frames: int,
        height: int,
        width: int,
        fps: float | int = 24.0,
        clip_frames: int | None = None,
        batch_size: int = 1,
        scene_cut_phrase: str = SCENE_CUT_PHRASE,
        scene_cuts: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not prompts:
            raise ValueError("no prompt: training on prompts needs at least one")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        if num_frames < 1 or num_frames % chunk_frames:
            lower = max(num_frames // chunk_frames, 1) * chunk_frames
            raise ValueError(
                f"num_frames={num_frames} is no positive multiple of chunk_frames={chunk_frames}; use {lower} or "
                f"{lower + chunk_frames}"
            )
        if clip_frames is not None and (clip_frames < 1 or num_frames % clip_frames):
            raise ValueError(
                f"clip_frames={clip_frames} does not divide num_frames={num_frames}: videos are made of whole clips"
            )
        self.num_frames, self.height, self.width, self.fps = num_frames, height, width, fps
        self.num_clips = 1 if clip_frames is None else num_frames // clip_frames
        self.batch_size = batch_size
        stories = [p if isinstance(p, StoryPrompt) else StoryPrompt(p, (p,)) for p in prompts]
        if not scene_cuts:
            stories = [replace(story, scene_cuts=False) for story in stories]
        fitted = [story.over(num_frames // chunk_frames) for story in stories]
        self.dataset = PromptDataset(fitted, scene_cut_phrase, seed)
        self._consumed_at_start = 0
        self._clips_at_start = 0
        self._batches_at_start = 0

    def setup(self, stage: str) -> None:
        """Refuse a length that the ranks of the module cannot share, before a network is built."""
        module: object = None if self.trainer is None else self.trainer.lightning_module
        if isinstance(module, ReadsWindows):
            module.clip_window(self.num_frames)

    def data_parallel(self) -> tuple[int, int]:
        """This process's data rank, and the number of data ranks."""
        if self.trainer is not None and isinstance(self.trainer.strategy, ParallelStrategy):
            kwargs = self.trainer.strategy.distributed_sampler_kwargs
            return int(kwargs["rank"]), int(kwargs["num_replicas"])
        return 0, 1

    @property
    def samples_consumed(self) -> int:
        """Prompts that went through all their training steps, over all ranks and since the first step of the run."""
        return self._consumed_at_start + self._steps() // self.num_clips * self.batch_size * self.data_parallel()[1]

    @property
    def clips_trained(self) -> int:
        """Steps that the batch after these prompts went through."""
        return self._steps() % self.num_clips

    def _steps(self) -> int:
        return self._clips_at_start + self._num_trained_batches() - self._batches_at_start

    def _num_trained_batches(self) -> int:
        if self.trainer is None:
            return self._batches_at_start
        return int(self.trainer.fit_loop.epoch_loop.batch_progress.total.processed)  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, Any]:
        """The position, and Lightning's own count at that moment, which it restores too."""
        position = {"samples_consumed": self.samples_consumed, "clips_trained": self.clips_trained}
        return position | {"num_batches": self._num_trained_batches()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._consumed_at_start = int(state_dict["samples_consumed"])
        self._clips_at_start = int(state_dict.get("clips_trained", 0))  # older checkpoints know no clips
        self._batches_at_start = int(state_dict["num_batches"])

    def train_dataloader(self) -> DataLoader[Any]:
        batches = PositionBatches(lambda: self.samples_consumed, self.batch_size, *self.data_parallel())
        repeated = RepeatedBatches(batches, self.num_clips, lambda: self.clips_trained)
        return DataLoader(self.dataset, batch_sampler=repeated, collate_fn=self._collate)

    def _collate(self, rows: Sequence[tuple[int, tuple[str, ...], tuple[int, ...]]]) -> PromptBatch:
        ids, prompts, shots = zip(*rows, strict=True)
        return PromptBatch(prompts, torch.tensor(shots), torch.tensor(ids), self.height, self.width)
