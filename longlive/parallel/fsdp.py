"""Sharding the network with FSDP2: every rank keeps a part of every parameter, its gradient and its optimizer state.

Before a block runs, the ranks gather its parameters; afterwards they drop them; in backward they gather them again and
sum the block's gradients into shards. One group of parameters is gathered at once: a block, the layers of the timestep,
and what is left (embeddings and head).

`shard_network` is the order of the steps, and each step rests on the one before:

1. *Compile* each block. The attention function stays outside (`models.wan.block`), so that blocks share one program.
2. *Checkpoint activations* around it: backward calls the compiled block again. The other way round, torch would run
   everything inside a checkpoint uncompiled, because no checkpoint may be interrupted by a call that is not compiled.
3. *Shard* each block around that, so that gathering is neither compiled nor repeated: backward gathers a block's
   parameters once, for recomputing and for gradients.

The first two replace `block.forward`; no module is wrapped, so parameters keep Wan's names.

A pass without backward (validation, rollout) runs under `torch.no_grad()`. Under `torch.inference_mode()` FSDP2's
buffers become ones that no later training can use; torch then says so.

The timestep's layers are gathered in float32 whatever `parameter_dtype` says, as the network computes them in float32.
A block's `modulation` is gathered with its block: its float32 sum with the timestep's modulation is rounded to the
activations' dtype right after, so rounding the table adds no error of another size (`tests/parallel/test_fsdp.py`
measures it).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from longlive.models.wan.model import CausalWan

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ShardingOptions:
    """How the network is sharded, and what surrounds its blocks.

    Attributes:
        activation_checkpointing: whether of a block only the input is kept, and backward computes it again; a number n
            says of every n-th block. What is called inside must answer alike the second time: an attention function
            with a cache must find in it what it found before.
        compile: whether the blocks are compiled.
        parameter_dtype: what parameters are gathered in. None: as they are kept, so that numbers equal those of one
            device; autocast then casts them where it needs. `bfloat16` halves what is sent and held, and blocks
            compute in it with or without autocast.
        reduce_dtype: what gradients are summed over ranks in. `bfloat16` loses updates when ranks are many.
        reshard_after_forward: whether a block's gathered parameters are dropped between forward and backward. False
            spares gathering them again, and keeps the whole network on every rank in between.
        replicate_across_nodes: whether every node holds a whole network, sharded over its ranks, so that only gradients
            travel between nodes.

    Raises:
        ValueError: for a dtype or a number that is none of these.
    """

    activation_checkpointing: int = False
    compile: bool = False
    parameter_dtype: str | None = None
    reduce_dtype: str = "float32"
    reshard_after_forward: bool = True
    replicate_across_nodes: bool = False

    def __post_init__(self) -> None:
        if self.activation_checkpointing < 0:
            raise ValueError(
                f"activation_checkpointing={self.activation_checkpointing} must be true, false, or n >= 1 for every "
                "n-th block"
            )
        if self.parameter_dtype not in (None, "bfloat16"):
            raise ValueError(
                f"parameter_dtype={self.parameter_dtype!r} is not supported; use null (as they are kept) or bfloat16"
            )
        if self.reduce_dtype not in _DTYPES:
            raise ValueError(f"reduce_dtype={self.reduce_dtype!r} is not supported; use {' or '.join(_DTYPES)}")


def shard_network(
    network: CausalWan, mesh: DeviceMesh, options: ShardingOptions, ranks_per_node: int | None = None
) -> CausalWan:
    """Shard a network in place, best while it is on meta: `materialise` then gives every rank its own
    part alone.

    Args:
        network: whole. Its parameters become DTensors, under the same names.
        mesh: its ranks, all axes together, are those that share the network.
        options: what to do, see there.
        ranks_per_node: needed for `replicate_across_nodes`.

    Raises:
        ValueError: as `sharding_mesh`.
    """
    shards = sharding_mesh(mesh, options.replicate_across_nodes, ranks_per_node)

    if options.compile:
        for block in network.blocks:
            block.forward = torch.compile(block.forward)

    if options.activation_checkpointing:
        for block in list(network.blocks)[:: options.activation_checkpointing]:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)

    # Inputs are not cast: the network itself knows which of them stay float32 (modulation, rotation).
    in_float32 = MixedPrecisionPolicy(reduce_dtype=_DTYPES[options.reduce_dtype], cast_forward_inputs=False)
    policy = replace(in_float32, param_dtype=_DTYPES[options.parameter_dtype] if options.parameter_dtype else None)
    shard = partial(fully_shard, mesh=shards, reshard_after_forward=options.reshard_after_forward)
    # FSDP2 warns of outputs that are views, as those of linear layers are. This one is small.
    network.time_projection.register_forward_hook(lambda module, args, output: output.clone())
    shard([network.time_embedding, network.time_projection], mp_policy=in_float32)
    sharded = [shard(block, mp_policy=policy) for block in network.blocks]
    shard(network, mp_policy=policy)

    # While a block computes, the next one's parameters are already on their way. In backward FSDP2 does so by itself.
    for current, following in pairwise(sharded):
        current.set_modules_to_forward_prefetch([following])
    network.register_forward_hook(_reshard_without_backward)
    return network


def sharding_mesh(mesh: DeviceMesh, replicate_across_nodes: bool, ranks_per_node: int | None = None) -> DeviceMesh:
    """The mesh of the parameters: all ranks of `mesh` along one axis `shard`, or the axes (`replicate`, `shard`).

    Raises:
        ValueError: if ranks per node are needed and missing, or do not divide the ranks.
    """
    if not replicate_across_nodes:
        return DeviceMesh(mesh.device_type, mesh.mesh.flatten(), mesh_dim_names=("shard",))
    if ranks_per_node is None:
        raise ValueError("replicate_across_nodes=True needs to know the nodes; pass ranks_per_node")
    if ranks_per_node < 1 or mesh.size() % ranks_per_node:
        legal = [number for number in range(1, mesh.size() + 1) if mesh.size() % number == 0]
        raise ValueError(
            f"ranks_per_node={ranks_per_node} does not divide {mesh.size()} ranks into nodes; use one of {legal}"
        )
    nodes = mesh.mesh.reshape(-1, ranks_per_node)
    return DeviceMesh(mesh.device_type, nodes, mesh_dim_names=("replicate", "shard"))


def _reshard_without_backward(network: nn.Module, args: Any, output: Any) -> None:
    """Drop what was gathered for a pass that no backward follows, for nothing else would: the network would go on with
    whole copies, and who then changes its parameters (an average swapped in) would change those."""
    if not torch.is_grad_enabled():
        for module in network.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
