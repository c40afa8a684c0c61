"""Batches of prompts alone: what a training that generates its own videos needs.

Prompts come in the epochs' permutations, by position, as clips do (`order.py`, `position.py`). A sample's id is its
position, so that a prompt that comes again starts from other noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from longlive.data.order import epoch_order
from longlive.data.position import PositionDataModule
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


class PromptDataModule(PositionDataModule):
    """Batches of prompts.

    Args:
        prompts: texts, or stories of several shots.
        num_frames: latent frames of the videos, a multiple of `chunk_frames`.
        chunk_frames: frames per chunk.
        height, width: pixels of the videos.
        fps: of the videos, for those who write them.
        clip_frames: as in `PositionDataModule`.
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
        super().__init__(num_frames, clip_frames, batch_size)
        if not prompts:
            raise ValueError("no prompt: training on prompts needs at least one")
        for name, value in (("chunk_frames", chunk_frames), ("height", height), ("width", width), ("fps", fps)):
            if not value > 0:
                raise ValueError(f"{name}={value} must be positive")
        if num_frames < 1 or num_frames % chunk_frames:
            lower = max(num_frames // chunk_frames, 1) * chunk_frames
            raise ValueError(
                f"num_frames={num_frames} is no positive multiple of chunk_frames={chunk_frames}; use {lower} or "
                f"{lower + chunk_frames}"
            )
        self.height, self.width, self.fps = height, width, fps
        stories = [p if isinstance(p, StoryPrompt) else StoryPrompt(p, (p,)) for p in prompts]
        if not scene_cuts:
            stories = [replace(story, scene_cuts=False) for story in stories]
        fitted = [story.over(num_frames // chunk_frames) for story in stories]
        self.dataset = PromptDataset(fitted, scene_cut_phrase, seed)

    def setup(self, stage: str) -> None:
        """Also refuse a length that the ranks of the module cannot share."""
        super().setup(stage)
        module: object = None if self.trainer is None else self.trainer.lightning_module
        if isinstance(module, ReadsWindows):
            module.clip_window(self.num_frames)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.dataset, batch_sampler=self.train_batches(), collate_fn=self._collate)

    def _collate(self, rows: Sequence[tuple[int, tuple[str, ...], tuple[int, ...]]]) -> PromptBatch:
        ids, prompts, shots = zip(*rows, strict=True)
        return PromptBatch(prompts, torch.tensor(shots), torch.tensor(ids), self.height, self.width)
