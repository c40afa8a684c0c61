"""A distillation in which nothing is zero."""

from __future__ import annotations

import torch

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
