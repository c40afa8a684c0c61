"""Bytes of weights that the roles of distillation hold, counted on the networks that a run builds, on meta.

Of every base its codes, scales and all that stays in bfloat16 or float32; of every role that learns its adapter. What
comes and goes with a step (gradients, optimizer, activations) is not in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lightning.pytorch.plugins import Precision

from longlive.adapters.lora import LoRASettings, base_name
from longlive.models.wan.config import WanConfig
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
    bases: list[tuple[Base, int]] = []
    adapters: dict[str, int] = {}
    for base in shared_bases(precisions, of_run):
        network = on_meta(
            model,
            of_run if base.precision is None else base.precision,
            {role: settings for role, settings in lora.items() if role in base.roles},
        )
        held = 0
        tensors: dict[str, Tensor] = dict(network.named_parameters()) | dict(network.named_buffers())
        for name, tensor in tensors.items():
            if base_name(name) is not None:
                held += tensor.nbytes
                continue
            role = next(role for role in base.roles if f".{role}." in name)
            adapters[role] = adapters.get(role, 0) + tensor.nbytes
        bases.append((base, held))
    parameters = on_meta(model).parameters()
    return RoleMemory(tuple(bases), adapters, sum(parameter.numel() for parameter in parameters))
