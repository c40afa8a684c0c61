"""The plan against what is counted: autograd's saved storages, the FLOPs of real calls, parameters, and the layouts."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from helpers.distributed import run_on_ranks
from longlive.codecs.wan import WanVideoCodec
from longlive.config import compose
from longlive.doctor.plan import Plan, make_plan
from longlive.doctor.plan_codec import count_frame_flops
from longlive.doctor.plan_config import Machine
from longlive.doctor.plan_memory import (
    Activations,
    Numbers,
    Sharding,
    Weights,
    activation_memory,
    converted_bytes,
    count_weights,
    optimizer_step_bytes,
    training_phases,
    weight_memory,
)
from longlive.doctor.plan_work import (
    attention_flops,
    block_flops,
    call_of,
    training_flops,
    ulysses_bytes_per_layer,
    weight_communication,
)
from longlive.doctor.plan_workload import Workload
from longlive.models.attention import ChunkedAttention
from longlive.models.visibility import VisibilityRule
from longlive.models.wan.config import WanConfig
from longlive.models.wan.model import CausalWan
from longlive.modules.optimizer import MuonAdamW
from longlive.parallel.layout import balanced_layout
from longlive.parallel.ulysses import UlyssesAttention

RECIPE_5B = (
    *("model=ti2v_5b", "codec=wan", "text=umt5", "precision=bf16-mixed"),
    *("data.num_frames=384", "data.chunk_frames=8", "data.height=704", "data.width=1280", "data.batch_size=1"),
)


def workload(
    num_layers: int = 2,
    num_frames: int = 16,
    size: int = 8,
    text_tokens: int = 12,
    batch_size: int = 1,
    rule: VisibilityRule | None = None,
) -> Workload:
    """A tiny clip on one rank, in chunks of 4 frames of `size x size` latent pixels."""
    return Workload(
        model=WanConfig.tiny(num_layers=num_layers),
        layout=balanced_layout(num_frames // 4, 1),
        rule=rule or VisibilityRule(),
        batch_size=batch_size,
        num_chunks=num_frames // 4,
        chunk_frames=4,
        height=size,
        width=size,
        text_tokens=text_tokens,
    )


def loss_of(network: CausalWan, work: Workload, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """One rank's forward of teacher forcing, with a prompt of its own for every chunk."""
    samples, frames = work.batch_size, 2 * work.num_frames // work.size
    prompt_index = torch.arange(work.num_prompts).view(samples, -1)[:, : work.num_chunks // work.size]
    segments = work.layout.delivered(work.tokens_per_chunk)
    attention = ChunkedAttention(segments, torch.zeros(samples, work.num_chunks, dtype=torch.int64), work.rule)
    velocity = network(
        latents=torch.randn(samples, frames, work.model.in_channels, work.height, work.width),
        timesteps=torch.rand(samples, frames),
        prompt_embeds=torch.randn(work.num_prompts, work.text_tokens, work.model.text_dim),
        prompt_index=prompt_index.repeat(1, 2),
        frame_positions=torch.arange(frames).repeat(samples, 1),
        attention=attention if group is None else UlyssesAttention(attention, group),
    )
    return velocity.float().square().mean()


def saved_bytes(work: Workload, precision: str, group: dist.ProcessGroup | None = None) -> int:
    """Bytes of the distinct storages that autograd keeps for backward, parameters left out."""
    network = CausalWan(work.model)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16-mixed"),
    ):
        loss_of(network, work, group)
    return sum(tensor.untyped_storage().nbytes() for key, tensor in saved.items() if key not in parameters)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize(
    "work",
    [
        workload(1, 8, 16),
        workload(3, 12, 8, text_tokens=20, batch_size=2),
        workload(2, 24, 8, rule=VisibilityRule(3, 1)),
    ],
    ids=["one layer", "batch of two", "window"],
)
def test_activations_are_what_autograd_saves(work: Workload, precision: str) -> None:
    """A term that is forgotten shows as an out-of-memory error hours later, on the real size alone."""
    memory = activation_memory(work, 0, Numbers.of(precision, "cpu"), Sharding())
    weights = count_weights(work.model, lambda named: torch.optim.AdamW(named))
    planned = memory.outside + memory.kept + converted_bytes(weights, Sharding(), precision == "bf16-mixed")
    assert planned == pytest.approx(saved_bytes(work, precision), rel=0.01)


def _saved_on_every_rank(work: Workload) -> None:
    planned = activation_memory(work, dist.get_rank(), Numbers.of("32-true", "cpu"), Sharding())
    counted = saved_bytes(work, "32-true", dist.group.WORLD)
    assert planned.outside + planned.kept == pytest.approx(counted, rel=0.01)


