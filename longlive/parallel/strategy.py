"""Lightning strategies: parameters sharded over all ranks, clips over the ranks of a sequence group.

They stand on Lightning's `ModelParallelStrategy`, which starts the processes, keeps the device mesh and takes any
precision plugin. Here is what it lacks: our mesh, `shard` (called by a module's `configure_model`, so the order of
steps is visible there), one communication per optimizer step under gradient accumulation, and checkpoints that are
complete or absent. Who owns which part of a clip is data (`layout.py`), so the two ways of splitting a sequence differ
in one line.
"""

from __future__ import annotations

import gc
from collections.abc import Generator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import nn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.fsdp import FSDPModule

from longlive.models.wan.model import CausalWan
from longlive.parallel.codec_halo import CODEC_CONTEXTS
from longlive.parallel.fsdp import ShardingOptions, shard_network
from longlive.parallel.launcher import JointLauncher, end_with_launcher, exit_soon
from longlive.parallel.layout import MakeLayout, balanced_layout, contiguous_layout, whole_layout
from longlive.parallel.mesh import SEQUENCE, SequenceShare, make_mesh
from longlive.parallel.sharded_checkpoint import ShardedCheckpoints


class ShardedStrategy(ModelParallelStrategy):
    """Parameters, gradients and optimizer state sharded over all ranks (FSDP2); every rank trains on clips of its own.

    Args:
        sharding: how the network is sharded; None: the defaults.
        checkpoints: how checkpoints are written; None: the defaults.
        process_group_backend: None: nccl on GPUs, gloo on CPUs.
        timeout: of a collective.
    """

    make_layout: ClassVar[MakeLayout] = staticmethod(whole_layout)

    def __init__(
        self,
        *,
        sharding: ShardingOptions | None = None,
        checkpoints: ShardedCheckpoints | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(process_group_backend=process_group_backend, timeout=timeout)
        self.sharding = sharding or ShardingOptions()
        self.checkpoints = checkpoints or ShardedCheckpoints()
        self.sequence_parallel_size: int | None = 1
        self.codec_context = "auto"

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        if not self.cluster_environment.creates_processes_externally:
            self._launcher = JointLauncher(self.cluster_environment, self.num_processes, self.num_nodes)

    def setup_environment(self) -> None:
        """Connect the processes and build the mesh.

        Raises:
            ValueError: if the sequence ranks do not divide the processes.
        """
        end_with_launcher()
        assert self.accelerator is not None
        self.accelerator.setup_device(self.root_device)
        self._setup_distributed()
        if self.sequence_parallel_size is None:
            self.sequence_parallel_size = self.num_processes
        self._device_mesh = make_mesh(self.world_size, self.sequence_parallel_size, self.root_device.type)
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self._device_mesh

    @property
    def sequence(self) -> SequenceShare:
        """This process's place in its sequence group."""
        axis = self.device_mesh[SEQUENCE]
        group = axis.get_group() if axis.size() > 1 else None
        return SequenceShare(axis.get_local_rank(), axis.size(), group, type(self).make_layout, self.codec_context)

    def shard(self, network: CausalWan) -> CausalWan:
        """Shard a network over all ranks, in place. It may be on the meta device."""
        return shard_network(network, self.device_mesh, self.sharding, ranks_per_node=self.num_processes)

    @contextmanager
    def block_backward_sync(self) -> Generator[None, None, None]:
        """Inside, gradients are added up locally: accumulation communicates once per optimizer step."""
        assert isinstance(self.model, nn.Module)
        roots = [module for module in self.model.children() if isinstance(module, FSDPModule)]
        for root in roots:
            root.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            for root in roots:
                root.set_requires_gradient_sync(True)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a directory that is complete or absent. Every rank must call it."""
        self.checkpoints.save(self, checkpoint, filepath)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Fill model and optimizers; returns the rest."""
        return self.checkpoints.load(self, checkpoint_path)

    def on_exception(self, exception: BaseException) -> None:
        exit_soon()

    def remove_checkpoint(self, filepath: str | Path) -> None:
        """Delete a checkpoint, once those that are being written are complete."""
        if self.is_global_zero:
            self.checkpoints.remove(filepath)

    def teardown(self) -> None:
        self.checkpoints.wait()
        super().teardown()
        # An asynchronous gloo operation of the last backward that outlives the interpreter aborts the process.
        gc.collect()


class SequenceParallelStrategy(ShardedStrategy):
    """Base of the strategies that also split clips.

    Args:
        sequence_parallel_size: ranks that share a clip, None: all processes of a node. It divides the processes, the
            attention heads and what a layout deals out.
        codec_context: how encoding a part of a clip gets its left context: `exchange` of the causal convolutions'
            inputs between neighbours, a `halo` of extra raw frames, or `auto`, the exchange where the codec can.
        **sharded: see `ShardedStrategy`.

    Raises:
        ValueError: for a size below 1 or an unknown context.
    """

    def __init__(
        self, sequence_parallel_size: int | None = None, *, codec_context: str = "auto", **sharded: Any
    ) -> None:
        super().__init__(**sharded)
        if sequence_parallel_size is not None and sequence_parallel_size < 1:
            raise ValueError(f"sequence_parallel_size={sequence_parallel_size} must be at least 1")
        if codec_context not in CODEC_CONTEXTS:
            raise ValueError(f"codec_context={codec_context!r} is unknown; use {', '.join(CODEC_CONTEXTS)}")
        self.sequence_parallel_size = sequence_parallel_size
        self.codec_context = codec_context


class BalancedSPStrategy(SequenceParallelStrategy):
    """Balanced SP: every rank owns the clean and the noisy copy of the same frames."""

    make_layout: ClassVar[MakeLayout] = staticmethod(balanced_layout)


class ContiguousSPStrategy(SequenceParallelStrategy):
    """The conventional split of `[all clean | all noisy]`, for comparison."""

    make_layout: ClassVar[MakeLayout] = staticmethod(contiguous_layout)


# So that `Trainer(strategy="balanced_sp")` finds them; by name they have their defaults. Here and not in the package's
# `__init__`, which `longlive --help` reads without torch: whoever has one of our modules has imported this.
StrategyRegistry.register("balanced_sp", BalancedSPStrategy, "clips shared by ranks with equal work")
StrategyRegistry.register("contiguous_sp", ContiguousSPStrategy, "clips shared by ranks, the conventional split")
StrategyRegistry.register("fsdp2", ShardedStrategy, "parameters sharded over all ranks")
