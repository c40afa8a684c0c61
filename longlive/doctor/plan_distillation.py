"""What a step of distillation takes: rollouts, scores, and what the student and the critic learn from them.

A step is the critic's, and every `student_every`-th is the student's as well; FLOPs and bytes sent are a mean over
steps, memory is that of a step with both.

**Rollout.** A chunk takes calls up to its exit step, one of n with equal probability, so (n + 1) / 2 on average, and
all but the last one a context pass. A call sees the window; ranks share the chunk's frames, and the heads.
**Scores** are teacher forcing on the rollout: of the critic, and for the student also of the teacher, with the prompt
and without. **Backward** of a frozen linear layer is one product, of an adapter's two layers two each; in the first
block queries, keys and values have inputs that need no gradient, and prompts' keys and values never have others. With
activation checkpointing, blocks are computed again.

**Memory** beside bases, adapters and the optimizers' state:

| phase | what is there |
|---|---|
| student's rollout | keys and values of all chunks, retained for backward; what every chunk's call saves |
| student's scores | the same, and the widest features of a score |
| student's backward | the same, and one block of one chunk, computed again |
| critic's rollout | the KV cache of the window |
| critic's forward, backward | as in stage 1, with an adapter over a frozen network |

It is taken that the adapters are on all linear layers of the blocks, and are gathered in the dtype of the features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from longlive.doctor.plan_memory import (
    Activations,
    Adapter,
    Sharding,
    activation_memory,
    block_activations,
    kv_cache_bytes,
)
from longlive.doctor.plan_roles import Roles
from longlive.doctor.plan_step import RunShape, StepCost
from longlive.doctor.plan_work import (
    Call,
    block_flops,
    call_of,
    forward_flops,
    gather_bytes,
    head_numbers,
    scalar_communication,
)
from longlive.doctor.plan_workload import ChunkWorkload
from longlive.models.visibility import visible_history
from longlive.modules.distillation import DistillationModule
from longlive.modules.roles import CRITIC, STUDENT, TEACHER
from longlive.parallel.ulysses import exchanged_bytes


def adapter_flops(call: Call, adapter: Adapter) -> int:
    """FLOPs of one block's adapter in forward."""
    return 2 * (call.tokens * adapter.token_numbers + call.text * adapter.text_numbers)


def adapted_flops(call: Call, adapter: Adapter) -> int:
    """FLOPs of a forward with an adapter."""
    return forward_flops(call) + call.model.num_layers * adapter_flops(call, adapter)


def backward_flops(call: Call, adapter: Adapter, sharding: Sharding) -> int:
    """FLOPs of a backward over a frozen network to its adapter, with what is computed again."""
    model, block = call.model, block_flops(call)
    attention = block["self-attention"] + block["cross-attention"]
    found = block["linear layers"] + 2 * attention + 2 * adapter_flops(call, adapter)
    found -= 2 * call.text * adapter.text_entering
    again = sum(block.values()) + adapter_flops(call, adapter)
    entering = 2 * call.tokens * (3 * model.dim**2 + adapter.entering)
    return (
        model.num_layers * found
        - entering
        + sharding.num_checkpointed(model.num_layers) * again
        + 2 * head_numbers(call)
    )


def chunk_works(module: DistillationModule, run: RunShape) -> tuple[ChunkWorkload, ...]:
    """A call on each chunk of a rollout."""
    work, rule = run.workload, module.rollout.rule
    one_shot = (0,) * work.num_chunks
    return tuple(
        ChunkWorkload(
            work.model,
            work.batch_size,
            work.tokens_per_chunk,
            work.chunk_frames,
            len(visible_history(chunk, one_shot, rule)) + 1,
            work.text_tokens,
            work.size,
        )
        for chunk in range(work.num_chunks)
    )


