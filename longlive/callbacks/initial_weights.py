"""A sharded run that starts from the weights of another one: `initialise_from`.

It happens when the network is where it will train, in the memory that it has there: each rank reads of the checkpoint
what it needs, whatever wrote it. Everything that starts from the weights (an average) comes after it, so this callback
is the first.
"""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from longlive.callbacks.ema import averaged_weights
from longlive.parallel.strategy import ShardedStrategy


class InitialWeights(Callback):
    """Takes the weights (the average, where there is one) of a checkpoint; step, optimizer and data position stay at 0.

    Args:
        checkpoint: a file or a directory.

    Raises:
        ValueError: when the fit starts, on every rank, if the checkpoint is of another model.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        strategy = trainer.strategy
        assert isinstance(strategy, ShardedStrategy)
        strategy.checkpoints.load_weights(strategy, self.checkpoint, averaged_weights)
