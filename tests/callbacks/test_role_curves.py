"""Means over the steps that had a value, also over those of a run that was resumed inside an interval."""

from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.runs import MemoryLogger, fake_batches, fit, tiny_module
from longlive.callbacks.role_curves import RoleCurves
from longlive.data.batch import VideoBatch
from longlive.modules.teacher_forcing import TeacherForcingModule


class TwoRoles(TeacherForcingModule):
    """One learns in every step, the other in every third."""

    def training_step(self, batch: VideoBatch, batch_index: int) -> dict[str, Any]:
        step = self.global_step
        values = {"critic/loss": float(step)} | ({"student/loss": 100.0 + step} if step % 3 == 0 else {})
        loss: Tensor = sum(p.sum() for p in self.parameters() if p.requires_grad) * torch.zeros(())
        return {"loss": loss, "values": values}


def test_a_value_is_averaged_over_the_steps_that_have_it() -> None:
    """Logged at the interval's last step alone, the student's curve would have no point at all."""
    logger = MemoryLogger()
    fit(tiny_module(TwoRoles), fake_batches(8), callbacks=[RoleCurves(every_n_steps=4)], logger=logger)
    assert logger.of("critic/loss") == {3: 1.5, 7: 5.5}
    assert logger.of("student/loss") == {3: 101.5, 7: 106.0}


def test_a_run_resumed_inside_an_interval_logs_the_same(tmp_path: Any) -> None:
    batches = fake_batches(4)
    trainer = fit(tiny_module(TwoRoles), batches[:2], callbacks=[RoleCurves(every_n_steps=4)])
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    logger = MemoryLogger()
    fit(
        tiny_module(TwoRoles),
        batches[2:],
        callbacks=[RoleCurves(every_n_steps=4)],
        logger=logger,
        checkpoint=tmp_path / "run.ckpt",
        max_steps=4,
    )
    assert logger.of("critic/loss") == {3: 1.5}
    assert logger.of("student/loss") == {3: 101.5}


def test_an_interval_has_a_step() -> None:
    with pytest.raises(ValueError, match="every_n_steps=0"):
        RoleCurves(every_n_steps=0)
