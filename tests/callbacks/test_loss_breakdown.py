"""What is logged is the loss of the whole interval, and its parts are those of plain loops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from helpers.distributed import run_on_ranks
from helpers.runs import MemoryLogger, fake_batches, fit, tiny_module
from longlive.callbacks.loss_breakdown import LossBreakdown, breakdown

COLUMNS = 9
"""The loss, four quarters of the timesteps, four of the clip."""


class Steps(Callback):
    """What `training_step` returned, per batch, and the gradient's norm before clipping, per optimizer step."""

    def __init__(self) -> None:
        self.batches: list[dict[str, torch.Tensor]] = []
        self.norms: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        scale = trainer.accumulate_grad_batches
        self.batches.append(
            {name: value.detach() * (scale if name == "loss" else 1) for name, value in outputs.items()}
        )

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        squares = [float(p.grad.double().square().sum()) for p in pl_module.parameters() if p.grad is not None]
        self.norms.append(math.sqrt(sum(squares)))


def loops(errors: torch.Tensor, timesteps: torch.Tensor, valid: torch.Tensor) -> list[list[float]]:
    """Sums and counts of the quarters, frame by frame."""
    sums, counts = [0.0] * (COLUMNS - 1), [0] * (COLUMNS - 1)
    for row in range(errors.shape[0]):
        for frame in range(errors.shape[1]):
            if not valid[row, frame]:
                continue
            timestep = float(timesteps[row, frame])
            by_time = 0 if timestep < 250 else 1 if timestep < 500 else 2 if timestep < 750 else 3
            by_place = 4 + 4 * frame // errors.shape[1]
            for column in (by_time, by_place):
                sums[column] += float(errors[row, frame])
                counts[column] += 1
    return [sums, counts]


def positions(num_frames: int) -> torch.Tensor:
    """Of all frames of a clip."""
    return torch.arange(num_frames) / num_frames


@pytest.mark.parametrize("num_frames", [8, 12, 6, 3, 1])
def test_the_parts_equal_plain_loops(num_frames):
    generator = torch.Generator().manual_seed(num_frames)
    errors = torch.rand(5, num_frames, generator=generator)
    timesteps = torch.rand(5, num_frames, generator=generator) * 1000
    valid = torch.rand(5, num_frames, generator=generator) < 0.7
    found = breakdown(torch.tensor(2.5), errors, timesteps, valid, positions(num_frames))
    assert found[:, 0].tolist() == [2.5, 1.0]
    torch.testing.assert_close(found[:, 1:], torch.tensor(loops(errors, timesteps, valid)))
    assert found[1, 1:5].sum() == found[1, 5:].sum() == valid.sum()


def test_the_borders_of_the_quarters_are_where_they_are_said_to_be():
    """The highest timestep, 1000, would be a fifth quarter."""
    timesteps = torch.tensor([[0.0, 249.9, 250.0, 500.0, 749.9, 750.0, 999.0, 1000.0]])
    errors, valid = torch.ones(1, 8), torch.ones(1, 8, dtype=torch.bool)
    found = breakdown(torch.tensor(0.0), errors, timesteps, valid, positions(8))
    assert found[1].tolist() == [1, 2, 1, 2, 3, 2, 2, 2, 2]


class ByShot(Callback):
    """Returns with every step what a module of multi-shot clips returns: shots 0 to 11 and some chunks of them."""

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        errors, scored = outputs["frame_errors"], outputs["scored"]
        outputs["shot"] = torch.arange(errors.numel()).view_as(errors) % 12
        outputs["chunk_of_shot"] = torch.arange(errors.numel()).view_as(errors) % 2
        for row in range(errors.shape[0]):
            for frame in range(errors.shape[1]):
                if scored[row, frame]:
                    shot, chunk = int(outputs["shot"][row, frame]), int(outputs["chunk_of_shot"][row, frame])
                    for name in (f"shot_{min(shot, 7) + 1}", f"chunk_of_shot_{chunk + 1}"):
                        self.sums.setdefault(name, []).append(float(errors[row, frame]))


def test_a_module_that_tells_shots_gets_its_loss_by_shot():
    """Shots after the eighth count with it."""
    by_shot, logger = ByShot(), MemoryLogger()
    fit(tiny_module(), fake_batches(2), [by_shot, LossBreakdown(every_n_steps=2)], logger)
    ((_, values),) = logger.logged
    found = {name: value for name, value in values.items() if "shot" in name}
    assert found == {
        f"train/loss_{name}": pytest.approx(sum(errors) / len(errors)) for name, errors in by_shot.sums.items()
    }
    assert len(found) == 8 + 2


