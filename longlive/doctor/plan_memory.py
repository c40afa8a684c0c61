"""Memory of training, per rank: the stated model that `longlive doctor plan` computes with.

**Weights.** Parameters, gradients, the optimizer's state and the average are float32, divided by the ranks that they
are sharded over. FSDP gathers the parameters outside the blocks for the whole step and those of two blocks at a time
(the one that computes and the next), on a single rank too; gradients that are accumulated over micro-batches without
communication are held whole. Under autocast, the bfloat16 copies of float32 matrices live as long as a forward. The
step of Adam on a GPU holds one more number per parameter.

**Phases.** Gradients live from one backward to the next: Lightning drops them when the next one begins. So where they
are not accumulated, backward begins without them and ends with them and without what forward had kept, and of the two
only the larger counts:

| phase | beside what is always there |
|---|---|
| encode, samples | gradients, and what they need themselves |
| forward | at its end gradients, what all blocks keep, the widest features, bfloat16 copies |
| start of backward | what all blocks keep, one block computed again, the widest gradients |
| end of backward | gradients, one block, the widest gradients |
| optimizer | gradients, the optimizer's own numbers |

**Activations** are what autograd saves, counted by storage: `l` tokens of a rank's sequence, `d` features, `m` of the
feed-forward, `n` heads, `c` bytes of the compute dtype (4, or 2 under bf16-mixed), `a` bytes in attention. Per block:

| what | bytes per token |
|---|---|
| two modulated norms: input and normalised in float32, result | 2 (8 d + 8 + c d) |
| two gated sums: the update in float32 | 8 d |
| RMS norms of query and key, and of the cross-attention's query | 3 norm |
| query, key, value as attended; output, its log-sum-exp, and the output joined | 4 a d + 4 n + c d |
| cross-attention: input of its norm and result, query, output, log-sum-exp | 4 d + 8 + c d + 2 a d + 4 n |
| feed-forward, before and after the GELU | 2 c m |

plus, for `ChunkedAttention`, the copies of the keys and values of every rectangle that joins several segments:
`2 a d / P` bytes per key token, with P ranks sharing the heads (`n (n + 1)` chunks for a clip of n without a window:
the one term that grows with the square of the clip); the keys and values of every piece's prompt; and a few vectors per
frame. With activation checkpointing every block keeps its input (`c d` per token) and only one block at a time all of
this. `norm` is `c d + 4` with a fused kernel (CUDA); on a CPU it is `8 d + 4`, and attention there is float32
(`a` = 4), so that under bf16-mixed it holds converted copies of all keys and values.

A frozen network with an adapter saves nothing for the gradients of its modulation (two normalised features and both
updates, `16 d`), and the adapter what is between its matrices (`rank c` per layer); the inputs of its layers are those
that the linear layers would save.

Under `nvfp4` a linear layer keeps 0.57 bytes per number of its input, where 2 are counted here: the plan is above what
is held. Not in the model: what lives only inside a kernel or between two operations, except the gradients of the
feed-forward's hidden features, the widest (`2 c m` per token), the allocator's fragmentation, and CUDA's own context.

Measured on one H200 (torch 2.11; 6 blocks of 1536 features, 32,768 and 65,536 tokens, both precisions): without
activation checkpointing, what is alive after a forward (26 to 106 GiB) is within 0.2 % of this and the peak of forward
and backward 0.6 to 2.4 % below it; with it, the peak (6 to 22 GiB) is 11 to 14 % below. The whole 5B network with its
optimizer and average (`tools/bench_train.py`, 64 and 72 frames): the peak in bf16 (130 and 137 GiB) is 3 % below this,
in FP8, of whose kernels nothing is known here, 7 % above (134 GiB at 56 frames).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Adam, Muon, Optimizer

from longlive.doctor.plan_workload import Work
from longlive.models.wan.config import WanConfig
from longlive.models.wan.model import CausalWan
from longlive.modules.base import OptimizerFactory
from longlive.modules.optimizer import MuonAdamW
from longlive.rollout.cache import KeyValueCache
from longlive.rollout.settings import CACHE_DTYPES, RolloutSettings

FLOAT32 = 4


@dataclass(frozen=True)
class Sharding:
    """How weights are spread, and what is kept for backward.

    Attributes:
        num_shards: ranks that every parameter is divided over; 1: each holds all.
        num_replicas: groups of `num_shards` ranks, each holding all; their gradients are averaged.
        gathered_itemsize: bytes per number of gathered parameters.
        reduced_itemsize: bytes per number of gradients on their way.
        reshard_after_forward: whether a block's parameters are dropped after its forward and gathered again.
        gathers: whether a block computes with a gathered copy of its parameters, as FSDP has it on one rank too.
        activation_checkpointing: 0: never; n: every n-th block is computed again in backward.
    """

    num_shards: int = 1
    num_replicas: int = 1
    gathered_itemsize: int = FLOAT32
    reduced_itemsize: int = FLOAT32
    reshard_after_forward: bool = True
    gathers: bool = False
    activation_checkpointing: int = 0

    def num_checkpointed(self, num_layers: int) -> int:
        """Blocks that are computed twice."""
        return len(range(0, num_layers, self.activation_checkpointing)) if self.activation_checkpointing else 0


@dataclass(frozen=True)
class Weights:
    """Numbers in a network's parameters, and bytes of the optimizer's state for all of them.

    Attributes:
        num_parameters: all.
        block: of one block.
        num_blocks: blocks.
        timestep: of the timestep's layers, which are gathered in float32 whatever the rest is gathered in.
        matrices: of the weights that autocast converts.
        optimizer_bytes: of the optimizer's state.
        muon: of the matrices that Muon needs whole.
        adam: of the parameters that Adam steps, all at once on a GPU.
    """

    num_parameters: int
    block: int
    num_blocks: int
    timestep: int
    matrices: int
    optimizer_bytes: int
    muon: int = 0
    adam: int = 0

    def gathered_bytes(self, num_blocks: int, itemsize: int) -> int:
        """Of everything outside the blocks, and of so many blocks, gathered."""
        rest = self.num_parameters - self.num_blocks * self.block - self.timestep
        return (rest + num_blocks * self.block) * itemsize + self.timestep * FLOAT32


def stepped_on_meta(make_optimizer: OptimizerFactory, named: Sequence[tuple[str, nn.Parameter]]) -> Optimizer:
    """An optimizer after its first step, on meta."""
    for _, parameter in named:
        parameter.grad = torch.empty_like(parameter)
    optimizer = make_optimizer(named)
    optimizer.step()
    return optimizer


def state_bytes(optimizer: Optimizer) -> int:
    """Of an optimizer's state, but for single numbers."""
    state = [value for entries in optimizer.state.values() for value in entries.values()]
    return sum(value.nbytes for value in state if isinstance(value, torch.Tensor) and value.ndim)


