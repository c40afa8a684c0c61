"""Bytes of weights that the roles of distillation hold, counted on the networks that a run builds, on meta.

Of every base its codes, scales and all that stays in bfloat16 or float32; of every role that learns its adapter. What
comes and goes with a step (gradients, optimizer, activations) is not in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lightning.pytorch.plugins import Precision

from longlive.adapters.lora import LoRASettings, adapter_parameters, base_name
from longlive.models.wan.config import WanConfig
from longlive.models.wan.model import CausalWan
from longlive.modules.base import on_meta
from longlive.modules.roles import ROLES, Base, RoleName, shared_bases
from longlive.typing import Tensor

BFLOAT16 = 2


@dataclass(frozen=True)
class RoleMemory:
    """Bytes of weights.

    Attributes:
        bases: each with what it holds, without adapters.
        adapters: by the role that learns.
        num_parameters: of the network that all start from.
    """

    bases: tuple[tuple[Base, int], ...]
    adapters: Mapping[str, int]
    num_parameters: int

    @property
    def total(self) -> int:
        """Of bases, each once, and adapters."""
        return sum(held for _, held in self.bases) + sum(self.adapters.values())

    @property
    def unshared(self) -> int:
        """If every role had a base for itself."""
        return sum(held * len(base.roles) for base, held in self.bases) + sum(self.adapters.values())

    @property
    def copies(self) -> int:
        """Of a copy of the network in bfloat16 for every role, which is what there was to save."""
        return len(ROLES) * self.num_parameters * BFLOAT16


def role_memory(
    model: WanConfig,
    lora: Mapping[RoleName, LoRASettings],
    precisions: Mapping[str, Precision | str | None],
    of_run: Precision | str,
) -> RoleMemory:
    """Count.

    Args:
        model: the network's sizes.
        lora: the adapter of every role that learns.
        precisions: as `modules.roles.read_precisions` gives them.
        of_run: that of the run.
    """
    bases, adapters = [], {}
    for base in shared_bases(precisions, of_run):
        network = base_on_meta(model, base, lora, of_run)
        bases.append((base, base_bytes(network)))
        for role in base.adapters(lora):
            adapters[role] = sum(parameter.nbytes for _, parameter in adapter_parameters(network, role))
    return RoleMemory(tuple(bases), adapters, sum(parameter.numel() for parameter in on_meta(model).parameters()))


def base_on_meta(
    model: WanConfig, base: Base, lora: Mapping[RoleName, LoRASettings], of_run: Precision | str
) -> CausalWan:
    """A base with its adapters, as a run holds it."""
    return on_meta(model, of_run if base.precision is None else base.precision, base.adapters(lora))


def base_bytes(network: CausalWan) -> int:
    """Of a network without its adapters."""
    tensors: dict[str, Tensor] = dict(network.named_parameters()) | dict(network.named_buffers())
    return sum(tensor.nbytes for name, tensor in tensors.items() if base_name(name) is not None)
