"""Where the time of a step goes, and how many tokens and samples it moves.

Phases of a step: *data* (waiting for the loader), *encode* (codec, text encoder, noise), *forward*, *backward*,
*optimizer* (clipping, step, everything until the batch ends); with gradient accumulation, each summed over the step's
batches. Phases are measured on the steps that are logged; on an accelerator each border then waits for the device,
which other steps never do. Tokens are those of the network's sequence, clean history and noisy targets, on all ranks:
those of teacher forcing. (Distillation measures its own steps, `callbacks.role_curves`.)
"""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from longlive.data.batch import VideoBatch
from longlive.modules.base import LongLiveModule
from longlive.modules.teacher_forcing import TeacherForcingModule
from longlive.typing import Tensor

PHASES = ("data", "encode", "forward", "backward", "optimizer")


class Throughput(Callback):
    """Logs `throughput/{tokens_per_second,step_seconds}`, `throughput/seconds_{phase}`, `progress/{samples,tokens}`.

    Samples and tokens are counted since the first step of the run and survive resuming.

    Args:
        every_n_steps: optimizer steps between two logged ones.

    Raises:
        ValueError: before training, for a module of another kind than `TeacherForcingModule`.
    """

    def __init__(self, every_n_steps: int = 10) -> None:
        self.every_n_steps = every_n_steps
        self.num_samples = 0
        self.num_tokens = 0
        self.tokens_per_second = 0.0
        """Of the last log interval; the progress bar shows it."""
        self._seconds: dict[str, float] = {}
        self._phase: str | None = None
        self._phase_start = self._batch_end = time.perf_counter()
        self._interval_start = time.perf_counter()
        self._interval_tokens = 0
        self._interval_steps = 0
        self._measured = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raise a `ValueError` for a stage whose steps are other work, before a network is built."""
        if stage == "fit" and not isinstance(pl_module, TeacherForcingModule):
            raise ValueError(
                "Throughput counts the tokens and phases of teacher forcing, and the steps of "
                f"{type(pl_module).__name__} are others; use callbacks.throughput=null"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, LongLiveModule)
        pl_module.on_phase = self._begin
        self._batch_end = self._interval_start = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._measured = (trainer.global_step + 1) % self.every_n_steps == 0
        self._seconds["data"] = self._seconds.get("data", 0.0) + time.perf_counter() - self._batch_end
        self._phase = None

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._begin("backward")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._begin("optimizer")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: VideoBatch, batch_idx: int
    ) -> None:
        self._begin(None)
        assert isinstance(pl_module, LongLiveModule)
        # The ranks of a sequence group share their clips.
        data_size = trainer.world_size // pl_module.sequence.size
        tokens = num_tokens(batch, pl_module) * data_size
        self.num_tokens += tokens
        self.num_samples += batch.batch_size * data_size
        self._interval_tokens += tokens
        if trainer.fit_loop._should_accumulate():
            self._batch_end = time.perf_counter()
            return
        self._interval_steps += 1
        if self._measured:
            now = time.perf_counter()
            elapsed = now - self._interval_start
            self.tokens_per_second = self._interval_tokens / elapsed
            values = {f"throughput/seconds_{phase}": self._seconds.get(phase, 0.0) for phase in PHASES}
            values["throughput/tokens_per_second"] = self.tokens_per_second
            values["throughput/step_seconds"] = elapsed / self._interval_steps
            values["progress/samples"] = float(self.num_samples)
            values["progress/tokens"] = float(self.num_tokens)
            for logger in trainer.loggers:
                logger.log_metrics(values, step=trainer.global_step - 1)
            self._interval_start, self._interval_tokens, self._interval_steps = now, 0, 0
        self._seconds, self._measured = {}, False
        self._batch_end = time.perf_counter()

    def _begin(self, phase: str | None) -> None:
        """End the running phase and start another one."""
        if not self._measured:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._phase is not None:
            self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + now - self._phase_start
        self._phase, self._phase_start = phase, now

    def state_dict(self) -> dict[str, Any]:
        return {"num_samples": self.num_samples, "num_tokens": self.num_tokens}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.num_samples = int(state_dict["num_samples"])
        self.num_tokens = int(state_dict["num_tokens"])


def num_tokens(batch: VideoBatch, module: LongLiveModule) -> int:
    """Tokens of the batch's whole sequences, clean and noisy copies together, on all ranks of a sequence group."""
    num_copies = sum(len(rank) for rank in module.sequence.layout(batch.shot_index.shape[1]).pieces)
    if batch.latents is not None:
        height, width = batch.latents.shape[-2:]
    else:
        assert batch.raw_frames is not None
        height, width = (size // module.codec.spatial_ratio for size in batch.raw_frames.shape[-2:])
    rows, columns = module.model_config.patches(height, width)
    return batch.batch_size * num_copies * module.chunk_frames * rows * columns
