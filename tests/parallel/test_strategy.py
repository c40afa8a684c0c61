"""One rank against many: the same loss, gradients and weights, whoever holds which part of a clip."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.distributed import run_on_ranks
from helpers.runs import Randomise, fit, samples_of_rank, tiny_module
from longlive.data.batch import BatchSpec, VideoBatch
from longlive.models.wan.config import WanConfig
from longlive.modules.teacher_forcing import TeacherForcingModule
from longlive.objectives.teacher_forcing import TeacherForcingInputs
from longlive.parallel.strategy import BalancedSPStrategy, ContiguousSPStrategy, ShardedStrategy
from longlive.parallel.ulysses import exchanged_bytes
from longlive.typing import Latents, PerFrame, Tensor

SPLITS = {"balanced": BalancedSPStrategy, "contiguous": ContiguousSPStrategy}
SPEC = BatchSpec(batch_size=2, num_frames=16, chunk_frames=4, channels=16, height=4, width=4)
SHOTS = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 2]])
MASKS: dict[str, dict[str, Any]] = {"unmasked": {}, "padded": {"num_valid": (16, 6)}, "i2v": {"given_frames": 1}}
RULES: dict[str, dict[str, Any]] = {
    "full": {},
    "window": {"window": 8, "sink_frames": 4, "shot_rope_offset": 8.0, "noise_augmentation": 0.1},
}


def make_batch(seed: int = 0, num_valid: tuple[int, int] = (16, 16)) -> VideoBatch:
    """Two clips with cuts at different places and a prompt per shot."""
    prompts = tuple(tuple(f"a {('red', 'blue', 'green')[shot]} circle" for shot in row) for row in SHOTS.tolist())
    return replace(
        VideoBatch.fake(SPEC, seed),
        shot_index=SHOTS,
        prompts=prompts,
        num_valid_frames=torch.tensor(num_valid),
        sample_ids=torch.tensor([41, 7]) + 100 * seed,
    )


def make_module(
    module_class: type[TeacherForcingModule] = TeacherForcingModule, **changes: Any
) -> TeacherForcingModule:
    """Four heads, for four ranks; every parameter gets a gradient from the first step on."""
    return tiny_module(
        module_class=module_class, model=WanConfig.tiny(num_layers=2, dim=32, ffn_dim=32, num_heads=4), **changes
    )


@dataclass
class Seen:
    """What a process saw of a run: losses (mean over the ranks) of every batch, gradients before the first step, final
    weights."""

    losses: list[float] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)


class Record(Callback):
    """Fills a `Seen`."""

    def __init__(self) -> None:
        self.seen = Seen()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, TeacherForcingModule)
        loss = pl_module.sum_over_ranks(outputs["loss"].detach()) / trainer.world_size
        self.seen.losses.append(float(loss))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if not self.seen.gradients:
            self.seen.gradients = {name: full(p.grad) for name, p in pl_module.named_parameters() if p.grad is not None}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seen.weights = {name: full(p.detach()) for name, p in pl_module.named_parameters()}


def full(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def train(batches: list[VideoBatch], module: TeacherForcingModule, **settings: Any) -> Seen:
    record = Record()
    fit(module, batches, [Randomise(), record], **settings)
    return record.seen


def on_ranks(
    world: int, split: str, size: int, batches: list[VideoBatch], changes: dict[str, Any], **settings: Any
) -> Seen:
    """A run on several ranks, `size` of them for each clip, as rank 0 saw it; all ranks saw the same."""

    def run() -> Seen:
        data_rank, data_size = int(os.environ["RANK"]) // size, world // size
        mine = [samples_of_rank(batch, data_rank, data_size) for batch in batches]
        return train(mine, make_module(**changes), strategy=SPLITS[split](size), devices=world, **settings)

    ranks = run_on_ranks(run, world, init_process_group=False)
    for seen in ranks[1:]:
        assert seen.losses == ranks[0].losses
    return ranks[0]


def case(mask: str, rule: str) -> tuple[list[VideoBatch], dict[str, Any]]:
    settings = dict(MASKS[mask])
    num_valid = settings.pop("num_valid", (16, 16))
    return [make_batch(num_valid=num_valid)], settings | RULES[rule]


CASES = [(mask, rule) for mask in MASKS for rule in RULES]


@cache
def alone(mask: str, rule: str) -> Seen:
    batches, changes = case(mask, rule)
    return train(batches, make_module(**changes))


@cache
def split_over(world: int, split: str) -> dict[tuple[str, str], Seen]:
    """All cases, one after the other in the same processes."""

    def run() -> dict[tuple[str, str], Seen]:
        found = {}
        for mask, rule in CASES:
            batches, changes = case(mask, rule)
            found[mask, rule] = train(batches, make_module(**changes), strategy=SPLITS[split](world), devices=world)
        return found

    ranks = run_on_ranks(run, world, init_process_group=False)
    for seen in ranks[1:]:
        assert all(seen[case].losses == ranks[0][case].losses for case in CASES)
    return ranks[0]


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    """Relative error of every tensor. A key's bias has a gradient of zero: what is left of it is rounding."""
    assert ours.keys() == theirs.keys()
    assert len(theirs) > 40
    for name, value in theirs.items():
        if not name.endswith("self_attn.k.bias"):
            error = float((ours[name] - value).norm() / value.norm())
            assert error <= tolerance, f"{name}: {error:.2e}"


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("split", SPLITS)
def test_loss_and_gradients_are_those_of_one_rank(split: str, mask: str, rule: str, world: int) -> None:
    expected, found = alone(mask, rule), split_over(world, split)[mask, rule]
    assert found.losses == pytest.approx(expected.losses, rel=1e-6)
    assert_close(found.gradients, expected.gradients, 1e-6)


