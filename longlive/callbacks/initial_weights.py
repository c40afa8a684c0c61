"""A sharded run that starts from the weights of another one: `initialise_from`.

It happens when the network is where it will train, in the memory that it has there: each rank reads of the checkpoint
what it needs, whatever wrote it. A module may say which of its weights those are (`LongLiveModule.weights_of`):
distillation takes the base, and its adapters stay as they start. Everything that starts from the weights (an average)
comes after it, so this callback is the first.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from longlive.callbacks.ema import averaged_weights
from longlive.modules.base import LongLiveModule
from longlive.parallel.checkpoint import existing
from longlive.parallel.checkpoint_directory import read_tree
from longlive.parallel.strategy import ShardedStrategy
from longlive.typing import Tensor


class InitialWeights(Callback):
    """Takes the weights (the average, where there is one) of a checkpoint; step, optimizer and data position stay at 0.

    Args:
        *checkpoints: files or directories. Each goes over those before it, which it may leave parts of to.

    Raises:
        ValueError: when the fit starts, on every rank, if a checkpoint is of another model.
    """

    def __init__(self, *checkpoints: Path) -> None:
        self.checkpoints = checkpoints

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        strategy = trainer.strategy
        assert isinstance(strategy, ShardedStrategy)

        for path in self.checkpoints:
            if not isinstance(pl_module, LongLiveModule):
                strategy.checkpoints.load_weights(strategy, path, averaged_weights)
                continue
            with pl_module.room_for(read_tree(existing(path))):
                strategy.checkpoints.load_weights(strategy, path, partial(_weights, pl_module))


def _weights(module: LongLiveModule, checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    return module.weights_of(averaged_weights(checkpoint), bool(checkpoint.get("trainable_only")))
