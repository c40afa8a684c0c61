"""A loss or a gradient that is no number ends the run before it reaches the weights.

Going on would make every weight NaN, and the next checkpoint replace a good one by that. Skipping the step would hide
what is wrong. So the run ends, on all ranks at once, without another checkpoint; a file in the run's directory, and the
message, name the samples of the step.

The price is one reduction and one look at the device per optimizer step, after its backward.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from longlive.data.atomic import write_aside
from longlive.data.datamodule import VideoDataModule
from longlive.modules.base import LongLiveModule
from longlive.objectives.finite import NonFiniteError
from longlive.typing import Tensor

NON_FINITE = "non_finite.json"
"""The file's name in the run's directory."""


@dataclass(frozen=True)
class MicroBatch:
    """What a rank trained on.

    Attributes:
        rank: the process.
        sample_ids: of the clips; ranks that share clips have the same.
        keys: what the shards call them; empty if the data have no such names.
        loss: as text, because JSON knows no NaN; this rank's part, on its own scale.
    """

    rank: int
    sample_ids: tuple[int, ...]
    keys: tuple[str, ...]
    loss: str


class StopOnNonFinite(Callback):
    """Raises `NonFiniteError` instead of a step whose loss or gradient is NaN or infinite.

    Also of a module that steps by hand and finds it itself, the file is written, then by the rank that found it.

    Args:
        directory: the run's; where `non_finite.json` is written.
    """

    def __init__(self, directory: str) -> None:
        self.directory = Path(directory)
        self._batches: list[tuple[tuple[int, ...], Tensor | None]] = []
        self._is_reported = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        if progress.processed % trainer.accumulate_grad_batches == 0:
            self._batches = []
        self._batches.append((tuple(batch.sample_ids.tolist()), None))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        # The last one of a module that steps by hand, and several times in a batch.
        scale = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
        self._batches[-1] = (self._batches[-1][0], loss.detach().float() * scale)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        assert isinstance(pl_module, LongLiveModule)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        losses = [loss for _, loss in self._batches if loss is not None]
        is_bad = ~torch.stack([*losses, norm.to(losses[0] if losses else norm)]).isfinite().all()
        if bool(pl_module.sum_over_ranks(is_bad.float()) > 0):
            self._report(trainer, _everywhere(self._own(trainer)), float(norm))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, NonFiniteError) and not self._is_reported:
            own = self._own(trainer)
            self._write(trainer, own, None, str(exception))
            exception.add_note(f"Samples of the step: {_listed(own)}. {self.directory / NON_FINITE} lists them.")

    def _own(self, trainer: Trainer) -> list[MicroBatch]:
        data = getattr(trainer, "datamodule", None)
        found = []
        for ids, loss in self._batches:
            keys = tuple(data.keys_of(ids)) if isinstance(data, VideoDataModule) else ()
            found.append(MicroBatch(trainer.global_rank, ids, keys, "" if loss is None else f"{float(loss):g}"))
        return found

    def _report(self, trainer: Trainer, batches: Sequence[MicroBatch], norm: float) -> None:
        bad = [batch for batch in batches if not math.isfinite(float(batch.loss or 0))]
        what = f"the loss is {bad[0].loss} (rank {bad[0].rank})" if bad else f"the gradient's norm is {norm:g}"
        file = self.directory / NON_FINITE
        message = (
            f"step {trainer.global_step}: {what}, so the step is not taken. Samples: {_listed(bad or batches)}. The "
            f"last checkpoint is as it was; {file} lists all samples of the step. Look at these clips and at the "
            "gradient's norm before, then continue with a smaller optimizer.lr or trainer.gradient_clip_val, or "
            "without the clips"
        )
        if trainer.is_global_zero:
            self._write(trainer, batches, norm, message)
        self._is_reported = True
        raise NonFiniteError(message)

    def _write(self, trainer: Trainer, batches: Sequence[MicroBatch], norm: float | None, message: str) -> None:
        content = {
            "step": trainer.global_step,
            "message": message,
            "gradient_norm": None if norm is None else f"{norm:g}",
            "micro_batches": [asdict(batch) for batch in batches],
        }
        self.directory.mkdir(parents=True, exist_ok=True)
        with write_aside(self.directory / NON_FINITE) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n")


def _everywhere(own: list[MicroBatch]) -> list[MicroBatch]:
    """Of all ranks, in their order. Every rank calls it."""
    if not (dist.is_available() and dist.is_initialized()):
        return own
    found: list[list[MicroBatch]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, own)
    return [batch for each in found for batch in each]


def _listed(batches: Sequence[MicroBatch], most: int = 16) -> str:
    """Sample ids with their keys, each once."""
    names = {
        sample: f"{sample} ({key})" if key else f"{sample}"
        for batch in batches
        for sample, key in zip(batch.sample_ids, batch.keys or ("",) * len(batch.sample_ids), strict=True)
    }
    shown = ", ".join(list(names.values())[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