def test_activations_of_sequence_ranks_are_what_autograd_saves() -> None:
    """The copies of keys and values are of a share of the heads, everything else of a share of the tokens."""
    work = replace(workload(num_layers=2, num_frames=24), layout=balanced_layout(6, 2))
    run_on_ranks(_saved_on_every_rank, 2, work)


def test_activation_checkpointing_keeps_inputs_and_one_block() -> None:
    work, numbers = workload(num_layers=4), Numbers.of("32-true", "cpu")
    whole, every, second = (
        activation_memory(work, 0, numbers, Sharding(activation_checkpointing=n)) for n in (0, 1, 2)
    )
    block = whole.kept // 4
    inputs = work.tokens(0) * work.model.dim * 4
    assert (whole.again, every.again, second.again) == (0, block, block)
    assert every.kept == 4 * inputs
    assert second.kept == 2 * inputs + 2 * block


def test_gradients_and_what_forward_keeps_are_not_added_up_twice() -> None:
    """Backward frees the one while it makes the other; with accumulation it begins with both."""
    activations = Activations(outside=1, kept=20, again=300, widest=4000)
    once, more = (
        training_phases(activations, gradients=50000, converted=7, accumulation=n, saves_converted=False)
        for n in (1, 2)
    )
    assert {phase: sum(held.values()) for phase, held in once.items()} == {
        "forward": 54028,
        "start of backward": 4321,
        "end of backward": 54300,
    }
    assert sum(more["start of backward"].values()) == 54321
    without = training_phases(
        Activations(1, 20, 0, 4000), gradients=50000, converted=7, accumulation=1, saves_converted=True
    )
    assert sum(without["forward"].values()) == 50028
    assert sum(without["start of backward"].values()) == 4028


@pytest.mark.parametrize(
    "work",
    [workload(1, 8, 8), workload(2, 8, 4, text_tokens=5, batch_size=2), workload(2, 16, 4, rule=VisibilityRule(3, 1))],
    ids=["one layer", "batch of two", "window and sink"],
)
def test_flops_are_those_of_a_forward_and_backward(work: Workload) -> None:
    """Counted exactly, with attention as plain products: torch's counter knows no fused attention of the CPU."""
    network = CausalWan(work.model)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss_of(network, work).backward()
    assert training_flops(work, 0, Sharding()) == counter.get_total_flops()


def test_checkpointed_blocks_are_computed_once_more() -> None:
    work = workload(num_layers=3)
    block = sum(block_flops(call_of(work, 0)).values())
    assert training_flops(work, 0, Sharding(activation_checkpointing=1)) == (
        training_flops(work, 0, Sharding()) + 3 * block
    )
    assert training_flops(work, 0, Sharding(activation_checkpointing=2)) == (
        training_flops(work, 0, Sharding()) + 2 * block
    )
    scores = 4 * work.useful_entries * work.model.dim
    assert attention_flops(work, Sharding(activation_checkpointing=1)) == 4 * 3 * scores


def test_a_codecs_flops_are_those_of_its_encode() -> None:
    codec = WanVideoCodec.tiny()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        codec.encode(torch.zeros(1, 9, 3, 32, 32))
    flops = count_frame_flops(codec, 32, 32)
    assert flops.first + 2 * flops.later == counter.get_total_flops()
    assert all(parameter.device.type == "cpu" for parameter in codec.parameters()), "the codec itself was changed"


def test_parameters_of_the_5b_model() -> None:
    assert count_weights(WanConfig.ti2v_5b(), lambda named: torch.optim.AdamW(named)).num_parameters == 4_999_787_712


def test_optimizer_state_is_counted_for_every_optimizer() -> None:
    model = WanConfig.tiny()
    adamw = count_weights(model, lambda named: torch.optim.AdamW(named))
    assert adamw.optimizer_bytes == 2 * 4 * adamw.num_parameters
    muon = count_weights(model, lambda named: MuonAdamW(named, lr=1e-2, adamw_lr=1e-3))
    in_blocks = sum(parameter.numel() for parameter in CausalWan(model).blocks.parameters() if parameter.ndim == 2)
    assert muon.optimizer_bytes == 2 * 4 * adamw.num_parameters - 4 * in_blocks
    assert (adamw.muon, muon.muon) == (0, in_blocks)
    assert (adamw.adam, muon.adam) == (adamw.num_parameters, adamw.num_parameters - in_blocks)


