"""The plan of distillation against what is counted: the FLOPs of real steps, autograd's saved storages, and bytes of
the networks that a run builds."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import AdamW
from torch.utils.flop_counter import FlopCounterMode

from helpers.runs import tiny_module
from longlive.adapters.lora import LoRASettings
from longlive.config import compose
from longlive.data.prompt_batches import PromptBatch
from longlive.doctor.plan import make_plan
from longlive.doctor.plan_config import Machine
from longlive.doctor.plan_distillation import chunk_works, distillation_step
from longlive.doctor.plan_memory import Numbers, Sharding, activation_memory
from longlive.doctor.plan_roles import count_roles
from longlive.doctor.plan_step import RunShape
from longlive.doctor.plan_workload import Workload
from longlive.models.wan.config import WanConfig
from longlive.modules.distillation import DistillationModule
from longlive.modules.streaming import StreamingSettings
from longlive.parallel.layout import whole_layout
from longlive.rollout.settings import RolloutSettings
from longlive.rollout.student import StudentRollout

CHUNKS, FRAMES, SIZE = 3, 4, 4
"""Chunks of frames of 4 x 4 latents."""


def make(num_steps: int = 1, guidance: float = 3.0, **changes: Any) -> DistillationModule:
    rollout = RolloutSettings(chunk_frames=FRAMES, num_steps=num_steps, solver="euler", window=8)
    settings: dict[str, Any] = {
        "optimizer": partial(AdamW, lr=1e-3),
        "critic_optimizer": partial(AdamW, lr=1e-3),
        "lora": LoRASettings(rank=4, alpha=8),
        "critic_lora": LoRASettings(rank=2, alpha=8),
        "rollout": rollout,
        "student_every": 3,
        "guidance": guidance,
    }
    module: Any = tiny_module(DistillationModule, **settings | changes)  # type: ignore[arg-type]
    return module


def run_of(module: DistillationModule, sharding: Sharding | None = None) -> RunShape:
    work = Workload(
        model=module.model_config,
        layout=whole_layout(CHUNKS),
        rule=module.rollout.rule,
        batch_size=2,
        num_chunks=CHUNKS,
        chunk_frames=FRAMES,
        height=SIZE,
        width=SIZE,
        text_tokens=module.text_encoder.num_tokens,
    )
    return RunShape(work, sharding or Sharding(), Numbers.of("32-true", "cpu"), False, 1, 1, "cpu", True)


def conditions_of(module: DistillationModule) -> Any:
    """Two videos of one shot, every chunk with a prompt of its own."""
    prompts = tuple(tuple(f"video {video} chunk {chunk}" for chunk in range(CHUNKS)) for video in range(2))
    ratio = module.codec.spatial_ratio
    shots = torch.zeros(2, CHUNKS, dtype=torch.int64)
    return module.conditions(PromptBatch(prompts, shots, torch.arange(2), SIZE * ratio, SIZE * ratio))


@pytest.mark.parametrize("guidance", [3.0, 0.0])
@pytest.mark.parametrize("num_steps", [1, 2])
def test_flops_are_those_of_a_students_and_a_critics_turn(num_steps: int, guidance: float) -> None:
    """Counted part by part, with attention as plain products."""
    module = make(num_steps, guidance)
    planned = distillation_step(module, count_roles(module, "32-true", Sharding()), run_of(module)).flops[0]
    module.configure_model()
    conditions = conditions_of(module)
    counted: dict[str, float] = {}
    for role in ("student", "critic"):
        # Steps that between them exit at every solver step once.
        exits = {exit_of(module, role, step): step for step in range(20)}
        assert set(exits) == set(range(num_steps))
        rolled_out = 0.0
        for step in exits.values():
            with (
                FlopCounterMode(display=False) as counter,
                sdpa_kernel(SDPBackend.MATH),
                torch.set_grad_enabled(role == "student"),
            ):
                clip = module.roll_out(role, conditions, step)  # type: ignore[arg-type]
            rolled_out += counter.get_total_flops() / num_steps
        counted[f"{role}'s rollout"] = rolled_out
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            loss = module.loss(role, clip.latents, conditions, step).loss  # type: ignore[arg-type]
        counted[f"{role}'s {'scores' if role == 'student' else 'forward'}"] = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            loss.backward()
        counted[f"{role}'s backward"] = counter.get_total_flops()
    in_a_turn = {name: flops * (3 if name.startswith("student") else 1) for name, flops in planned.items()}
    assert in_a_turn.keys() == counted.keys()
    for name, flops in counted.items():
        assert in_a_turn[name] == pytest.approx(flops, rel=1e-6), name


def exit_of(module: DistillationModule, role: str, step: int) -> int:
    """At which solver step a rollout of that step exits."""
    if module.network is None:
        module.configure_model()
    rollout = StudentRollout(module.rollout_engine(), module.exit_per)
    state = rollout.start(
        (module.codec.latent_channels, SIZE, SIZE), seed=module.seed, sample_ids=(0, 1), max_chunks=CHUNKS, step=step,
        purpose=f"{role}_rollout",
    )  # fmt: skip
    return rollout.exit_step(state, 0)


def saved_bytes(module: DistillationModule, role: str) -> int:
    """Of distinct storages that autograd keeps for a role's backward, weights left out."""
    conditions = conditions_of(module)
    weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.set_grad_enabled(role == "student"):
            clip = module.roll_out(role, conditions, 0)  # type: ignore[arg-type]
        if role == "critic":
            module.loss("critic", clip.latents, conditions, 0)
    return sum(tensor.untyped_storage().nbytes() for key, tensor in saved.items() if key not in weights)


