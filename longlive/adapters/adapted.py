"""A network as one of its adapters makes it: what distillation calls student, teacher or critic.

Called, it runs the network with its adapter, in its precision, and leaves it as it was. Several of them share one
network, and so its memory; a rollout engine takes one in place of a network.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch.plugins import Precision
from torch import nn

from longlive.adapters.lora import adapter_parameters, use_adapter
from longlive.models.wan.config import WanConfig
from longlive.models.wan.model import CausalWan
from longlive.precision.auto import training_context
from longlive.typing import Latents


class AdaptedNetwork:
    """A view of a network, no module of its own: its parameters are the network's.

    Args:
        network: with the adapter.
        adapter: None: the base alone.
        precision: the network's own; None: whatever is around.
    """

    def __init__(self, network: CausalWan, adapter: str | None, precision: Precision | str | None = None) -> None:
        self.network = network
        self.adapter = adapter
        self.precision = precision

    @property
    def config(self) -> WanConfig:
        return self.network.config

    def parameters(self) -> Iterator[nn.Parameter]:
        """All of the network's."""
        return self.network.parameters()

    def named_adapter_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The adapter's own, under the network's names; none of the base alone."""
        if self.adapter is not None:
            yield from adapter_parameters(self.network, self.adapter)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside, the adapter multiplies, in its precision: for backward, which may run the network again."""
        with ExitStack() as stack:
            if self.precision is not None:
                stack.enter_context(training_context(self.precision, self.device))
            stack.enter_context(use_adapter(self.network, self.adapter))
            yield

    def __call__(self, *args: Any, **kwargs: Any) -> Latents:
        """As `CausalWan.forward`."""
        with self.active():
            velocity: Latents = self.network(*args, **kwargs)
        return velocity
