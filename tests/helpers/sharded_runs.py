"""Runs of a small network under the sharded strategy, for what does not need the real network.

Every rank trains on the same batches, so a run's numbers do not depend on how many ranks there are. The sizes divide by
no number of ranks: some shards are shorter, some empty.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from helpers.distributed import run_on_ranks
from helpers.runs import fit
from longlive.callbacks.ema import EMA
from longlive.parallel.checkpoint import AtomicCheckpointIO
from longlive.parallel.sharded_checkpoint import ShardedCheckpoints
from longlive.parallel.strategy import ShardedStrategy

MakeOptimizer = Callable[[Iterable[tuple[str, nn.Parameter]]], Optimizer]
adamw: MakeOptimizer = partial(AdamW, lr=0.01)


class Network(nn.Module):
    """An embedding, two blocks and a scale; `width` makes it another model."""

    def __init__(self, width: int = 7) -> None:
        super().__init__()
        self.embedding = nn.Linear(5, width)
        self.blocks = nn.ModuleList([nn.Linear(width, width), nn.Linear(width, width)])
        self.head = nn.Linear(width, 3)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embedding(x)
        for block in self.blocks:
            x = x + block(x).tanh()
        return self.head(x) * self.scale


class Stage(LightningModule):
    """Trains it; sharded under a sharded strategy."""

    def __init__(self, make_optimizer: MakeOptimizer = adamw, frozen: str = "nothing", width: int = 7) -> None:
        super().__init__()
        self.make_optimizer, self.frozen, self.width = make_optimizer, frozen, width
        self.network: Network | None = None
        self.losses: list[float] = []

    def configure_model(self) -> None:
        if self.network is not None:
            return
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.network = Network(self.width)
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(not name.startswith(self.frozen))
        if isinstance(self.trainer.strategy, ShardedStrategy):
            mesh = self.trainer.strategy.device_mesh._flatten("shard")
            for block in self.network.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(self.network, mesh=mesh)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        assert self.network is not None
        loss = (self.network(batch) - batch[:, :3].sin()).square().mean()
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> Optimizer:
        return self.make_optimizer([named for named in self.named_parameters() if named[1].requires_grad])


def batches(steps: range) -> list[torch.Tensor]:
    return [torch.randn(4, 5, generator=torch.Generator().manual_seed(step)) for step in steps]


def whole(tree: Any) -> Any:
    """A copy of a tree whose sharded tensors are gathered."""
    if isinstance(tree, DTensor):
        return tree.full_tensor().detach().clone()
    if isinstance(tree, torch.Tensor):
        return tree.detach().clone()
    if isinstance(tree, Mapping):
        return {key: whole(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [whole(value) for value in tree]
    return tree


def state_of(trainer: Trainer) -> dict[str, Any]:
    """Weights, optimizer state by name, average and losses of a run that has ended, gathered."""
    module = trainer.lightning_module
    assert isinstance(module, Stage)
    averages = [callback for callback in trainer.callbacks if isinstance(callback, EMA)]  # type: ignore[attr-defined]
    optimizer = get_optimizer_state_dict(module, trainer.optimizers[0], options=StateDictOptions())
    return {
        "weights": whole(module.state_dict()),
        "optimizer": whole(optimizer["state"]),
        "average": whole(averages[0].average) if averages else {},
        "losses": module.losses,
    }


def train(
    steps: range,
    save: Path | None = None,
    checkpoint: Path | None = None,
    stage: Stage | None = None,
    checkpoints: ShardedCheckpoints | None = None,
    callbacks: Sequence[Callback] = (),
    sharded: bool = True,
    **settings: Any,
) -> dict[str, Any]:
    """Steps `steps` of a run on this rank; `save` when they are done."""
    sharding: dict[str, Any] = {}
    averages = [callback for callback in callbacks if isinstance(callback, EMA)]
    if sharded:
        logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
        strategy = ShardedStrategy(checkpoints=checkpoints or ShardedCheckpoints())
        sharding = {"strategy": strategy, "devices": int(os.environ["WORLD_SIZE"]), "num_nodes": 1}
    trainer = fit(
        stage or Stage(),
        batches(steps),  # type: ignore[arg-type]
        [*([] if averages else [EMA(decay=0.9)]), *callbacks],
        checkpoint=checkpoint,
        max_steps=steps.stop,
        plugins=[AtomicCheckpointIO()],
        **sharding | settings,
    )
    if save is not None:
        trainer.save_checkpoint(save)
        if sharded:
            strategy.checkpoints.wait()
    return state_of(trainer)


def train_on(num_ranks: int, steps: range, **settings: Any) -> dict[str, Any]:
    """The run on so many ranks, as rank 0 sees it."""
    return run_on_ranks(partial(train, steps, **settings), num_ranks, init_process_group=False)[0]


def bare(
    mesh: DeviceMesh, optimizer: MakeOptimizer = adamw, frozen: str = "nothing", width: int = 7
) -> ShardedStrategy:
    """A strategy with a sharded network that made one step, without a Trainer."""
    network = Network(width)
    for index, (name, parameter) in enumerate(network.named_parameters()):
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
        parameter.requires_grad_(not name.startswith(frozen))
    for block in network.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)
    strategy = ShardedStrategy()
    strategy.model = network
    strategy.optimizers = [optimizer([named for named in network.named_parameters() if named[1].requires_grad])]
    step(strategy, 0)
    return strategy


def step(strategy: ShardedStrategy, seed: int) -> None:
    """One optimizer step on the batch of this seed."""
    (optimizer,) = strategy.optimizers
    optimizer.zero_grad()
    (x,) = batches(range(seed, seed + 1))
    assert isinstance(strategy.model, nn.Module)
    strategy.model(x).square().mean().backward()
    optimizer.step()


def checkpoint_of(strategy: ShardedStrategy, **more: Any) -> dict[str, Any]:
    """As Lightning collects it: shards on every rank."""
    (optimizer,) = strategy.optimizers
    return {
        "state_dict": strategy.lightning_module_state_dict(),
        "optimizer_states": [strategy.optimizer_state(optimizer)],
        "global_step": 1,
    } | more


def held(strategy: ShardedStrategy) -> dict[str, Any]:
    """Weights and optimizer state, gathered."""
    return whole(checkpoint_of(strategy))


def flat_mesh() -> DeviceMesh:
    """All ranks along one axis."""
    return init_device_mesh("cpu", (dist.get_world_size(),))
