"""A network small enough for many adapters, none of which is hidden by a head of zeros, and one point to run it at."""

from __future__ import annotations

import torch
from torch import nn

from longlive.adapters.lora import adapter_parameters, use_adapter
from longlive.models.attention import dense_attention
from longlive.models.wan.config import WanConfig
from longlive.models.wan.model import CausalWan
from longlive.models.wan.rope import Rotation
from longlive.typing import Tensor

CONFIG = WanConfig.tiny(num_layers=2, dim=32, ffn_dim=64, num_heads=2, in_channels=4, out_channels=4, text_dim=8)
LATENTS = torch.randn(1, 2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
PROMPTS = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(2))
TIMESTEP = 500.0


def base(seed: int = 0) -> CausalWan:
    """The network, without an adapter."""
    network = CausalWan(CONFIG)
    network.init_weights(seed)
    with torch.no_grad():
        network.head.head.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(2))
    return network


def fill_adapter(network: nn.Module, name: str, seed: int) -> None:
    """Give an adapter a B that does something."""
    numbers = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in adapter_parameters(network, name):
            if "lora_B" in parameter_name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=numbers))


def attend(query: Tensor, key: Tensor, value: Tensor, rotation: Rotation, layer: int) -> Tensor:
    """Everything sees everything."""
    return dense_attention(rotation.rotate(query), rotation.rotate(key), value)


def velocity(network: nn.Module) -> Tensor:
    """At `LATENTS`, `TIMESTEP` and `PROMPTS`, with whatever adapter is active."""
    index, positions = torch.zeros(1, 1, dtype=torch.int64), torch.arange(2)[None]
    return network(LATENTS, torch.full((1, 2), TIMESTEP), PROMPTS, index, positions, attend)


def adapted(name: str | None, network: CausalWan) -> Tensor:
    """The velocity with one adapter, or with none, without a graph."""
    with use_adapter(network, name), torch.no_grad():
        return velocity(network)
