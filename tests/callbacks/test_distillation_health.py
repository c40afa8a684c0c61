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
    "diversity": ["the videos of a step differ 0.47 times as much as at first (rule: at least 0.5)"],
    "recovers": ["is 1.30 of the teacher's", "is 1.20 of the teacher's"],
}


class Curves(TeacherForcingModule):
    """Learns nothing and says what it is told to, as so many ranks do."""

    rows: list[tuple[float, float, float]]
    num_ranks = 1

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        return self.num_ranks * values

    def training_step(self, batch: VideoBatch, batch_index: int) -> dict[str, Any]:
        step = self.global_step
        critic, teacher, spread = self.rows[step]
        values = {"critic/diversity": spread, "critic/loss": 7.0} if spread else {"critic/loss": 7.0}
        if step % STUDENT_EVERY == 0:
            values |= {"student/critic_error": critic, "student/teacher_error": teacher}
        loss: Tensor = sum(p.sum() for p in self.parameters() if p.requires_grad) * torch.zeros(())
        return {"loss": loss, "values": values}


def run(
    name: str, first: int = 0, last: int = 12, num_ranks: int = 1, every_n_steps: int = 4, **settings: Any
) -> tuple[Any, MemoryLogger]:
    module: Any = tiny_module(Curves)
    module.rows, module.num_ranks = CURVES[name], num_ranks
    logger = MemoryLogger()
    callbacks = [DistillationHealth(every_n_steps=every_n_steps)]
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


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("healthy", {"num_ranks": 4}, {}),
        ("diversity", {}, {"num_ranks": 4}),
        ("healthy", {}, {"every_n_steps": 2}),
        ("diversity", {"every_n_steps": 2}, {}),
    ],
    ids=["fewer ranks", "more ranks", "shorter intervals", "longer intervals"],
)
@pytest.mark.parametrize("stop", [8, 10])
def test_spreads_compare_whatever_they_were_taken_over(
    tmp_path: Any, caplog: Any, name: str, before: dict[str, int], after: dict[str, int], stop: int
) -> None:
    """Sums would call a healthy run on fewer ranks collapsed, and a collapsed one on more of them healthy."""
    with caplog.at_level(logging.WARNING, logger="longlive.callbacks.distillation_health"):
        run(name, 0, stop, **before)[0].save_checkpoint(tmp_path / "run.ckpt")
        _, logger = run(name, stop, 12, checkpoint=tmp_path / "run.ckpt", max_epochs=5, **after)
    assert logger.of("health/diversity")[11] == pytest.approx(CURVES[name][-1][2] / 4.0)
    assert len(caplog.records) == (name == "diversity")


def test_one_video_in_a_step_is_said_once_to_be_watched_by_nobody(caplog: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CURVES, "alone", [(0.6, 1.0, 0.0)] * 12)
    with caplog.at_level(logging.WARNING, logger="longlive.callbacks.distillation_health"):
        _, logger = run("alone")
    (record,) = caplog.records
    assert "samples that collapse (min_diversity) are not noticed; use data.batch_size=2" in record.getMessage()
    assert not logger.of("health/diversity")
    assert logger.of("health/critic_error")[11] == pytest.approx(0.6)


def test_settings_out_of_range_are_refused() -> None:
    for settings, message in (
        ({"every_n_steps": 0}, "every_n_steps=0 must be positive"),
        ({"max_critic_error": 0.0}, r"max_critic_error=0\.0 must be positive"),
        ({"min_diversity": 1.0}, r"min_diversity=1\.0 must be above 0 and below 1"),
    ):
        with pytest.raises(ValueError, match=message):
            DistillationHealth(**settings)
