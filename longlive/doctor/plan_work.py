"""Arithmetic and communication of training, per rank.

A product of `m x k` by `k x n` is `2 m k n` FLOPs. Backward computes two products for every one of forward: the
gradient of the input and that of the weight; the first products of a path (patches, prompts, timesteps) need none for
their input. Attention counts the scores that visibility asks for, `4 d` FLOPs per score over all heads, and twice that
in backward; that a fused kernel computes the scores once more is not counted, nor are norms and element-wise work.
Activation checkpointing computes the blocks' forward once more. Sequence ranks attend over the whole clip with their
share of the heads, so attention is equal on all of them whatever the layout.

Bytes are those that one rank sends to others. A gather of B bytes over N ranks sends `B (N - 1) / N`, a reduce-scatter
as many, an all-reduce twice that (what a ring does, and the least there can be).
"""

from __future__ import annotations

from dataclasses import dataclass

from longlive.doctor.plan_memory import FLOAT32, Sharding, Weights
from longlive.doctor.plan_workload import Work, Workload
from longlive.models.wan.config import WanConfig
from longlive.parallel.ulysses import exchanged_bytes

INT64 = 8


@dataclass(frozen=True)
class Call:
    """One call of the network, as one rank computes it.

    Attributes:
        model: sizes of the network.
        tokens, frames: here.
        prompts: distinct ones.
        text_tokens: of a prompt.
        scores: attention scores of one head, here and of all heads: where ranks share the heads, a share of the whole.
    """

    model: WanConfig
    tokens: int
    frames: int
    prompts: int
    text_tokens: int
    scores: int

    @property
    def text(self) -> int:
        """Tokens of all distinct prompts."""
        return self.prompts * self.text_tokens


def call_of(workload: Work, rank: int) -> Call:
    """A rank's part of a call. Of the heads' scores it computes its share."""
    return Call(
        workload.model,
        workload.tokens(rank),
        workload.frames(rank),
        workload.num_prompts,
        workload.text_tokens,
        workload.useful_entries // workload.size,
    )


def block_flops(call: Call) -> dict[str, int]:
    """FLOPs of one block's forward, by name."""
    model, tokens = call.model, call.tokens
    dim = model.dim
    return {
        "linear layers": 2 * tokens * (6 * dim * dim + 2 * dim * model.ffn_dim),
        "prompts' keys and values": 2 * call.text * 2 * dim * dim,
        "self-attention": 4 * call.scores * dim,
        "cross-attention": 4 * tokens * call.text_tokens * dim,
    }


def outer_flops(call: Call) -> tuple[int, int]:
    """FLOPs of the forward outside the blocks, and those of them whose inputs need no gradient."""
    model, tokens, frames = call.model, call.tokens, call.frames
    dim = model.dim
    area = model.patch_size[1] * model.patch_size[2]
    first = 2 * (
        tokens * model.in_channels * area * dim + call.text * model.text_dim * dim + frames * model.freq_dim * dim
    )
    later = 2 * (call.text * dim * dim + frames * 7 * dim * dim + head_numbers(call))
    return first + later, first


def head_numbers(call: Call) -> int:
    """Multiplications of the head."""
    return call.tokens * call.model.dim * call.model.out_channels * call.model.patch_size[1] * call.model.patch_size[2]


def forward_flops(call: Call) -> int:
    """FLOPs of a call that no backward follows."""
    return call.model.num_layers * sum(block_flops(call).values()) + outer_flops(call)[0]


def training_flops(workload: Workload, rank: int, sharding: Sharding) -> int:
    """FLOPs of one rank for forward and backward of a micro-batch."""
    call = call_of(workload, rank)
    outer, first = outer_flops(call)
    return _passes(workload, sharding) * sum(block_flops(call).values()) + 3 * outer - first


def attention_flops(workload: Workload, sharding: Sharding) -> int:
    """The self-attention scores' part of `training_flops`; equal on all ranks."""
    return _passes(workload, sharding) * block_flops(call_of(workload, 0))["self-attention"]


def _passes(workload: Workload, sharding: Sharding) -> int:
    """How often a block's forward FLOPs are spent, over all blocks: three times, and once more where computed again."""
    return 3 * workload.model.num_layers + sharding.num_checkpointed(workload.model.num_layers)


def ulysses_bytes_per_layer(
    batch_size: int, local_tokens: int, dim: int, itemsize: int, size: int, checkpointing: bool = False
) -> int:
    """Bytes that one rank sends for one layer's attention in forward and backward of a micro-batch.

    Args:
        batch_size: clips.
        local_tokens: of one clip, on this rank.
        dim: features of all heads together.
        itemsize: bytes per number of queries, keys and values.
        size: sequence ranks.
        checkpointing: whether the layer's forward, exchange included, runs twice.
    """
    return exchanged_bytes(batch_size, local_tokens, dim, itemsize, size) * (3 if checkpointing else 2)


def gather_bytes(num_bytes: int, size: int) -> int:
    """Bytes that a rank sends when `num_bytes`, spread over `size` ranks, are gathered by all or reduced to shards."""
    return num_bytes * (size - 1) // size


def weight_communication(weights: Weights, sharding: Sharding, accumulation: int) -> dict[str, int]:
    """Bytes per rank and optimizer step that weights and gradients cost, by name."""
    shards, replicas = sharding.num_shards, sharding.num_replicas
    gradients = weights.num_parameters * sharding.reduced_itemsize
    found = {}
    if shards > 1:
        gathered = weights.gathered_bytes(weights.num_blocks, sharding.gathered_itemsize)
        again = weights.num_blocks * weights.block * sharding.gathered_itemsize if sharding.reshard_after_forward else 0
        found["parameters gathered for forward"] = accumulation * gather_bytes(gathered, shards)
        found["parameters gathered for backward"] = accumulation * gather_bytes(again, shards)
        found["gradients reduced to shards"] = gather_bytes(gradients, shards)
        if weights.muon:
            found["matrices gathered for Muon"] = gather_bytes(weights.muon * FLOAT32, shards)
    if replicas > 1:
        found["gradients averaged over replicas"] = 2 * gather_bytes(gradients // shards, replicas)
    return found


def scalar_communication(workload: Workload, world_size: int, accumulation: int) -> int:
    """Bytes per rank and optimizer step of what is reduced or compared number by number: per micro-batch the count of
    scored frames and, in a sequence group, the ids of the samples; per step the gradients' norm."""
    reduced = 2 * gather_bytes((accumulation + 1) * FLOAT32, world_size)
    return reduced + accumulation * workload.batch_size * INT64 * (workload.size - 1)