def test_padded_frames_are_in_no_part():
    """A padded frame repeats the last one: it would make the end of the clip look easy."""
    errors = torch.tensor([[1.0, 2.0, 100.0, 100.0]])
    valid = torch.tensor([[True, True, False, False]])
    found = breakdown(torch.tensor(1.5), errors, torch.full((1, 4), 600.0), valid, positions(4))
    assert found[:, 3].tolist() == [3.0, 2.0]
    assert found[:, 5:].tolist() == [[1.0, 2.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_logged_loss_is_the_mean_of_all_batches_of_the_interval(accumulate):
    """Logged is often the last micro-batch of the last step: one sample of a noisy curve, divided by the count."""
    steps, logger = Steps(), MemoryLogger()
    fit(
        tiny_module(),
        fake_batches(6 * accumulate),
        [steps, LossBreakdown(every_n_steps=2)],
        logger,
        max_steps=6,
        accumulate_grad_batches=accumulate,
    )
    logged = logger.of("train/loss")
    assert list(logged) == [1, 3, 5]
    for interval, value in enumerate(logged.values()):
        batches = steps.batches[2 * accumulate * interval : 2 * accumulate * (interval + 1)]
        losses = [float(batch["loss"]) for batch in batches]
        assert value == pytest.approx(sum(losses) / len(losses), rel=1e-6)
        for column in range(COLUMNS - 1):
            parts = [loops(batch["frame_errors"], batch["timesteps"], batch["scored"]) for batch in batches]
            total, count = (sum(part[row][column] for part in parts) for row in (0, 1))
            tag = f"train/loss_{'timestep' if column < 4 else 'clip'}_quarter_{column % 4 + 1}"
            found = logger.of(tag).get(2 * interval + 1)
            assert found == (pytest.approx(total / count, rel=1e-5) if count else None)


def test_batches_are_counted_alike_with_and_without_accumulation():
    """The loss of a step must not depend on how many batches it is divided into."""
    whole, parts = MemoryLogger(), MemoryLogger()
    batches = fake_batches(2)
    frozen = {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.0)}
    same_draws = [batches[0], batches[0]]
    fit(tiny_module(**frozen), same_draws[:1], [LossBreakdown(1)], whole)
    fit(tiny_module(**frozen), same_draws, [LossBreakdown(1)], parts, max_steps=1, accumulate_grad_batches=2)
    for tag in ("train/loss", "train/gradient_norm", "train/loss_clip_quarter_2"):
        assert parts.of(tag)[0] == pytest.approx(whole.of(tag)[0], rel=1e-6)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_gradient_norm_is_that_before_clipping(accumulate):
    """After clipping it is the clipping value, whatever happens."""
    steps, logger = Steps(), MemoryLogger()
    fit(
        tiny_module(),
        fake_batches(4 * accumulate),
        [steps, LossBreakdown(2)],
        logger,
        max_steps=4,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=1e-3,
    )
    assert len(steps.norms) == 4
    logged = logger.of("train/gradient_norm")
    assert logged == {1: pytest.approx(steps.norms[1], rel=1e-5), 3: pytest.approx(steps.norms[3], rel=1e-5)}
    assert min(logged.values()) > 0.01


def test_the_learning_rate_of_the_step_is_logged():
    """When a batch has ended, the schedule already holds the rate of the next step."""
    logger = MemoryLogger()
    module = tiny_module(
        learning_rate=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    )
    fit(module, fake_batches(3), [LossBreakdown(1)], logger)
    assert logger.of("train/learning_rate") == pytest.approx({0: 0.1, 1: 0.05, 2: 0.025})


def test_padding_leaves_the_logged_quarters_without_value():
    """A mean over nothing is NaN, and a NaN in a curve looks like a diverged run."""
    batches = fake_batches(1)
    padded = [type(batch)(**vars(batch) | {"num_valid_frames": torch.tensor([4, 4])}) for batch in batches]
    logger = MemoryLogger()
    fit(tiny_module(), padded, [LossBreakdown(1)], logger)
    ((_, values),) = logger.logged
    assert {"train/loss_clip_quarter_1", "train/loss_clip_quarter_2"} <= values.keys()
    assert not {"train/loss_clip_quarter_3", "train/loss_clip_quarter_4"} & values.keys()
    assert all(math.isfinite(value) for value in values.values())


def test_a_run_resumed_inside_an_interval_logs_the_mean_of_the_whole_interval(tmp_path):
    """Forgetting the part before the checkpoint, the first point after every kill is off the curve."""
    batches, whole, resumed = fake_batches(6), MemoryLogger(), MemoryLogger()
    fit(tiny_module(), batches, [LossBreakdown(3)], whole)
    fit(tiny_module(), batches[:4], [LossBreakdown(3)]).save_checkpoint(tmp_path / "4.ckpt")
    breakdown_resumed = LossBreakdown(3)
    fit(tiny_module(), batches[4:], [breakdown_resumed], resumed, checkpoint=tmp_path / "4.ckpt", max_steps=6)
    assert resumed.logged == whole.logged[1:]
    assert breakdown_resumed.last_loss == whole.of("train/loss")[5]


def _interrupted(loaded: dict[str, Any] | None) -> tuple[dict[str, Any], list[list[float]]]:
    """A batch inside an interval, with another loss on every rank: what is saved then, and what the ranks sum up to."""
    rank = dist.get_rank()
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    type(trainer.strategy).is_global_zero = property(lambda self: rank == 0)
    module, callback = tiny_module(), LossBreakdown(100)
    if loaded is not None:
        callback.load_state_dict(loaded)
        callback.on_train_start(trainer, module)
    batch = torch.tensor([[1.0 + rank] * COLUMNS, [1.0] * COLUMNS])
    callback._sums = batch if callback._sums is None else callback._sums + batch
    checkpoint = {"callbacks": {callback.state_key: callback.state_dict()}}
    callback.on_save_checkpoint(trainer, module, checkpoint)
    return checkpoint["callbacks"][callback.state_key], module.sum_over_ranks(callback._sums).tolist()


def test_sums_of_all_ranks_are_saved_and_continued_by_any_number_of_ranks():
    """Rank 0's sums alone, given to every rank of the next start, count its part of the clip as often as there are
    ranks, and the others' not at all."""
    saved = run_on_ranks(_interrupted, 4, None)[0][0]
    assert saved["sums"].tolist() == [[1 + 2 + 3 + 4] * COLUMNS, [4] * COLUMNS]
    for num_ranks in (1, 2):
        for state, sums in run_on_ranks(_interrupted, num_ranks, saved):
            assert sums == [[10 + sum(range(1, num_ranks + 1))] * COLUMNS, [4 + num_ranks] * COLUMNS]
            assert state["sums"].tolist() == sums
