"""What a step of teacher forcing takes, by rank: the terms of `plan_memory` and `plan_work` put together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from longlive.doctor.plan_memory import (
    Numbers,
    Sharding,
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


@dataclass(frozen=True)
class StepCost:
    """What a stage makes of a step. By name throughout; tuples are of the ranks of a sequence group.

    Attributes:
        num_parameters: of the network.
        always: bytes that are there all the time.
        between: bytes that are there besides outside of the phases here.
        phases: bytes besides, in each phase.
        flops: of the network, in an optimizer step.
        step_bytes: sent by a rank in an optimizer step.
        layer_bytes: of them, for the attention of a layer that learns, per micro-batch.
        attention_flops: the part of self-attention's scores in the FLOPs.
        block: bytes that a block saves on the first rank.
    """

    num_parameters: int
    always: Mapping[str, int]
    between: Mapping[str, int]
    phases: tuple[Mapping[str, Mapping[str, int]], ...]
    flops: tuple[Mapping[str, int], ...]
    step_bytes: Mapping[str, int]
    layer_bytes: int
    attention_flops: int
    block: Mapping[str, int]


@dataclass(frozen=True)
class RunShape:
    """What all stages know of a run.

    Attributes:
        workload: a micro-batch of teacher forcing.
        sharding: of the weights.
        numbers: bytes per number.
        autocast: whether products are in bfloat16 over float32 weights.
        accumulation: micro-batches per step.
        num_gpus: ranks in all.
        device: `cuda` or `cpu`.
        has_average: whether there is an average.
    """

    workload: Workload
    sharding: Sharding
    numbers: Numbers
    autocast: bool
    accumulation: int
    num_gpus: int
    device: str
    has_average: bool


def tuning_step(module: TeacherForcingModule, run: RunShape) -> StepCost:
    """Of stage 1."""
    work, sharding, numbers, accumulation = run.workload, run.sharding, run.numbers, run.accumulation
    model, ranks = work.model, range(work.size)
    weights = count_weights(model, module.make_optimizer)
    gradients = {"gradients": shard_bytes(weights, sharding)}
    optimizer = {**gradients, "its own numbers": optimizer_step_bytes(weights, sharding, run.device)}
    phases = tuple(
        training_phases(
            activation_memory(work, rank, numbers, sharding),
            gradients=gradients["gradients"],
            converted=converted_bytes(weights, sharding, run.autocast),
            accumulation=accumulation,
            saves_converted=sharding.num_checkpointed(model.num_layers) < model.num_layers,
        )
        | {"optimizer": optimizer}
        for rank in ranks
    )
    local_tokens = work.tokens(0) // work.batch_size
    plain, repeated = (
        ulysses_bytes_per_layer(work.batch_size, local_tokens, model.dim, numbers.compute, work.size, checkpointing)
        for checkpointing in (False, True)
    )
    num_repeated = sharding.num_checkpointed(model.num_layers)
    return StepCost(
        num_parameters=weights.num_parameters,
        always=weight_memory(weights, sharding, accumulation=accumulation, has_average=run.has_average),
        between=gradients,
        phases=phases,
        flops=tuple({"training": accumulation * training_flops(work, rank, sharding)} for rank in ranks),
        step_bytes={
            "attention (all-to-all)": accumulation
            * (num_repeated * repeated + (model.num_layers - num_repeated) * plain),
            **weight_communication(weights, sharding, accumulation),
            "loss, gradient norm, sample ids": scalar_communication(work, run.num_gpus, accumulation),
        },
        layer_bytes=repeated if num_repeated else plain,
        attention_flops=accumulation * attention_flops(work, sharding),
        block=block_activations(work, 0, numbers),
    )
