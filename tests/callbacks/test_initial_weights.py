"""A sharded run that starts from another's weights: they are there before anything else starts from them."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from helpers.distributed import RankError, run_on_ranks
from helpers.runs import assert_same, fake_batches, fit, tiny_module
from helpers.sharded_runs import Stage, train, whole
from longlive.adapters.lora import LoRASettings
from longlive.callbacks.ema import EMA, averaged_weights
from longlive.callbacks.initial_weights import InitialWeights
from longlive.modules.distillation import DistillationModule
from longlive.parallel.checkpoint import AtomicCheckpointIO, load_checkpoint
from longlive.parallel.strategy import ShardedStrategy
from longlive.rollout.settings import RolloutSettings


def _started(path: Path, width: int = 7) -> tuple[Any, Any]:
    """Weights and average of a run of one step that moves nothing."""
    stage = Stage(partial(torch.optim.SGD, lr=0.0), width=width)
    state = train(range(1), stage=stage, callbacks=[InitialWeights(path), EMA(decay=0.9)])
    return state["weights"], state["average"]


@pytest.mark.parametrize("sharded", [True, False])
def test_weights_and_average_start_from_the_other_runs_average(tmp_path, sharded):
    """The average of a run that starts from its own initialisation is wrong for as long as it remembers."""
    path = tmp_path / "step-0000003.ckpt"
    save = partial(train, range(3), save=path, sharded=sharded)
    if sharded:
        run_on_ranks(save, 2, init_process_group=False)
    else:
        save()
    expected = whole(averaged_weights(load_checkpoint(path)))
    for weights, average in run_on_ranks(partial(_started, path), 2, init_process_group=False):
        assert_same(weights, expected)
        assert_same(average, {name: value for name, value in expected.items() if name in average})
        assert average.keys() == expected.keys() - {"network.scale"}


def test_weights_of_another_model_are_refused(tmp_path):
    path = tmp_path / "step-0000001.ckpt"
    train(range(1), save=path, sharded=False)
    with pytest.raises(RankError, match=r"of another model: .*\(7, 5\) in the checkpoint, \(8, 5\) in this model"):
        run_on_ranks(partial(_started, path, 8), 2, init_process_group=False)


def _distillation(base: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The weights that a sharded distillation starts from, and those that it would have had of its own."""
    settings: dict[str, Any] = {
        "critic_optimizer": partial(torch.optim.SGD, lr=0.1),
        "lora": LoRASettings(rank=4, alpha=4),
        "rollout": RolloutSettings(chunk_frames=4, num_steps=2),
    }
    module: Any = tiny_module(DistillationModule, **settings)  # type: ignore[arg-type]
    own: dict[str, Any] = {}

    class Note(Callback):
        def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            own.update(whole(pl_module.state_dict()))

    fit(module, [], [Note(), InitialWeights(base)], strategy=ShardedStrategy(), devices=2, max_steps=0)
    return whole(module.state_dict()), own


@pytest.mark.parametrize("sharded", [True, False])
def test_a_distillation_starts_from_a_network_without_adapters(tmp_path, sharded):
    """The base is that network's average under other names; the adapters, which it has not, are as they start."""
    path = tmp_path / "step-0000001.ckpt"
    run_on_ranks(partial(_base, path), 2, init_process_group=False) if sharded else _base(path)
    expected = whole(averaged_weights(load_checkpoint(path)))
    for weights, own in run_on_ranks(partial(_distillation, path), 2, init_process_group=False):
        adapters = {name: value for name, value in weights.items() if ".lora_" in name}
        assert len(adapters) == 2 * 2 * 10
        assert_same(adapters, {name: own[name] for name in adapters})
        base = {name.replace(".base_layer.", "."): v for name, v in weights.items() if name not in adapters}
        assert_same({name: base[name] for name in expected}, expected)
        assert base.keys() == expected.keys()
        assert not torch.equal(weights["network.head.head.bias"], own["network.head.head.bias"])


def _base(path: Path) -> None:
    """One step of a many-step network, with an average that is not its weights."""
    on_ranks: dict[str, Any] = {}
    if "WORLD_SIZE" in os.environ:
        on_ranks = {"strategy": ShardedStrategy(), "devices": 2}
    trainer = fit(tiny_module(seed=5), fake_batches(2), [EMA(decay=0.5)], plugins=[AtomicCheckpointIO()], **on_ranks)
    trainer.save_checkpoint(path)
