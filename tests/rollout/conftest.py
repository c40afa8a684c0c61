"""Tiny networks in which nothing is zero: Wan's initialisation leaves head and biases at zero, hiding errors."""

import pytest
import torch

from longlive.models.wan.config import WanConfig
from longlive.models.wan.model import CausalWan


@pytest.fixture(scope="session")
def network() -> CausalWan:
    return make_network(dim=48)


@pytest.fixture(scope="session")
def network_for_blocks() -> CausalWan:
    """Heads of two NVFP4 blocks."""
    return make_network(dim=64)


def make_network(dim: int) -> CausalWan:
    config = WanConfig.tiny(
        num_layers=2, dim=dim, ffn_dim=64, num_heads=2, in_channels=4, out_channels=4, text_dim=8, freq_dim=16
    )
    network = CausalWan(config)
    network.init_weights(seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith(("modulation", "bias")) or name.startswith("head"):
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
            if "self_attn.q." in name or "self_attn.k." in name:
                # Sharper attention than at initialisation: who is seen, and where, then shows in the output.
                parameter.mul_(2)
    return network.requires_grad_(False).eval()
