"""An exponential moving average of the weights: what validation, sampling and generation use.

    average <- d average + (1 - d) weights,    d = min(decay, (1 + n) / (10 + n)) at the n-th update

The growing d lets a short run forget its random start (the rule of TensorFlow's and diffusers' averages). The average
lives beside the parameters, tensor by tensor: where those are shards, it is shards, and nothing is gathered.

To stand in for the weights, the average changes places with them value by value, in the memory where each is: what
holds a view of that memory, as FSDP2 does, sees it. FSDP2 also keeps whole copies of some parameters after a forward
pass; they are dropped before, so that none outlives the values that it was gathered from.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from longlive.typing import Tensor


@runtime_checkable
class AveragesAPart(Protocol):
    """A module of which only a part is averaged, and not in every step."""

    def averaged_parameters(self) -> Iterable[tuple[str, torch.nn.Parameter]]:
        """Named as the module names them."""
        ...

    def average_moves(self, step: int) -> bool:
        """Whether that part learned in the optimizer step that made their count `step`."""
        ...


class EMA(Callback):
    """Average the trainable weights after every optimizer step, or what the module says of them (`AveragesAPart`).

    Args:
        decay: the largest d.
        start_step: before this optimizer step the average is the weights themselves.

    Raises:
        ValueError: if the decay is not in [0, 1).
    """

    def __init__(self, decay: float = 0.99, start_step: int = 0) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay} must be at least 0 and below 1")
        if start_step < 0:
            raise ValueError(f"start_step={start_step} must be at least 0")
        self.decay = decay
        self.start_step = start_step
        self.num_updates = 0
        self.average: dict[str, Tensor] = {}
        self._swapped = False
        self._last_step = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for name, parameter in _averaged(pl_module):
            kept = self.average.get(name)
            # A loaded average comes from the CPU; it takes the parameter's device and layout.
            self.average[name] = parameter.detach().clone() if kept is None else kept.to(parameter)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Under gradient accumulation most batches end without an optimizer step.
        if trainer.global_step > self._last_step:
            self._last_step = trainer.global_step
            if not isinstance(pl_module, AveragesAPart) or pl_module.average_moves(trainer.global_step):
                self.update(pl_module, trainer.global_step)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last_step = trainer.global_step

    @torch.no_grad()
    def update(self, pl_module: LightningModule, step: int) -> None:
        """Fold the weights after optimizer step `step` (counted from 1) into the average."""
        names, parameters = zip(*_averaged(pl_module), strict=True)
        averages = [_part(self.average[name]) for name in names]
        weights = [_part(parameter) for parameter in parameters]
        if step <= self.start_step:
            torch._foreach_copy_(averages, weights)
            return
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        torch._foreach_lerp_(averages, weights, 1 - decay)
        self.num_updates += 1

    @contextmanager
    def averaged(self, pl_module: LightningModule) -> Iterator[None]:
        """Inside, the module's weights are the average; afterwards they are what they were. Nests."""
        if self._swapped or not self.average:
            yield
            return
        self._swap(pl_module)
        self._swapped = True
        try:
            yield
        finally:
            self._swap(pl_module)
            self._swapped = False

    @torch.no_grad()
    def _swap(self, pl_module: LightningModule) -> None:
        for name, parameter in _averaged(pl_module):
            weight, average = _part(parameter), _part(self.average[name])
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.average:
            self._swap(pl_module)
            self._swapped = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._swapped:
            self._swap(pl_module)
            self._swapped = False

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # A checkpoint saved on the way out holds the weights as weights and the average as average.
        self.on_validation_end(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # Saved while the average stands in for the weights, both still go where they belong.
        if self._swapped:
            averaged = {name: checkpoint["state_dict"][name] for name in self.average}
            checkpoint["state_dict"] |= self.average
            checkpoint["callbacks"][self.state_key]["average"] = averaged

    def state_dict(self) -> dict[str, Any]:
        return {"num_updates": self.num_updates, "average": self.average}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.num_updates = int(state_dict["num_updates"])
        # Under a sharded strategy the fit has begun by now, and what the checkpoint lacks has its start already.
        self.average = self.average | state_dict["average"]


def _averaged(pl_module: LightningModule) -> list[tuple[str, torch.nn.Parameter]]:
    """As the optimizer sees them: sharded parameters as shards, also right after a forward pass."""
    for module in pl_module.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    if isinstance(pl_module, AveragesAPart):
        return list(pl_module.averaged_parameters())
    return [(name, parameter) for name, parameter in pl_module.named_parameters() if parameter.requires_grad]


def _part(tensor: Tensor) -> Tensor:
    """This rank's memory of a tensor."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def averaged_weights(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The module's weights in a checkpoint, with the average where there is one."""
    weights = dict(checkpoint["state_dict"])
    for key, state in checkpoint.get("callbacks", {}).items():
        if key.startswith(EMA.__name__):
            weights |= state["average"]
    return weights
