"""A training run before it runs: who holds, computes and sends what, from the composed config alone.

No weights are built: networks and optimizers are counted on the meta device, everything else is arithmetic on the same
tables that the run uses. The module, the strategy and the codec of the config are constructed (without weights), so
what they refuse is refused here, in the same words. Three things are taken at their most: no frame is padding, every
chunk has a prompt of its own, and a clip is one shot.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from omegaconf import DictConfig

from longlive.callbacks.ema import EMA
from longlive.callbacks.sample_video import SampleVideo
from longlive.codecs.base import VideoCodec
from longlive.config import check_arguments, instantiate
from longlive.doctor.plan_codec import EncodeCost, FrameFlops, count_frame_flops, encode_cost, no_encode
from longlive.doctor.plan_config import (
    Machine,
    accumulation_of,
    clip_of,
    codec_of,
    module_of,
    precision_of,
    reads_clips,
    sharding_of,
    strategy_of,
)
from longlive.doctor.plan_distillation import distillation_step
from longlive.doctor.plan_memory import Numbers, kv_cache_bytes
from longlive.doctor.plan_roles import count_roles
from longlive.doctor.plan_step import RunShape, StepCost, tuning_step
from longlive.doctor.plan_workload import Workload
from longlive.modules.base import LongLiveModule
from longlive.modules.distillation import DistillationModule
from longlive.modules.teacher_forcing import TeacherForcingModule
from longlive.parallel.codec_halo import codec_context
from longlive.parallel.layout import MakeLayout, check_rollout, check_world, whole_layout
from longlive.parallel.strategy import ShardedStrategy

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
        parts: FLOPs of the network in an optimizer step, by name.
        encode_flops: of the codec in an optimizer step.
        memory: its bytes.
    """

    tokens: int
    loss_tokens: int
    encode: EncodeCost
    parts: Mapping[str, int]
    encode_flops: int
    memory: Memory

    @property
    def flops(self) -> int:
        """Of the network, in an optimizer step."""
        return sum(self.parts.values())


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
    for part in (config.data, config.trainer):  # which are not built here
        check_arguments(part)
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
    if not isinstance(module, TeacherForcingModule | DistillationModule):
        raise ValueError(
            f"module {type(module).__name__} cannot be planned; use module=teacher_forcing, multi_shot or distillation"
        )
    accumulation = accumulation_of(config, data_size, by_hand=not module.automatic_optimization)
    precision = precision_of(config, machine)
    name = precision if isinstance(precision, str) else str(precision.precision)
    sharding = sharding_of(strategy, machine)
    num_chunks = clip.num_frames // clip.chunk_frames
    workload = Workload(
        model=module.model_config,
        layout=make_layout(num_chunks, size),
        rule=module.rule if isinstance(module, TeacherForcingModule) else module.rollout.rule,
        batch_size=config.data.batch_size,
        num_chunks=num_chunks,
        chunk_frames=clip.chunk_frames,
        height=clip.height // codec.spatial_ratio,
        width=clip.width // codec.spatial_ratio,
        text_tokens=module.text_encoder.num_tokens,
        given_frames=module.given_frames,
    )
    callbacks = [instantiate(callback) for callback in config.callbacks.values() if callback is not None]
    run = RunShape(
        workload=workload,
        sharding=sharding,
        numbers=Numbers.of(name, machine.device),
        autocast=name != "32-true",
        accumulation=accumulation,
        num_gpus=machine.num_gpus,
        device=machine.device,
        has_average=any(isinstance(callback, EMA) for callback in callbacks),
    )
    if isinstance(module, DistillationModule):
        check_rollout(clip.chunk_frames, module.model_config.num_heads, size)
        step = distillation_step(module, count_roles(module, precision, sharding), run)
    else:
        step = tuning_step(module, run)

    encodes = reads_clips(config) and not pre_encoded
    samples = [callback for callback in callbacks if isinstance(callback, SampleVideo)]
    always = dict(step.always)
    if encodes or samples:
        always["codec"] = sum(tensor.nbytes for tensor in (*codec.parameters(), *codec.buffers()))
    context = codec_context(codec, strategy.codec_context if isinstance(strategy, ShardedStrategy) else "auto")
    frame_flops = count_frame_flops(codec, clip.height, clip.width) if encodes else None
    encode = [
        _encode_cost(codec, frame_flops, workload, rank, context, clip.height, clip.width) for rank in range(size)
    ]
    cache = max((_cache_bytes(module, codec, callback, size) for callback in samples), default=0)
    return Plan(
        machine=machine,
        strategy=strategy if isinstance(strategy, str) else type(strategy).__name__,
        data_size=data_size,
        sequence_size=size,
        num_nodes=machine.num_gpus // machine.ranks_per_node,
        accumulation=accumulation,
        global_batch_size=accumulation * data_size * workload.batch_size,
        workload=workload,
        precision=name,
        context=context,
        num_parameters=step.num_parameters,
        useful_share=workload.useful_entries / workload.entries,
        ranks=tuple(
            RankPlan(
                tokens=workload.tokens(rank),
                loss_tokens=workload.loss_tokens(rank),
                encode=encode[rank],
                parts=step.flops[rank],
                encode_flops=accumulation * encode[rank].flops,
                memory=Memory(always, _phases(step, rank, encode[rank].peak_bytes or 0, cache)),
            )
            for rank in range(size)
        ),
        step_bytes={
            **step.step_bytes,
            "codec's left context": accumulation * max(cost.sent_bytes for cost in encode),
        },
        layer_bytes=step.layer_bytes,
        attention_flops=step.attention_flops,
        activations_of_a_block=step.block,
    )


def _phases(step: StepCost, rank: int, encode: int, cache: int) -> dict[str, Mapping[str, int]]:
    """In the order of a step; what a run never does is left out."""
    phases: dict[str, Mapping[str, int]] = {"encode": {**step.between, "encode": encode}} if encode else {}
    phases |= step.phases[rank]
    if cache:
        phases["samples"] = {**step.between, "KV cache": cache}
    return phases


def _encode_cost(
    codec: VideoCodec,
    frame_flops: FrameFlops | None,
    workload: Workload,
    rank: int,
    context: str,
    height: int,
    width: int,
) -> EncodeCost:
    frames = workload.layout.frames(rank, workload.chunk_frames)
    if frame_flops is None:
        return no_encode(frames)
    return encode_cost(
        codec,
        frame_flops,
        frames,
        context,
        batch_size=workload.batch_size,
        num_frames=workload.num_frames,
        height=height,
        width=width,
    )


def _cache_bytes(module: LongLiveModule, codec: VideoCodec, samples: SampleVideo, ranks: int) -> int:
    """Bytes of a rank's KV cache in the rollouts during training."""
    return kv_cache_bytes(
        module.rollout,
        module.model_config,
        (samples.height // codec.spatial_ratio, samples.width // codec.spatial_ratio),
        num_samples=len(samples.requests),
        num_chunks=module.rollout.num_chunks(samples.num_frames),
        ranks=ranks,
    )
