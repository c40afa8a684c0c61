"""What a checkpoint finds on the disk when it is written, and when it is written at all."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint

from helpers.runs import MemoryLogger, fake_batches, fit, tiny_module
from longlive.callbacks.checkpoint import RunCheckpoint
from longlive.callbacks.loss_breakdown import LossBreakdown
from longlive.data.batch import VideoBatch


class FlushedLogger(MemoryLogger):
    """Notes how much was logged whenever it is told to write it to the disk."""

    def __init__(self) -> None:
        super().__init__()
        self.flushed: list[list[int]] = []

    def save(self) -> None:
        self.flushed.append([step for step, _ in self.logged])


def saving(directory: Path, every: int, **changes: Any) -> RunCheckpoint:
    """As in conf/callbacks/default.yaml."""
    settings = {"dirpath": directory, "filename": "step-{step:07d}", "auto_insert_metric_name": False}
    kept = {"save_top_k": 2, "monitor": "step", "mode": "max", "save_on_train_epoch_end": False}
    return RunCheckpoint(every_n_train_steps=every, **settings | kept | changes)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("*"))


def train(directory: Path, every: int, batches: range, **settings: Any) -> FlushedLogger:
    logger = FlushedLogger()
    callbacks = [LossBreakdown(1), saving(directory, every)]
    fit(
        tiny_module(),
        fake_batches(batches.stop)[batches.start :],
        callbacks,
        logger,
        enable_checkpointing=True,
        **{"max_steps": batches.stop} | settings,
    )
    return logger


def test_everything_logged_before_a_checkpoint_is_on_the_disk_with_it(tmp_path):
    """A kill after the checkpoint loses what the writer still held: those points are never logged again."""
    logger = train(tmp_path, 2, range(5))
    assert [0, 1] in logger.flushed
    assert [0, 1, 2, 3] in logger.flushed
    assert [0, 1, 2, 3, 4] in logger.flushed


@pytest.mark.parametrize(
    ("every", "steps", "expected"), [(2, 4, (2, 4)), (2, 5, (4, 5)), (100, 3, (3,)), (1, 1, (1,)), (2, 6, (4, 6))]
)
def test_the_two_newest_are_kept_and_the_last_step_is_one_of_them(tmp_path, every, steps, expected):
    train(tmp_path, every, range(steps))
    assert names(tmp_path) == [f"step-{step:07d}.ckpt" for step in expected]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_run_does_not_save_its_first_step_again(tmp_path, accumulate):
    """A copy under another name (`-v1`), taken between two batches of one step, whose gradient is lost."""
    train(tmp_path, 2, range(2 * accumulate), max_steps=2, accumulate_grad_batches=accumulate)
    first = (tmp_path / "step-0000002.ckpt").stat().st_mtime_ns
    resumed = range(2 * accumulate, 3 * accumulate)
    settings = {"max_steps": 3, "accumulate_grad_batches": accumulate, "checkpoint": tmp_path / "step-0000002.ckpt"}
    train(tmp_path, 2, resumed, **settings)
    assert names(tmp_path) == ["step-0000002.ckpt", "step-0000003.ckpt"]
    assert (tmp_path / "step-0000002.ckpt").stat().st_mtime_ns == first


class StepsByHand(LightningModule):
    """As distillation does; its weight counts the steps."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: VideoBatch, batch_idx: int) -> None:
        optimizer = self.optimizers()
        self.weight.grad = torch.tensor(-1.0)
        optimizer.step()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


@pytest.mark.parametrize(("kind", "number"), [(ModelCheckpoint, 1), (RunCheckpoint, 0)])
def test_nobody_is_told_to_keep_weights_from_before_the_step(tmp_path, kind, number):
    """Lightning's own callback shows that this is still the text it warns with."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        callback = kind(dirpath=tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
        fit(StepsByHand(), fake_batches(4), [callback], enable_checkpointing=True)
    assert len([each for each in caught if "pre-optimization" in str(each.message)]) == number
    for step in (2, 4):
        saved = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)
        assert saved["state_dict"]["weight"] == saved["global_step"] == step