def count_weights(model: WanConfig, make_optimizer: OptimizerFactory) -> Weights:
    """Count on the meta device; the optimizer's state by taking one step there."""
    with torch.device("meta"):
        network = CausalWan(model)
    parameters = dict(network.named_parameters())
    optimizer = stepped_on_meta(make_optimizer, [(f"network.{name}", value) for name, value in parameters.items()])
    parts = optimizer.parts if isinstance(optimizer, MuonAdamW) else (optimizer,)
    return Weights(
        num_parameters=sum(parameter.numel() for parameter in parameters.values()),
        block=sum(parameter.numel() for parameter in network.blocks[0].parameters()),
        num_blocks=model.num_layers,
        timestep=sum(p.numel() for name, p in parameters.items() if name.startswith("time_")),
        matrices=sum(p.numel() for name, p in parameters.items() if p.ndim > 1 and not name.startswith("time_")),
        optimizer_bytes=state_bytes(optimizer),
        muon=sum(_num_stepped(part) for part in parts if isinstance(part, Muon)),
        adam=sum(_num_stepped(part) for part in parts if isinstance(part, Adam)),
    )


def _num_stepped(optimizer: Optimizer) -> int:
    return sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])


def weight_memory(weights: Weights, sharding: Sharding, *, accumulation: int, has_average: bool) -> dict[str, int]:
    """Bytes per rank that are there all the time, by name."""
    shards = sharding.num_shards
    memory = {"parameters": shard_bytes(weights, sharding), "optimizer state": -(-weights.optimizer_bytes // shards)}
    if has_average:
        memory["average (EMA)"] = shard_bytes(weights, sharding)
    if sharding.gathers:
        num_blocks = min(2, weights.num_blocks) if sharding.reshard_after_forward else weights.num_blocks
        memory["gathered parameters"] = weights.gathered_bytes(num_blocks, sharding.gathered_itemsize)
    if shards > 1 and accumulation > 1:
        memory["gradients held whole while accumulating"] = weights.num_parameters * sharding.reduced_itemsize
    return memory


def shard_bytes(weights: Weights, sharding: Sharding) -> int:
    """Of one float32 number for each of a rank's parameters: of itself, or of its gradient."""
    return -(-weights.num_parameters * FLOAT32 // sharding.num_shards)


def converted_bytes(weights: Weights, sharding: Sharding, autocast: bool) -> int:
    """Of the bfloat16 copies that autocast makes of the matrices in a forward, if they are not gathered in it."""
    return 2 * weights.matrices if autocast and sharding.gathered_itemsize == FLOAT32 else 0


def optimizer_step_bytes(weights: Weights, sharding: Sharding, device: str) -> int:
    """Of what the optimizer's step holds for itself: Adam on a GPU the roots of all its second moments."""
    return -(-weights.adam * FLOAT32 // sharding.num_shards) if device == "cuda" else 0


@dataclass(frozen=True)
class Numbers:
    """Bytes per number of what is saved.

    Attributes:
        compute: of the features between operations: 4, or 2 under bf16-mixed.
        attention: of queries, keys and values as the attention kernel saves them.
        fused_norm: whether RMS norms keep their input alone.
    """

    compute: int
    attention: int
    fused_norm: bool

    @classmethod
    def of(cls, precision: str, device_type: str) -> Numbers:
        """For `32-true`, or bfloat16 by autocast (`bf16-mixed`, `fp8`, `nvfp4`), on `cpu` or `cuda`."""
        compute = FLOAT32 if precision == "32-true" else 2
        return cls(compute, FLOAT32 if device_type == "cpu" else compute, device_type != "cpu")

    def norm(self, dim: int, frozen: bool) -> int:
        """Bytes that an RMS norm over `dim` features saves."""
        kept = 1 if frozen else 2
        return (self.compute * dim if self.fused_norm else kept * FLOAT32 * dim) + 4


@dataclass(frozen=True)
class Adapter:
    """LoRA in one block, summed over its layers: those that get tokens, and those that get prompts.

    Attributes:
        token_ranks, text_ranks: columns of A's output.
        token_numbers, text_numbers: of A and B together.
        entering, text_entering: of the As whose inputs never need a gradient: of queries, keys and values in the first
            block, and of the layers that get prompts in all of them.
    """

    token_ranks: int
    text_ranks: int
    token_numbers: int
    text_numbers: int
    entering: int
    text_entering: int


def block_activations(workload: Work, rank: int, numbers: Numbers, adapter: Adapter | None = None) -> dict[str, int]:
    """Bytes that one block saves for backward, by name."""
    model, tokens, frames = workload.model, workload.tokens(rank), workload.frames(rank)
    dim, c, a = model.dim, numbers.compute, numbers.attention
    # A kernel in another dtype than the features keeps converted copies of all keys, else of those that it joins.
    copied = workload.key_tokens(only_joined=a == c)
    kept = 4 if a == c else 2
    text = workload.num_prompts * workload.text_tokens
    per_frame = (6 + 2) * dim * FLOAT32
    cross_norm = (FLOAT32 if a == c else c) * dim + 8 if model.cross_attn_norm else 0
    converted = 0 if a == c else c * dim
    norm = numbers.norm(dim, frozen=adapter is not None)
    modulated = FLOAT32 * dim if adapter is None else 0
    found = {
        "modulated norms": tokens * 2 * (FLOAT32 * dim + modulated + 8 + c * dim) + frames * per_frame,
        "gated sums": tokens * 2 * modulated,
        "query and key norms": tokens * 3 * norm,
        "self-attention": tokens * (kept * a * dim + 4 * model.num_heads + c * dim),
        "copies of keys and values": 2 * copied * a * dim // workload.size,
        "cross-attention": tokens * (cross_norm + c * dim + 2 * a * dim + 4 * model.num_heads + converted),
        "prompts' keys and values": (text * norm + 2 * workload.prompt_rows(rank) * workload.text_tokens * a * dim),
        "feed-forward": tokens * 2 * c * model.ffn_dim,
    }
    if adapter is not None:
        found["between the adapter's matrices"] = (tokens * adapter.token_ranks + text * adapter.text_ranks) * c
    return found


def outer_activations(workload: Work, rank: int, numbers: Numbers, frozen: bool = False) -> int:
    """Bytes that the network saves outside its blocks: embeddings, rotation, head, velocity."""
    model, tokens, frames = workload.model, workload.tokens(rank), workload.frames(rank)
    c, dim = numbers.compute, model.dim
    area = model.patch_size[1] * model.patch_size[2]
    if frozen:
        # Of the embeddings nothing: the prompts' are the input of adapters.
        text = workload.num_prompts * workload.text_tokens * c * dim
        return tokens * (2 * model.head_dim * FLOAT32 + FLOAT32 * dim + 8) + text
    per_token = model.in_channels * area * c + 2 * model.head_dim * FLOAT32
    per_token += 8 * dim + 8 + c * dim + model.out_channels * area * FLOAT32
    per_frame = (model.freq_dim + 5 * dim) * FLOAT32
    text = workload.num_prompts * workload.text_tokens * c * (model.text_dim + 3 * dim)
    return tokens * per_token + frames * per_frame + text


@dataclass(frozen=True)
class Activations:
    """Bytes per rank that autograd holds, and what lives beside.

    Attributes:
        outside: saved outside the blocks.
        kept: saved of all blocks through forward: everything, or the input where a block is computed again.
        again: of one block that is computed again.
        widest: of the widest features, or of their gradients.
    """

    outside: int
    kept: int
    again: int
    widest: int


def activation_memory(
    workload: Work, rank: int, numbers: Numbers, sharding: Sharding, adapter: Adapter | None = None
) -> Activations:
    """What a micro-batch takes on a rank. With an adapter, the network itself is frozen."""
    block = sum(block_activations(workload, rank, numbers, adapter).values())
    tokens, num_layers = workload.tokens(rank), workload.model.num_layers
    num_checkpointed = sharding.num_checkpointed(num_layers)
    inputs = num_checkpointed * tokens * workload.model.dim * numbers.compute
    return Activations(
        outside=outer_activations(workload, rank, numbers, frozen=adapter is not None),
        kept=inputs + (num_layers - num_checkpointed) * block,
        again=block if num_checkpointed else 0,
        widest=2 * tokens * workload.model.ffn_dim * numbers.compute,
    )


def training_phases(
    activations: Activations, *, gradients: int, converted: int, accumulation: int, saves_converted: bool
) -> dict[str, dict[str, int]]:
    """Bytes by phase and name; see the module docstring.

    Args:
        activations: of a micro-batch.
        gradients: of the parameters.
        converted: of the bfloat16 copies of matrices.
        accumulation: micro-batches per step; gradients are held from one to the next.
        saves_converted: whether backward needs those copies.
    """
    a = activations
    saved = {"outside the blocks": a.outside, "kept of the blocks": a.kept}
    copies = {"bfloat16 copies of the weights": converted}
    again = {"one block, computed again": a.again} if a.again else {}
    return {
        "forward": {"gradients": gradients, **saved, **copies, "widest features": a.widest if a.again else 0},
        "start of backward": {
            "gradients": gradients if accumulation > 1 else 0,
            **saved,
            **(copies if saves_converted else {}),
            **again,
            "widest gradients": a.widest,
        },
        "end of backward": {"gradients": gradients, **again, "widest gradients": a.widest},
    }


def kv_cache_bytes(
    rollout: RolloutSettings, model: WanConfig, size: tuple[int, int], *, num_samples: int, num_chunks: int, ranks: int
) -> int:
    """Bytes of a rank's KV cache in a rollout of latents of `size`; ranks share it where they divide a chunk."""
    shared = ranks if rollout.chunk_frames % ranks == 0 else 1
    return KeyValueCache(
        num_layers=model.num_layers,
        batch_size=num_samples * (2 if rollout.guided else 1),
        num_chunks=num_chunks,
        chunk_frames=rollout.chunk_frames,
        patches=model.patches(*size),
        num_heads=model.num_heads // shared,
        head_dim=model.head_dim,
        rule=rollout.rule,
        dtype=CACHE_DTYPES[rollout.cache_dtype] if rollout.cache_dtype else torch.float32,
        device="meta",
    ).num_bytes
