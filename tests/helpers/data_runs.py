"""Runs of the data module alone: a model of one number that notes which samples it saw."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from longlive.data.batch import VideoBatch
from longlive.data.datamodule import VideoDataModule

SETTINGS: dict[str, Any] = {
    "num_frames": 3, "chunk_frames": 1, "height": 16, "width": 32, "batch_size": 2, "num_workers": 0, "seed": 5,
}  # fmt: skip


class Recorder(LightningModule):
    """Trains one number, and notes which samples it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[int]] = []
        self.validated: list[tuple[int, int]] = []
        self.batches_at_steps: list[int] = []

    def training_step(self, batch: VideoBatch, batch_index: int) -> torch.Tensor:
        self.seen.append(batch.sample_ids.tolist())
        return self.weight * batch.raw_frames.float().mean()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.batches_at_steps.append(len(self.seen))

    @property
    def steps(self) -> list[list[int]]:
        """Which samples each optimizer step saw."""
        return [
            list(chain(*self.seen[first:last]))
            for first, last in zip([0, *self.batches_at_steps], self.batches_at_steps, strict=False)
        ]

    def validation_step(self, batch: VideoBatch, batch_index: int) -> None:
        self.validated += zip(batch.sample_ids.tolist(), batch.num_valid_frames.tolist(), strict=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer_of(max_steps: int, **settings: Any) -> Trainer:
    return Trainer(
        **{
            "accelerator": "cpu",
            "max_steps": max_steps,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "use_distributed_sampler": False,
            "num_sanity_val_steps": 0,
        }
        | settings
    )


def train(
    data: VideoDataModule, max_steps: int, checkpoint: Path | None = None, save: Path | None = None, **settings: Any
) -> Recorder:
    model, trainer = Recorder(), trainer_of(max_steps, **settings)
    trainer.fit(model, datamodule=data, ckpt_path=checkpoint)
    if save is not None:
        trainer.save_checkpoint(save)
    return model


class OneOfManyRanks(VideoDataModule):
    """A data rank without its peers."""

    def __init__(self, *args: Any, data_rank: int, data_size: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.place = data_rank, data_size

    def data_parallel(self) -> tuple[int, int]:
        return self.place
