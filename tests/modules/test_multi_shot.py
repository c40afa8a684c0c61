"""Shots in training: what a step tells of them; samples with different cuts do not mix; rollouts agree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from longlive.data.batch import VideoBatch
from longlive.models.visibility import Role
from longlive.modules.multi_shot import MultiShotModule, chunk_of_shot
from longlive.modules.teacher_forcing import TeacherForcingModule
from longlive.objectives.error_recycling import ErrorRecycling
from longlive.rollout.settings import RolloutSettings
from longlive.typing import Tensor

SHOTS = torch.tensor([[0, 1, 1], [0, 0, 1]])
PROMPTS = (
    ("a red circle", "The scene transitions. a blue square", "a blue square"),
    ("a cyan cross", "a cyan cross", "The scene transitions. a red circle"),
)


@pytest.fixture
def batch(batch: VideoBatch) -> VideoBatch:
    """Two samples with cuts at different chunks; the second one ends after 5 of 6 frames."""
    return replace(
        batch,
        prompts=PROMPTS,
        shot_index=SHOTS,
        sample_ids=torch.tensor([41, 7]),
        num_valid_frames=torch.tensor([6, 5]),
    )


def row_of(batch: VideoBatch, row: int) -> VideoBatch:
    assert batch.latents is not None
    return replace(
        batch,
        latents=batch.latents[row : row + 1],
        prompts=batch.prompts[row : row + 1],
        shot_index=batch.shot_index[row : row + 1],
        num_valid_frames=batch.num_valid_frames[row : row + 1],
        sample_ids=batch.sample_ids[row : row + 1],
    )


def full_of_errors(**changes: Any) -> ErrorRecycling:
    """Injects every kind of error whenever it can, and has some."""
    recycling = ErrorRecycling(
        **{"budget_mib": 1, "num_buckets": 3, "clean_probability": 0, "history_probability": 1}
        | {"latent_probability": 1, "noise_probability": 1}
        | changes
    )
    generator = torch.Generator().manual_seed(5)
    for index in range(12):
        recycling.buffer.append(index % 3, torch.randn(2, 2, 16, 4, 4, generator=generator))
    return recycling


def number_of_errors(recycling: ErrorRecycling) -> int:
    recycling.state_dict()  # waits for what is under way
    return len(recycling.buffer)


def test_chunks_are_counted_in_their_shot() -> None:
    shots = torch.tensor([[0, 0, 0, 0, 0], [0, 1, 2, 3, 4], [0, 0, 1, 1, 1], [0, 1, 1, 2, 2]])
    assert chunk_of_shot(shots).tolist() == [[0, 1, 2, 3, 4], [0, 0, 0, 0, 0], [0, 1, 0, 1, 2], [0, 0, 1, 0, 1]]


def test_a_step_tells_shot_and_place_of_every_frame(
    make_module: Callable[..., TeacherForcingModule], batch: VideoBatch
) -> None:
    """Per-shot losses of the wrong frames would still look like losses."""
    result = make_module(MultiShotModule).training_step(batch, 0)
    assert result["shot"].tolist() == [[0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1]]
    assert result["chunk_of_shot"].tolist() == [[0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 0, 0]]
    assert result["shot"].shape == result["frame_errors"].shape


def test_a_cut_is_heard_in_time(make_module: Callable[..., TeacherForcingModule], batch: VideoBatch) -> None:
    module = make_module(MultiShotModule)
    assert module.pieces(batch).clip_positions().tolist() == [[0, 1, 10, 11, 12, 13], [0, 1, 2, 3, 12, 13]]
    assert make_module(MultiShotModule, shot_rope_offset=0.0).pieces(batch).clip_positions()[0].tolist() == [
        0,
        1,
        2,
        3,
        4,
        5,
    ]


def test_a_batch_with_different_cuts_trains_like_its_samples_alone(
    make_module: Callable[..., TeacherForcingModule], batch: VideoBatch
) -> None:
    """Known mistake 9. Losses of all frames and gradients; with sinks, a given frame, padding and injected errors."""
    settings: dict[str, Any] = {"window": 4, "shot_sink": True, "given_frames": 1, "noise_augmentation": 0.3}

    def step(part: VideoBatch) -> tuple[dict[str, Tensor], dict[str, Tensor], ErrorRecycling]:
        module = make_module(MultiShotModule, **settings, error_recycling=full_of_errors())
        result = module.training_step(part, 0)
        result["loss"].backward()
        assert module.error_recycling is not None
        module.error_recycling.commit()
        gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
        return result, gradients, module.error_recycling

    together, gradients, recycling = step(batch)
    alone = [step(row_of(batch, row)) for row in range(2)]
    for row, (result, _, _) in enumerate(alone):
        for name in ("frame_errors", "timesteps", "scored", "shot"):
            torch.testing.assert_close(together[name][row], result[name][0], atol=1e-5, rtol=1e-5)
    numbers = [int(result["scored"].sum()) for result, _, _ in alone]
    assert numbers == [5, 4]
    loss = sum(number * result["loss"] for number, (result, _, _) in zip(numbers, alone, strict=True)) / 9
    torch.testing.assert_close(together["loss"], loss, atol=1e-5, rtol=1e-5)
    for name, gradient in gradients.items():
        expected = sum(number * g[name] for number, (_, g, _) in zip(numbers, alone, strict=True)) / 9
        torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-3, msg=name)
    # Each alone adds its chunks to the 12 errors that were there; the last one of the second sample is padded.
    assert [number_of_errors(one) for one in (recycling, *(other for _, _, other in alone))] == [17, 15, 14]


def test_injected_errors_change_the_loss_of_what_sees_them(
    make_module: Callable[..., TeacherForcingModule], batch: VideoBatch
) -> None:
    """The first chunk has no history, so an error there cannot reach it."""
    rates = {"latent_probability": 0, "noise_probability": 0}
    plain = make_module(MultiShotModule).training_step(batch, 0)["frame_errors"]
    found = make_module(MultiShotModule, error_recycling=full_of_errors(**rates)).training_step(batch, 0)[
        "frame_errors"
    ]
    difference = (found - plain).abs()
    assert difference[:, :2].max() < 1e-6
    assert difference[:, 2:].min() > 1e-4


def test_given_frames_are_clean_in_both_copies(
    make_module: Callable[..., TeacherForcingModule], batch: VideoBatch
) -> None:
    """A rollout is given them without noise, so noise on the history's copy would be one that it never sees."""
    module = make_module(given_frames=3, noise_augmentation=0.4)
    clean = module.encode(batch)
    history, targets = module.make_inputs(clean, batch, 0).latents.split(
        (len(module.chunks(batch, Role.CLEAN)) * 2, 6), 1
    )
    same = [(copy == clean[:, : copy.shape[1]]).flatten(2).all(2) for copy in (history, targets)]
    assert all(frames[:, :3].all() for frames in same)
    assert not any(frames[:, 3:].any() for frames in same)


def test_validation_injects_and_records_nothing(
    settings: dict[str, Any], batch: VideoBatch, make_trainer: Callable[..., Trainer]
) -> None:
    """Else the validation loss would move with the buffers, and they with it."""
    recycling = full_of_errors(num_buckets=3)
    losses = []
    for error_recycling in (None, recycling):
        module = MultiShotModule(**settings, error_recycling=error_recycling)
        (metrics,) = make_trainer().validate(module, DataLoader([batch], batch_size=None), verbose=False)
        losses.append(metrics["validation/loss"])
    assert losses[0] == losses[1]
    recycling.commit()
    assert number_of_errors(recycling) == 12


def test_the_rollout_cuts_as_training_does(settings: dict[str, Any]) -> None:
    module = MultiShotModule(**settings, window=4, sink_frames=2, shot_rope_offset=6.0)
    expected = RolloutSettings(chunk_frames=2, window=4, sink_frames=2, shot_rope_offset=6.0)
    assert module.rollout == expected
    assert module.rollout.rule == module.rule
    with pytest.raises(ValueError, match=r"rollout.shot_rope_offset=0.0 differs from shot_rope_offset=8.0; a rollout"):
        MultiShotModule(**settings, rollout=RolloutSettings(chunk_frames=2))