def rollout_flops(works: tuple[ChunkWorkload, ...], adapter: Adapter, num_steps: int) -> int:
    """FLOPs of one rank for a rollout, on average over exit steps."""
    calls = [adapted_flops(call_of(work, 0), adapter) for work in works]
    return (num_steps + 1) * sum(calls) // 2 + sum(calls[:-1])


def num_calls(num_chunks: int, num_steps: int) -> float:
    """Network calls of a rollout, on average."""
    return num_chunks * (num_steps + 1) / 2 + num_chunks - 1


def distillation_step(module: DistillationModule, roles: Roles, run: RunShape) -> StepCost:
    """Of stage 2. Accumulation there is none: the module steps by hand.

    Raises:
        ValueError: for a stream.
    """
    if module.stream is not None:
        seen = module.rollout.rule.window_chunks or 1
        clip_frames = module.stream.settings.clip_frames
        raise ValueError(
            f"a step of a stream (module.streaming.clip_frames={clip_frames}) cannot be planned; the clip and the past "
            "that it sees, as one clip, are an upper bound: module.streaming=null "
            f"data.num_frames={clip_frames + (seen - 1) * module.chunk_frames}"
        )
    work, sharding, numbers = run.workload, run.sharding, run.numbers
    works = chunk_works(module, run)
    student, critic = roles.adapters[STUDENT], roles.adapters[CRITIC]
    flops = tuple(_flops(module, run, works, student, critic, rank) for rank in range(work.size))
    phases = tuple(
        _phases(module, roles, run, works, activation_memory(work, rank, numbers, sharding, critic))
        for rank in range(work.size)
    )
    sent = _sent(module, roles, run)
    return StepCost(
        num_parameters=roles.num_parameters,
        always=roles.memory(sharding, run.has_average),
        between={},
        phases=phases,
        flops=flops,
        step_bytes=sent,
        layer_bytes=(3 if sharding.activation_checkpointing else 2) * _exchanged(run, work.tokens(0)),
        attention_flops=_attention(module, run, works),
        block=block_activations(work, 0, numbers, critic),
    )


def _flops(
    module: DistillationModule,
    run: RunShape,
    works: tuple[ChunkWorkload, ...],
    student: Adapter,
    critic: Adapter,
    rank: int,
) -> Mapping[str, int]:
    score, every = call_of(run.workload, rank), module.student_every
    rollout = rollout_flops(works, student, module.rollout.num_steps)
    teacher = forward_flops(score)
    if module.guidance:
        teacher += forward_flops(replace(score, prompts=1))
    return {
        "student's rollout": rollout // every,
        "student's scores": (teacher + adapted_flops(score, critic)) // every,
        "student's backward": sum(backward_flops(call_of(work, 0), student, run.sharding) for work in works) // every,
        "critic's rollout": rollout,
        "critic's forward": adapted_flops(score, critic),
        "critic's backward": backward_flops(score, critic, run.sharding),
    }


