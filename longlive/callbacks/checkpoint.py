"""Lightning's `ModelCheckpoint` for runs that are killed and continued.

It differs in three things. A checkpoint is also written after the last step, whatever the interval, and after the step
at which a run is told to stop: no step that was trained is lost. What was logged up to a checkpoint is on the disk
before the checkpoint is, so the curves of a run that was killed and continued have no hole. It says nothing of modules
that step their optimizers by hand, where Lightning asks for a copy from before the step: a checkpoint holds the weights
after it.
"""

from __future__ import annotations

import warnings
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

AFTER_THE_STEP = "Using ModelCheckpoint with manual optimization and every_n_train_steps, but no pre-optimization state"
"""Begins Lightning's warning that a checkpoint holds the weights after the step, which is what a resumed run needs."""


class RunCheckpoint(ModelCheckpoint):
    """See the module docstring. Arguments are `ModelCheckpoint`'s."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        # A resumed run has this one already. Lightning forgets, and would write it again after the next micro-batch,
        # in the middle of a gradient accumulation.
        self._last_global_step_saved = trainer.global_step
        # For good: `catch_warnings` around every save would let warnings that come once come again.
        warnings.filterwarnings("ignore", message=AFTER_THE_STEP)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        is_whole_step = not trainer.fit_loop._should_accumulate()
        if trainer.should_stop and is_whole_step and not self._should_skip_saving_checkpoint(trainer):
            # Now: whoever tells a run to stop may not wait for what Lightning does before the end of training.
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
        super().on_train_end(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        for logger in trainer.loggers:
            logger.save()
