"""The loss against its formula in float64, and the promises about draws: known by name, whoever makes them."""

import math
from typing import Any

import pytest
import torch

from longlive.diffusion.schedule import FlowSchedule
from longlive.objectives.teacher_forcing import (
    Draws,
    TeacherForcingInputs,
    draw,
    frame_errors,
    frames_of_chunks,
    make_inputs,
    weighted_loss,
)
from longlive.typing import Tensor

SCHEDULE = FlowSchedule(num_steps=100, shift=3.0)
CHUNK = 2
SHAPE = (2, 8, 3, 4, 5)
IDS = [70, 3]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def drawn(shape: tuple[int, ...] = SHAPE, **changes: Any) -> Draws:
    chunks = range(shape[1] // CHUNK)
    arguments: dict[str, Any] = {
        **{"seed": 5, "step": 9, "sample_ids": IDS, "history": chunks, "targets": chunks, "noise_augmentation": 0.5}
    }
    return draw(shape[2:], CHUNK, SCHEDULE, **(arguments | changes))


def inputs_of(clean: Tensor, draws: Draws, **changes: Any) -> TeacherForcingInputs:
    """One rank: the same frames as history and as targets."""
    return make_inputs(clean, clean, draws, SCHEDULE, CHUNK, **changes)


def valid_frames(lengths: tuple[int, ...]) -> Tensor:
    return torch.arange(SHAPE[1]) < torch.tensor(lengths)[:, None]


def tensors(draws: Draws) -> dict[str, Tensor]:
    return {name: value for name, value in vars(draws).items() if value is not None}


def test_the_loss_is_its_formula() -> None:
    """Random velocities, weights and lengths; in float64, frame by frame, as the module docstring writes it."""
    prediction, target, clean = randn(*SHAPE), randn(*SHAPE, seed=1), randn(*SHAPE, seed=2)
    draws = drawn()
    inputs = inputs_of(clean, draws)
    valid = valid_frames((8, 3))
    loss = weighted_loss(frame_errors(prediction, target), inputs.loss_weights, valid, valid.sum().float())

    grid = [1 - step / 100 for step in range(100)]
    timesteps = [1000 * 3 * u / (1 + 2 * u) for u in grid]
    bells = [math.exp(-2 * ((t - 500) / 1000) ** 2) for t in timesteps]
    mean_bell = sum(bell - min(bells) for bell in bells) / 100
    total = 0.0
    for sample, frames in enumerate((8, 3)):
        for frame in range(frames):
            index = int(draws.grid_index[sample, frame // 2])
            difference = prediction[sample, frame].double() - target[sample, frame].double()
            weight = (bells[index] - min(bells)) / mean_bell
            total += weight * float((difference**2).sum()) / (3 * 4 * 5)
    assert float(loss) == pytest.approx(total / 11, rel=1e-5)


def test_the_noisy_copy_lies_between_latents_and_noise_at_its_sigma() -> None:
    clean, draws = randn(*SHAPE), drawn(noise_augmentation=0.0)
    inputs = inputs_of(clean, draws)
    assert inputs.latents.shape == (2, 16, 3, 4, 5)
    assert torch.equal(inputs.latents[:, :8], clean)
    for sample in range(2):
        for frame in range(8):
            u = 1 - int(draws.grid_index[sample, frame // 2]) / 100
            sigma = 3 * u / (1 + 2 * u)
            x0, noise = clean[sample, frame].double(), draws.noise[sample, frame].double()
            expected = (1 - sigma) * x0 + sigma * noise
            torch.testing.assert_close(inputs.latents[sample, 8 + frame].double(), expected, atol=1e-6, rtol=0)
            torch.testing.assert_close(inputs.target[sample, frame].double(), noise - x0, atol=1e-6, rtol=0)
            assert float(inputs.timesteps[sample, 8 + frame]) == pytest.approx(1000 * sigma, rel=1e-6)


def test_the_clean_copy_has_timestep_zero_and_a_chunk_shares_one() -> None:
    """One timestep for a whole clip, or one per frame, would train on what no rollout ever shows."""
    inputs = inputs_of(randn(*SHAPE), drawn())
    assert (inputs.timesteps[:, :8] == 0).all()
    noisy = inputs.target_timesteps
    assert torch.equal(noisy, inputs.timesteps[:, 8:])
    assert torch.equal(noisy[:, 0::2], noisy[:, 1::2])
    assert len(noisy[:, ::2].unique()) == 8
    assert torch.equal(inputs.loss_weights[:, 0::2], inputs.loss_weights[:, 1::2])


def test_noise_augmentation_mixes_noise_into_the_history_and_does_not_tell() -> None:
    clean, draws = randn(*SHAPE), drawn()
    inputs = inputs_of(clean, draws)
    assert draws.history_noise is not None
    assert draws.history_sigma is not None
    sigma = draws.history_sigma.repeat_interleave(2, dim=1)[:, :, None, None, None]
    torch.testing.assert_close(inputs.latents[:, :8], (1 - sigma) * clean + sigma * draws.history_noise)
    assert (inputs.timesteps[:, :8] == 0).all()
    torch.testing.assert_close(inputs.target, draws.noise - clean)
    without = inputs_of(clean, drawn(noise_augmentation=0.0))
    assert torch.equal(inputs.latents[:, 8:], without.latents[:, 8:])


def test_noise_augmentation_is_uniform_up_to_its_bound() -> None:
    shares = [drawn((2, 40, 1, 1, 1), noise_augmentation=0.3, step=step).history_sigma for step in range(20)]
    share = torch.cat([value for value in shares if value is not None]).flatten()
    assert len(share) == 800
    assert float(share.min()) >= 0
    assert float(share.max()) < 0.3
    counts = torch.histc(share, bins=6, min=0, max=0.3)
    assert float(((counts - 800 / 6) ** 2 / (800 / 6)).sum()) < 20.5, "chi-square, 5 degrees, p = 0.001"


def test_without_noise_augmentation_nothing_is_drawn_for_the_history() -> None:
    draws = drawn(noise_augmentation=0.0)
    assert draws.history_noise is None
    assert draws.history_sigma is None


@pytest.mark.parametrize(
    "change",
    [{"seed": 6}, {"step": 10}, {"sample_ids": [71, 4]}, {"history": range(4, 8), "targets": range(4, 8)}],
    ids=str,
)
def test_every_part_of_the_name_changes_every_draw(change: dict[str, Any]) -> None:
    for name, value in tensors(drawn()).items():
        other = tensors(drawn(**change))[name]
        assert (value != other).float().mean() > 0.7, name


def test_the_draws_of_a_step_are_not_copies_of_each_other() -> None:
    """Noise that repeats from chunk to chunk, or is the history's too, can be read off by the network."""
    draws = drawn()
    assert draws.history_noise is not None
    chunks = torch.cat([draws.noise, draws.history_noise]).unflatten(1, (4, 2)).flatten(0, 1).flatten(1)
    similarity = torch.corrcoef(chunks) - torch.eye(len(chunks))
    assert len(chunks) == 16
    assert similarity.abs().max() < 0.5
    assert abs(float(chunks.mean())) < 0.1
    assert float(chunks.std()) == pytest.approx(1, abs=0.1)


def test_a_batch_of_two_draws_what_its_two_batches_of_one_draw() -> None:
    """Numbers that depend on the batch would change with the number of ranks, and on resume."""
    for row in range(2):
        alone = tensors(drawn((1, *SHAPE[1:]), sample_ids=IDS[row : row + 1]))
        for name, value in tensors(drawn()).items():
            assert torch.equal(value[row : row + 1], alone[name]), name


def test_a_rank_that_owns_the_second_half_draws_the_second_half() -> None:
    whole, half = tensors(drawn()), tensors(drawn(history=(2, 3), targets=(2, 3)))
    for name, value in whole.items():
        assert torch.equal(value[:, value.shape[1] // 2 :], half[name]), name


def test_a_rank_may_hold_history_alone_or_targets_alone() -> None:
    """As under the contiguous split."""
    clean = randn(*SHAPE)
    history = make_inputs(clean, clean[:, :0], drawn(targets=()), SCHEDULE, CHUNK)
    targets = make_inputs(clean[:, :0], clean, drawn(history=()), SCHEDULE, CHUNK)
    both = inputs_of(clean, drawn())
    assert torch.equal(torch.cat([history.latents, targets.latents], dim=1), both.latents)
    assert torch.equal(torch.cat([history.timesteps, targets.timesteps], dim=1), both.timesteps)
    assert history.target.shape[1] == 0
    assert torch.equal(targets.target, both.target)


def test_the_global_generator_is_neither_read_nor_moved() -> None:
    torch.manual_seed(0)
    first = tensors(drawn())
    torch.manual_seed(1)
    before = torch.get_rng_state()
    for name, value in tensors(drawn()).items():
        assert torch.equal(value, first[name]), name
    assert torch.equal(torch.get_rng_state(), before)


def test_torchs_default_dtype_does_not_change_the_draws() -> None:
    """As Lightning's true half precision does during a step."""
    first = tensors(drawn())
    torch.set_default_dtype(torch.bfloat16)
    try:
        second = tensors(drawn())
    finally:
        torch.set_default_dtype(torch.float32)
    for name, value in second.items():
        assert value.dtype == first[name].dtype, name
        assert torch.equal(value, first[name]), name


def test_the_grid_index_is_uniform() -> None:
    """Drawn uniformly in index, so that the shift, and nothing else, decides which noise levels are common."""
    index = torch.cat([drawn((2, 40, 1, 1, 1), step=step).grid_index for step in range(50)]).flatten()
    assert len(index) == 2000
    assert int(index.min()) == 0
    assert int(index.max()) == 99
    counts = torch.bincount(index // 10, minlength=10)
    assert float(((counts - 200) ** 2 / 200).sum()) < 27.9, "chi-square, 9 degrees, p = 0.001"


def test_frames_of_chunks_are_their_places_in_the_clip() -> None:
    assert frames_of_chunks((0, 3), 2).tolist() == [0, 1, 6, 7]
    assert frames_of_chunks((), 2).tolist() == []


def test_given_frames_stay_clean_among_the_targets_and_say_so() -> None:
    """Image to video: in rollout the first frame is known, so noise on it would train on what never happens."""
    clean, draws = randn(*SHAPE), drawn(noise_augmentation=0.0)
    inputs, without = inputs_of(clean, draws, is_given=torch.arange(8) < 1), inputs_of(clean, draws)
    assert torch.equal(inputs.latents[:, 8], clean[:, 0])
    assert (inputs.target_timesteps[:, 0] == 0).all()
    assert torch.equal(inputs.latents[:, 9:], without.latents[:, 9:])
    assert torch.equal(inputs.target_timesteps[:, 1:], without.target_timesteps[:, 1:])
    assert (without.latents[:, 8] != clean[:, 0]).any()


def test_frame_errors_are_float32_whatever_the_network_answers_in() -> None:
    prediction, target = randn(*SHAPE), randn(*SHAPE, seed=1)
    errors = frame_errors(prediction.bfloat16(), target)
    assert errors.dtype == torch.float32
    expected = (prediction.bfloat16().double() - target.double()).square().mean((2, 3, 4))
    torch.testing.assert_close(errors.double(), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("lengths", [(8, 8), (8, 3), (4, 1), (3, 2)], ids=str)
def test_the_mean_over_two_ranks_is_the_loss_and_gradient_of_one(lengths: tuple[int, int]) -> None:
    """Known mistake 1: divided by the rank's own count and then averaged, gradients depend on who has the padding.

    Each rank has half of the frames of both samples; in the last two cases the second rank has none that counts.
    """
    latents, draws = randn(*SHAPE), drawn()
    inputs = inputs_of(latents, draws)
    valid = valid_frames(lengths)
    parameter = randn(*SHAPE[2:], seed=4).requires_grad_()

    def errors() -> Tensor:
        return frame_errors(parameter.expand(*SHAPE), inputs.target)

    loss = weighted_loss(errors(), inputs.loss_weights, valid, valid.sum().float())
    (gradient,) = torch.autograd.grad(loss, parameter)

    losses, gradients = [], []
    for rank in range(2):
        mine = slice(4 * rank, 4 * rank + 4)
        weights = inputs.loss_weights[:, mine]
        part = weighted_loss(errors()[:, mine], weights, valid[:, mine], valid.sum().float(), world_size=2)
        losses.append(part)
        gradients.append(torch.autograd.grad(part, parameter)[0])
    assert float(gradient.abs().min()) > 0
    torch.testing.assert_close((losses[0] + losses[1]) / 2, loss, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close((gradients[0] + gradients[1]) / 2, gradient, atol=1e-6, rtol=1e-5)


def test_a_batch_of_padding_alone_is_zero_and_not_nan() -> None:
    errors = randn(2, 8).square().requires_grad_()
    loss = weighted_loss(errors, torch.ones(2, 8), torch.zeros(2, 8, dtype=torch.bool), torch.tensor(0.0))
    loss.backward()
    assert float(loss.detach()) == 0
    assert errors.grad is not None
    assert (errors.grad == 0).all()


def test_frames_are_a_multiple_of_the_chunk() -> None:
    latents = randn(1, 7, 1, 2, 2)
    with pytest.raises(ValueError, match="num_frames=7 is no multiple of chunk_frames=2; use 6"):
        inputs_of(latents, drawn(latents.shape, sample_ids=[0]))
    with pytest.raises(ValueError, match="num_frames=1 is no multiple of chunk_frames=2; use 2"):
        inputs_of(latents[:, :1], drawn((1, 2, 1, 2, 2), sample_ids=[0]))
