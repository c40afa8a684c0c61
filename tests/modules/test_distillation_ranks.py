"""Data ranks under FSDP, with activations recomputed: one rank and two learn the same, also from a checkpoint that the
other wrote."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim import SGD

from helpers.distributed import run_on_ranks
from helpers.runs import assert_same, fit, tiny_module
from longlive.adapters.lora import LoRASettings
from longlive.data.prompt_batches import PromptBatch
from longlive.modules.distillation import DistillationModule
from longlive.parallel.fsdp import ShardingOptions
from longlive.parallel.materialise import local_part
from longlive.parallel.strategy import ShardedStrategy
from longlive.rollout.settings import RolloutSettings
from longlive.typing import Tensor

PROMPTS = (("red", "red", "blue"), ("green", "grey", "grey"))
SHOTS = torch.tensor([[0, 0, 1], [0, 1, 1]])
STEPS, HALF = 4, 1
"""The student learns in the steps 0 and 3: a checkpoint after one is in the middle of a cycle."""


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


def module() -> DistillationModule:
    settings: dict[str, Any] = {
        # Momentum: a state to keep, and steps that grow with their gradients, as Adam's do not.
        "optimizer": partial(SGD, lr=0.2, momentum=0.5),
        "critic_optimizer": partial(SGD, lr=0.2, momentum=0.5),
        "lora": LoRASettings(rank=4, alpha=4),
        "rollout": RolloutSettings(chunk_frames=4, num_steps=2, window=8),
        "student_every": 3,
        "exit_per": "chunk",
        "max_gradient_norm": 0.2,
    }
    made: Any = tiny_module(Noisy, **settings)  # type: ignore[arg-type]
    return made


def batch(number: int, rank: int, size: int) -> PromptBatch:
    """A data rank's samples."""
    mine = slice(rank * 2 // size, (rank + 1) * 2 // size)
    ids = torch.tensor([2 * number, 2 * number + 1])
    return PromptBatch(PROMPTS[mine], SHOTS[mine], ids[mine], height=32, width=32)


def learned(first: int, last: int, start: Path | None = None, save: Path | None = None) -> dict[str, Tensor]:
    """The adapters after the steps `first .. last - 1`, whole."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    trained = module()
    trainer = fit(
        trained,
        [batch(number, rank, size) for number in range(first, last)],
        strategy=ShardedStrategy(sharding=ShardingOptions(activation_checkpointing=True)),
        devices=size,
        max_steps=last,
        max_epochs=5,
        checkpoint=start,
    )
    assert trainer.global_step == last
    if save is not None:
        trainer.save_checkpoint(save)
    return {
        name: (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().clone()
        for name, parameter in trained.named_parameters()
        if parameter.requires_grad
    }


def test_two_data_ranks_learn_what_one_does_and_go_on_from_a_checkpoint(tmp_path: Path) -> None:
    """Catches means over one rank's frames, draws by rank, exits that differ (which would hang), and recomputation with
    another adapter or a later cache."""
    alone = module()
    fit(alone, [batch(number, 0, 1) for number in range(STEPS)])
    expected = {name: p.detach() for name, p in alone.named_parameters() if p.requires_grad}
    start = {name: p.detach() for name, p in started().items()}
    whole, other = run_on_ranks(learned, 2, 0, STEPS)
    assert_same(other, whole)
    moved = max(float((expected[name] - start[name]).abs().max()) for name in start)
    assert moved > 1e-2
    for name, weight in expected.items():
        torch.testing.assert_close(whole[name], weight, atol=1e-5 * moved, rtol=1e-5)

    (half, _), saved = run_on_ranks(learned, 2, 0, HALF, None, tmp_path / "half.ckpt"), tmp_path / "half.ckpt"
    assert half.keys() == expected.keys()
    resumed, _ = run_on_ranks(learned, 2, HALF, STEPS, saved)
    assert_same(resumed, whole)
    (elsewhere,) = run_on_ranks(learned, 1, HALF, STEPS, saved)
    for name, weight in expected.items():
        torch.testing.assert_close(elsewhere[name], weight, atol=1e-5 * moved, rtol=1e-5)


def started() -> dict[str, Tensor]:
    """The adapters before the first step."""
    made = module()
    made.configure_model()
    return {name: p for name, p in made.named_parameters() if p.requires_grad}
