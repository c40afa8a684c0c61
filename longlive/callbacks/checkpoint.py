"""Lightning's `ModelCheckpoint` for runs that are killed and continued.

It differs in two things. A checkpoint is also written after the last step, whatever the interval: no step that was
trained is lost. And what was logged up to a checkpoint is on the disk before the checkpoint is, so the curves of a run
that was killed and continued have no hole.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class RunCheckpoint(ModelCheckpoint):
    """See the module docstring. Arguments are `ModelCheckpoint`'s."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        # A resumed run has this one already. Lightning forgets, and would write it again after the next micro-batch,
        # in the middle of a gradient accumulation.
        self._last_global_step_saved = trainer.global_step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
        super().on_train_end(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        for logger in trainer.loggers:
            logger.save()
