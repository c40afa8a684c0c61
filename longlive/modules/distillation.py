"""Stage 2: distil a many-step network into a few-step one (`objectives.dmd`), as LoRA.

Student, teacher and critic stand on the frozen network of stage 1 (`roles.py`); the adapters of the student and the
critic are all that learns.

A step is one batch of prompts. The critic learns in every step, the student in every `student_every`-th, beginning with
the first; each from a rollout of its own (`rollout.student`). Scoring is teacher forcing: the rollout, clean, is the
history of its own noisy copy, seen through the rollout's window and sinks. With `streaming`, one rollout goes on from
step to step, for videos that a step cannot hold (`streaming.py`). Ranks of a sequence group share a rollout
(`rollout.split`), and each scores its own chunks (`objectives.pieces`).

Lightning counts the critic's optimizer steps: `trainer.global_step` is the number of batches, and the student's turn
follows from it. So a run that is killed anywhere in a cycle and resumed goes on as if nothing had happened: weights,
both optimizers and the average are in the checkpoint, and every draw is named by the step.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from lightning.pytorch.plugins import Precision
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.distributed.tensor import DTensor

from longlive.adapters.adapted import AdaptedNetwork
from longlive.adapters.lora import LoRASettings
from longlive.data.batch import VideoBatch
from longlive.data.position import PositionDataModule
from longlive.data.prompt_batches import PromptBatch, PromptDataModule
from longlive.models.visibility import Role
from longlive.modules.base import OptimizerFactory
from longlive.modules.conditions import Conditions, given_frames, latent_shape
from longlive.modules.roles import CRITIC, STUDENT, RoleName, RolesModule
from longlive.modules.streaming import PURPOSE as STREAM
from longlive.modules.streaming import Stream, StreamingSettings
from longlive.objectives.diversity import diversity
from longlive.objectives.dmd import (
    CountedFrames,
    Loss,
    Noising,
    Score,
    critic_loss,
    draw_noising,
    require_finite,
    student_loss,
)
from longlive.objectives.pieces import HeldPieces
from longlive.parallel.layout import check_rollout
from longlive.rollout.state import RolloutState
from longlive.rollout.student import Clip, StudentRollout
from longlive.rollout.switches import count_switches
from longlive.typing import Int, Latents, PerFrame, Tensor


class DistillationModule(RolesModule):
    """Distribution matching distillation.

    Args:
        optimizer: of the student.
        critic_optimizer: of the critic.
        lora: the student's adapter.
        critic_lora: the critic's; None: as the student's.
        role_precision: in which each role multiplies, by its name; for all others, and None: in the run's.
        student_every: steps between two of the student (the ratio of two-time-scale updates).
        guidance: of the teacher, `cond + guidance (cond - uncond)`; 0 is none.
        negative_prompt: of the teacher's unconditional prediction.
        exit_per: `rollout` or `chunk`; see `StudentRollout`.
        timestep_per_chunk: whether every chunk is scored at a timestep of its own, as image to video is.
        given_frames: first frames of a clip that the rollout is given: batches then bring clips. 1: image to video.
        max_gradient_norm: of each role; larger gradients are scaled down to it.
        streaming: how long the videos are that are made clip by clip, a clip in a step; None: every rollout begins its
            own, and is of the length that batches ask for.
        **base: see `LongLiveModule`; `rollout` is how the student rolls out: its few steps, without guidance.

    Raises:
        ValueError: for settings out of range, or a rollout with guidance.
    """

    def __init__(
        self,
        *,
        critic_optimizer: OptimizerFactory,
        lora: LoRASettings | None = None,
        critic_lora: LoRASettings | None = None,
        role_precision: Mapping[str, Precision | str | None] | None = None,
        student_every: int = 5,
        guidance: float = 3.0,
        negative_prompt: str = "",
        exit_per: str = "rollout",
        timestep_per_chunk: bool = False,
        given_frames: int = 0,
        max_gradient_norm: float = 10.0,
        streaming: StreamingSettings | None = None,
        **base: Any,
    ) -> None:
        super().__init__(
            lora={STUDENT: lora or LoRASettings(), CRITIC: critic_lora or lora or LoRASettings()},
            role_precision=role_precision,
            **base,
        )
        if student_every < 1:
            raise ValueError(f"student_every={student_every} must be at least 1 (the student learns in every step)")
        if guidance < 0:
            raise ValueError(f"guidance={guidance} must be at least 0 (none); the usual one is 3")
        if not 0 <= given_frames <= self.chunk_frames:
            raise ValueError(
                f"given_frames={given_frames} must be 0 to {self.chunk_frames}, the frames of a chunk; 1 is image to "
                "video"
            )
        if not max_gradient_norm > 0:
            raise ValueError(f"max_gradient_norm={max_gradient_norm} must be positive; 10 is the source's")
        StudentRollout.check(self.rollout, exit_per)
        if streaming is not None:
            streaming.check(self.rollout, student_every)
        self.automatic_optimization = False
        self.make_critic_optimizer = critic_optimizer
        self.student_every = student_every
        self.guidance = guidance
        self.negative_prompt = negative_prompt
        self.exit_per = exit_per
        self.timestep_per_chunk = timestep_per_chunk
        self.given_frames = given_frames
        self.max_gradient_norm = max_gradient_norm
        self.stream = None if streaming is None else Stream(streaming, self.rollout)

    def check_sequence(self) -> None:
        """Raise the `ValueError` for ranks that cannot share a rollout, or that have no targets to score; with
        streaming, for those whose checkpoint could not hold their streams."""
        size = self.sequence.size
        if self.stream is not None and self._trainer is not None:
            self.stream.check_strategy(self._trainer.strategy, self._trainer.world_size)
        check_rollout(self.chunk_frames, self.model_config.num_heads, size)
        if not all(self.sequence.layout(size).of_role(rank, Role.NOISY) for rank in range(size)):
            raise ValueError(
                f"sequence_parallel_size={size}: this strategy gives some ranks clean chunks alone, and a step of "
                "distillation is learned from noisy ones on every rank; use strategy=balanced_sp"
            )

    def check_data(self, data: PositionDataModule) -> None:
        """Raise the `ValueError` for data without the frames that are given, or of other videos than streams, or than
        the codec has."""
        if isinstance(data, PromptDataModule):
            if self.given_frames:
                raise ValueError(f"given_frames={self.given_frames}, but the data holds prompts alone; train on clips")
            self.codec.check_size(data.height, data.width)
        if self.stream is None:
            super().check_data(data)
        else:
            self.stream.settings.check_data(data.num_frames, data.clip_frames)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizers = [
            make(self.adapter_parameters_of(role))
            for role, make in ((STUDENT, self.make_optimizer), (CRITIC, self.make_critic_optimizer))
        ]
        if self.make_learning_rate is None:
            return optimizers
        return optimizers, [self.make_learning_rate(optimizer) for optimizer in optimizers]

    def training_step(self, batch: VideoBatch | PromptBatch, batch_index: int) -> dict[str, Any]:
        """One step of the critic, and of the student where it is its turn.

        Returns:
            of the critic, what `LossBreakdown` breaks down; and under `values` what else is worth a curve, by name.
        """
        conditions, step = self.conditions(batch), self.global_step
        if self.stream is not None:
            conditions = self.stream.next_clip(conditions, step, partial(self.start_rollout, conditions, STREAM))
        values: dict[str, float] = {}
        clip: Clip | None = None
        for role in (STUDENT, CRITIC) if step % self.student_every == 0 else (CRITIC,):
            if clip is None or self.stream is None:
                start = time.perf_counter()
                with torch.set_grad_enabled(role == STUDENT):
                    clip = self.roll_out(role, conditions, step)
                values[f"{role}/seconds_rollout"] = time.perf_counter() - start
            loss = self.learn(role, clip.latents, conditions, step, values)
            clip = replace(clip, latents=clip.latents.detach())
        for scheduler in self._schedulers():
            scheduler.step()
        pieces = self.pieces(conditions)
        return {
            "loss": loss.loss.detach(),
            "frame_errors": loss.frame_errors,
            "timesteps": loss.timesteps,
            "scored": self.counted(conditions).frames,
            "clip_position": conditions.video_position(pieces.frames(Role.NOISY) / self.chunk_frames).to(self.device),
            "values": values,
        }

    def learn(
        self, role: RoleName, rollout: Latents, conditions: Conditions, step: int, values: dict[str, float]
    ) -> Loss:
        """Score a rollout, and step the role's optimizer.

        Args:
            role: `student` or `critic`.
            rollout: the whole clip; of the student with its graph.
            conditions: of the clip.
            step: names the draws.
            values: gets loss, gradient norm, seconds and the spread between samples, under names that begin with the
                role's.

        Raises:
            NonFiniteError: naming a role, if something is not finite.
        """
        start = time.perf_counter()
        spread = diversity(rollout, self.sum_over_ranks, copies=self.sequence.size)
        if spread is not None:
            values[f"{role}/diversity"] = spread
        network = self.student if role == STUDENT else self.critic
        optimizer = self._optimizer(role)
        loss = self.loss(role, rollout, conditions, step)
        require_finite(loss.loss, role, "the loss")
        self.place_tokens(self.token_positions(role, conditions))
        # Activation checkpointing runs the role's network again in backward.
        with network.active():
            self.manual_backward(loss.loss)
        norm = self._clipped([parameter for _, parameter in network.named_adapter_parameters()])
        require_finite(norm, role, "the gradient")
        if role == STUDENT:
            # Lightning would count it, and steps would be batches no more.
            optimizer.optimizer.step()
        else:
            optimizer.step()
        optimizer.zero_grad()
        values[f"{role}/loss"] = float(loss.loss.detach())
        values[f"{role}/gradient_norm"] = float(norm)
        values[f"{role}/seconds_learning"] = time.perf_counter() - start
        if role == STUDENT:
            values["student/distance_to_teacher"] = float(loss.frame_errors.mean())
        if loss.prediction_errors is not None:
            for name, errors in zip(("critic", "teacher"), loss.prediction_errors, strict=True):
                values[f"{role}/{name}_error"] = float(errors.mean())
        return loss

    def roll_out(self, role: RoleName, conditions: Conditions, step: int) -> Clip:
        """What the student makes now, for a role to learn from; of a stream, the clip that the conditions ask for."""
        if self.stream is not None:
            return self.stream.roll_out(self.student_rollout, conditions)
        state, c = self.start_rollout(conditions, f"{role}_rollout", step), conditions
        return self.student_rollout.clip(state, c.prompt_embeds, c.prompt_index, c.shot_index, c.given, final=True)

    @property
    def student_rollout(self) -> StudentRollout:
        """How the student rolls out."""
        return StudentRollout(self.rollout_engine(), self.exit_per)

    def start_rollout(self, conditions: Conditions, purpose: str, step: int) -> RolloutState:
        """A rollout of the student that has made nothing yet; purpose and step name its draws."""
        return self.student_rollout.start(
            conditions.latent_shape,
            seed=self.seed,
            sample_ids=conditions.sample_ids,
            max_chunks=conditions.shot_index.shape[1],
            step=step,
            purpose=purpose,
            recaches=self.recaches(conditions),
        )

    def recaches(self, conditions: Conditions) -> frozenset[int]:
        """The chunks before which a cache is rebuilt on some rank: all must run the network equally often."""
        if self.rollout.prompt_switch == "keep":
            return frozenset()
        here = count_switches(conditions.prompt_index.tolist(), conditions.shot_index.tolist())
        anywhere = self.sum_over_ranks(torch.tensor(here, device=self.device))
        return frozenset(anywhere.nonzero().flatten().tolist())

    def loss(self, role: RoleName, rollout: Latents, conditions: Conditions, step: int) -> Loss:
        """A role's loss on a rollout. To learn from something else, override this.

        Args:
            role: `student` or `critic`.
            rollout: the whole clip; this rank's part of it is scored here.
            conditions: of the clip.
            step: names the draws.
        """
        noising = self.noising(role, conditions, step)
        rollout, frames = conditions.with_past(rollout), self.pieces(conditions).frames(Role.NOISY)
        history, rollout = rollout.detach(), rollout[:, frames]
        critic = self.score(self.critic, history, conditions)
        common: dict[str, Any] = {"is_given": frames < conditions.num_given if conditions.num_given else None}
        if role == CRITIC:
            return critic_loss(rollout, noising, self.counted(conditions), critic=critic, **common)
        unconditional = self.score(self.teacher, history, self.without_prompt(conditions)) if self.guidance else None
        return student_loss(
            rollout,
            noising,
            self.counted(conditions),
            critic=critic,
            teacher=self.score(self.teacher, history, conditions),
            unconditional=unconditional,
            guidance=self.guidance,
            **common,
        )

    def score(self, role: AdaptedNetwork, history: Latents, conditions: Conditions) -> Score:
        """A role's velocity of this rank's noisy chunks, each given the clean ones before it, as in stage 1."""
        pieces = self.pieces(conditions)
        clean = history[:, pieces.frames(Role.CLEAN)]
        prompt_index = pieces.prompt_index(conditions.prompt_index)
        positions = pieces.frame_positions(self.device)
        attention = pieces.attention(self.model_config.tokens_per_frame(*history.shape[-2:]))

        def velocity(latents: Latents, timesteps: PerFrame) -> Latents:
            both = role(
                latents=torch.cat([clean, latents], dim=1),
                timesteps=torch.cat([timesteps.new_zeros(clean.shape[:2]), timesteps], dim=1),
                prompt_embeds=conditions.prompt_embeds,
                prompt_index=prompt_index,
                frame_positions=positions,
                attention=attention,
            )
            return both[:, clean.shape[1] :].float()

        return velocity

    def pieces(self, conditions: Conditions) -> HeldPieces:
        """What this process scores of the clips, with the positions and the visibility of the rollout."""
        rule, offset = self.rollout.rule, self.rollout.shot_rope_offset
        shots, num_past, starts = conditions.shot_index, conditions.num_past, conditions.starts
        return HeldPieces(shots, self.chunk_frames, self.sequence, rule, offset, num_past, starts)

    def token_positions(self, role: RoleName, conditions: Conditions) -> Int[Tensor, "b l"]:
        """Numbers of the tokens of each call that a role's loss goes back through (`HeldPieces.token_positions`): the
        critic's of both copies, and the student's of a chunk."""
        pieces, sample_ids = self.pieces(conditions), torch.tensor(conditions.sample_ids)
        tokens_per_frame = self.model_config.tokens_per_frame(*conditions.latent_shape[1:])
        of_role = pieces.token_positions if role == CRITIC else pieces.chunk_token_positions
        return of_role(sample_ids, tokens_per_frame)

    def conditions(self, batch: VideoBatch | PromptBatch) -> Conditions:
        """What a batch asks for.

        Raises:
            ValueError: if frames are to be given, and the batch has none; or for videos of a size that the codec has
                not.
        """
        known = batch.prompt_embeds if isinstance(batch, VideoBatch) else None
        prompt_embeds, prompt_index = self.embed(batch.prompts, known)
        given, counts, shape = None, torch.ones(batch.batch_size, dtype=torch.bool), latent_shape(self.codec, batch)
        if isinstance(batch, VideoBatch):
            given, counts = given_frames(self, batch, self.given_frames), self.agreed(batch)
        elif self.given_frames:
            raise ValueError(f"given_frames={self.given_frames}, but the batch holds prompts alone; train on clips")
        ids = tuple(batch.sample_ids.tolist())
        return Conditions(prompt_embeds, prompt_index, batch.shot_index, ids, shape, given, counts)

    @torch.no_grad()
    def without_prompt(self, conditions: Conditions) -> Conditions:
        """The same videos under the negative prompt."""
        embeds = self.text_encoder.encode([self.negative_prompt]).to(self.device)
        return replace(conditions, prompt_embeds=embeds, prompt_index=torch.zeros_like(conditions.prompt_index))

    def noising(self, role: RoleName, conditions: Conditions, step: int) -> Noising:
        """At which timesteps and with which noise a role learns from the chunks here."""
        return draw_noising(
            conditions.latent_shape,
            self.chunk_frames,
            self.schedule,
            role,
            seed=self.seed,
            step=step,
            sample_ids=conditions.sample_ids,
            chunks=self.pieces(conditions).chunks(Role.NOISY),
            per_chunk=self.timestep_per_chunk,
        )

    def counted(self, conditions: Conditions) -> CountedFrames:
        """Which frames here carry loss: those that were not given, of samples that count."""
        frames = self.pieces(conditions).frames(Role.NOISY) >= conditions.num_given
        frames = (frames & conditions.counts[:, None]).to(self.device)
        world_size = self.trainer.world_size if self._trainer is not None else 1
        return CountedFrames(frames, self.sum_over_ranks(frames.sum().float()), world_size)

    def average_moves(self, step: int) -> bool:
        """Whether the student learned in the step that made the count of steps `step`."""
        return (step - 1) % self.student_every == 0

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.stream is not None:
            checkpoint["stream"] = self.stream.state_dict(like=next(self.trained_network.parameters()))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if self.stream is not None:
            self.stream.load_state_dict(checkpoint.get("stream"))

    def _optimizer(self, role: RoleName) -> Any:
        optimizers: Any = self.optimizers()
        return optimizers[0 if role == STUDENT else 1]

    def _schedulers(self) -> list[Any]:
        schedulers: Any = self.lr_schedulers()
        return schedulers or []

    def _clipped(self, parameters: list[nn.Parameter]) -> Tensor:
        """Scale the gradients down where they are too large; returns their norm before."""
        norm = nn.utils.clip_grad_norm_(parameters, self.max_gradient_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm
