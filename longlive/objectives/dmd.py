"""Distribution matching distillation: a few-step student learns to make what the many-step teacher would.

The student rolls out latents x. Noised to one timestep, they are scored by two networks: the *critic* knows what the
student makes, the frozen *teacher* what it should make. Where their clean predictions differ, the student's
distribution differs from the teacher's, and that difference is the gradient (DMD, arXiv 2311.18828; DMD2, 2405.14867;
in the form of Self-Forcing, 2506.08009):

    x_t = (1 - sigma) x + sigma eps          x, x_f and x_r are not differentiated
    x_f = critic(x_t)
    x_r = cond + guidance (cond - uncond)    of the teacher; guidance 3 is a guidance scale of 4 in a rollout
    g   = (x_f - x_r) / mean |x - x_r|       the mean over a chunk, so that no chunk's scale decides over the others
    student loss = 1/2 mean (x - stopgrad(x - g))^2,    whose gradient with respect to x is g / number of elements
    critic loss  = mean (v - v_critic)^2,    v = eps - x, on another rollout of the student

The means run over the frames that count: not those that a rollout is given (image to video). A step draws one timestep
per sample, or one per chunk: an index of the schedule's shifted grid, uniformly, then clamped away from both ends.
Draws are named by (step, role, sample id, chunk).

A role is a callable from noisy latents and timesteps to velocity: how it attends, which prompts it reads and what
surrounds it is its own business. A number that is not finite stops the step and names the role it came from: replaced
by zero, it would hide a run that is lost.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from longlive import rng
from longlive.diffusion.guidance import guide
from longlive.diffusion.path import add_noise, velocity_target, x0_from_velocity
from longlive.diffusion.schedule import TIMESTEP_SCALE, FlowSchedule
from longlive.objectives.finite import NonFiniteError
from longlive.objectives.teacher_forcing import frame_errors
from longlive.typing import Bool, Float, Int, Latents, PerFrame, Tensor

Score = Callable[[Latents, PerFrame], Latents]
"""The velocity that a role predicts at noisy latents `[b f c h w]` and timesteps `[b f]`."""

MIN_TIMESTEP, MAX_TIMESTEP = 20.0, 980.0
"""Nearer to clean, predictions hardly differ; nearer to noise, they know nothing of the sample."""


@dataclass(frozen=True)
class Noising:
    """The random part of scoring a rollout.

    Attributes:
        timesteps: 0 to 1000 of every chunk; equal ones where a sample has one alone.
        noise: what the rollout is mixed with.
    """

    timesteps: Float[Tensor, "b chunk"]
    noise: Latents


def draw_noising(
    frame_shape: Sequence[int],
    chunk_frames: int,
    schedule: FlowSchedule,
    role: Literal["student", "critic"],
    *,
    seed: int,
    step: int,
    sample_ids: Sequence[int],
    chunks: Sequence[int],
    per_chunk: bool = False,
) -> Noising:
    """Timesteps and noise, on the CPU.

    Args:
        frame_shape: `(c, h, w)` of a frame.
        chunk_frames: frames per chunk.
        schedule: whose grid the timesteps are of.
        role: who learns from it. Student and critic draw their own.
        seed, step, sample_ids: name the draws, together with the chunk's index in the clip.
        chunks: those that are here.
        per_chunk: whether every chunk has a timestep of its own.
    """
    rows = [
        [
            rng.integer(
                schedule.num_steps,
                seed,
                f"{role}_timestep",
                step=step,
                sample=sample,
                chunk=chunk if per_chunk else 0,
            )
            for chunk in chunks
        ]
        for sample in sample_ids
    ]
    timesteps = schedule.timestep(torch.tensor(rows, dtype=torch.int64)).clamp(MIN_TIMESTEP, MAX_TIMESTEP)
    shape = (chunk_frames, *frame_shape)
    noise = [
        torch.cat([rng.normal(shape, seed, f"{role}_noise", step=step, sample=sample, chunk=chunk) for chunk in chunks])
        for sample in sample_ids
    ]
    return Noising(timesteps, torch.stack(noise))


@dataclass(frozen=True)
class Noised:
    """A rollout at the noise levels of a `Noising`, detached.

    Attributes:
        latents: `x_t`.
        timesteps: of every frame; 0 where it is given.
        sigma: share of noise, likewise.
        noise: eps.
    """

    latents: Latents
    timesteps: PerFrame
    sigma: PerFrame
    noise: Latents


@torch.no_grad()
def noised(rollout: Latents, noising: Noising, is_given: Bool[Tensor, " f"] | None = None) -> Noised:
    """Mix a rollout with noise, on its device and in its dtype.

    Args:
        rollout: clean latents.
        noising: what to draw from, for the same chunks.
        is_given: frames that stay clean, because the rollout was given them.

    Raises:
        ValueError: if the draws are for another number of frames.
    """
    num_frames, num_chunks = rollout.shape[1], noising.timesteps.shape[1]
    if noising.noise.shape != rollout.shape or num_frames % num_chunks:
        raise ValueError(
            f"the rollout is {tuple(rollout.shape)}, but noise was drawn for {tuple(noising.noise.shape)} in "
            f"{num_chunks} chunks; draw for the chunks of this rollout"
        )
    timesteps = noising.timesteps.to(rollout).repeat_interleave(num_frames // num_chunks, dim=1)
    if is_given is not None:
        timesteps = timesteps * ~is_given.to(rollout.device)
    sigma, noise = timesteps / TIMESTEP_SCALE, noising.noise.to(rollout)
    return Noised(add_noise(rollout, noise, sigma), timesteps, sigma, noise)


@dataclass(frozen=True)
class Loss:
    """What a role learns from.

    Attributes:
        loss: of this rank; the mean over ranks is that of the whole batch.
        frame_errors: per frame and detached. Of the critic: the unweighted loss. Of the student: how far critic and
            teacher are apart, `mean_{c,h,w} |x_f - x_r|`.
        timesteps: at which the frames were scored.
        prediction_errors: of the student: `mean_{c,h,w} (x - x_f)^2` and `(x - x_r)^2`, x_r without guidance: which of
            critic and teacher knows its rollouts better.
    """

    loss: Float[Tensor, ""]
    frame_errors: PerFrame
    timesteps: PerFrame
    prediction_errors: tuple[PerFrame, PerFrame] | None = None


@dataclass(frozen=True)
class CountedFrames:
    """Which frames count.

    Attributes:
        frames: those that do, of the frames here.
        num_frames: how many do in the whole batch, on all ranks.
        world_size: ranks that gradients are averaged over.
    """

    frames: Bool[Tensor, "b f"]
    num_frames: Float[Tensor, ""]
    world_size: int = 1

    def mean(self, per_frame: PerFrame) -> Float[Tensor, ""]:
        """`sum_local / count_global * world_size`."""
        kept = torch.where(self.frames, per_frame, torch.zeros_like(per_frame))
        return kept.sum() / self.num_frames.clamp_min(1) * self.world_size


def student_loss(
    rollout: Latents,
    noising: Noising,
    counted: CountedFrames,
    *,
    critic: Score,
    teacher: Score,
    unconditional: Score | None,
    guidance: float = 3.0,
    is_given: Bool[Tensor, " f"] | None = None,
) -> Loss:
    """The student's loss; gradient reaches `rollout` alone.

    Args:
        rollout: of the student, float32 or wider, with its graph.
        noising: from `draw_noising`.
        counted: which frames count.
        critic, teacher: with the sample's prompts.
        unconditional: the teacher with the negative prompt. None: no guidance.
        guidance: of the teacher, see the module docstring; 0 is none.
        is_given: frames that the rollout was given.

    Raises:
        ValueError: if guidance and `unconditional` do not belong together, or the draws are for other frames.
        NonFiniteError: naming the role, if something is not finite.
    """
    if (guidance != 0) != (unconditional is not None):
        need = "needs" if guidance != 0 else "takes no"
        raise ValueError(f"guidance={guidance} {need} unconditional teacher; give it exactly when guidance is not 0")
    require_finite(rollout, "student", "the rollout")
    with torch.no_grad():
        x, at = rollout.detach(), noised(rollout, noising, is_given)
        fake = _clean_prediction(critic, "critic", at)
        real = _clean_prediction(teacher, "teacher", at)
        of_critic, of_teacher = ((x - clean).square().mean(dim=(2, 3, 4)) for clean in (fake, real))
        if unconditional is not None:
            without = _clean_prediction(unconditional, "teacher", at, " without prompt")
            real = guide(real, without, 1 + guidance)
        scale = chunk_scale((x - real).abs().mean(dim=(2, 3, 4)), counted.frames, noising.timesteps.shape[1])
        gradient = (fake - real) / scale[:, :, None, None, None]
        gradient = torch.where(counted.frames[:, :, None, None, None], gradient, torch.zeros_like(gradient))
        require_finite(gradient, "student", "the gradient (x_f - x_r) / mean|x - x_r|")
    # x - stopgrad(x - g) in this order, because x - x is exactly 0: nothing of a small g is lost in x.
    errors = (rollout - x + gradient).square().mean(dim=(2, 3, 4))
    apart = (fake - real).abs().mean(dim=(2, 3, 4))
    return Loss(0.5 * counted.mean(errors), apart, at.timesteps, (of_critic, of_teacher))


def critic_loss(
    rollout: Latents,
    noising: Noising,
    counted: CountedFrames,
    *,
    critic: Score,
    is_given: Bool[Tensor, " f"] | None = None,
) -> Loss:
    """The critic's loss: flow matching on what the student makes now. Gradient reaches the critic's parameters alone.

    Args:
        rollout: of the student; it is detached here.
        noising: from `draw_noising`.
        counted: which frames count.
        critic: with the sample's prompts.
        is_given: frames that the rollout was given.

    Raises:
        ValueError: if the draws are for other frames.
        NonFiniteError: naming the role, if something is not finite.
    """
    x = rollout.detach()
    require_finite(x, "student", "the rollout")
    at = noised(x, noising, is_given)
    velocity = critic(at.latents, at.timesteps)
    require_finite(velocity, "critic", "the prediction")
    errors = frame_errors(velocity, velocity_target(x, at.noise))
    return Loss(counted.mean(errors), errors.detach(), at.timesteps)


def chunk_scale(distance: PerFrame, counts: Bool[Tensor, "b f"], num_chunks: int) -> PerFrame:
    """The mean of `distance` over the frames of a chunk that count, for each of its frames. 1 where none does.

    Args:
        distance: `mean_{c,h,w} |x - x_r|` of every frame.
        counts: which frames do.
        num_chunks: equal runs that the frames are split into.
    """
    by_chunk, counts_by_chunk = (x.unflatten(1, (num_chunks, -1)) for x in (distance, counts))
    number = counts_by_chunk.sum(dim=2)
    total = torch.where(counts_by_chunk, by_chunk, torch.zeros_like(by_chunk)).sum(dim=2)
    mean = torch.where(number > 0, total / number.clamp_min(1), torch.ones_like(total))
    return mean.repeat_interleave(distance.shape[1] // num_chunks, dim=1)


def require_finite(values: Tensor, role: str, what: str) -> None:
    """Stop where a role makes something that is no number.

    Raises:
        NonFiniteError: naming role, what it is and which samples of the batch have it.
    """
    finite = values.detach().isfinite()
    if bool(finite.all()):
        return
    where = ""
    if values.ndim > 1:
        samples: Int[Tensor, " bad"] = (~finite.flatten(1).all(dim=1)).nonzero().flatten()
        where = f" in samples {samples.tolist()} of the batch"
    raise NonFiniteError(
        f"{role}: {what} is not finite{where}. The run stops here, because replacing it would hide that; continue from "
        "the last checkpoint with lower learning rates or smaller gradient clipping"
    )


def _clean_prediction(score: Score, role: str, at: Noised, kind: str = "") -> Latents:
    velocity = score(at.latents, at.timesteps).to(at.latents.dtype)
    require_finite(velocity, role, f"the prediction{kind}")
    return x0_from_velocity(at.latents, velocity, at.sigma)
