"""What the precision plugins share: chosen linear layers are replaced by ones that multiply in low precision, and all
other products run in bfloat16 by autocast.

A replaced layer is an `nn.Linear` with the very `weight` and `bias` Parameters of the layer it replaces. So
checkpoints, averages, optimizers, adapters and sharding see the names and tensors that they always saw, and a
checkpoint of one precision loads in any other.

Lightning calls `convert_module` after `configure_model`, when parameters are sharded already and a replaced layer would
be unknown to FSDP. So a module's `configure_model` calls it itself, before it shards (`modules.base`), and Lightning's
later call finds nothing left to do.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.pytorch.plugins import Precision
from lightning.pytorch.utilities import rank_zero_only
from torch import nn
from torch.distributed.tensor import DTensor

from longlive.precision.selection import BLOCK_LINEARS, Layer, LayerSelection, grouped
from longlive.typing import Int, Tensor

log = logging.getLogger(__name__)


@runtime_checkable
class HoldsNetworks(Protocol):
    """A module that says which of its networks the run's precision is for: others have one of their own."""

    def networks_of_run(self) -> Sequence[nn.Module]: ...


class LinearPrecision(Precision):
    """Base of the plugins that replace linear layers.

    Args:
        multiple: see `LayerSelection`.
        layers: shell patterns of the names of the layers to replace.
        keep_last_blocks_bf16: share of the blocks, the last ones, whose layers stay.
    """

    precision: Any  # Lightning's annotation knows its own names alone
    linear_class: type[nn.Linear]
    """Of the replaced layers."""

    def __init__(
        self, *, multiple: int, layers: Sequence[str] = BLOCK_LINEARS, keep_last_blocks_bf16: float = 0.0
    ) -> None:
        self.selection = LayerSelection(multiple, tuple(layers), keep_last_blocks_bf16)
        self.layers: tuple[Layer, ...] = ()
        """What was wrapped and what was not, and why; empty before `convert_module`."""

    @property
    @abstractmethod
    def backend_name(self) -> str:
        """Who multiplies."""

    @property
    @abstractmethod
    def settings(self) -> tuple[Any, ...]:
        """All that decides what a network computes in it: two plugins of one class and equal settings are equal."""

    @abstractmethod
    def replace(self, module: nn.Module, layers: Sequence[Layer]) -> None:
        """Replace these layers of `module` in place."""

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Replace the chosen layers in place; those that are replaced already stay. Parameters may be on meta. Of a
        module that holds networks (`HoldsNetworks`), those of the run alone.

        Returns:
            `module`.

        Raises:
            ValueError: if no layer can be replaced.
            RuntimeError: if one that should be is sharded already.
        """
        if isinstance(module, HoldsNetworks):
            for network in module.networks_of_run():
                self.convert_module(network)
            return module
        layers = self.selection.of(module, self.linear_class)
        chosen = [layer for layer in layers if layer.reason is None]
        if not chosen:
            reasons = "; ".join(f"{group.name}: {group.reason}" for group in grouped(layers))
            raise ValueError(f"precision={self.precision} would change no layer. {reasons}")
        waiting = [layer for layer in chosen if not isinstance(module.get_submodule(layer.name), self.linear_class)]
        if waiting != chosen:
            self.adopt([module.get_submodule(layer.name) for layer in chosen if layer not in waiting])
        for layer in waiting:
            if isinstance(module.get_submodule(layer.name).weight, DTensor):
                raise RuntimeError(
                    f"{layer.name} is sharded already, so precision={self.precision} cannot replace it; call "
                    "trainer.precision_plugin.convert_module(network) in configure_model, before the network is sharded"
                )
        if waiting:
            self.replace(module, waiting)
        if waiting or not self.layers:
            self.layers = layers
            self._report()
        return module

    def adopt(self, layers: Sequence[nn.Module]) -> None:
        """Layers that are replaced already, perhaps by another Trainer's plugin, are from now on this one's."""

    def freeze(self, module: nn.Module) -> None:
        """The weights of the replaced layers change no more: keep of them what products read. They may be on meta."""

    def begin_backward(self, step: int) -> None:
        """A backward begins, of this step: what is random in it is drawn for that."""

    def place_tokens(self, positions: Int[Tensor, "b l"]) -> None:
        """Where the tokens that follow stand in the global batch, in the network's order: for what is random and must
        not depend on how ranks split a clip."""

    @contextmanager
    def forward_context(self) -> Generator[None, None, None]:
        """Everything that is not replaced multiplies in bfloat16, over float32 weights. Steps of training, validation,
        test and prediction run in this."""
        with _autocast("cpu", True), _autocast("cuda", torch.cuda.is_available()):
            yield

    @rank_zero_only
    def _report(self) -> None:
        """One line: how many layers, and which of those that `layers` names did not fit."""
        wrapped = sum(layer.reason is None for layer in self.layers)
        unfit = [
            f"{row.name} ({row.reason})" for row in grouped(self.layers) if row.reason and "multiple" in row.reason
        ]
        but = f"; not wrapped: {', '.join(unfit)}" if unfit else ""
        log.info("precision %s: %d linear layers, backend %s%s", self.precision, wrapped, self.backend_name, but)


def _autocast(device_type: str, enabled: bool) -> torch.autocast:
    # Without its cache, as Lightning's mixed precision: a cached copy of a weight would outlive its update.
    return torch.autocast(device_type, torch.bfloat16, enabled=enabled, cache_enabled=False)
