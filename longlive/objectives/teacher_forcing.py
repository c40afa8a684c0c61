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


@dataclass(frozen=True)
class Draws:
    """The random part of a step.

    Attributes:
        grid_index: where on the schedule's grid every chunk is, `[b chunk]`.
        noise: what the targets are mixed with.
        history_noise, history_sigma: noise of the clean history and its share per chunk; None: the history is clean.
    """

    grid_index: Int[Tensor, "b chunk"]
    noise: Latents
    history_noise: Latents | None = None
    history_sigma: Float[Tensor, "b chunk"] | None = None


def draw(
    shape: Sequence[int],
    chunk_frames: int,
    schedule: FlowSchedule,
    *,
    seed: int,
    step: int,
    sample_ids: Sequence[int],
    first_chunk: int = 0,
    noise_augmentation: float = 0.0,
) -> Draws:
    """Timesteps and noise for latents of a shape `(b, f, c, h, w)`, on the CPU.

    Args:
        chunk_frames: frames that share a timestep.
        seed, step, sample_ids: name the draws.
        first_chunk: index in the clip of the first chunk here (a rank may own a later part).
        noise_augmentation: the history's share of noise is uniform between 0 and this, one draw per chunk. It is not
            told to the network: in rollout, too, the network does not know how wrong its history is.
    """
    _, num_frames, *frame_shape = shape
    chunks = range(first_chunk, first_chunk + num_frames // chunk_frames)

    def noise(purpose: str) -> Latents:
        rows = [
            torch.cat(
                [rng.normal((chunk_frames, *frame_shape), seed, purpose, step=step, sample=i, chunk=c) for c in chunks]
            )
            for i in sample_ids
        ]
        return torch.stack(rows)

    index = [
        [rng.integer(schedule.num_steps, seed, "timestep", step=step, sample=i, chunk=c) for c in chunks]
        for i in sample_ids
    ]
    if not noise_augmentation:
        return Draws(torch.tensor(index), noise("noise"))
    share = [[rng.uniform(seed, "history_sigma", step=step, sample=i, chunk=c) for c in chunks] for i in sample_ids]
    history_sigma = noise_augmentation * torch.tensor(share, dtype=torch.float32)
    return Draws(torch.tensor(index), noise("noise"), noise("history_noise"), history_sigma)


@dataclass(frozen=True)
class TeacherForcingInputs:
    """What the network gets and what it is scored against.

    Attributes:
        latents: clean copy, then noisy copy `[b 2f c h w]`.
        timesteps: 0 for the clean copy, 0 to 1000 for the noisy one `[b 2f]`.
        target: the noisy copy's velocity `[b f c h w]`.
        loss_weights: w(t) of every noisy frame `[b f]`.
    """

    latents: Float[Tensor, "b both c h w"]
    timesteps: Float[Tensor, "b both"]
    target: Latents
    loss_weights: PerFrame

    @property
    def target_timesteps(self) -> PerFrame:
        """Timesteps of the noisy copy alone, `[b f]`."""
        return self.timesteps[:, self.target.shape[1] :]


def make_inputs(latents: Latents, draws: Draws, schedule: FlowSchedule, chunk_frames: int) -> TeacherForcingInputs:
    """Both copies of the clip, on the device of the latents.

    Raises:
        ValueError: if the frames are no multiple of `chunk_frames`.
    """
    num_frames = latents.shape[1]
    if num_frames % chunk_frames:
        raise ValueError(
            f"num_frames={num_frames} is no multiple of chunk_frames={chunk_frames}; use "
            f"{num_frames - num_frames % chunk_frames or chunk_frames}"
        )

    def per_frame(per_chunk: Tensor) -> Tensor:
        return per_chunk.to(latents.device).repeat_interleave(chunk_frames, dim=1)

    grid_index = per_frame(draws.grid_index)
    sigma = schedule.sigma(grid_index)
    noise = draws.noise.to(latents)
    history = latents
    if draws.history_noise is not None and draws.history_sigma is not None:
        history = add_noise(latents, draws.history_noise.to(latents), per_frame(draws.history_sigma))
    timesteps = schedule.timestep(grid_index)
    return TeacherForcingInputs(
        latents=torch.cat([history, add_noise(latents, noise, sigma)], dim=1),
        timesteps=torch.cat([torch.zeros_like(timesteps), timesteps], dim=1),
        target=velocity_target(latents, noise),
        loss_weights=schedule.loss_weight(grid_index),
    )


def valid_frames(num_valid_frames: Int[Tensor, " b"], num_frames: int, first_frame: int = 0) -> Bool[Tensor, "b f"]:
    """Which frames are not padding; `first_frame` is the clip's index of the first frame here."""
    return first_frame + torch.arange(num_frames) < num_valid_frames[:, None]


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
