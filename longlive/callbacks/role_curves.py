"""Curves of a training with several roles, each of which learns in steps of its own: what a step's result says under
`values`, as means over log intervals.

A role that learns in every fifth step would be missing where only the last step of an interval is logged, or be there
by chance.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from longlive.modules.base import LongLiveModule


class RoleCurves(Callback):
    """Logs the mean of every value over the steps of an interval that had it, and over ranks.

    Args:
        every_n_steps: optimizer steps per log interval.
    """

    def __init__(self, every_n_steps: int = 10) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps} must be at least 1")
        self.every_n_steps = every_n_steps
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, LongLiveModule)
        for name, value in outputs["values"].items():
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1
        if trainer.global_step % self.every_n_steps or not self._sums:
            return
        # All ranks take the same steps, so they have the same names.
        pairs = [(self._sums[name], float(self._counts[name])) for name in self._sums]
        totals = pl_module.sum_over_ranks(torch.tensor(pairs, dtype=torch.float64, device=pl_module.device))
        means = dict(zip(self._sums, (totals[:, 0] / totals[:, 1]).tolist(), strict=True))
        self._sums, self._counts = {}, {}
        for logger in trainer.loggers:
            logger.log_metrics(means, step=trainer.global_step - 1)

    def state_dict(self) -> dict[str, Any]:
        """The part of the log interval that is already done: rank 0's."""
        return {"sums": dict(self._sums), "counts": dict(self._counts)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._sums, self._counts = dict(state_dict["sums"]), dict(state_dict["counts"])
