"""A training run before it runs: who holds, computes and sends what, from the composed config alone.

No weights are built: networks and optimizers are counted on the meta device, everything else is arithmetic on the same
tables that the run uses. The module, the strategy and the codec of the config are constructed (without weights), so
what they refuse is refused here, in the same words. Three things are taken at their most: no frame is padding, every
chunk has a prompt of its own, and a clip is one shot.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from omegaconf import DictConfig

from longlive.callbacks.ema import EMA
from longlive.callbacks.sample_video import SampleVideo
from longlive.codecs.base import VideoCodec
from longlive.config import instantiate
from longlive.doctor.plan_codec import EncodeCost, count_frame_flops, encode_cost, no_encode
from longlive.doctor.plan_config import (
    Machine,
    accumulation_of,
    clip_of,
    codec_of,
    module_of,
    precision_of,
    sharding_of,
    strategy_of,
)
from longlive.doctor.plan_memory import (
    Numbers,
    activation_memory,
    block_activations,
    converted_bytes,
    count_weights,
    optimizer_step_bytes,
    shard_bytes,
    training_phases,
    weight_memory,
)
from longlive.doctor.plan_work import (
    attention_flops,
    scalar_communication,
    training_flops,
    ulysses_bytes_per_layer,
    weight_communication,
)
from longlive.doctor.plan_workload import Workload
from longlive.modules.teacher_forcing import TeacherForcingModule
from longlive.parallel.codec_halo import codec_context
from longlive.parallel.layout import MakeLayout, check_world, whole_layout
from longlive.parallel.strategy import ShardedStrategy
from longlive.rollout.cache import KeyValueCache
from longlive.rollout.engine import CACHE_DTYPES

GIBIBYTE = 2**30


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank, by name.

    Attributes:
        always: weights and what belongs to them.
        phases: what a step goes through, and what each holds beside.
    """

    always: Mapping[str, int]
    phases: Mapping[str, Mapping[str, int]]

    def of(self, phase: str) -> int:
        """What is there in a phase."""
        return sum(self.always.values()) + sum(self.phases[phase].values())

    @property
    def fullest(self) -> str:
        """The phase that holds most."""
        return max(self.phases, key=self.of)

    @property
    def peak(self) -> int:
        """What that phase holds."""
        return self.of(self.fullest)


@dataclass(frozen=True)
class RankPlan:
    """One sequence rank.

    Attributes:
        tokens, loss_tokens: of its part of a micro-batch.
        encode: of a micro-batch.
        flops, encode_flops: of an optimizer step, of the network and of the codec.
        memory: its bytes.
    """

    tokens: int
    loss_tokens: int
    encode: EncodeCost
    flops: int
    encode_flops: int
    memory: Memory


@dataclass(frozen=True)
class Plan:
    """What a run takes.

    Attributes:
        machine: what it was made for.
        strategy: name of its class, or Lightning's name.
        data_size, sequence_size: the mesh.
        num_nodes: machines.
        accumulation: micro-batches per optimizer step.
        global_batch_size: clips per optimizer step.
        workload: a micro-batch.
        precision: of the products.
        context: how a part of an encode gets its left context.
        num_parameters: of the network.
        useful_share: attention scores that visibility asks for, of all.
        ranks: the ranks of one sequence group; all groups are alike.
        step_bytes: bytes that a rank sends per optimizer step, by name (the largest of the ranks).
        layer_bytes: bytes that a rank sends for the attention of one layer (the first) and micro-batch.
        attention_flops: the part of self-attention's scores in a rank's FLOPs per optimizer step.
        activations_of_a_block: bytes by name, on rank 0.
    """

    machine: Machine
    strategy: str
    data_size: int
    sequence_size: int
    num_nodes: int
    accumulation: int
    global_batch_size: int
    workload: Workload
    precision: str
    context: str
    num_parameters: int
    useful_share: float
    ranks: tuple[RankPlan, ...]
    step_bytes: Mapping[str, int]
    layer_bytes: int
    attention_flops: int
    activations_of_a_block: Mapping[str, int]

    @property
    def peak_bytes(self) -> int:
        """Of the rank that holds most."""
        return max(rank.memory.peak for rank in self.ranks)

    @property
    def fits(self) -> bool | None:
        """Whether every rank's peak is below the memory of a GPU; None: not known."""
        memory = self.machine.gpu_memory
        return None if memory is None else self.peak_bytes <= memory * GIBIBYTE

    @property
    def step_flops(self) -> int:
        """FLOPs of an optimizer step on all ranks, network and codec."""
        return self.data_size * sum(rank.flops + rank.encode_flops for rank in self.ranks)


