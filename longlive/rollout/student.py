"""The student's rollout: what a few-step model generates, with a graph through one network call per chunk.

A chunk starts from noise and takes the steps of the solver that the finished model will take. At its *exit step*, drawn
from them all, it stops: the prediction of clean latents made there is the chunk. That call alone carries gradients
(Self-Forcing, arXiv 2506.08009); the steps before it, and the context pass that writes the chunk into the cache, carry
none, so memory is that of one call per chunk. Gradients do not flow from a chunk to the earlier ones that it sees.

At the last step the prediction of clean latents *is* where the solver arrives. So a rollout that always exits there is
the rollout of `engine.py`, number for number.

The exit step is a function of (seed, step) and, where every chunk has its own, of the chunk: all ranks exit alike.

Backward may run the blocks again (activation checkpointing): the cache retains what each call has read. Whoever chooses
what the network is (an adapter) keeps that choice until backward is through.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from longlive import rng
from longlive.diffusion.path import x0_from_velocity
from longlive.diffusion.solver import make_solver
from longlive.rollout.engine import ChunkCondition, RolloutEngine, hold
from longlive.rollout.request import GivenFrames, check_given
from longlive.rollout.settings import RolloutSettings
from longlive.rollout.state import RolloutState
from longlive.typing import Int, Latents, PromptEmbeds, Tensor

EXITS = ("rollout", "chunk")


@dataclass(frozen=True)
class Clip:
    """A run of chunks that a rollout made.

    Attributes:
        latents: `[b f c h w]`, float32. With a graph, unless made under `no_grad`.
        exit_steps: of every chunk.
        first_chunk: index in the video of the first of them.
    """

    latents: Latents
    exit_steps: tuple[int, ...]
    first_chunk: int


class StudentRollout:
    """Rolls out clip after clip.

    Args:
        engine: over the student's network, with its number of steps and without guidance.
        exit_per: `rollout`: one exit step for all chunks of a clip; `chunk`: one for each.

    Raises:
        ValueError: for an engine with guidance, or another `exit_per`.
    """

    def __init__(self, engine: RolloutEngine, exit_per: str = "rollout") -> None:
        self.check(engine.settings, exit_per)
        self.engine = engine
        self.exit_per = exit_per

    @staticmethod
    def check(settings: RolloutSettings, exit_per: str) -> None:
        """Raise the `ValueError` for settings that a student cannot have."""
        if settings.guided:
            raise ValueError(
                f"guidance_scale={settings.guidance_scale}: a student learns to do without guidance; set "
                "guidance_scale=1 for its rollouts (the teacher's guidance is the objective's)"
            )
        if exit_per not in EXITS:
            raise ValueError(f"exit_per={exit_per!r} is unknown; use {' or '.join(EXITS)}")

    def start(
        self,
        latent_shape: tuple[int, int, int],
        *,
        seed: int,
        sample_ids: Sequence[int],
        max_chunks: int,
        step: int,
        purpose: str,
        recaches: Collection[int] = (),
    ) -> RolloutState:
        """A rollout that has made nothing yet. Arguments and errors as `RolloutEngine.start`."""
        return self.engine.start(
            latent_shape, seed, sample_ids, max_chunks, step=step, purpose=purpose, retain=True, recaches=recaches
        )

    def exit_step(self, state: RolloutState, first_chunk: int) -> int:
        """Where the next chunk exits, in a clip that began at `first_chunk`."""
        chunk = state.next_chunk if self.exit_per == "chunk" else first_chunk
        return rng.integer(
            self.engine.settings.num_steps, state.seed, f"{state.purpose}_exit", step=state.step, chunk=chunk
        )

    def clip(
        self,
        state: RolloutState,
        prompt_embeds: PromptEmbeds,
        prompt_index: Int[Tensor, "b p"],
        shot_index: Int[Tensor, "b p"],
        given: GivenFrames | None = None,
        final: bool = False,
    ) -> Clip:
        """The next `p` chunks. The rollout can go on from where it ends: what follows sees them detached.

        Args:
            state: from `start`, or where an earlier clip ended.
            prompt_embeds: the distinct prompts, the same ones in every clip.
            prompt_index: which of them every chunk follows.
            shot_index: shot of every chunk, counted from 0 in each sample.
            given: the first frames of the video, where the rollout is given them (image to video: one).
            final: whether it does not go on: nobody looks back at the last chunk, which then needs no context pass.

        Raises:
            ValueError: if frames are given that cannot begin these videos.
        """
        num_frames = (state.next_chunk + prompt_index.shape[1]) * self.engine.settings.chunk_frames
        check_given(given, (len(state.sample_ids), num_frames, *state.latent_shape))
        first, exits, chunks = state.next_chunk, [], []
        prompt_index = prompt_index.to(self.engine.device)
        for position in range(prompt_index.shape[1]):
            exits.append(self.exit_step(state, first))
            condition = self.engine.open_chunk(
                state, prompt_embeds, prompt_index[:, position], shot_index[:, position].tolist()
            )
            chunks.append(self._chunk(state, condition, exits[-1], self.engine.given_of(state.next_chunk, given)))
            if not final or position + 1 < prompt_index.shape[1]:
                self.engine.write(state, condition, chunks[-1].detach())
        return Clip(torch.cat(chunks, dim=1), tuple(exits), first)

    def _chunk(
        self, state: RolloutState, condition: ChunkCondition, exit_step: int, given: GivenFrames | None
    ) -> Latents:
        settings = self.engine.settings
        num_given = 0 if given is None else given.shape[1]
        x = hold(self.engine.noise(state), given)
        solver = make_solver(settings.solver, settings.num_steps, self.engine.schedule)
        for index, (timestep, sigma) in enumerate(solver):
            timesteps, sigmas = (torch.full(x.shape[:2], value, device=x.device) for value in (timestep, sigma))
            timesteps[:, :num_given] = 0
            if index == exit_step:
                velocity = self.engine.velocity(condition, x, timesteps)
                return hold(x0_from_velocity(x, velocity, sigmas), given)
            with torch.no_grad():
                x = hold(solver.step(self.engine.velocity(condition, x, timesteps), x), given)
        raise AssertionError(f"exit_step={exit_step} is none of {settings.num_steps} steps")
