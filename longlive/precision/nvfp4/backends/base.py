"""What a backend is: something that computes a linear layer by an NVFP4 recipe.

Some backends bring GEMMs (`emulated`: operands are quantised here, bit for bit as the format says), others whole layers
(`transformer_engine`, `torchao`: they quantise themselves). A recipe that a backend would compute otherwise than it
says is refused when the backend is chosen, by name of the setting: a backend never runs something else instead.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch

from longlive.precision.nvfp4.recipe import NVFP4Recipe
from longlive.typing import Float, Tensor

if TYPE_CHECKING:
    from longlive.precision.nvfp4.linear import NVFP4Linear

BLACKWELL = (10, 0)
"""The first compute capability with FP4 GEMMs."""


class Backend(ABC):
    """Attributes:
    name: as in `backend=`.
    trains: whether weights can learn under it. Inputs get gradients under every backend.
    """

    name: str
    trains: bool

    @abstractmethod
    def refusal(self, recipe: NVFP4Recipe) -> str | None:
        """Why this backend does not compute what a recipe says, and which settings it does; None: it does."""

    @abstractmethod
    def linear(self, layer: NVFP4Linear, x: Float[Tensor, "tokens features"]) -> Float[Tensor, "tokens out"]:
        """`layer`'s output, bias included, in autocast's dtype or else that of `x`."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Backend:
        """Shared by all layers, also by copied ones."""
        return self


def has_fp4_gemms(device: torch.device | str | None = None) -> bool:
    """Whether a device (by default the current CUDA device) multiplies FP4 in hardware."""
    if not torch.cuda.is_available() or torch.device(device or "cuda").type != "cuda":
        return False
    return torch.cuda.get_device_capability(device) >= BLACKWELL


def describe_device(device: torch.device | str | None = None) -> str:
    """`cpu`, or the GPU's name and compute capability."""
    if not torch.cuda.is_available() or torch.device(device or "cuda").type != "cuda":
        return "cpu"
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor})"
