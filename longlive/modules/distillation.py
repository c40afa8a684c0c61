"""Stage 2: distil a many-step network into a few-step one (`objectives.dmd`), as LoRA.

Three roles share one frozen network, the one of stage 1: the *teacher* is the network itself, the *student* and the
*critic* are it with an adapter each (`adapters.lora`), and the adapters are all that learns.

A step is one batch of prompts. The critic learns in every step, the student in every `student_every`-th, beginning with
the first; each from a rollout of its own (`rollout.student`). Scoring is teacher forcing: the rollout, clean, is the
history of its own noisy copy, seen through the rollout's window and sinks.

Lightning counts the critic's optimizer steps: `trainer.global_step` is the number of batches, and the student's turn
follows from it. So a run that is killed anywhere in a cycle and resumed goes on as if nothing had happened: weights,
both optimizers and the average are in the checkpoint, and every draw is named by the step.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.distributed.tensor import DTensor

from longlive.adapters.adapted import AdaptedNetwork
from longlive.adapters.lora import LoRASettings, add_adapter, base_name, initialise_adapter, train_only
from longlive.data.batch import VideoBatch
from longlive.data.prompt_batches import PromptBatch
from longlive.models.attention import ChunkedAttention
from longlive.models.visibility import teacher_forcing_segments
from longlive.models.wan.model import CausalWan
from longlive.modules.base import LongLiveModule, OptimizerFactory
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
from longlive.rollout.student import Clip, StudentRollout
from longlive.typing import Bool, Int, Latents, PerFrame, PromptEmbeds, Tensor

RoleName = Literal["student", "critic"]
STUDENT: RoleName = "student"
CRITIC: RoleName = "critic"
"""Those that learn, and the names of their adapters."""


@dataclass(frozen=True)
class Conditions:
    """What a batch asks for, on the module's device.

    Attributes:
        prompt_embeds, prompt_index: the distinct prompts, and which of them every chunk follows.
        shot_index: shot of every chunk.
        sample_ids: name the draws.
        latent_shape: (channels, height, width).
        given: first frames of the videos; None: none are given.
    """

    prompt_embeds: PromptEmbeds
    prompt_index: Int[Tensor, "b chunk"]
    shot_index: Int[Tensor, "b chunk"]
    sample_ids: tuple[int, ...]
    latent_shape: tuple[int, int, int]
    given: Latents | None


class DistillationModule(LongLiveModule):
    """Distribution matching distillation.

    Args:
        optimizer: of the student.
        critic_optimizer: of the critic.
        lora: the student's adapter.
        critic_lora: the critic's; None: as the student's.
        student_every: steps between two of the student (the ratio of two-time-scale updates).
        guidance: of the teacher, `cond + guidance (cond - uncond)`; 0 is none.
        negative_prompt: of the teacher's unconditional prediction.
        exit_per: `rollout` or `chunk`; see `StudentRollout`.
        timestep_per_chunk: whether every chunk is scored at a timestep of its own, as image to video is.
        given_frames: first frames of a clip that the rollout is given: batches then bring clips. 1: image to video.
        max_gradient_norm: of each role; larger gradients are scaled down to it.
        **base: see `LongLiveModule`; `rollout` is how the student rolls out: its few steps, without guidance.

    Raises:
        ValueError: for settings out of range, or a rollout with guidance.
    """

    rollout_adapter = STUDENT
    student: AdaptedNetwork
    teacher: AdaptedNetwork
    critic: AdaptedNetwork

    def __init__(
        self,
        *,
        critic_optimizer: OptimizerFactory,
        lora: LoRASettings | None = None,
        critic_lora: LoRASettings | None = None,
        student_every: int = 5,
        guidance: float = 3.0,
        negative_prompt: str = "",
        exit_per: str = "rollout",
        timestep_per_chunk: bool = False,
        given_frames: int = 0,
        max_gradient_norm: float = 10.0,
        **base: Any,
    ) -> None:
        super().__init__(**base)
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
        self.automatic_optimization = False
        self.make_critic_optimizer = critic_optimizer
        self.lora = {STUDENT: lora or LoRASettings(), CRITIC: critic_lora or lora or LoRASettings()}
        self.student_every = student_every
        self.guidance = guidance
        self.negative_prompt = negative_prompt
        self.exit_per = exit_per
        self.timestep_per_chunk = timestep_per_chunk
        self.given_frames = given_frames
        self.max_gradient_norm = max_gradient_norm

    def add_adapters(self, network: CausalWan) -> None:
        """The student's and the critic's, the only ones that learn.

        Raises:
            ValueError: under a strategy that splits clips.
        """
        if self.sequence.size > 1:
            raise ValueError(
                f"sequence_parallel_size={self.sequence.size}: the rollout of distillation runs on whole clips; use 1"
            )
        for name, settings in self.lora.items():
            add_adapter(network, name, settings)
        train_only(network, list(self.lora))

    def initialise_adapters(self, network: CausalWan) -> None:
        """Also the roles, which are views of the network."""
        for name in self.lora:
            initialise_adapter(network, name, self.seed)
        self.student = AdaptedNetwork(network, STUDENT)
        self.critic = AdaptedNetwork(network, CRITIC)
        self.teacher = AdaptedNetwork(network, None)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        prefix = "network."
        optimizers = [
            make([(prefix + name, parameter) for name, parameter in role.named_adapter_parameters()])
            for role, make in ((self.student, self.make_optimizer), (self.critic, self.make_critic_optimizer))
        ]
        if self.make_learning_rate is None:
            return optimizers
        return optimizers, [self.make_learning_rate(optimizer) for optimizer in optimizers]

    def training_step(self, batch: VideoBatch | PromptBatch, batch_index: int) -> dict[str, Any]:
        """One step of the critic, and of the student where it is its turn.

        Returns:
            of the critic, what `LossBreakdown` breaks down; and under `values` what else is worth a curve, by name.
        """
        conditions = self.conditions(batch)
        values: dict[str, float] = {}
        step = self.global_step
        if step % self.student_every == 0:
            loss = self.learn(STUDENT, conditions, step, values)
            values["student/distance_to_teacher"] = float(loss.frame_errors.mean())
            if loss.prediction_errors is not None:
                for name, errors in zip(("critic", "teacher"), loss.prediction_errors, strict=True):
                    values[f"student/{name}_error"] = float(errors.mean())
        loss = self.learn(CRITIC, conditions, step, values)
        for scheduler in self._schedulers():
            scheduler.step()
        frames = torch.arange(loss.frame_errors.shape[1], device=self.device)
        return {
            "loss": loss.loss.detach(),
            "frame_errors": loss.frame_errors,
            "timesteps": loss.timesteps,
            "scored": self.counted(conditions).frames,
            "clip_position": frames / len(frames),
            "values": values,
        }

    def learn(self, role: RoleName, conditions: Conditions, step: int, values: dict[str, float]) -> Loss:
        """Roll out, score, and step the role's optimizer.

        Args:
            role: `student` or `critic`.
            conditions: of the batch.
            step: names the draws.
            values: gets loss, gradient norm, seconds and the spread between samples, under names that begin with the
                role's.

        Raises:
            NonFiniteError: naming a role, if something is not finite.
        """
        start = time.perf_counter()
        with torch.set_grad_enabled(role == STUDENT):
            clip = self.roll_out(role, conditions, step)
        rolled_out = time.perf_counter()
        if len(conditions.sample_ids) > 1:
            values[f"{role}/diversity"] = float(clip.latents.detach().float().std(dim=0).mean())
        network = self.student if role == STUDENT else self.critic
        optimizer = self._optimizer(role)
        loss = self.loss(role, clip.latents, conditions, step)
        require_finite(loss.loss, role, "the loss")
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
        values[f"{role}/seconds_rollout"] = rolled_out - start
        values[f"{role}/seconds_learning"] = time.perf_counter() - rolled_out
        return loss

    def roll_out(self, role: RoleName, conditions: Conditions, step: int) -> Clip:
        """What the student makes now, for a role to learn from."""
        rollout = StudentRollout(self.rollout_engine(), self.exit_per)
        state = rollout.start(
            conditions.latent_shape,
            seed=self.seed,
            sample_ids=conditions.sample_ids,
            max_chunks=conditions.shot_index.shape[1],
            step=step,
            purpose=f"{role}_rollout",
        )
        c = conditions
        return rollout.clip(state, c.prompt_embeds, c.prompt_index, c.shot_index, c.given, final=True)

    def loss(self, role: RoleName, rollout: Latents, conditions: Conditions, step: int) -> Loss:
        """A role's loss on a rollout. To learn from something else, override this."""
        noising = self.noising(role, conditions, step)
        history = rollout.detach()
        critic = self.score(self.critic, history, conditions)
        common: dict[str, Any] = {"is_given": self.is_given(rollout.shape[1])}
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
        """A role's velocity of noisy chunks, each given the clean ones before it, as in stage 1."""
        num_chunks = conditions.shot_index.shape[1]
        tokens = self.chunk_frames * self.model_config.tokens_per_frame(*history.shape[-2:])
        attention = ChunkedAttention(
            teacher_forcing_segments(num_chunks, tokens), conditions.shot_index, self.rollout.rule
        )
        positions = self.frame_positions(conditions).repeat(1, 2)

        def velocity(latents: Latents, timesteps: PerFrame) -> Latents:
            both = role(
                latents=torch.cat([history, latents], dim=1),
                timesteps=torch.cat([torch.zeros_like(timesteps), timesteps], dim=1),
                prompt_embeds=conditions.prompt_embeds,
                prompt_index=conditions.prompt_index.repeat(1, 2),
                frame_positions=positions,
                attention=attention,
            )
            return both[:, history.shape[1] :].float()

        return velocity

    def conditions(self, batch: VideoBatch | PromptBatch) -> Conditions:
        """What a batch asks for.

        Raises:
            ValueError: if frames are to be given, and the batch has none.
        """
        prompt_embeds, prompt_index = self.embed(batch.prompts)
        codec, given = self.codec, None
        if isinstance(batch, VideoBatch):
            latents = self.encode(batch)
            shape = (latents.shape[2], latents.shape[3], latents.shape[4])
            given = latents[:, : self.given_frames] if self.given_frames else None
        elif self.given_frames:
            raise ValueError(f"given_frames={self.given_frames}, but the batch holds prompts alone; train on clips")
        else:
            shape = (codec.latent_channels, batch.height // codec.spatial_ratio, batch.width // codec.spatial_ratio)
        ids = tuple(batch.sample_ids.tolist())
        return Conditions(prompt_embeds, prompt_index, batch.shot_index, ids, shape, given)

    @torch.no_grad()
    def without_prompt(self, conditions: Conditions) -> Conditions:
        """The same videos under the negative prompt."""
        embeds = self.text_encoder.encode([self.negative_prompt]).to(self.device)
        index = torch.zeros_like(conditions.prompt_index)
        c = conditions
        return Conditions(embeds, index, c.shot_index, c.sample_ids, c.latent_shape, c.given)

    def noising(self, role: RoleName, conditions: Conditions, step: int) -> Noising:
        """At which timesteps and with which noise a role learns."""
        return draw_noising(
            conditions.latent_shape,
            self.chunk_frames,
            self.schedule,
            role,
            seed=self.seed,
            step=step,
            sample_ids=conditions.sample_ids,
            chunks=range(conditions.shot_index.shape[1]),
            per_chunk=self.timestep_per_chunk,
        )

    def frame_positions(self, conditions: Conditions) -> PerFrame:
        """RoPE position of every frame, as the rollout has it: its index, plus the offset of its shot."""
        shot = conditions.shot_index.repeat_interleave(self.chunk_frames, dim=1)
        return (torch.arange(shot.shape[1]) + self.rollout.shot_rope_offset * shot.double()).to(self.device)

    def is_given(self, num_frames: int) -> Bool[Tensor, " f"] | None:
        """Which frames the rollout was given; None: none."""
        return torch.arange(num_frames, device=self.device) < self.given_frames if self.given_frames else None

    def counted(self, conditions: Conditions) -> CountedFrames:
        """Which frames carry loss: all that were not given."""
        num_frames = conditions.shot_index.shape[1] * self.chunk_frames
        counts = torch.arange(num_frames, device=self.device) >= self.given_frames
        frames = counts.expand(len(conditions.sample_ids), -1)
        world_size = self.trainer.world_size if self._trainer is not None else 1
        return CountedFrames(frames, self.sum_over_ranks(frames.sum().float()), world_size)

    def averaged_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The student's: its average is what is generated from and exported."""
        for name, parameter in self.student.named_adapter_parameters():
            yield f"network.{name}", parameter

    def average_moves(self, step: int) -> bool:
        """Whether the student learned in the step that made the count of steps `step`."""
        return (step - 1) % self.student_every == 0

    def weights_of(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Also those of a run without adapters: the base is theirs, and the adapters are as they start."""
        own = self.state_dict()
        renamed = {base_name(name): name for name in own if base_name(name) is not None}
        found = {renamed.get(name, name): tensor for name, tensor in stored.items()}
        return {name: value for name, value in own.items() if base_name(name) is None} | super().weights_of(found)

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
