"""Bases of several precisions over two ranks: each is sharded, codes too, and holds what one process would hold."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed.tensor import DTensor
from torch.optim import SGD

from helpers.distributed import run_on_ranks
from helpers.runs import Randomise, assert_same, fake_batches, fit, tiny_module
from helpers.sharded_runs import whole
from longlive.adapters.lora import LoRASettings
from longlive.callbacks.initial_weights import InitialWeights
from longlive.data.prompt_batches import PromptBatch
from longlive.modules.distillation import DistillationModule
from longlive.parallel.checkpoint import AtomicCheckpointIO
from longlive.parallel.fsdp import ShardingOptions
from longlive.parallel.strategy import ShardedStrategy
from longlive.precision.nvfp4.plugin import NVFP4Precision
from longlive.precision.nvfp4.recipe import NVFP4Recipe
from longlive.rollout.settings import RolloutSettings
from longlive.train import initialise
from longlive.typing import Tensor

WEIGHTS_ALONE = NVFP4Recipe(activations=None, gradients=None)
"""amax of activations is each rank's own, so that other recipes compute on two ranks what no single one does."""


def started(path: Path, recipe: NVFP4Recipe) -> tuple[DistillationModule, list[Callback]]:
    settings: dict[str, Any] = {
        "optimizer": partial(SGD, lr=0.2, momentum=0.5),
        "critic_optimizer": partial(SGD, lr=0.2, momentum=0.5),
        "lora": LoRASettings(rank=4, alpha=4),
        "rollout": RolloutSettings(chunk_frames=4, num_steps=2),
        "student_every": 2,
        "role_precision": dict.fromkeys(("student", "critic"), NVFP4Precision(recipe=recipe)),
    }
    module: Any = tiny_module(DistillationModule, **settings)  # type: ignore[arg-type]
    return module, [InitialWeights(path)]


def batches(rank: int, size: int) -> list[PromptBatch]:
    mine = slice(rank * 2 // size, (rank + 1) * 2 // size)
    shots, prompts = torch.tensor([[0, 1], [0, 0]]), (("red", "blue"), ("green", "green"))
    ids = [torch.tensor([2 * number, 2 * number + 1]) for number in range(2)]
    return [PromptBatch(prompts[mine], shots[mine], each[mine], height=32, width=32) for each in ids]


class Note(Callback):
    """How many of a layer's code rows a rank has."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        parameters = dict(pl_module.named_parameters())
        codes = parameters["network.blocks.0.ffn.0.base_layer.weight_packed"]
        assert isinstance(codes, DTensor)
        self.rows = len(codes.to_local())
        assert isinstance(parameters["teacher_base.blocks.0.ffn.0.weight"], DTensor)


def learned(stage_one: Path, folder: Path, recipe: NVFP4Recipe) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    """The weights after two steps, of a run that goes on and of one that stops after the first; and a rank's rows."""
    rank, size, note = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), Note()

    def run(first: int, last: int, callbacks: list[Callback], resumed: Path | None = None) -> dict[str, Tensor]:
        module, initial = started(stage_one, recipe)
        trainer = fit(
            module,
            batches(rank, size)[first:last],
            [*(initial if resumed is None else []), *callbacks],
            strategy=ShardedStrategy(sharding=ShardingOptions(activation_checkpointing=True)),
            devices=size,
            max_steps=last,
            max_epochs=3,
            checkpoint=resumed,
            precision="bf16-mixed",
        )
        trainer.save_checkpoint(folder / f"{first}-{last}.ckpt")
        return whole(module.state_dict())

    through = run(0, 2, [note])
    run(0, 1, [])
    return through, run(1, 2, [], folder / "0-1.ckpt"), note.rows


def stage_one_of(path: Path) -> None:
    """Two ranks train one step of a network whose weights are then random throughout."""
    module = tiny_module(seed=5)
    trainer = fit(
        module, fake_batches(1), [Randomise()], plugins=[AtomicCheckpointIO()], strategy=ShardedStrategy(), devices=2
    )
    trainer.save_checkpoint(path)


def test_bases_are_sharded_and_hold_and_learn_what_those_of_one_process_do(tmp_path: Path) -> None:
    """From a directory that ranks wrote: one stored weight becomes codes in one base and bfloat16 in another. Codes of
    a rank's own rows alone would have another amax."""
    path = tmp_path / "step-0000001.ckpt"
    run_on_ranks(partial(stage_one_of, path), 2, init_process_group=False)
    work = partial(learned, path, tmp_path, WEIGHTS_ALONE)
    (first, resumed, rows), (second, _, _) = run_on_ranks(work, 2, init_process_group=False)
    assert rows == 16
    assert_same(second, first)
    assert_same(resumed, first)

    alone, _ = started(path, WEIGHTS_ALONE)
    initialise(Trainer(accelerator="cpu", precision="bf16-mixed", logger=False), alone, path)
    fit(alone, batches(0, 1), precision="bf16-mixed")
    expected = alone.state_dict()
    assert expected.keys() == first.keys()
    for name, value in expected.items():
        if "lora_" not in name:
            assert torch.equal(first[name], value), name
    moved = [name for name in expected if "lora_B" in name]
    scale = max(float(expected[name].abs().max()) for name in moved)
    assert scale > 1e-3
    for name in moved:
        torch.testing.assert_close(first[name], expected[name], atol=0.02 * scale, rtol=0.02)
