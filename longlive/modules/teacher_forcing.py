"""Stage 1: tune a bidirectional network into an autoregressive one by teacher forcing
(`objectives.teacher_forcing`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from longlive import rng
from longlive.data.batch import VideoBatch
from longlive.models.attention import ChunkedAttention, SelfAttention
from longlive.models.visibility import VisibilityRule, teacher_forcing_segments
from longlive.modules.base import LongLiveModule
from longlive.objectives.teacher_forcing import (
    TeacherForcingInputs,
    draw,
    frame_errors,
    make_inputs,
    valid_frames,
    weighted_loss,
)
from longlive.typing import Int, Latents, PerFrame, Tensor

VALIDATION_STEP = -1
"""Validation draws its timesteps and noise as if at this step: the same ones every time, and none of training's."""


class TeacherForcingModule(LongLiveModule):
    """Predict the velocity of every chunk from its noisy copy and the clean chunks before it.

    To change the loss, override `frame_losses`; to change what the network sees, `make_inputs` or `attention`.

    Args:
        prompt_dropout: probability that a sample's prompts are replaced by the empty one, for classifier-free guidance.
        noise_augmentation: the clean history gets up to this share of noise, so that the network learns not to trust
            it blindly.
        window: frames that a chunk sees in training (sinks and itself included), None: all; usually the rollout's
            window.
        sink_frames: first frames that stay visible under a window.
        shot_sink: whether the first chunk of the current shot does, too.
        shot_rope_offset: frames by which a scene cut moves the RoPE position.
        **base: see `LongLiveModule`.
    """

    def __init__(
        self,
        *,
        prompt_dropout: float = 0.0,
        noise_augmentation: float = 0.0,
        window: int | None = None,
        sink_frames: int = 0,
        shot_sink: bool = False,
        shot_rope_offset: float = 0.0,
        **base: Any,
    ) -> None:
        super().__init__(**base)
        for name, value in (("prompt_dropout", prompt_dropout), ("noise_augmentation", noise_augmentation)):
            if not 0 <= value < 1:
                raise ValueError(f"{name}={value} must be at least 0 and below 1")
        self.prompt_dropout = prompt_dropout
        self.noise_augmentation = noise_augmentation
        self.shot_rope_offset = shot_rope_offset
        self.rule = VisibilityRule.from_frames(window, sink_frames, shot_sink, self.chunk_frames)

    def training_step(self, batch: VideoBatch, batch_index: int) -> dict[str, Tensor]:
        """The loss, and what a callback needs to break it down: frame errors, timesteps and validity, `[b f]` each."""
        return self._step(batch, self.global_step, self.prompt_dropout)

    def validation_step(self, batch: VideoBatch, batch_index: int) -> Tensor:
        result = self._step(batch, VALIDATION_STEP, prompt_dropout=0.0)
        self.log("validation/loss", result["loss"], batch_size=batch.batch_size, sync_dist=True, prog_bar=True)
        return result["loss"]

    def _step(self, batch: VideoBatch, step: int, prompt_dropout: float) -> dict[str, Tensor]:
        self.on_phase("encode")
        latents = self.encode(batch)
        prompt_embeds, prompt_index = self.embed(self._drop_prompts(batch, step, prompt_dropout))
        inputs = self.make_inputs(latents, batch, step)
        valid = valid_frames(batch.num_valid_frames, latents.shape[1], batch.frame_offset).to(latents.device)

        self.on_phase("forward")
        prediction = self.predict(inputs, batch, prompt_embeds, prompt_index)
        losses = self.frame_losses(prediction, inputs)
        num_valid = self.sum_over_ranks(valid.sum().float())
        world_size = self.trainer.world_size if self._trainer is not None else 1
        return {
            "loss": weighted_loss(losses, inputs.loss_weights, valid, num_valid, world_size),
            "frame_errors": losses.detach(),
            "timesteps": inputs.target_timesteps,
            "valid": valid,
        }

    def make_inputs(self, latents: Latents, batch: VideoBatch, step: int) -> TeacherForcingInputs:
        """Draw timesteps and noise, and make the two copies."""
        draws = draw(
            latents.shape,
            self.chunk_frames,
            self.schedule,
            seed=self.seed,
            step=step,
            sample_ids=batch.sample_ids.tolist(),
            first_chunk=batch.frame_offset // self.chunk_frames,
            noise_augmentation=self.noise_augmentation,
        )
        return make_inputs(latents, draws, self.schedule, self.chunk_frames)

    def predict(
        self, inputs: TeacherForcingInputs, batch: VideoBatch, prompt_embeds: Tensor, prompt_index: Int[Tensor, "b p"]
    ) -> Latents:
        """The network's velocity for the noisy copy."""
        num_frames = inputs.target.shape[1]
        positions = self.frame_positions(batch, num_frames).repeat(1, 2)
        velocity: Latents = self.trained_network(
            latents=inputs.latents,
            timesteps=inputs.timesteps,
            prompt_embeds=prompt_embeds,
            prompt_index=prompt_index.repeat(1, 2),
            frame_positions=positions,
            attention=self.attention(batch, inputs.latents),
        )
        return velocity[:, num_frames:]

    def attention(self, batch: VideoBatch, latents: Latents) -> SelfAttention:
        """Who sees whom, for the clean and noisy copies in `latents`."""
        _, num_frames, _, height, width = latents.shape
        rows, columns = self.model_config.patches(height, width)
        num_chunks = num_frames // 2 // self.chunk_frames
        segments = teacher_forcing_segments(num_chunks, self.chunk_frames * rows * columns)
        return ChunkedAttention(segments, batch.shot_index, self.rule)

    def frame_positions(self, batch: VideoBatch, num_frames: int) -> PerFrame:
        """RoPE position of every frame: its index in the clip, plus the offset of its shot."""
        index = batch.frame_offset + torch.arange(num_frames)
        shot = batch.shot_index.repeat_interleave(self.chunk_frames, dim=1)
        return (index + self.shot_rope_offset * shot.float()).to(self.device)

    def frame_losses(self, prediction: Latents, inputs: TeacherForcingInputs) -> PerFrame:
        """One unweighted loss per noisy frame. Weights, padding and averaging are applied afterwards."""
        return frame_errors(prediction, inputs.target)

    def _drop_prompts(self, batch: VideoBatch, step: int, probability: float) -> Sequence[Sequence[str]]:
        if not probability:
            return batch.prompts
        return [
            [""] * len(row) if rng.uniform(self.seed, "prompt_dropout", step=step, sample=sample) < probability else row
            for row, sample in zip(batch.prompts, batch.sample_ids.tolist(), strict=True)
        ]
