"""longlive: train video diffusion transformers to generate long videos."""

from lightning.pytorch.strategies import StrategyRegistry

from longlive.parallel.strategy import BalancedSPStrategy, ContiguousSPStrategy, ShardedStrategy

__version__ = "0.1.0.dev0"

# So that `Trainer(strategy="balanced_sp")` finds them. By name they have their defaults: a clip is shared by a node.
StrategyRegistry.register("balanced_sp", BalancedSPStrategy, "clips shared by ranks with equal work")
StrategyRegistry.register("contiguous_sp", ContiguousSPStrategy, "clips shared by ranks, the conventional split")
StrategyRegistry.register("fsdp2", ShardedStrategy, "parameters sharded over all ranks")