def test_activations_of_both_turns_are_what_autograd_saves() -> None:
    module = make()
    run, roles = run_of(module), count_roles(module, "32-true", Sharding())
    score = activation_memory(run.workload, 0, run.numbers, run.sharding, roles.adapters["critic"])
    calls = [
        activation_memory(work, 0, run.numbers, run.sharding, roles.adapters["student"])
        for work in chunk_works(module, run)
    ]
    module.configure_model()
    assert score.outside + score.kept == pytest.approx(saved_bytes(module, "critic"), rel=0.05)
    # Above what is saved, as every call's attention is taken to join its outputs in memory of their own.
    kept = sum(call.outside + call.kept for call in calls)
    assert 1 <= kept / saved_bytes(module, "student") < 1.1


@pytest.mark.parametrize("student_precision", [None, "nvfp4"])
def test_weights_are_those_that_a_run_holds(student_precision: str | None) -> None:
    """A role of another precision has a base of its own."""
    changes = {} if student_precision is None else {"role_precision": {"student": student_precision}}
    module = make(model=WanConfig.tiny(num_layers=3, dim=32, ffn_dim=64, num_heads=2), **changes)
    roles = count_roles(module, "32-true", Sharding())
    module.configure_model()
    held = dict(module.named_parameters()) | dict(module.named_buffers())
    learned = {
        role: sum(parameter.numel() for _, parameter in module.adapter_parameters_of(role))  # type: ignore[arg-type]
        for role in ("student", "critic")
    }
    assert roles.sizes == learned
    assert roles.optimizer_bytes == {role: 2 * 4 * size for role, size in learned.items()}
    assert sum(base.num_bytes for base in roles.bases) + 4 * sum(learned.values()) == sum(
        tensor.nbytes for tensor in held.values()
    )
    assert len(roles.bases) == 1 + (student_precision is not None)
    memory = roles.memory(Sharding(num_shards=2, gathers=True), has_average=True)
    assert memory["average (EMA)"] == 4 * learned["student"] // 2
    assert memory["frozen bases"] == -(-sum(base.num_bytes for base in roles.bases) // 2)


def test_a_stream_is_refused_and_its_bound_named() -> None:
    """A clip of two chunks that sees one past chunk, not the 32 frames that batches are of."""
    module = make(streaming=StreamingSettings(max_frames=32, clip_frames=8))
    run = run_of(module)
    with pytest.raises(ValueError, match=r"clip_frames=8.* cannot be planned; .* data.num_frames=12"):
        distillation_step(module, count_roles(module, "32-true", run.sharding), run)


def test_what_is_gathered_is_the_whole_network_at_every_call() -> None:
    """A rollout of 3 chunks in 2 steps makes 3 x 1.5 calls, and 2 context passes."""
    module = make(num_steps=2)
    sharding = Sharding(num_shards=2, gathers=True)
    roles = count_roles(module, "32-true", sharding)
    sent = distillation_step(module, roles, run_of(module, sharding)).step_bytes
    network = (roles.bases[0].rest + roles.bases[0].block) // 2
    critic = 6.5 * network + 2 * network
    student = 6.5 * network + 3 * network + 3 * network
    assert sent["parameters gathered"] == pytest.approx(critic + student / 3, rel=1e-6)
    assert sent["attention (all-to-all)"] == 0


def test_a_longer_video_is_held_longer_only_by_the_student() -> None:
    """Backward reads every chunk's keys; the critic's rollout those that the window shows."""
    module = make()
    phases = distillation_step(module, count_roles(module, "32-true", Sharding()), run_of(module)).phases[0]
    slot = phases["critic's rollout"]["KV cache"] // 2
    assert phases["student's backward"]["KV cache, retained"] == CHUNKS * slot


def test_both_adapters_gradients_are_averaged_over_replicas() -> None:
    """The student's in every third step. Without it, 4 GPUs under DDP send 12 bytes a step."""
    module = make()
    roles = count_roles(module, "32-true", Sharding())
    learned = 4 * (roles.sizes["student"] // 3 + roles.sizes["critic"])

    def sent(sharding: Sharding) -> Mapping[str, int]:
        return distillation_step(module, roles, run_of(module, sharding)).step_bytes

    name = "gradients averaged over replicas"
    assert sent(Sharding(num_replicas=4))[name] == 2 * (learned * 3 // 4)
    assert sent(Sharding(num_shards=2, num_replicas=4, gathers=True))[name] == 2 * (learned // 2 * 3 // 4)
    assert name not in sent(Sharding(num_shards=4, gathers=True))


@pytest.mark.parametrize(
    ("experiment", "settings", "message"),
    [
        (
            "toyworld_distill_4step",
            ("trainer.accumulate_grad_batches=4",),
            "4 micro-batches per step, but distillation",
        ),
        ("toyworld", ("trainer.accumulate_grad_batches=0",), "accumulate_grad_batches=0 must be at least 1"),
        (
            "toyworld",
            ("trainer.accumulate_grad_batches=3", "data.global_batch_size=32"),
            "accumulate_grad_batches=3 contradicts data.global_batch_size=32, which makes 2",
        ),
    ],
)
def test_accumulation_that_a_training_refuses_is_not_planned(
    experiment: str, settings: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_plan(compose("train", [f"experiment={experiment}", *settings]), Machine(2, device="cpu"))