@pytest.mark.parametrize(("world", "size"), [(2, 2), (2, 1), (4, 4), (4, 2)], ids=str)
def test_weights_after_three_accumulated_and_clipped_steps_are_those_of_one_rank(world: int, size: int) -> None:
    """Padding lies in one sample alone, so a mean of the data ranks' means would be another loss."""
    batches = [make_batch(seed, num_valid=(16, 6)) for seed in range(6)]
    settings: dict[str, Any] = {"max_steps": 3, "accumulate_grad_batches": 2, "gradient_clip_val": 0.05}
    expected = train(batches, make_module(), **settings)
    found = on_ranks(world, "balanced", size, batches, {}, **settings)
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    assert_close(found.weights, expected.weights, 1e-5)
    without_clipping = train(batches, make_module(), **settings | {"gradient_clip_val": None})
    with pytest.raises(AssertionError):
        assert_close(without_clipping.weights, expected.weights, 1e-3)


class AbsoluteError(TeacherForcingModule):
    """A researcher's module: another loss, and not a line about ranks."""

    def frame_losses(self, prediction: Latents, inputs: TeacherForcingInputs) -> PerFrame:
        return (prediction - inputs.target).abs().mean(dim=(2, 3, 4))


def test_a_subclass_that_changes_the_loss_runs_unchanged() -> None:
    changes = {"module_class": AbsoluteError}
    batches = [make_batch(seed, num_valid=(16, 6)) for seed in range(2)]
    expected = train(batches, make_module(**changes))
    found = on_ranks(2, "balanced", 2, batches, changes)
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    assert_close(found.gradients, expected.gradients, 1e-6)


