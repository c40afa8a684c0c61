"""Made-up curves that break each rule and none, warned of once, and the same after a resume."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.runs import MemoryLogger, fake_batches, fit, tiny_module
from longlive.callbacks.distillation_health import DistillationHealth
from longlive.data.batch import VideoBatch
from longlive.modules.teacher_forcing import TeacherForcingModule

STUDENT_EVERY = 2
# Per step: the critic's error, the teacher's (in the student's turns), the spread between samples.
CURVES = {
    "healthy": [(1.0, 1.0, 4.0)] * 4 + [(0.6, 1.0, 3.0)] * 8,
    "critic": [(1.0, 1.0, 4.0)] * 4 + [(1.3, 1.0, 4.0)] * 8,
    "diversity": [(1.0, 1.0, 4.0)] * 4 + [(0.6, 1.0, 1.9)] * 8,
    "recovers": [(1.3, 1.0, 4.0)] * 4 + [(0.6, 1.0, 4.0)] * 4 + [(1.2, 1.0, 4.0)] * 4,
}
WARNINGS = {
    "healthy": [],
    "critic": ["does not track the student: its error on the student's videos is 1.30 of the teacher's"],
    "diversity": ["the videos of a batch differ 0.47 times as much as at first (rule: at least 0.5)"],
    "recovers": ["is 1.30 of the teacher's", "is 1.20 of the teacher's"],
}


class Curves(TeacherForcingModule):
    """Learns nothing and says what it is told to."""

    rows: list[tuple[float, float, float]]

    def training_step(self, batch: VideoBatch, batch_index: int) -> dict[str, Any]:
        step = self.global_step
        critic, teacher, spread = self.rows[step]
        values = {"critic/diversity": spread, "critic/loss": 7.0}
        if step % STUDENT_EVERY == 0:
            values |= {"student/critic_error": critic, "student/teacher_error": teacher}
        loss: Tensor = sum(p.sum() for p in self.parameters() if p.requires_grad) * torch.zeros(())
        return {"loss": loss, "values": values}


def run(name: str, first: int = 0, last: int = 12, **settings: Any) -> tuple[Any, MemoryLogger]:
    module: Any = tiny_module(Curves)
    module.rows = CURVES[name]
    logger = MemoryLogger()
    callbacks = [DistillationHealth(every_n_steps=4)]
    return fit(module, fake_batches(last - first), callbacks, logger=logger, max_steps=last, **settings), logger


@pytest.mark.parametrize("name", CURVES)
def test_a_broken_rule_is_warned_of_once_and_a_healthy_run_not(name: str, caplog: Any) -> None:
    with caplog.at_level(logging.WARNING, logger="longlive.callbacks.distillation_health"):
        _, logger = run(name)
    told = [record.getMessage() for record in caplog.records if "distillation health" in record.getMessage()]
    assert len(told) == len(WARNINGS[name])
    for message, expected in zip(told, WARNINGS[name], strict=True):
        assert expected in message
    last = CURVES[name][-1]
    assert logger.of("health/critic_error")[11] == pytest.approx(last[0] / last[1])
    assert logger.of("health/diversity")[11] == pytest.approx(last[2] / 4.0)


def test_a_resumed_run_remembers_the_first_spread_and_what_it_warned_of(tmp_path: Any, caplog: Any) -> None:
    """From the middle of an interval: a spread taken anew would call a collapsed run healthy."""
    with caplog.at_level(logging.WARNING, logger="longlive.callbacks.distillation_health"):
        trainer, _ = run("diversity", 0, 9)
        trainer.save_checkpoint(tmp_path / "run.ckpt")
        assert len(caplog.records) == 1
        _, logger = run("diversity", 9, 12, checkpoint=tmp_path / "run.ckpt", max_epochs=5)
    assert logger.of("health/diversity") == {11: pytest.approx(1.9 / 4.0)}
    assert logger.of("health/critic_error") == {11: pytest.approx(0.6)}
    assert len(caplog.records) == 1


def test_settings_out_of_range_are_refused() -> None:
    for settings, message in (
        ({"every_n_steps": 0}, "every_n_steps=0 must be positive"),
        ({"max_critic_error": 0.0}, r"max_critic_error=0\.0 must be positive"),
        ({"min_diversity": 1.0}, r"min_diversity=1\.0 must be above 0 and below 1"),
    ):
        with pytest.raises(ValueError, match=message):
            DistillationHealth(**settings)