def make_plan(config: DictConfig, machine: Machine, pre_encoded: bool = False) -> Plan:
    """Plan `conf/train.yaml` as composed. Data need not be there, and pretrained weights neither.

    Args:
        config: of the run.
        machine: that it is planned for.
        pre_encoded: whether clips come as latents, so that nothing is encoded and no codec held.

    Raises:
        ValueError: if the run could not work; mostly in the run's own words.
    """
    strategy = strategy_of(config.strategy)
    if isinstance(strategy, ShardedStrategy):
        size = strategy.sequence_parallel_size or machine.ranks_per_node
        make_layout: MakeLayout = type(strategy).make_layout
    else:
        size, make_layout = 1, whole_layout
    check_world(machine.num_gpus, size)
    data_size = machine.num_gpus // size

    clip = clip_of(config)
    codec = codec_of(config.codec)
    codec.check_size(clip.height, clip.width)
    module = module_of(config, codec)
    model = module.model_config
    accumulation = accumulation_of(config, data_size)
    precision = precision_of(config, machine)
    numbers = Numbers.of(precision, machine.device)
    sharding = sharding_of(strategy, machine)
    num_chunks = clip.num_frames // clip.chunk_frames
    workload = Workload(
        model=model,
        layout=make_layout(num_chunks, size),
        rule=module.rule,
        batch_size=config.data.batch_size,
        num_chunks=num_chunks,
        chunk_frames=clip.chunk_frames,
        height=clip.height // codec.spatial_ratio,
        width=clip.width // codec.spatial_ratio,
        text_tokens=module.text_encoder.num_tokens,
        given_frames=module.given_frames,
    )
    context = codec_context(codec, strategy.codec_context if isinstance(strategy, ShardedStrategy) else "auto")

    weights = count_weights(model, module.make_optimizer)
    callbacks = [instantiate(callback) for callback in config.callbacks.values() if callback is not None]
    always = weight_memory(
        weights,
        sharding,
        accumulation=accumulation,
        has_average=any(isinstance(callback, EMA) for callback in callbacks),
    )
    samples = [callback for callback in callbacks if isinstance(callback, SampleVideo)]
    if samples or not pre_encoded:
        always["codec"] = sum(tensor.nbytes for tensor in (*codec.parameters(), *codec.buffers()))
    gradients = shard_bytes(weights, sharding)
    others = {
        "samples": {
            "gradients": gradients,
            "KV cache": max((_cache_bytes(module, codec, callback) for callback in samples), default=0),
        },
        "optimizer": {
            "gradients": gradients,
            "its own numbers": optimizer_step_bytes(weights, sharding, machine.device),
        },
    }

    frame_flops = None if pre_encoded else count_frame_flops(codec, clip.height, clip.width)
    ranks = []
    for rank in range(size):
        frames = workload.layout.frames(rank, clip.chunk_frames)
        if frame_flops is None:
            encode = no_encode(frames)
        else:
            encode = encode_cost(
                codec,
                frame_flops,
                frames,
                context,
                batch_size=workload.batch_size,
                num_frames=clip.num_frames,
                height=clip.height,
                width=clip.width,
            )
        phases = training_phases(
            activation_memory(workload, rank, numbers, sharding),
            gradients=gradients,
            converted=converted_bytes(weights, sharding, precision != "32-true"),
            accumulation=accumulation,
            saves_converted=sharding.num_checkpointed(model.num_layers) < model.num_layers,
        )
        ranks.append(
            RankPlan(
                tokens=workload.tokens(rank),
                loss_tokens=workload.loss_tokens(rank),
                encode=encode,
                flops=accumulation * training_flops(workload, rank, sharding),
                encode_flops=accumulation * encode.flops,
                memory=Memory(
                    always,
                    {"encode": {"gradients": gradients, "encode": encode.peak_bytes or 0}, **phases, **others},
                ),
            )
        )
    local_tokens = workload.tokens(0) // workload.batch_size
    plain, repeated = (
        ulysses_bytes_per_layer(workload.batch_size, local_tokens, model.dim, numbers.compute, size, checkpointing)
        for checkpointing in (False, True)
    )
    num_repeated = sharding.num_checkpointed(model.num_layers)
    exchanged = num_repeated * repeated + (model.num_layers - num_repeated) * plain
    step_bytes = {
        "attention (all-to-all)": accumulation * exchanged,
        **weight_communication(weights, sharding, accumulation),
        "codec's left context": accumulation * max(rank.encode.sent_bytes for rank in ranks),
        "loss, gradient norm, sample ids": scalar_communication(workload, machine.num_gpus, accumulation),
    }
    return Plan(
        machine=machine,
        strategy=strategy if isinstance(strategy, str) else type(strategy).__name__,
        data_size=data_size,
        sequence_size=size,
        num_nodes=machine.num_gpus // machine.ranks_per_node,
        accumulation=accumulation,
        global_batch_size=accumulation * data_size * workload.batch_size,
        workload=workload,
        precision=precision,
        context=context,
        num_parameters=weights.num_parameters,
        useful_share=workload.useful_entries / workload.entries,
        ranks=tuple(ranks),
        step_bytes=step_bytes,
        layer_bytes=repeated if num_repeated else plain,
        attention_flops=accumulation * attention_flops(workload, sharding),
        activations_of_a_block=block_activations(workload, 0, numbers),
    )


def _cache_bytes(module: TeacherForcingModule, codec: VideoCodec, samples: SampleVideo) -> int:
    """Bytes of the KV cache of the rollouts during training."""
    model, rollout, ratio = module.model_config, module.rollout, codec.spatial_ratio
    dtype = CACHE_DTYPES[rollout.cache_dtype] if rollout.cache_dtype else torch.float32
    cache = KeyValueCache(
        num_layers=model.num_layers,
        batch_size=len(samples.requests) * (2 if rollout.guided else 1),
        num_chunks=rollout.num_chunks(samples.num_frames),
        chunk_frames=rollout.chunk_frames,
        patches=model.patches(samples.height // ratio, samples.width // ratio),
        num_heads=model.num_heads,
        head_dim=model.head_dim,
        rule=rollout.rule,
        dtype=dtype,
        device="meta",
    )
    return cache.num_bytes
