"""A number that is none never reaches the weights or a checkpoint, and the samples that made it are named."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.distributed import run_on_ranks
from helpers.runs import assert_same, fake_batches, fit, tiny_module
from longlive.callbacks.checkpoint import RunCheckpoint
from longlive.callbacks.non_finite import NON_FINITE, StopOnNonFinite
from longlive.modules.teacher_forcing import TeacherForcingModule
from longlive.objectives.finite import NonFiniteError
from longlive.parallel.checkpoint import load_checkpoint
from longlive.parallel.strategy import BalancedSPStrategy
from longlive.typing import Tensor

BAD_STEP = 2


class BadLoss(TeacherForcingModule):
    """Its loss is NaN in the first batch of a step, of one rank alone."""

    has_been_bad = False

    def frame_losses(self, prediction: Any, inputs: Any) -> Tensor:
        losses = super().frame_losses(prediction, inputs)
        rank = self.trainer.world_size - 1
        if self.global_step == BAD_STEP and self.global_rank == rank and not self.has_been_bad:
            self.has_been_bad = True
            return losses * math.nan
        return losses


class BadGradient(TeacherForcingModule):
    """Its loss is finite, and one value of its gradient is not."""

    def on_after_backward(self) -> None:
        if self.global_step == BAD_STEP:
            gradient = next(p.grad for p in self.parameters() if p.grad is not None)
            gradient.view(-1)[0] = math.inf


def run(directory: Path, module: TeacherForcingModule, accumulate: int = 1, **settings: Any) -> str:
    """Fails; the message. What samples are called depends on the batch."""
    batches = fake_batches(4 * accumulate)
    for number, batch in enumerate(batches):
        batch.sample_ids.add_(10 * number)
    name = {"filename": "step-{step:07d}", "auto_insert_metric_name": False}
    saving = RunCheckpoint(dirpath=directory / "checkpoints", every_n_train_steps=1, **name)
    guard = StopOnNonFinite(str(directory))
    more = {"max_steps": 4, "accumulate_grad_batches": accumulate, "enable_checkpointing": True, "gradient_clip_val": 1}
    with pytest.raises(NonFiniteError) as error:
        fit(module, batches, [guard, saving], **more | settings)
    return str(error.value)


def dumped(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / NON_FINITE).read_text())
    return found


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loss_that_is_none_ends_the_run_before_the_weights_change(tmp_path, accumulate):
    """After a step with it, all weights are NaN, and so is the checkpoint that replaces a good one."""
    module = tiny_module(BadLoss)
    message = run(tmp_path, module, accumulate)
    first = 10 * BAD_STEP * accumulate
    assert f"step 2: the loss is nan (rank 0), so the step is not taken. Samples: {first}, {first + 1}." in message
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-0000002.ckpt"]
    last = load_checkpoint(tmp_path / "checkpoints" / "step-0000002.ckpt")["state_dict"]
    assert_same(dict(module.state_dict()), dict(last))
    assert all(value.isfinite().all() for value in last.values())
    found = dumped(tmp_path)
    assert (found["step"], found["message"], found["gradient_norm"]) == (BAD_STEP, message, "nan")
    ids = [batch["sample_ids"] for batch in found["micro_batches"]]
    assert ids == [[first + 10 * number, first + 10 * number + 1] for number in range(accumulate)]
    losses = [float(batch["loss"]) for batch in found["micro_batches"]]
    assert [math.isnan(loss) for loss in losses] == [True, False][:accumulate]


def test_a_gradient_that_is_none_ends_it_too(tmp_path):
    """Clipping by its norm would make zeros of an infinite gradient, and NaN of the infinite value."""
    module = tiny_module(BadGradient)
    message = run(tmp_path, module)
    assert "step 2: the gradient's norm is inf, so the step is not taken. Samples: 20, 21." in message
    last = load_checkpoint(tmp_path / "checkpoints" / "step-0000002.ckpt")["state_dict"]
    assert_same(dict(module.state_dict()), dict(last))
    assert float(dumped(tmp_path)["micro_batches"][0]["loss"]) > 0


def _on_a_rank(directory: Path) -> str:
    strategy = BalancedSPStrategy(process_group_backend="gloo")
    return run(directory, tiny_module(BadLoss), strategy=strategy, devices=2)


def test_all_ranks_stop_for_what_one_has_and_all_samples_are_listed(tmp_path):
    """The others would wait for it in the next collective, for half an hour."""
    messages = run_on_ranks(_on_a_rank, 2, tmp_path, init_process_group=False)
    assert messages[0] == messages[1]
    assert "the loss is nan (rank 1)" in messages[0]
    assert [(batch["rank"], batch["sample_ids"]) for batch in dumped(tmp_path)["micro_batches"]] == [
        (0, [20, 21]),
        (1, [20, 21]),
    ]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-0000002.ckpt"]


class FindsItItself(TeacherForcingModule):
    """As modules that step by hand do."""

    def training_step(self, batch: Any, batch_index: int) -> Any:
        if self.global_step == BAD_STEP:
            raise NonFiniteError("critic: the loss is not finite")
        return super().training_step(batch, batch_index)


def test_what_a_module_finds_itself_is_written_too(tmp_path):
    assert run(tmp_path, tiny_module(FindsItItself)) == "critic: the loss is not finite"
    found = dumped(tmp_path)
    assert found["message"] == "critic: the loss is not finite"
    assert [batch["sample_ids"] for batch in found["micro_batches"]] == [[20, 21]]


def test_finite_numbers_pass(tmp_path):
    trainer = fit(tiny_module(), fake_batches(2), [StopOnNonFinite(str(tmp_path))])
    assert trainer.global_step == 2
    assert list(tmp_path.iterdir()) == []
    assert torch.cat([p.flatten() for p in trainer.lightning_module.parameters()]).isfinite().all()
