"""Streams on data ranks, under FSDP with activations recomputed: one rank and two learn the same, also from a
checkpoint that the other wrote in the middle of a stream."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch.distributed.tensor import DTensor
from torch.optim import SGD

from helpers.distributed import run_on_ranks
from helpers.noisy import Noisy
from helpers.runs import assert_same, fit, tiny_module
from longlive.adapters.lora import LoRASettings
from longlive.data.prompt_batches import PromptBatch
from longlive.modules.distillation import DistillationModule
from longlive.modules.streaming import StreamingSettings
from longlive.parallel.fsdp import ShardingOptions
from longlive.parallel.strategy import BalancedSPStrategy, ShardedStrategy
from longlive.rollout.settings import RolloutSettings
from longlive.typing import Tensor

PROMPTS = (("red",) * 3 + ("blue",) * 3, ("green", "grey", "grey", "grey", "white", "white"))
SHOTS = torch.tensor([[0, 0, 0, 0, 0, 0], [0, 1, 1, 1, 1, 1]])
"""One of the samples switches in the fourth chunk, and the other in the fifth: on two ranks, both must rebuild their
caches in both, or one waits for ever."""
STEPS, HALF = 4, 2
"""Streams of three clips: a checkpoint after two steps is in the middle of the first. The student learns in 0 and 2."""


def module() -> DistillationModule:
    settings: dict[str, Any] = {
        # Momentum: a state to keep, and steps that grow with their gradients, as Adam's do not.
        "optimizer": partial(SGD, lr=0.2, momentum=0.5),
        "critic_optimizer": partial(SGD, lr=0.2, momentum=0.5),
        "lora": LoRASettings(rank=4, alpha=4),
        "rollout": RolloutSettings(
            chunk_frames=4, num_steps=2, window=12, sink_frames=4, shot_sink=True, prompt_switch="recache"
        ),
        "streaming": StreamingSettings(max_frames=24, clip_frames=8),
        "student_every": 2,
        "max_gradient_norm": 0.2,
    }
    made: Any = tiny_module(Noisy, **settings)  # type: ignore[arg-type]
    return made


def batch(step: int, rank: int, size: int) -> PromptBatch:
    """A data rank's samples: those at the positions rank, rank + size, ... of a global batch of two."""
    mine, stream = slice(rank, 2, size), step // 3
    ids = torch.tensor([2 * stream, 2 * stream + 1])
    return PromptBatch(PROMPTS[mine], SHOTS[mine], ids[mine], height=32, width=32)


def learned(
    first: int, last: int, start: Path | None = None, save_at: int = 0, save: Path | None = None
) -> dict[str, Tensor]:
    """The adapters after the steps `first .. last - 1`, whole."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    trained = module()
    settings: dict[str, Any] = {
        "strategy": ShardedStrategy(sharding=ShardingOptions(activation_checkpointing=True)),
        "devices": size,
        "max_steps": last,
        "max_epochs": 5,
    }

    class Save(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            if trainer.global_step == save_at:
                trainer.save_checkpoint(save)

    trainer = fit(
        trained,
        [batch(step, rank, size) for step in range(first, last)],
        callbacks=[Save()] if save else [],
        checkpoint=start,
        **settings,
    )
    assert trainer.global_step == last
    return {
        name: (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().clone()
        for name, parameter in trained.named_parameters()
        if parameter.requires_grad
    }


def test_two_data_ranks_stream_as_one_does_and_go_on_from_the_middle_of_a_stream(tmp_path: Path) -> None:
    """Catches a stream of which one rank's part is saved, and parts that go to other samples than they are of."""
    saved = tmp_path / "half.ckpt"
    whole, other = run_on_ranks(learned, 2, 0, STEPS, None, HALF, saved)
    assert_same(other, whole)
    resumed, _ = run_on_ranks(learned, 2, HALF, STEPS, saved)
    assert_same(resumed, whole)

    alone = module()
    fit(alone, [batch(step, 0, 1) for step in range(STEPS)])
    expected = {name: p.detach() for name, p in alone.named_parameters() if p.requires_grad}
    fresh = module()
    fresh.configure_model()
    moved = max(float((expected[name] - p.detach()).abs().max()) for name, p in fresh.named_parameters()
                if p.requires_grad)  # fmt: skip
    assert moved > 1e-2
    (elsewhere,) = run_on_ranks(learned, 1, HALF, STEPS, saved)
    for name, weight in expected.items():
        for found in (whole, elsewhere):
            torch.testing.assert_close(found[name], weight, atol=2e-5 * moved, rtol=1e-5)


def refused() -> None:
    with pytest.raises(ValueError, match="sequence_parallel_size=2: a clip of a stream is scored on one rank"):
        fit(module(), [batch(0, 0, 1)], strategy=BalancedSPStrategy(sequence_parallel_size=2), devices=2)


def test_ranks_that_share_clips_are_refused() -> None:
    run_on_ranks(refused, 2)