class CountCommunication(TorchDispatchMode):
    """Bytes that every collective of this process sends to other processes, and how often each is called."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).split(".")[1] if "c10d" in str(func) else ""
        if name.startswith("alltoall"):
            self.calls["all_to_all"] += 1
            self.bytes["all_to_all"] += args[1].nbytes * (self.size - 1) // self.size
        elif "reduce_scatter" in name:
            self.calls["reduce_scatter"] += 1
        return func(*args, **(kwargs or {}))


class Counting(Callback):
    """Counts what a run communicates."""

    def __init__(self, size: int) -> None:
        self.mode = CountCommunication(size)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.mode.__enter__()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.mode.__exit__(None, None, None)


def count(world: int, split: str, num_batches: int, **settings: Any) -> tuple[dict[str, int], dict[str, int]]:
    def run() -> tuple[dict[str, int], dict[str, int]]:
        counting = Counting(world)
        batches = [make_batch(seed) for seed in range(num_batches)]
        fit(make_module(), batches, [counting], strategy=SPLITS[split](world), devices=world, **settings)
        return dict(counting.mode.calls), dict(counting.mode.bytes)

    found = run_on_ranks(run, world, init_process_group=False)
    assert all(other == found[0] for other in found)
    return found[0]


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("split", SPLITS)
def test_a_layer_sends_the_bytes_of_one_fused_exchange_each_way(split: str, world: int) -> None:
    """Two layers; queries, keys and values in one exchange, the output in another, the same for their gradients."""
    calls, sent = count(world, split, num_batches=1)
    assert calls["all_to_all"] == 2 * 2 * 2
    local_tokens = 2 * 16 * 4 // world
    assert sent["all_to_all"] == 2 * 2 * exchanged_bytes(2, local_tokens, dim=32, itemsize=4, size=world)


def test_gradients_are_communicated_once_per_optimizer_step() -> None:
    """Known mistake 28: with every micro-batch, accumulation costs as much communication as it saves."""
    calls, _ = count(2, "balanced", num_batches=2, max_steps=2)
    accumulated, _ = count(2, "balanced", num_batches=8, max_steps=2, accumulate_grad_batches=4)
    assert accumulated["reduce_scatter"] == calls["reduce_scatter"] > 0
    assert accumulated["all_to_all"] == 4 * calls["all_to_all"]


@pytest.mark.parametrize(
    ("world", "size", "changes", "message"),
    [
        (4, 3, {}, "sequence_parallel_size=3 does not divide the 4 processes of this run; use 1, 2 or 4"),
        (2, 2, {"num_heads": 1}, "sequence_parallel_size=2 does not divide model.num_heads=1; use 1:"),
        (2, 2, {"num_frames": 12}, "sequence_parallel_size=2 does not divide the 3 chunks of a clip; use 1 or 3"),
        (2, 2, {"prompts": 2}, "sample 41 has 2 prompts for 4 chunks"),
    ],
    ids=["world", "heads", "chunks", "prompts"],
)
def test_what_does_not_divide_is_refused_on_every_rank(
    world: int, size: int, changes: dict[str, int], message: str
) -> None:
    """A rank that goes on would wait for the others for ever."""

    def run() -> str:
        module = tiny_module(
            model=WanConfig.tiny(num_layers=1, dim=32, ffn_dim=32, num_heads=changes.get("num_heads", 4))
        )
        batch, num_frames = make_batch(), changes.get("num_frames", 16)
        assert batch.latents is not None
        rows = tuple(row[: changes.get("prompts", num_frames // 4)] for row in batch.prompts)
        batch = replace(
            batch, latents=batch.latents[:, :num_frames], shot_index=SHOTS[:, : num_frames // 4], prompts=rows
        )
        try:
            fit(module, [batch], strategy=BalancedSPStrategy(size), devices=world)
        except ValueError as error:
            return str(error)
        return "no error"

    for found in run_on_ranks(run, world, init_process_group=False, timeout=60):
        assert message in found


def test_a_sample_that_the_ranks_read_differently_carries_no_loss() -> None:
    """One rank could not read its part of the first clip and took the next one of the order."""
    batch = make_batch()

    def run() -> list[float]:
        torn = batch if os.environ["RANK"] == "0" else replace(batch, sample_ids=torch.tensor([42, 7]))
        return train([torn], make_module(), strategy=BalancedSPStrategy(2), devices=2).losses

    second = replace(batch, num_valid_frames=torch.tensor([0, 16]))
    assert run_on_ranks(run, 2, init_process_group=False)[0] == pytest.approx(train([second], make_module()).losses)


def test_a_size_below_one_or_an_unknown_context_is_refused() -> None:
    with pytest.raises(ValueError, match="sequence_parallel_size=0 must be at least 1"):
        BalancedSPStrategy(0)
    with pytest.raises(ValueError, match="codec_context='all' is unknown; use auto, exchange, halo"):
        BalancedSPStrategy(2, codec_context="all")


@pytest.mark.parametrize(
    ("name", "strategy"),
    [("balanced_sp", BalancedSPStrategy), ("contiguous_sp", ContiguousSPStrategy), ("fsdp2", ShardedStrategy)],
)
def test_a_trainer_knows_the_strategies_by_name(name: str, strategy: type[ShardedStrategy]) -> None:
    trainer = Trainer(strategy=name, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    assert type(trainer.strategy) is strategy
