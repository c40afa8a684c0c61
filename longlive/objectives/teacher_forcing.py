"""Teacher forcing: denoise every chunk of a clip at once, each given the clean chunks before it.

The sequence holds every chunk twice, `[clean history | noisy targets]`. The clean copy has timestep 0; every noisy
chunk has a timestep of its own, drawn uniformly from the shifted grid. The network predicts velocities for both; only
the noisy half is
scored:

    loss = sum over valid frames of w(t) mean_{c,h,w} (v - v_hat)^2 / number of valid frames,

both sums over all ranks (`models.visibility` says who sees whom; LongLive-2.0, arXiv 2605.18739). Timesteps and noise
are named by (step, sample id, chunk), so they depend neither on the batch nor on who computes them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from longlive import rng
from longlive.diffusion.path import add_noise, velocity_target
from longlive.diffusion.schedule import FlowSchedule
from longlive.typing import Bool, Float, Int, Latents, PerFrame, Tensor

HistoryLatents = Float[Tensor, "b h_frames c h w"]
"""Latents of clean chunks; a rank may hold another number of those than of targets."""


@dataclass(frozen=True)
class Draws:
    """The random part of a step.

    Attributes:
        grid_index: where on the schedule's grid every target chunk is, `[b targets]`.
        noise: what the targets are mixed with.
        history_noise, history_sigma: noise of the clean history and its share per chunk; None: the history is clean.
    """

    grid_index: Int[Tensor, "b targets"]
    noise: Latents
    history_noise: HistoryLatents | None = None
    history_sigma: Float[Tensor, "b history"] | None = None


def draw(
    frame_shape: Sequence[int],
    chunk_frames: int,
    schedule: FlowSchedule,
    *,
    seed: int,
    step: int,
    sample_ids: Sequence[int],
    history: Sequence[int],
    targets: Sequence[int],
    noise_augmentation: float = 0.0,
) -> Draws:
    """Timesteps and noise, on the CPU.

    Args:
        frame_shape: `(c, h, w)` of a frame.
        chunk_frames: frames that share a timestep.
        seed, step, sample_ids: name the draws, together with the chunk's index in the clip.
        history, targets: the chunks whose clean and whose noisy copies are here.
        noise_augmentation: the history's share of noise is uniform between 0 and this, one draw per chunk. It is not
            told to the network: in rollout, too, the network does not know how wrong its history is.
    """

    def noise(purpose: str, chunks: Sequence[int]) -> Float[Tensor, "b g c h w"]:
        shape = (chunk_frames, *frame_shape)
        rows = [
            torch.cat(
                [torch.empty(0, *frame_shape)]
                + [rng.normal(shape, seed, purpose, step=step, sample=sample, chunk=chunk) for chunk in chunks]
            )
            for sample in sample_ids
        ]
        return torch.stack(rows)

    index = [
        [rng.integer(schedule.num_steps, seed, "timestep", step=step, sample=sample, chunk=chunk) for chunk in targets]
        for sample in sample_ids
    ]
    grid_index = torch.tensor(index, dtype=torch.int64)
    if not noise_augmentation:
        return Draws(grid_index, noise("noise", targets))
    share = [
        [rng.uniform(seed, "history_sigma", step=step, sample=sample, chunk=chunk) for chunk in history]
        for sample in sample_ids
    ]
    history_sigma = noise_augmentation * torch.tensor(share, dtype=torch.float32)
    return Draws(grid_index, noise("noise", targets), noise("history_noise", history), history_sigma)


@dataclass(frozen=True)
class InjectedErrors:
    """Errors of earlier predictions that a step adds to what the network sees (`error_recycling.py`); None: none.

    Attributes:
        history: added to the clean history.
        latents: added to the targets before they are noised. The velocity still points at the true latents.
        noise: added to the noise of the targets. The velocity points away from the sum.
    """

    history: HistoryLatents | None = None
    latents: Latents | None = None
    noise: Latents | None = None


@dataclass(frozen=True)
class TeacherForcingInputs:
    """What the network gets and what it is scored against: h history frames, then f target frames.

    Attributes:
        latents: clean history, then noisy targets `[b h+f c h w]`.
        timesteps: 0 for the history, 0 to 1000 for the targets `[b h+f]`.
        target: the velocity of the noisy targets `[b f c h w]`.
        loss_weights: w(t) of every target frame `[b f]`.
        clean: the true latents of the targets `[b f c h w]`.
        grid_index: where on the schedule's grid every target chunk is `[b targets]`, on the CPU.
    """

    latents: Float[Tensor, "b both c h w"]
    timesteps: Float[Tensor, "b both"]
    target: Latents
    loss_weights: PerFrame
    clean: Latents
    grid_index: Int[Tensor, "b targets"]

    @property
    def num_history_frames(self) -> int:
        return self.latents.shape[1] - self.target.shape[1]

    @property
    def target_timesteps(self) -> PerFrame:
        """Timesteps of the targets alone, `[b f]`."""
        return self.timesteps[:, self.num_history_frames :]


def make_inputs(
    history: HistoryLatents,
    targets: Latents,
    draws: Draws,
    schedule: FlowSchedule,
    chunk_frames: int,
    is_given: Bool[Tensor, " f"] | None = None,
    history_is_given: Bool[Tensor, " h_frames"] | None = None,
    errors: InjectedErrors | None = None,
) -> TeacherForcingInputs:
    """History and noisy targets in one sequence, on the device of the latents.

    Args:
        history, targets: clean latents of the chunks that the draws are for.
        draws: from `draw`.
        schedule: noise levels.
        chunk_frames: frames per chunk.
        is_given: target frames that stay clean, at timestep 0, because a rollout is given them too.
        history_is_given: frames of the history to which no noise is added, for the same reason.
        errors: of earlier predictions, to be added; None: nothing is.

    Raises:
        ValueError: if the frames are no multiple of `chunk_frames`.
    """
    num_frames = targets.shape[1]
    if num_frames % chunk_frames:
        raise ValueError(
            f"num_frames={num_frames} is no multiple of chunk_frames={chunk_frames}; use "
            f"{num_frames - num_frames % chunk_frames or chunk_frames}"
        )

    def per_frame(per_chunk: Tensor) -> Tensor:
        return per_chunk.to(targets.device).repeat_interleave(chunk_frames, dim=1)

    grid_index = per_frame(draws.grid_index)
    sigma, timesteps = schedule.sigma(grid_index), schedule.timestep(grid_index)
    if is_given is not None:
        is_noisy = ~is_given.to(targets.device)
        sigma, timesteps = sigma * is_noisy, timesteps * is_noisy
    noise, start = draws.noise.to(targets), targets
    if errors is not None:
        history = history if errors.history is None else history + errors.history
        start = start if errors.latents is None else start + errors.latents
        noise = noise if errors.noise is None else noise + errors.noise
    if draws.history_noise is not None and draws.history_sigma is not None:
        share = per_frame(draws.history_sigma)
        if history_is_given is not None:
            share = share * ~history_is_given.to(share.device)
        history = add_noise(history, draws.history_noise.to(history), share)
    return TeacherForcingInputs(
        latents=torch.cat([history, add_noise(start, noise, sigma)], dim=1),
        timesteps=torch.cat([timesteps.new_zeros(history.shape[:2]), timesteps], dim=1),
        target=velocity_target(targets, noise),
        loss_weights=schedule.loss_weight(grid_index),
        clean=targets,
        grid_index=draws.grid_index,
    )


def frames_of_chunks(chunks: Sequence[int], chunk_frames: int) -> Int[Tensor, " f"]:
    """Indices in the clip of the frames of some chunks, in their order."""
    starts = torch.tensor(chunks, dtype=torch.int64)[:, None] * chunk_frames
    return (starts + torch.arange(chunk_frames)).flatten()


def frame_errors(prediction: Latents, target: Latents) -> PerFrame:
    """`mean_{c,h,w} (v - v_hat)^2`, float32."""
    return (prediction.float() - target.float()).square().mean(dim=(2, 3, 4))


def weighted_loss(
    errors: PerFrame,
    loss_weights: PerFrame,
    valid: Bool[Tensor, "b f"],
    num_valid: Float[Tensor, ""],
    world_size: int = 1,
) -> Float[Tensor, ""]:
    """The loss of this rank: `sum_local / count_global * world_size`, whose mean over the ranks is the loss of the
    whole batch.

    Args:
        errors, loss_weights, valid: of the frames here.
        num_valid: valid frames of the whole batch, on all ranks.
        world_size: ranks that the gradient is averaged over.
    """
    weights = loss_weights * valid.to(errors)
    return (errors * weights).sum() / num_valid.clamp_min(1) * world_size
