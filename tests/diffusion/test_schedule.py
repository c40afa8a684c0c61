"""The shifted schedule, its weights and its rollout grid."""

import math

import pytest
import torch

from longlive.diffusion.schedule import FlowSchedule


def test_sigmas_of_a_small_grid_are_the_shifted_uniform_grid() -> None:
    schedule = FlowSchedule(num_steps=4, shift=3.0)
    expected = torch.tensor([1.0, 2.25 / 2.5, 1.5 / 2.0, 0.75 / 1.5])
    torch.testing.assert_close(schedule.sigmas, expected)
    torch.testing.assert_close(schedule.timesteps, 1000 * expected)


def test_a_shift_of_one_leaves_the_grid_uniform() -> None:
    torch.testing.assert_close(FlowSchedule(5, shift=1.0).sigmas, torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2]))


def test_default_grid_is_wans() -> None:
    schedule = FlowSchedule()
    assert schedule.sigmas.shape == (1000,)
    assert schedule.sigmas.dtype == torch.float32
    assert schedule.sigmas[0] == 1
    assert schedule.sigmas[-1].item() == pytest.approx(5 * 0.001 / (1 + 4 * 0.001), rel=1e-6)
    assert (schedule.sigmas.diff() < 0).all()


def test_loss_weights_follow_the_formula_and_have_mean_one() -> None:
    schedule = FlowSchedule()
    raw = [math.exp(-2 * ((t - 500) / 1000) ** 2) for t in schedule.timesteps.double().tolist()]
    shifted = [weight - min(raw) for weight in raw]
    expected = torch.tensor([weight * len(raw) / sum(shifted) for weight in shifted])
    torch.testing.assert_close(schedule.loss_weights, expected, rtol=1e-5, atol=1e-6)
    assert schedule.loss_weights.mean().item() == pytest.approx(1, abs=1e-6)
    assert schedule.loss_weights.min() == 0


def test_lookups_keep_the_shape_of_the_indices() -> None:
    schedule = FlowSchedule()
    index = torch.tensor([[0, 999], [500, 7]])
    assert torch.equal(schedule.sigma(index), schedule.sigmas[index])
    assert torch.equal(schedule.timestep(index), schedule.timesteps[index])
    assert torch.equal(schedule.loss_weight(index), schedule.loss_weights[index])


def test_rollout_grid_lies_on_the_training_curve_and_ends_at_zero() -> None:
    """Catches a rollout that meets noise levels that training never drew (another shift, a grid that stops early)."""
    schedule = FlowSchedule()
    torch.testing.assert_close(schedule.rollout_sigmas(4), torch.tensor([1.0, 0.9375, 5 / 6, 0.625, 0.0]))
    torch.testing.assert_close(schedule.rollout_sigmas(1000)[:-1], schedule.sigmas)
    torch.testing.assert_close(schedule.rollout_sigmas(50)[:-1], schedule.sigmas[::20])


@pytest.mark.parametrize(("num_steps", "shift"), [(1, 5.0), (0, 5.0), (1000, 0.0), (1000, -1.0), (1000, math.nan)])
def test_a_grid_that_cannot_be_made_is_refused(num_steps: int, shift: float) -> None:
    with pytest.raises(ValueError, match="use"):
        FlowSchedule(num_steps, shift)


def test_a_rollout_without_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="num_steps=0"):
        FlowSchedule().rollout_sigmas(0)


def test_uniform_weights_are_one_and_leave_the_noise_levels_alone():
    bell, uniform = FlowSchedule(shift=3.0), FlowSchedule(shift=3.0, weighting="uniform")
    assert torch.equal(uniform.loss_weights, torch.ones(1000))
    assert torch.equal(uniform.sigmas, bell.sigmas)
    assert not torch.equal(uniform.loss_weights, bell.loss_weights)
    with pytest.raises(ValueError, match="weighting='none' is unknown; use bell or uniform"):
        FlowSchedule(weighting="none")
