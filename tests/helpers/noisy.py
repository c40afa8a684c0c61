"""A distillation in which nothing is zero."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.optim import AdamW

from helpers.runs import tiny_module
from longlive.adapters.lora import LoRASettings
from longlive.modules.distillation import DistillationModule
from longlive.parallel.materialise import local_part


class Noisy(DistillationModule):
    """Random throughout: Wan's zero head and LoRA's zero B would hide every error."""

    def configure_model(self) -> None:
        if self.network is not None:
            return
        super().configure_model()
        numbers = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in self.trained_network.named_parameters():
                if name.endswith(("modulation", "bias")) or name.startswith("head") or "lora_B" in name:
                    drawn = 0.2 * torch.randn(parameter.shape, generator=numbers)
                    part, where = local_part(parameter)
                    part.add_(drawn[where])


def tiny_distillation(noisy: bool = True, **changes: Any) -> DistillationModule:
    """One layer, with its network; the student learns in every third step."""
    settings: dict[str, Any] = {
        "optimizer": partial(AdamW, lr=1e-2, betas=(0.0, 0.999)),
        "critic_optimizer": partial(AdamW, lr=2e-2, betas=(0.0, 0.999)),
        "lora": LoRASettings(rank=4, alpha=8),
        "student_every": 3,
        "seed": 3,
    }
    module: Any = tiny_module(Noisy if noisy else DistillationModule, **settings | changes)  # type: ignore[arg-type]
    module.configure_model()
    assert isinstance(module, DistillationModule)
    return module
