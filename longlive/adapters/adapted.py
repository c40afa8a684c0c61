"""A network as one of its adapters makes it: what distillation calls student, teacher or critic.

Called, it runs the network with its adapter and leaves it as it was. Several of them share one network, and so its
memory; a rollout engine takes one in place of a network.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from longlive.adapters.lora import adapter_parameters, use_adapter
from longlive.models.wan.config import WanConfig
from longlive.models.wan.model import CausalWan
from longlive.typing import Latents


class AdaptedNetwork:
    """A view of a network, no module of its own: its parameters are the network's.

    Args:
        network: with the adapter.
        adapter: None: the base alone.
    """

    def __init__(self, network: CausalWan, adapter: str | None) -> None:
        self.network = network
        self.adapter = adapter

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

    def active(self) -> AbstractContextManager[None]:
        """Inside, the adapter multiplies: for backward, which may run the network again."""
        return use_adapter(self.network, self.adapter)

    def __call__(self, *args: Any, **kwargs: Any) -> Latents:
        """As `CausalWan.forward`."""
        with self.active():
            velocity: Latents = self.network(*args, **kwargs)
        return velocity