def plan_of(strategy: str, size: int, *overrides: str, machine: Machine | None = None) -> Plan:
    given = (f"strategy={strategy}", f"strategy.sequence_parallel_size={size}")
    return make_plan(compose("train", [*given, *overrides]), machine or Machine(4, device="cpu"))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_balanced_ranks_have_equal_shares(size: int) -> None:
    plan = plan_of("balanced_sp", size, "data.num_frames=16", "data.batch_size=2")
    tokens = 2 * 16 * 2 * 16  # clips x frames x copies x tokens per frame
    assert [rank.tokens for rank in plan.ranks] == [tokens // size] * size
    assert [rank.loss_tokens for rank in plan.ranks] == [tokens // 2 // size] * size
    assert [rank.encode.frames for rank in plan.ranks] == [16 // size] * size
    assert len({rank.flops for rank in plan.ranks}) == 1
    assert len({rank.memory.peak for rank in plan.ranks}) == 1
    assert (plan.data_size, plan.sequence_size) == (4 // size, size)


def test_contiguous_ranks_share_tokens_but_not_loss() -> None:
    plan = plan_of("contiguous_sp", 4, "data.num_frames=16", "data.batch_size=1")
    assert [rank.tokens for rank in plan.ranks] == [128] * 4
    assert [rank.loss_tokens for rank in plan.ranks] == [0, 0, 128, 128]
    assert [rank.encode.raw_frames for rank in plan.ranks] == [61] * 4, "every rank encodes the whole clip"


def test_a_declared_global_batch_sets_the_accumulation() -> None:
    plan = plan_of("balanced_sp", 2, "data.num_frames=16", "data.batch_size=2", "data.global_batch_size=12")
    assert (plan.accumulation, plan.global_batch_size) == (3, 12)
    once = plan_of("balanced_sp", 2, "data.num_frames=16", "data.batch_size=2")
    assert (once.accumulation, once.global_batch_size) == (1, 4)
    assert plan.ranks[0].flops == 3 * once.ranks[0].flops
    assert plan.step_bytes["attention (all-to-all)"] == 3 * once.step_bytes["attention (all-to-all)"]


def test_given_frames_bear_no_loss() -> None:
    plan = plan_of("balanced_sp", 4, "data.num_frames=16", "data.batch_size=1", "module.given_frames=1")
    assert [rank.loss_tokens for rank in plan.ranks] == [48, 64, 64, 64]


def test_the_windows_of_the_ranks_are_what_they_read() -> None:
    """DCT needs no context, but a window that does not begin with the clip begins with one raw frame more."""
    plan = plan_of("balanced_sp", 4, "data.num_frames=16")
    assert [(rank.encode.window.start, rank.encode.window.stop) for rank in plan.ranks] == [
        (0, 13), (12, 29), (28, 45), (44, 61),
    ]  # fmt: skip
    assert [rank.encode.encoded_frames for rank in plan.ranks] == [4, 5, 5, 5]


def test_the_5b_recipe_on_64_gpus() -> None:
    """Numbers worked out by hand: 48 frames of 880 tokens per rank and copy, and so on."""
    plan = plan_of(
        "balanced_sp",
        8,
        *RECIPE_5B,
        "strategy.sharding.activation_checkpointing=true",
        "strategy.sharding.parameter_dtype=bfloat16",
        machine=Machine(64, gpu_memory=80.0),
    )
    rank = plan.ranks[3]
    assert (plan.data_size, plan.sequence_size, plan.num_nodes) == (8, 8, 8)
    assert (rank.tokens, rank.loss_tokens) == (84_480, 42_240)
    assert [rank.encode.raw_frames for rank in plan.ranks] == [189] + [192] * 7
    assert rank.memory.always["parameters"] == 4 * 4_999_787_712 // 64
    # 4 tensors of 84480 x 3072 bfloat16, 7/8 of each to others, three times: forward, again, backward.
    assert plan.layer_bytes == 4 * 84_480 * 3072 * 2 * 7 // 8 * 3
    # Keys and values of 48 x 49 chunks, less the two of one chunk that need no copy, 384 features per rank.
    assert plan.activations_of_a_block["copies of keys and values"] == (48 * 49 - 2) * 7040 * 384 * 2 * 2
    assert plan.useful_share == 48 * 49 / (4 * 48**2)
    assert plan.attention_flops == 30 * 4 * 4 * (48 * 49 * 7040**2) * 3072 // 8
    assert plan.fits is False


def test_bytes_of_ulysses() -> None:
    assert ulysses_bytes_per_layer(2, 10, 16, 4, 1) == 0
    # One rank keeps half of its 2 x 10 x 16 numbers, sends the others; four tensors, forward and backward.
    assert ulysses_bytes_per_layer(2, 10, 16, 4, 2) == 4 * (2 * 10 * 16 // 2) * 4 * 2
    assert ulysses_bytes_per_layer(2, 10, 16, 4, 2, checkpointing=True) == 4 * (2 * 10 * 16 // 2) * 4 * 3


WEIGHTS = Weights(num_parameters=1000, block=200, num_blocks=4, timestep=100, matrices=900, optimizer_bytes=8000)


def test_weights_are_divided_by_the_ranks_that_share_them() -> None:
    sharded = weight_memory(WEIGHTS, Sharding(num_shards=4, gathers=True), accumulation=1, has_average=True)
    assert sharded == {
        "parameters": 1000,
        "optimizer state": 2000,
        "average (EMA)": 1000,
        "gathered parameters": (200 + 2 * 200) * 4,
    }
    accumulated = weight_memory(WEIGHTS, Sharding(num_shards=4), accumulation=2, has_average=False)
    assert accumulated["gradients held whole while accumulating"] == 4000
    alone = weight_memory(WEIGHTS, Sharding(gathers=True, gathered_itemsize=2), accumulation=2, has_average=False)
    assert alone == {
        "parameters": 4000,
        "optimizer state": 8000,
        # The timestep's layers stay float32.
        "gathered parameters": (100 + 2 * 200) * 2 + 100 * 4,
    }
    replicated = Sharding(num_replicas=4)
    assert weight_memory(WEIGHTS, replicated, accumulation=1, has_average=False)["parameters"] == 4000
    assert converted_bytes(WEIGHTS, replicated, autocast=True) == 1800
    assert converted_bytes(WEIGHTS, replicated, autocast=False) == 0
    assert converted_bytes(WEIGHTS, Sharding(gathered_itemsize=2), autocast=True) == 0


def test_adam_on_a_gpu_holds_a_number_more_per_parameter() -> None:
    assert optimizer_step_bytes(replace(WEIGHTS, adam=1000), Sharding(num_shards=4), "cuda") == 1000
    assert optimizer_step_bytes(replace(WEIGHTS, adam=1000), Sharding(), "cpu") == 0
    assert optimizer_step_bytes(WEIGHTS, Sharding(), "cuda") == 0


def test_weights_travel_once_per_micro_batch_and_gradients_once_per_step() -> None:
    bfloat16 = Sharding(num_shards=4, gathered_itemsize=2)
    assert weight_communication(WEIGHTS, bfloat16, accumulation=3) == {
        "parameters gathered for forward": 3 * ((900 * 2 + 100 * 4) * 3 // 4),
        "parameters gathered for backward": 3 * (800 * 2 * 3 // 4),
        "gradients reduced to shards": 4000 * 3 // 4,
    }
    hybrid = weight_communication(WEIGHTS, Sharding(num_shards=2, num_replicas=2), accumulation=1)
    assert hybrid["gradients averaged over replicas"] == 2 * (4000 // 2 // 2)
    assert weight_communication(WEIGHTS, Sharding(), accumulation=1) == {}


@pytest.mark.parametrize(
    ("size", "overrides", "message"),
    [
        (3, (), "sequence_parallel_size=3 does not divide the 4 processes of this run; use 1, 2 or 4"),
        (4, ("data.num_frames=12",), "sequence_parallel_size=4 does not divide the 3 chunks of a clip; use 1 or 3"),
        (4, ("data.num_frames=16", "model.num_heads=2"), "sequence_parallel_size=4 does not divide model.num_heads=2"),
        (2, ("data.num_frames=14",), "num_frames=14 is no multiple of chunk_frames=4; use 12 or 16"),
        (2, ("data.num_frames=16", "data.height=60"), "height=60, width=64 are no multiples of the codec's"),
        (2, ("data.num_frames=16", "module.window=6"), "window=6 is no multiple of chunk_frames=4"),
        (2, ("data.num_frames=16", "data.global_batch_size=12"), "global_batch_size=12 is no multiple of 16"),
        (2, ("data.num_frames=16", "model.in_channels=48"), "model.in_channels=48, but the codec makes latents of 16"),
        (2, ("data.num_frames=16", "data.batch_size=0"), "batch_size=0 must be at least 1"),
        (2, ("data.num_frames=16", "callbacks.samples.num_frames=10"), "num_frames=10 is no positive multiple"),
    ],
)
def test_what_cannot_run_is_refused(size: int, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        plan_of("balanced_sp", size, *overrides)


def test_latents_are_not_encoded() -> None:
    config = compose("train", ["experiment=quickstart", "callbacks.samples=null", "data.train=x"])
    videos, latents = (make_plan(config, Machine(1, device="cpu"), pre_encoded) for pre_encoded in (False, True))
    assert videos.ranks[0].encode_flops > latents.ranks[0].encode_flops == 0
    assert (videos.ranks[0].encode.raw_frames, latents.ranks[0].encode.raw_frames) == (29, 0)
    assert "codec" in videos.ranks[0].memory.always
    assert "codec" not in latents.ranks[0].memory.always
    assert videos.ranks[0].flops == latents.ranks[0].flops


def test_nodes_are_whole() -> None:
    with pytest.raises(ValueError, match="gpus_per_node=8 does not divide num_gpus=12"):
        Machine(12)
    assert Machine(4).ranks_per_node == 4
