"""What the loss is made of: the mean over ranks and micro-batches, and its parts by timestep, by position in the clip
and, of modules that tell, by shot.

A single number hides what goes wrong in autoregressive training: a network that is good at high noise only, or only
where there is little history, or until the first scene cut. All parts travel in one tensor and one reduction per log
interval.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from longlive.diffusion.schedule import TIMESTEP_SCALE
from longlive.modules.base import LongLiveModule
from longlive.typing import Bool, Float, Int, PerFrame, Tensor

QUARTERS = 4
PLACES = 8
"""Shots, and chunks of a shot, with a part of their own; the last one also has those after it."""


class LossBreakdown(Callback):
    """Logs `train/loss`, `train/loss_timestep_quarter_{1..4}`, `train/loss_clip_quarter_{1..4}`, `train/gradient_norm`
    (before clipping) and `train/learning_rate`; of a module whose steps return shots, `train/loss_shot_{1..8}` and
    `train/loss_chunk_of_shot_{1..8}`, too.

    The parts hold unweighted errors of scored frames. `train/loss` is the mean of the interval's steps.

    Args:
        every_n_steps: optimizer steps per log interval.
    """

    def __init__(self, every_n_steps: int = 10) -> None:
        self.every_n_steps = every_n_steps
        self.last_loss = float("nan")
        """Mean of the last log interval; the progress bar shows it."""
        self._sums: Tensor | None = None
        self._gradient_norm: Tensor | None = None
        self._learning_rate = 0.0

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if (trainer.global_step + 1) % self.every_n_steps == 0:
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            norm = get_total_norm(gradients)
            self._gradient_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
            self._learning_rate = float(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, LongLiveModule)
        # Lightning hands over the loss divided by the number of accumulated batches.
        loss = outputs["loss"].detach().float() * trainer.accumulate_grad_batches
        errors, scored = outputs["frame_errors"], outputs["scored"]
        parts = breakdown(loss, errors, outputs["timesteps"], scored, outputs["clip_position"])
        names = [f"{name}_quarter_{quarter + 1}" for name in ("timestep", "clip") for quarter in range(QUARTERS)]
        for name in ("shot", "chunk_of_shot"):
            if name in outputs:
                parts = torch.cat([parts, sums_by(outputs[name].clamp(max=PLACES - 1), PLACES, errors, scored)], dim=1)
                names += [f"{name}_{place + 1}" for place in range(PLACES)]
        # Sums of a few float32 are exact in float64: a run that is resumed adds them up in another order.
        parts = parts.double()
        self._sums = parts if self._sums is None else self._sums.to(parts) + parts
        if trainer.global_step % self.every_n_steps or trainer.fit_loop._should_accumulate():
            return
        sums = pl_module.sum_over_ranks(self._sums).cpu()
        self._sums = None
        self.last_loss = float(sums[0, 0] / sums[1, 0])
        values = {"train/loss": self.last_loss}
        for column, name in enumerate(names, start=1):
            if sums[1, column] > 0:
                values[f"train/loss_{name}"] = float(sums[0, column] / sums[1, column])
        if self._gradient_norm is not None:
            values["train/gradient_norm"] = float(self._gradient_norm)
        values["train/learning_rate"] = self._learning_rate
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step - 1)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        assert isinstance(pl_module, LongLiveModule)
        if self._sums is not None:
            checkpoint["callbacks"][self.state_key]["sums"] = pl_module.sum_over_ranks(self._sums).cpu()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A checkpoint holds the sums of all ranks, however many they were.
        if self._sums is not None and not trainer.is_global_zero:
            self._sums = torch.zeros_like(self._sums)

    def state_dict(self) -> dict[str, Any]:
        """The part of the log interval that is already done, so that a resumed run logs the same means."""
        return {"sums": None if self._sums is None else self._sums.cpu(), "last_loss": self.last_loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._sums, self.last_loss = state_dict["sums"], state_dict["last_loss"]


def breakdown(loss: Tensor, errors: Tensor, timesteps: Tensor, scored: Tensor, clip_position: Tensor) -> Tensor:
    """Sums (row 0) and counts (row 1) of: the loss, errors by timestep quarter, errors by quarter of the clip.

    Args:
        loss: of this micro-batch.
        errors, timesteps, scored: `[b f]`.
        clip_position: where in the clip the frames are, `[f]` in [0, 1).
    """
    timestep_quarter = (timesteps * QUARTERS / TIMESTEP_SCALE).long().clamp(0, QUARTERS - 1)
    clip_quarter = (clip_position * QUARTERS).long().expand_as(errors)
    columns = [torch.stack([loss, torch.ones_like(loss)])[:, None]]
    columns += [sums_by(group, QUARTERS, errors, scored) for group in (timestep_quarter, clip_quarter)]
    return torch.cat(columns, dim=1)


def sums_by(
    group: Int[Tensor, "b f"], num_groups: int, errors: PerFrame, scored: Bool[Tensor, "b f"]
) -> Float[Tensor, "2 groups"]:
    """Sums (row 0) and counts (row 1) of the scored errors of each group of frames."""
    weights = scored.to(errors)
    columns = []
    for number in range(num_groups):
        inside = weights * (group == number)
        columns.append(torch.stack([(errors * inside).sum(), inside.sum()]))
    return torch.stack(columns, dim=1)
