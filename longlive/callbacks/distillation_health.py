"""Warnings of a distillation that goes wrong in one of two ways that its losses do not show.

**The critic does not track the student.** The student's gradient is the difference of two clean predictions, the
critic's and the teacher's, and means something only as long as the critic knows what the student makes. Both predict
the same noisy rollouts in every turn of the student, so their errors compare: the critic starts as the teacher, at a
ratio of 1, and has to get below it.

    warned if   sum |x - x_f|^2 / sum |x - x_r|^2  >  max_critic_error         x_r without guidance

**Samples collapse.** A student that makes the same for every prompt and seed has a small loss too. The spread between
the videos of a step, on all ranks (`objectives.diversity`), is compared to what it was at first:

    warned if   mean spread  <  min_diversity * mean spread in the first interval

A step has different prompts, so a student that makes one video per prompt is not noticed. Where it has one video alone,
there is nothing to compare, which is said once.

Sums, and the mean, run over the steps of an interval and over ranks. Both numbers are curves, `health/critic_error` and
`health/diversity`; a warning comes when a rule begins to be broken, not in every interval.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from longlive.modules.base import LongLiveModule

log = logging.getLogger(__name__)

CRITIC_ERROR, TEACHER_ERROR, DIVERSITY = "student/critic_error", "student/teacher_error", "critic/diversity"
"""What a step's result says under `values`."""

ALONE = (
    "a step makes one video, so samples that collapse (min_diversity) are not noticed; use data.batch_size=2, or "
    "several data ranks"
)


class DistillationHealth(Callback):
    """Compares critic with teacher, and samples with each other.

    Args:
        every_n_steps: steps per interval; it should hold several turns of the student.
        max_critic_error: the critic's error relative to the teacher's.
        min_diversity: share of the first interval's spread.

    Raises:
        ValueError: for a setting that is not positive.
    """

    def __init__(self, every_n_steps: int = 100, max_critic_error: float = 1.0, min_diversity: float = 0.5) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("max_critic_error", max_critic_error)):
            if value <= 0:
                raise ValueError(f"{name}={value} must be positive")
        if not 0 < min_diversity < 1:
            raise ValueError(f"min_diversity={min_diversity} must be above 0 and below 1: a share of the first spread")
        self.every_n_steps = every_n_steps
        self.max_critic_error = max_critic_error
        self.min_diversity = min_diversity
        self._sums = dict.fromkeys((CRITIC_ERROR, TEACHER_ERROR, DIVERSITY), 0.0)
        self._diverse_steps = 0
        self._first_diversity: float | None = None
        self._broken: set[str] = set()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, LongLiveModule)
        values = outputs["values"]
        for name in self._sums:
            self._sums[name] += values.get(name, 0.0)
        self._diverse_steps += DIVERSITY in values
        self._tell("alone", DIVERSITY not in values, ALONE)
        if trainer.global_step % self.every_n_steps:
            return
        sums = torch.tensor([*self._sums.values(), self._diverse_steps], dtype=torch.float64, device=pl_module.device)
        critic, teacher, diversity, diverse_steps = pl_module.sum_over_ranks(sums).tolist()
        self._sums, self._diverse_steps = dict.fromkeys(self._sums, 0.0), 0
        curves = {}
        if teacher:
            curves["health/critic_error"] = critic / teacher
            self._tell(
                "critic",
                critic > self.max_critic_error * teacher,
                f"the critic does not track the student: its error on the student's videos is {critic / teacher:.2f} "
                f"of the teacher's (rule: at most {self.max_critic_error:g}). Give it more steps "
                "(module.student_every), a higher rate (module.critic_optimizer.lr), or the student a lower one",
            )
        if diversity and self._first_diversity is None:
            self._first_diversity = diversity / diverse_steps
        if diverse_steps and self._first_diversity is not None:
            share = curves["health/diversity"] = diversity / diverse_steps / self._first_diversity
            self._tell(
                "diversity",
                share < self.min_diversity,
                f"samples collapse: the videos of a step differ {share:.2f} times as much as at first (rule: at least "
                f"{self.min_diversity:g}). Look at callbacks.samples; continue from an earlier checkpoint with a lower "
                "optimizer.lr or module.guidance",
            )
        for logger in trainer.loggers:
            logger.log_metrics(curves, step=trainer.global_step - 1)

    def _tell(self, rule: str, is_broken: bool, what: str) -> None:
        if is_broken and rule not in self._broken:
            rank_zero_only(log.warning)("distillation health: %s", what)
        self._broken = self._broken | {rule} if is_broken else self._broken - {rule}

    def state_dict(self) -> dict[str, Any]:
        """With the part of the interval that is already done: rank 0's."""
        return {
            "sums": dict(self._sums),
            "diverse_steps": self._diverse_steps,
            "first_diversity": self._first_diversity,
            "broken": sorted(self._broken),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._broken = set(state_dict["broken"])
        # Older checkpoints have sums alone, of which nobody knows over how much: they begin anew.
        if "diverse_steps" in state_dict:
            self._sums, self._diverse_steps = dict(state_dict["sums"]), state_dict["diverse_steps"]
            self._first_diversity = state_dict["first_diversity"]