def _attention(module: DistillationModule, run: RunShape, works: tuple[ChunkWorkload, ...]) -> int:
    """Of self-attention's scores, in a rank's FLOPs."""
    layers, every = run.workload.model.num_layers, module.student_every
    again = run.sharding.num_checkpointed(layers)
    chunks = [block_flops(call_of(work, 0))["self-attention"] for work in works]
    score = block_flops(call_of(run.workload, 0))["self-attention"]
    rollout = layers * ((module.rollout.num_steps + 1) * sum(chunks) // 2 + sum(chunks[:-1]))
    scores = (3 if module.guidance else 2) * layers * score
    learned = (2 * layers + again) * sum(chunks)
    return (rollout + scores + learned) // every + rollout + (3 * layers + again) * score


def _phases(
    module: DistillationModule,
    roles: Roles,
    run: RunShape,
    works: tuple[ChunkWorkload, ...],
    score: Activations,
) -> dict[str, dict[str, int]]:
    work, sharding, numbers = run.workload, run.sharding, run.numbers
    calls = [activation_memory(chunk, 0, numbers, sharding, roles.adapters[STUDENT]) for chunk in works]
    size = (work.height, work.width)
    retained = kv_cache_bytes(
        replace(module.rollout, window=None, sink_frames=0, shot_sink=False),
        work.model,
        size,
        num_samples=work.batch_size,
        num_chunks=work.num_chunks,
        ranks=work.size,
    )
    cache = kv_cache_bytes(
        module.rollout,
        work.model,
        size,
        num_samples=work.batch_size,
        num_chunks=work.num_chunks,
        ranks=work.size,
    )
    graph = {"KV cache, retained": retained, "saved of the calls": sum(call.outside + call.kept for call in calls)}
    widest = max(call.widest for call in calls)
    again = {"one block, computed again": max(call.again for call in calls)} if calls[0].again else {}
    of_student, of_critic = (
        {"gradients": -(-roles.sizes[role] * 4 // sharding.num_shards)} for role in (STUDENT, CRITIC)
    )
    features = {"widest features": score.widest}
    of_score = {"outside the blocks": score.outside, "kept of the blocks": score.kept}
    score_again = {"one block, computed again": score.again} if score.again else {}
    return {
        "student's rollout": {**graph, "widest features": widest},
        "student's scores": {**graph, **features},
        "student's backward": {**graph, **of_student, **again, "widest gradients": widest},
        "critic's rollout": {"KV cache": cache, "widest features": widest},
        "critic's forward": {**of_score, **features},
        "critic's backward": {**of_critic, **of_score, **score_again, "widest gradients": score.widest},
    }


def _exchanged(run: RunShape, tokens: int) -> int:
    """Bytes that a rank sends for a layer's attention in a forward over its `tokens`."""
    return exchanged_bytes(1, tokens, run.workload.model.dim, run.numbers.compute, run.workload.size)


def _sent(module: DistillationModule, roles: Roles, run: RunShape) -> dict[str, int]:
    """Bytes per rank and step."""
    work, sharding, every = run.workload, run.sharding, module.student_every
    layers, chunks = work.model.num_layers, work.num_chunks
    in_rollout = num_calls(chunks, module.rollout.num_steps)
    again = sharding.num_checkpointed(layers)
    chunk, score = (
        _exchanged(run, tokens) for tokens in (work.tokens_per_chunk * work.batch_size // work.size, work.tokens(0))
    )
    teacher_calls = 2 if module.guidance else 1
    rolled = layers * in_rollout * chunk
    learned = chunks * (layers + again) * chunk
    scored = (1 + teacher_calls) * layers * score
    found = {
        "attention (all-to-all)": int((rolled + learned + scored) / every + rolled + (2 * layers + again) * score),
    }
    gradients = (roles.sizes[STUDENT] // every + roles.sizes[CRITIC]) * sharding.reduced_itemsize
    if sharding.num_shards > 1:
        network = {
            role: gather_bytes(base.rest + layers * base.block, sharding.num_shards)
            for role in (STUDENT, TEACHER, CRITIC)
            for base in (roles.base_of(role),)
        }
        backward = 2 if sharding.reshard_after_forward else 1
        # In backward every chunk's call gathers again.
        student = (in_rollout + (backward - 1) * chunks) * network[STUDENT]
        scores = network[CRITIC] + teacher_calls * network[TEACHER]
        found["parameters gathered"] = int(
            (student + scores) / every + in_rollout * network[STUDENT] + backward * network[CRITIC]
        )
        found["gradients reduced to shards"] = gather_bytes(gradients, sharding.num_shards)
    if sharding.num_replicas > 1:
        # A reduce-scatter and an all-gather among the replicas of a shard.
        of_a_shard = gradients // sharding.num_shards
        found["gradients averaged over replicas"] = 2 * gather_bytes(of_a_shard, sharding.num_replicas)
    found["loss, gradient norm, sample ids"] = scalar_communication(work, run.num_gpus, 1)
    return found
