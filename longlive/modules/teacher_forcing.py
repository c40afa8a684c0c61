"""Stage 1: tune a bidirectional network into an autoregressive one by teacher forcing
(`objectives.teacher_forcing`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

from longlive import rng
from longlive.data.batch import VideoBatch
from longlive.models.attention import SelfAttention
from longlive.models.visibility import Role, VisibilityRule
from longlive.modules.base import LongLiveModule
from longlive.objectives.error_recycling import ErrorRecycling, Step
from longlive.objectives.pieces import HeldPieces
from longlive.objectives.teacher_forcing import (
    TeacherForcingInputs,
    draw,
    frame_errors,
    frames_of_chunks,
    make_inputs,
    weighted_loss,
)
from longlive.typing import Bool, Int, Latents, PerFrame, Tensor

VALIDATION_STEP = -1
"""Validation draws its timesteps and noise as if at this step: the same ones every time, and none of training's."""


class TeacherForcingModule(LongLiveModule):
    """Predict the velocity of every chunk from its noisy copy and the clean chunks before it.

    To change the loss, override `frame_losses`; to change what the network sees, `make_inputs` or `attention`. Under a
    sequence-parallel strategy all of these see this process's frames alone, and work unchanged.

    Args:
        prompt_dropout: probability that a sample's prompts are replaced by the empty one, for classifier-free guidance.
        noise_augmentation: the clean history gets up to this share of noise, so that the network learns not to trust
            it blindly.
        window: frames that a chunk sees in training (sinks and itself included), None: all; usually the rollout's
            window.
        sink_frames: first frames that stay visible under a window.
        shot_sink: whether the first chunk of the current shot does, too.
        shot_rope_offset: frames by which a scene cut moves the RoPE position.
        given_frames: first frames of a clip that rollout is given: they stay clean among the targets and carry no
            loss. 1: image to video.
        error_recycling: adds errors of earlier predictions to what the network sees in training; None: does not.
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
        given_frames: int = 0,
        error_recycling: ErrorRecycling | None = None,
        **base: Any,
    ) -> None:
        super().__init__(**base)
        if given_frames < 0:
            raise ValueError(f"given_frames={given_frames} must be at least 0")
        for name, value in (("prompt_dropout", prompt_dropout), ("noise_augmentation", noise_augmentation)):
            if not 0 <= value < 1:
                raise ValueError(f"{name}={value} must be at least 0 and below 1")
        self.prompt_dropout = prompt_dropout
        self.noise_augmentation = noise_augmentation
        self.shot_rope_offset = shot_rope_offset
        self.given_frames = given_frames
        self.error_recycling = error_recycling
        self.rule = VisibilityRule.from_frames(window, sink_frames, shot_sink, self.chunk_frames)

    def training_step(self, batch: VideoBatch, batch_index: int) -> dict[str, Tensor]:
        """The loss, and what a callback needs to break it down: errors, timesteps and whether they are scored of the
        target frames here, `[b f]` each, and where in the clip they are, `[f]` in [0, 1)."""
        return self._step(batch, self.global_step, self.prompt_dropout)

    def validation_step(self, batch: VideoBatch, batch_index: int) -> Tensor:
        result = self._step(batch, VALIDATION_STEP, prompt_dropout=0.0)
        self.log("validation/loss", result["loss"], batch_size=batch.batch_size, sync_dist=True, prog_bar=True)
        return result["loss"]

    def _step(self, batch: VideoBatch, step: int, prompt_dropout: float) -> dict[str, Tensor]:
        self.check(batch)
        self.on_phase("encode")
        latents = self.encode(batch)
        prompt_embeds, prompt_index = self.embed(self._drop_prompts(batch, step, prompt_dropout), batch.prompt_embeds)
        inputs = self.make_inputs(latents, batch, step)
        targets = self.chunks(batch, Role.NOISY)
        frame_index = frames_of_chunks(targets, self.chunk_frames)
        scored_here = self.scored_frames(batch, frame_index)
        scored = scored_here.to(latents.device)
        recycling = self.error_recycling if step != VALIDATION_STEP else None
        if recycling is not None:
            recycling.announce(self.recycled_step(batch, step), targets, inputs, scored_here)

        self.on_phase("forward")
        prediction = self.predict(inputs, batch, prompt_embeds, prompt_index)
        if recycling is not None:
            recycling.record(self.recycled_step(batch, step), targets, inputs, prediction)
        losses = self.frame_losses(prediction, inputs)
        num_scored = self.sum_over_ranks(scored.sum().float())
        world_size = self.trainer.world_size if self._trainer is not None else 1
        return {
            "loss": weighted_loss(losses, inputs.loss_weights, scored, num_scored, world_size),
            "frame_errors": losses.detach(),
            "timesteps": inputs.target_timesteps,
            "scored": scored,
            "clip_position": (frame_index / (batch.shot_index.shape[1] * self.chunk_frames)).to(latents.device),
        }

    def check(self, batch: VideoBatch) -> None:
        """Raise a `ValueError` for a batch whose prompts are not one per chunk: ranks would read different ones."""
        num_chunks = batch.shot_index.shape[1]
        for sample, row in zip(batch.sample_ids.tolist(), batch.prompts, strict=True):
            if len(row) != num_chunks:
                raise ValueError(
                    f"sample {sample} has {len(row)} prompts for {num_chunks} chunks; give one prompt per chunk of the "
                    "whole clip, on every rank"
                )

    def chunks(self, batch: VideoBatch, role: Role) -> tuple[int, ...]:
        """The chunks of the clip that this process holds in a role."""
        return self.pieces(batch).chunks(role)

    def scored_frames(self, batch: VideoBatch, frame_index: Int[Tensor, " f"]) -> Bool[Tensor, "b f"]:
        """Which target frames carry loss: no padding, no given frame, no sample that sequence peers read differently.

        Args:
            batch: the batch.
            frame_index: index in the clip of every target frame.
        """
        scored = frame_index < batch.num_valid_frames[:, None]
        if self.given_frames:
            scored &= frame_index >= self.given_frames
        return scored & self.agreed(batch)[:, None]

    def make_inputs(self, latents: Latents, batch: VideoBatch, step: int) -> TeacherForcingInputs:
        """Draw timesteps, noise and errors of earlier predictions, and make both copies.

        Args:
            latents: of this process's frames.
            batch: the batch.
            step: names the draws.
        """
        history, targets = self.chunks(batch, Role.CLEAN), self.chunks(batch, Role.NOISY)
        draws = draw(
            latents.shape[2:],
            self.chunk_frames,
            self.schedule,
            seed=self.seed,
            step=step,
            sample_ids=batch.sample_ids.tolist(),
            history=history,
            targets=targets,
            noise_augmentation=self.noise_augmentation,
        )
        errors = None
        if self.error_recycling is not None and step != VALIDATION_STEP:
            names = self.recycled_step(batch, step)
            errors = self.error_recycling.inject(names, latents, history, targets, draws.grid_index)
        first = self.frames(batch.shot_index.shape[1]).start
        history_frames, target_frames = (frames_of_chunks(chunks, self.chunk_frames) for chunks in (history, targets))
        return make_inputs(
            latents[:, history_frames - first],
            latents[:, target_frames - first],
            draws,
            self.schedule,
            self.chunk_frames,
            is_given=target_frames < self.given_frames if self.given_frames else None,
            history_is_given=history_frames < self.given_frames if self.given_frames else None,
            errors=errors,
        )

    def recycled_step(self, batch: VideoBatch, step: int) -> Step:
        """What names the draws of error recycling."""
        return Step(
            seed=self.seed,
            step=step,
            sample_ids=tuple(batch.sample_ids.tolist()),
            num_chunks=batch.shot_index.shape[1],
            chunk_frames=self.chunk_frames,
            grid_size=self.schedule.num_steps,
            given_frames=self.given_frames,
        )

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        if self.error_recycling is not None:
            self.error_recycling.commit()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.error_recycling is not None:
            checkpoint["error_recycling"] = self.error_recycling.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Errors come with a checkpoint of a run that recycled them; other runs' begin without."""
        super().on_load_checkpoint(checkpoint)
        if self.error_recycling is not None and "error_recycling" in checkpoint:
            self.error_recycling.load_state_dict(checkpoint["error_recycling"])

    def predict(
        self,
        inputs: TeacherForcingInputs,
        batch: VideoBatch,
        prompt_embeds: Tensor,
        prompt_index: Int[Tensor, "b chunk"],
    ) -> Latents:
        """The network's velocity for the targets."""
        pieces = self.pieces(batch)
        tokens_per_frame = self.model_config.tokens_per_frame(*inputs.latents.shape[-2:])
        self.place_tokens(pieces.token_positions(batch.sample_ids, tokens_per_frame))
        velocity: Latents = self.trained_network(
            latents=inputs.latents,
            timesteps=inputs.timesteps,
            prompt_embeds=prompt_embeds,
            prompt_index=pieces.prompt_index(prompt_index),
            frame_positions=pieces.frame_positions(self.device),
            attention=self.attention(batch, inputs.latents),
        )
        return velocity[:, inputs.num_history_frames :]

    def pieces(self, batch: VideoBatch) -> HeldPieces:
        """What this process holds of the clips."""
        return HeldPieces(batch.shot_index, self.chunk_frames, self.sequence, self.rule, self.shot_rope_offset)

    def attention(self, batch: VideoBatch, latents: Latents) -> SelfAttention:
        """Who sees whom, for clean and noisy copies of the size of `latents`, on all ranks of the sequence group."""
        return self.pieces(batch).attention(self.model_config.tokens_per_frame(*latents.shape[-2:]))

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
