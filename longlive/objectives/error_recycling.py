"""Error recycling: train on histories that are wrong in the way in which the network's own are (Stable Video Infinity,
arXiv 2510.09212; LongLive-2.0, arXiv 2605.18739).

Rollout feeds the network its own errors; teacher forcing does not. So past prediction errors are kept, by bucket of the
training grid, and added to what the network sees. With the prediction v_hat for the target v at noise level sigma:

    E_x = x0_hat - x0 = (x_t - sigma v_hat) - x0,        E_n = (1 - sigma) (v_hat - v),

and E_n is eps_hat - eps, the error of the noise, where no error was injected into the latent.

A clip's step is *clean* with probability 0.2. Otherwise errors are injected, each kind by a draw of its own: into the
clean history (an E_x of any bucket), into the latent before it is noised (an E_x of the chunk's bucket; the target
keeps pointing at the true latent), into the noise (an E_n of its bucket; the target follows). Every chunk gets an entry
and a scale of its own. Given frames get none, because a rollout is given them without error.

**Recording.** A clip's chunks are recorded after its step; those of a clean step, whose errors are small, with
probability 0.1. A chunk that is partly padding is not recorded; the error of given frames is zero. During the warm-up
every clip of a step is recorded, afterwards one, drawn: the source fills its buffers at these rates, sharing errors
between data ranks in the warm-up only.

**All ranks have the same buffer.** The source's ranks keep what they computed themselves, so there an injected error
depends on who held which clip. Here a recorded clip is sent to all ranks, also after the warm-up, and entries are
written in the order of (step, sample id, chunk) when the optimizer steps, however the step's clips were dealt out to
ranks, accumulated batches and sequence peers. What is recorded, injected, chosen and scaled is a function of (seed,
step, sample id, chunk), and an entry is known by its age. So any number of ranks trains alike, and goes on alike.

What it costs, for chunks of m = 2 * 2 bytes * k c h w (5.2 MiB at 704x1280) and n chunks per clip:

- host memory: at most the budget in every process, and what a step records on its way there, in pinned memory;
- device memory: m for each own chunk that is recorded, and once more while it is sent;
- to all ranks: in the warm-up n m of each clip of a step, afterwards n m once per step, in one broadcast per sequence
  rank; before the forward pass of every batch, the names of its chunks (24 bytes each);
- device to host: one asynchronous copy per broadcast, waited for when the next step chooses its errors; host to device:
  one copy per kind of error.

Keeping on each sequence rank only errors of its own chunks would send nothing and save memory. It was not done: entries
would be chosen among those of one place of the clip, of which a budget of some GiB holds less than one per bucket.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from longlive import rng
from longlive.diffusion.path import per_frame, x0_from_velocity
from longlive.diffusion.schedule import TIMESTEP_SCALE
from longlive.objectives.error_buffer import LATENT, NOISE, ErrorBuffer
from longlive.objectives.error_sharing import Arrival, ChunkName, StepErrors
from longlive.objectives.teacher_forcing import InjectedErrors, TeacherForcingInputs, frames_of_chunks
from longlive.typing import Bool, Float, Int, Latents, Tensor


def prediction_errors(prediction: Latents, inputs: TeacherForcingInputs) -> Float[Tensor, "kind b f c h w"]:
    """E_x and E_n of the module docstring, float32, of the target frames; those of given frames, at timestep 0, are
    zero. Waits for nothing on the device.

    Args:
        prediction: v_hat.
        inputs: what the network got, and v.
    """
    velocity, target = prediction.float(), inputs.target.float()
    sigma = inputs.target_timesteps / TIMESTEP_SCALE
    noisy = inputs.latents[:, inputs.num_history_frames :].float()
    latent_error = x0_from_velocity(noisy, velocity, sigma) - inputs.clean.float()
    noise_error = per_frame(1 - sigma) * (velocity - target)
    return torch.stack([latent_error, noise_error]) * per_frame((sigma > 0).float())


@dataclass(frozen=True)
class Step:
    """A step on a batch: what its draws are named by, and its sizes.

    Attributes:
        seed, step, sample_ids: name the draws, together with a chunk's index in the clip.
        num_chunks: of a whole clip.
        chunk_frames: frames per chunk.
        grid_size: points of the schedule's grid.
        given_frames: first frames of a clip that a rollout is given.
    """

    seed: int
    step: int
    sample_ids: tuple[int, ...]
    num_chunks: int
    chunk_frames: int
    grid_size: int
    given_frames: int = 0

    def uniform(self, purpose: str, sample: int, chunk: int = 0) -> float:
        return rng.uniform(self.seed, purpose, step=self.step, sample=sample, chunk=chunk)

    def integer(self, high: int, purpose: str, sample: int, chunk: int) -> int:
        return rng.integer(high, self.seed, purpose, step=self.step, sample=sample, chunk=chunk)

    def is_given(self, chunks: Sequence[int]) -> Bool[Tensor, " f"]:
        """Which frames of some chunks are given."""
        return frames_of_chunks(chunks, self.chunk_frames) < self.given_frames


@dataclass(frozen=True)
class Choice:
    """One injection: the entry (bucket, age rank), scaled, into a chunk of a sample, counted among those here."""

    row: int
    column: int
    bucket: int
    age_rank: int
    scale: float


class ErrorRecycling:
    """Errors of past predictions, and when they are injected.

    Args:
        budget_mib: host memory of the buffers, in every process.
        num_buckets: equal runs of the schedule's grid.
        warm_up_steps: optimizer steps that record all their clips; later ones record one.
        clean_probability: that nothing is injected into a clip.
        history_probability: otherwise, that its clean history gets errors.
        latent_probability: the same of the latents that are noised.
        noise_probability: the same of the noise.
        clean_update_probability: that a clip into which nothing was to be injected may be recorded.
        scale_spread: an injected error is multiplied by a number drawn between 1 - this and 1 + this.

    Raises:
        ValueError: if a setting is out of its range.
    """

    def __init__(
        self,
        *,
        budget_mib: float | int = 2048,
        num_buckets: int = 50,
        warm_up_steps: int = 50,
        clean_probability: float | int = 0.2,
        history_probability: float | int = 0.9,
        latent_probability: float | int = 0.9,
        noise_probability: float | int = 0.01,
        clean_update_probability: float | int = 0.1,
        scale_spread: float | int = 0.3,
    ) -> None:
        shares = {
            "clean_probability": clean_probability,
            "history_probability": history_probability,
            "latent_probability": latent_probability,
            "noise_probability": noise_probability,
            "clean_update_probability": clean_update_probability,
            "scale_spread": scale_spread,
        }
        for name, value in shares.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value} must be between 0 and 1")
        if warm_up_steps < 0:
            raise ValueError(f"warm_up_steps={warm_up_steps} must be at least 0")
        self.buffer = ErrorBuffer(num_buckets, budget_mib)
        self.warm_up_steps = warm_up_steps
        self.clean_probability = clean_probability
        self.probability = {"history": history_probability, "latent": latent_probability, "noise": noise_probability}
        self.clean_update_probability = clean_update_probability
        self.scale_spread = scale_spread
        self.num_steps = 0
        """Optimizer steps that were recorded."""
        self._step: Step | None = None
        self._errors = StepErrors()
        self._arrivals: list[Arrival] = []

    def bucket(self, grid_index: int, grid_size: int) -> int:
        """The bucket of a point of the schedule's grid."""
        return grid_index * self.buffer.num_buckets // grid_size

    def is_clean(self, step: Step, sample: int) -> bool:
        """Whether nothing is injected into a clip."""
        return step.uniform("error_clean", sample) < self.clean_probability

    def may_record(self, step: Step, sample: int) -> bool:
        """Whether the errors of a clip may enter the buffer."""
        return not self.is_clean(step, sample) or step.uniform("error_update", sample) < self.clean_update_probability

    def inject(
        self,
        step: Step,
        latents: Latents,
        history: Sequence[int],
        targets: Sequence[int],
        grid_index: Int[Tensor, "b targets"],
    ) -> InjectedErrors:
        """The errors to add to a batch, on the device of its latents, float32.

        Args:
            step: names the draws.
            latents: of which device and frame size matter.
            history, targets: the chunks whose clean and whose noisy copies are here.
            grid_index: of the targets.

        Raises:
            ValueError: if the recorded errors are of another size.
        """
        self._settle()
        buckets = [[self.bucket(index, step.grid_size) for index in row] for row in grid_index.tolist()]

        def errors(name: str, kind: int, chunks: Sequence[int], buckets: list[list[int]] | None) -> Tensor | None:
            choices = self.choose(step, name, chunks, buckets)
            return self._place(step, choices, kind, chunks, latents) if choices else None

        return InjectedErrors(
            history=errors("history", LATENT, history, None),
            latents=errors("latent", LATENT, targets, buckets),
            noise=errors("noise", NOISE, targets, buckets),
        )

    def choose(
        self, step: Step, name: str, chunks: Sequence[int], buckets: Sequence[Sequence[int]] | None
    ) -> list[Choice]:
        """The entries to inject into `chunks` of every sample.

        Args:
            step: names the draws.
            name: `history`, `latent` or `noise`.
            chunks: in the order in which `Choice.column` counts them.
            buckets: `[sample][chunk]`: the bucket to choose from; None: any.
        """
        found = []
        for row, sample in enumerate(step.sample_ids):
            if self.is_clean(step, sample) or step.uniform(f"error_{name}", sample) >= self.probability[name]:
                continue
            for column, chunk in enumerate(chunks):
                bucket = None if buckets is None else buckets[row][column]
                number = len(self.buffer) if bucket is None else self.buffer.size(bucket)
                if number == 0:
                    continue
                entry = step.integer(number, f"error_{name}_entry", sample, chunk)
                place = self.buffer.locate(entry) if bucket is None else (bucket, entry)
                spread = 2 * step.uniform(f"error_{name}_scale", sample, chunk) - 1
                found.append(Choice(row, column, *place, 1 + self.scale_spread * spread))
        return found

    def _place(
        self, step: Step, choices: Sequence[Choice], kind: int, chunks: Sequence[int], latents: Latents
    ) -> Float[Tensor, "b placed c h w"]:
        """The chosen errors where they belong among the frames of `chunks`, and zeros elsewhere."""
        device = latents.device
        entries = self.buffer.take(kind, [(c.bucket, c.age_rank) for c in choices], pin=latents.is_cuda)
        if entries.shape[1:] != (step.chunk_frames, *latents.shape[2:]):
            raise ValueError(
                f"the recorded errors are of chunks of {list(entries.shape[1:])}, and the chunks here are "
                f"{[step.chunk_frames, *latents.shape[2:]]}; keep the clips' size, or start a new run with "
                "initialise_from"
            )
        # The dtype is named, because Lightning's true half precision changes torch's default during a step.
        scales = torch.tensor([choice.scale for choice in choices], dtype=torch.float32).to(device)
        rows, columns = torch.tensor([(choice.row, choice.column) for choice in choices]).T.to(device)
        scaled = entries.to(device, non_blocking=True).float() * scales[:, None, None, None, None]
        errors = scaled.new_zeros(len(step.sample_ids), len(chunks), *scaled.shape[1:])
        errors[rows, columns] = scaled
        is_predicted = ~step.is_given(chunks).to(device)
        return errors.flatten(1, 2) * is_predicted[:, None, None, None]

    def announce(
        self, step: Step, targets: Sequence[int], inputs: TeacherForcingInputs, scored: Bool[Tensor, "b f"]
    ) -> None:
        """Tell all ranks which chunks of a batch have errors to record. Every rank must call it, before the forward
        pass, so that nothing need wait for the device after it.

        Args:
            step: names the draws.
            targets: the chunks whose noisy copies are here.
            inputs: of the batch.
            scored: target frames that carry loss, on the CPU.
        """
        if self._step is None or self._step.step != step.step:
            self._step, self._errors = step, StepErrors()
        shape = (len(step.sample_ids), len(targets), step.chunk_frames)
        is_scored, is_given = scored.view(shape), step.is_given(targets).view(shape[1:])
        is_whole = (is_scored | is_given).all(2) & is_scored.any(2)
        grid_index = inputs.grid_index.tolist()
        names = [
            ChunkName(step.sample_ids[row], targets[column], self.bucket(grid_index[row][column], step.grid_size))
            for row, column in is_whole.nonzero().tolist()
        ]
        self._errors.announce(names, len(step.sample_ids) * step.num_chunks, inputs.latents.device)

    @torch.no_grad()
    def record(self, step: Step, targets: Sequence[int], inputs: TeacherForcingInputs, prediction: Latents) -> None:
        """Keep the errors of a batch that was announced until `commit`, if they are wanted."""
        wanted = self._wanted(step)
        # Of the batches before, a clip that is not drawn any more is dropped.
        self._errors.drop_all_but(wanted)
        found, names = {}, self._errors.missing(wanted, step.sample_ids)
        if names:
            errors = prediction_errors(prediction, inputs).to(torch.bfloat16)
            errors = errors.unflatten(2, (len(targets), step.chunk_frames))
            for name in names:
                place = step.sample_ids.index(name.sample), targets.index(name.chunk)
                found[name] = errors[:, *place].clone()
        like = prediction.new_empty(0, 2, step.chunk_frames, *prediction.shape[2:], dtype=torch.bfloat16)
        self._errors.hold(found, like)

    def _wanted(self, step: Step) -> set[int]:
        """The samples to record, of the batches so far."""
        samples = self._errors.samples
        if samples and self.num_steps >= self.warm_up_steps:
            samples = {min(samples, key=lambda sample: (step.uniform("error_clip", sample), sample))}
        return {sample for sample in samples if self.may_record(step, sample)}

    @torch.no_grad()
    def commit(self) -> None:
        """The end of an optimizer step: send its errors to all ranks and on to the host. Every rank must call it."""
        self._settle()
        if self._step is not None:
            self._arrivals = self._errors.send(self._wanted(self._step))
        self._step, self._errors = None, StepErrors()
        self.num_steps += 1

    def _settle(self) -> None:
        """Write what has arrived into the buffer, in the order of its names."""
        arrivals, self._arrivals = self._arrivals, []
        pairs = [pair for arrival in arrivals for pair in zip(arrival.names, arrival.wait(), strict=True)]
        for name, errors in sorted(pairs, key=lambda pair: pair[0]):
            self.buffer.append(name.bucket, errors)

    def state_dict(self) -> dict[str, Any]:
        """What the next step injects from. A step that is not committed is not in it: a resumed run repeats it."""
        self._settle()
        return {"num_steps": self.num_steps, "errors": self.buffer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state.

        Raises:
            ValueError: as `ErrorBuffer.load_state_dict`.
        """
        self.buffer.load_state_dict(state["errors"])
        self.num_steps = int(state["num_steps"])
        self._step, self._errors, self._arrivals = None, StepErrors(), []
