"""Sequence ranks under Balanced SP, data ranks beside them, and data ranks that Lightning's strategy copies the module
to: all learn what one rank learns, also with activations recomputed, and from a checkpoint that others wrote."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed.tensor import DTensor
from torch.optim import SGD

from helpers.distributed import run_on_ranks
from helpers.noisy import Noisy
from helpers.runs import assert_same, fit, tiny_module
from longlive.adapters.lora import LoRASettings
from longlive.codecs.base import to_unit_range
from longlive.codecs.dct import DCTCodec
from longlive.data.batch import BatchSpec, VideoBatch
from longlive.data.prompt_batches import PromptBatch, PromptDataModule
from longlive.models.wan.config import WanConfig
from longlive.modules.distillation import DistillationModule
from longlive.parallel.fsdp import ShardingOptions
from longlive.parallel.layout import MakeLayout, balanced_layout, contiguous_layout
from longlive.parallel.mesh import SequenceShare
from longlive.parallel.strategy import BalancedSPStrategy
from longlive.rollout.settings import RolloutSettings
from longlive.typing import Tensor

SHOTS = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 2]])
PROMPTS = tuple(tuple(f"a {('red', 'blue', 'green')[shot]} circle" for shot in row) for row in SHOTS.tolist())
SPEC = BatchSpec(batch_size=2, num_frames=16, chunk_frames=4, channels=16, height=4, width=4)
STEPS, HALF = 3, 1
COPIES = "2 copies"
MESHES = {"1 x 1": (1, 1), "1 x 2": (1, 2), "1 x 4": (1, 4), "2 x 2": (2, 2), COPIES: (2, 1)}
"""Data ranks x sequence ranks; copies of the module have `strategy=auto`."""

KINDS: dict[str, dict[str, Any]] = {
    "prompts": {
        "student_every": 2,
        "exit_per": "chunk",
        "rollout": RolloutSettings(chunk_frames=4, num_steps=2, window=8, shot_rope_offset=4.0),
    },
    "clips": {
        "student_every": 1,
        "given_frames": 1,
        "timestep_per_chunk": True,
        "rollout": RolloutSettings(
            chunk_frames=4, num_steps=2, window=12, sink_frames=4, shot_sink=True, relative_rope=True
        ),
    },
}
"""Of prompts, the student learns in the steps 0 and 2: a checkpoint after one is in the middle of a cycle."""


def make_module(kind: str, module_class: type[DistillationModule] = Noisy, **changes: Any) -> DistillationModule:
    """Four heads, for four ranks."""
    settings: dict[str, Any] = {
        "model": WanConfig.tiny(num_layers=1, dim=32, ffn_dim=32, num_heads=4),
        # Momentum: a state to keep, and steps that grow with their gradients, as Adam's do not.
        "optimizer": partial(SGD, lr=0.2, momentum=0.5),
        "critic_optimizer": partial(SGD, lr=0.2, momentum=0.5),
        "lora": LoRASettings(rank=4, alpha=4),
        "max_gradient_norm": 0.2,
    }
    made: Any = tiny_module(module_class, **settings | KINDS[kind] | changes)  # type: ignore[arg-type]
    return made


def make_batch(kind: str, number: int, data_rank: int = 0, data_size: int = 1) -> Any:
    """A data rank's samples; prompts are of two chunks alone."""
    mine = slice(data_rank * 2 // data_size, (data_rank + 1) * 2 // data_size)
    ids = torch.tensor([41, 7]) + 50 * number
    if kind == "prompts":
        prompts = tuple(row[:2] for row in PROMPTS[mine])
        return PromptBatch(prompts, SHOTS[mine, :2], ids[mine], height=32, width=32)
    clips = VideoBatch.fake(SPEC, seed=number)
    assert clips.latents is not None
    return replace(
        clips,
        latents=clips.latents[mine],
        shot_index=SHOTS[mine],
        prompts=PROMPTS[mine],
        num_valid_frames=clips.num_valid_frames[mine],
        sample_ids=ids[mine],
    )


@dataclass
class Seen:
    """What a process saw of a run: of every step both losses (means over the ranks), both gradient norms, how much
    samples differ, and the critic's loss by chunk; at its end the adapters, whole, and what they generate, as
    `SampleVideo` would."""

    values: list[dict[str, float]] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    generated: Tensor = field(default_factory=lambda: torch.empty(0))


class Record(Callback):
    """Fills a `Seen`, and saves at half of the run."""

    def __init__(self, save: Path | None) -> None:
        self.seen = Seen()
        self.save = save

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, DistillationModule)
        names = [name for name in outputs["values"] if name.endswith(("loss", "gradient_norm", "error", "diversity"))]
        means = pl_module.sum_over_ranks(torch.tensor([outputs["values"][name] for name in names]).double())
        values = dict(zip(names, (means / trainer.world_size).tolist(), strict=True))
        by_chunk = torch.zeros(4, dtype=torch.float64)
        errors = (outputs["frame_errors"] * outputs["scored"]).sum(dim=0).double()
        by_chunk.index_add_(0, (outputs["clip_position"] * 4).long(), errors)
        by_chunk = pl_module.sum_over_ranks(by_chunk)
        self.seen.values.append(values | {f"chunk_{number}": float(error) for number, error in enumerate(by_chunk)})
        if self.save is not None and trainer.global_step == HALF:
            trainer.save_checkpoint(self.save)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for name, parameter in pl_module.named_parameters():
            if parameter.requires_grad:
                whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
                self.seen.weights[name] = whole.detach().clone()
        assert isinstance(pl_module, DistillationModule)
        with torch.no_grad():
            embeds, index = pl_module.embed(PROMPTS)
            made = pl_module.rollout_engine().generate(embeds, index, SHOTS, (16, 4, 4), 0, [0, 1])
            self.seen.generated = made.latents


def learn(kind: str, mesh: str = "1 x 1", save: Path | None = None, start: Path | None = None) -> Seen:
    """The run, or what is left of it after a checkpoint, as this rank sees it."""
    data_size, sequence_size = MESHES[mesh]
    world, data_rank, strategy = data_size * sequence_size, 0, {}
    if "RANK" in os.environ:  # one rank reads a sharded checkpoint in a sharded run
        data_rank = int(os.environ["RANK"]) // sequence_size
        sharding = ShardingOptions(activation_checkpointing=kind == "prompts")
        sharded = BalancedSPStrategy(sequence_size, sharding=sharding)
        strategy = {"strategy": "auto" if mesh == COPIES else sharded, "devices": world}
    record = Record(save)
    batches = [make_batch(kind, number, data_rank, data_size) for number in range(HALF if start else 0, STEPS)]
    fit(make_module(kind), batches, [record], checkpoint=start, max_steps=STEPS, max_epochs=5, **strategy)  # type: ignore[arg-type]
    return record.seen


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Seen]:
    """By kind and mesh: whole runs, and of prompts those that went on from the checkpoint of two: `1 x 2 > mesh`."""
    saved = tmp_path_factory.mktemp("checkpoints") / "half.ckpt"

    def several(*wanted: tuple[str, str, Path | None, Path | None]) -> list[Seen]:
        return [learn(*run) for run in wanted]

    def on_ranks(world: int, *wanted: tuple[str, str, Path | None, Path | None]) -> list[Seen]:
        """What all ranks saw alike."""
        first, *others = run_on_ranks(partial(several, *wanted), world, init_process_group=False)
        for rank in others:
            for ours, theirs in zip(rank, first, strict=True):
                assert ours.values == theirs.values
                assert_same(ours.weights, theirs.weights)
        return first

    found = {(kind, "1 x 1"): learn(kind) for kind in KINDS}
    found["prompts", "1 x 2"], found["prompts", "1 x 2 > 1 x 2"] = on_ranks(
        2, ("prompts", "1 x 2", saved, None), ("prompts", "1 x 2", None, saved)
    )
    found["clips", "1 x 4"], found["prompts", "1 x 2 > 2 x 2"] = on_ranks(
        4, ("clips", "1 x 4", None, None), ("prompts", "2 x 2", None, saved)
    )
    (found["prompts", "1 x 2 > 1 x 1"],) = on_ranks(1, ("prompts", "1 x 1", None, saved))
    half = saved.with_name("half_of_copies.ckpt")
    found["prompts", COPIES], found["prompts", f"{COPIES} > {COPIES}"] = on_ranks(
        2, ("prompts", COPIES, half, None), ("prompts", COPIES, None, half)
    )
    return found


@pytest.mark.parametrize(("kind", "mesh"), [("prompts", "1 x 2"), ("clips", "1 x 4"), ("prompts", COPIES)])
def test_ranks_learn_what_one_rank_does(runs: dict[tuple[str, str], Seen], kind: str, mesh: str) -> None:
    """Catches means over one rank's frames, exits that differ (which would hang), gradients that stay on the rank of
    the loss, and recomputation with another adapter or a later cache; of copies, that wait for gradients of the adapter
    that a role's backward leaves alone."""
    expected, found = runs[kind, "1 x 1"], runs[kind, mesh]
    assert len(expected.values) == STEPS
    student_steps = [number for number, values in enumerate(expected.values) if "student/loss" in values]
    assert student_steps == list(range(0, STEPS, KINDS[kind]["student_every"]))
    for ours, theirs in zip(found.values, expected.values, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    begun = make_module(kind)
    begun.configure_model()
    start = {name: parameter.detach() for name, parameter in begun.named_parameters() if parameter.requires_grad}
    moved = max(float((expected.weights[name] - start[name]).abs().max()) for name in start)
    assert moved > 1e-2
    for name, weight in expected.weights.items():
        torch.testing.assert_close(found.weights[name], weight, atol=1e-5 * moved, rtol=1e-5)
    torch.testing.assert_close(found.generated, expected.generated, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mesh", ["1 x 2", COPIES])
def test_a_run_resumed_in_a_cycle_on_the_same_ranks_goes_on_bit_for_bit(
    runs: dict[tuple[str, str], Seen], mesh: str
) -> None:
    whole, resumed = runs["prompts", mesh], runs["prompts", f"{mesh} > {mesh}"]
    assert resumed.values == whole.values[HALF:]
    assert_same(resumed.weights, whole.weights)


@pytest.mark.parametrize("mesh", ["1 x 1", "2 x 2"])
def test_a_run_resumed_on_other_ranks_goes_on_as_on_one(runs: dict[tuple[str, str], Seen], mesh: str) -> None:
    """Of 2 x 2 every data rank has one of the two samples: catches draws by rank, too."""
    whole, resumed = runs["prompts", "1 x 1"], runs["prompts", f"1 x 2 > {mesh}"]
    for ours, theirs in zip(resumed.values, whole.values[HALF:], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    for name, weight in whole.weights.items():
        torch.testing.assert_close(resumed.weights[name], weight, atol=1e-6, rtol=1e-5)


def test_of_a_clip_that_ranks_read_differently_nothing_is_learned() -> None:
    """One was unreadable in the part of one rank, which took the next: their rollout is neither's."""

    class Disagreeing(Noisy):
        def agreed(self, batch: VideoBatch) -> Tensor:
            return batch.sample_ids != 7

    found = []
    for kind, samples in ((Disagreeing, slice(2)), (Noisy, slice(1))):
        module, clips = make_module("clips", kind), make_batch("clips", 0)
        batch = replace(
            clips, **{name: getattr(clips, name)[samples] for name in
                      ("latents", "shot_index", "prompts", "num_valid_frames", "sample_ids")}
        )  # fmt: skip
        module.configure_model()
        conditions = module.conditions(batch)
        rollout = module.roll_out("student", conditions, 0).latents
        losses = [module.loss(role, rollout, conditions, 0).loss for role in ("student", "critic")]
        found.append([float(loss.detach()) for loss in losses])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


class Split(DistillationModule):
    """One of some ranks, as it finds itself under a strategy; without the others."""

    share: SequenceShare

    @property
    def sequence(self) -> SequenceShare:
        return self.share


def split(
    rank: int,
    size: int,
    layout: MakeLayout = balanced_layout,
    heads: int = 4,
    group: dist.ProcessGroup | None = None,
    **changes: Any,
) -> DistillationModule:
    model = WanConfig.tiny(num_layers=1, dim=48, ffn_dim=32, num_heads=heads)
    module = make_module("prompts", Split, model=model, **changes)
    assert isinstance(module, Split)
    module.share = SequenceShare(rank, size, group, layout)
    return module


def given_here(pixels: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The given frames of clips of which this rank has its window alone, and what it has encoded."""
    encoded: list[int] = []

    class Counting(DCTCodec):
        def encode(self, video: Tensor) -> Tensor:
            encoded.append(video.shape[1])
            return super().encode(video)

    module = split(dist.get_rank(), dist.get_world_size(), group=dist.group.WORLD, given_frames=2, codec=Counting())
    clips = make_batch("clips", 0)
    window = module.clip_window(SPEC.num_frames)
    assert window is not None
    mine = pixels[:, window.start : window.stop]
    batch = replace(clips, latents=None, raw_frames=mine, frame_offset=window.frame_offset)
    return module.conditions(batch).given, tuple(encoded)


def test_the_first_rank_encodes_the_given_frames_for_all() -> None:
    pixels = torch.randint(256, (2, 61, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    expected = DCTCodec().encode(to_unit_range(pixels))[:, :2]
    for size in (2, 4):
        for rank, (given, encoded) in enumerate(run_on_ranks(partial(given_here, pixels), size)):
            assert torch.equal(given, expected)
            assert encoded == (() if rank else (5,))


def test_tokens_have_the_same_numbers_whichever_rank_has_them() -> None:
    """Random rounding in backward is named by them; ranks that all count from zero would round alike."""
    alone = make_module("prompts")
    conditions = alone.conditions(make_batch("prompts", 0))
    for role, count in (("critic", (2 + 2) * 16), ("student", 16)):
        whole = alone.token_positions(role, conditions)
        of_ranks = torch.cat([split(rank, 2).token_positions(role, conditions) for rank in range(2)], dim=1)
        assert of_ranks.shape == (2, count)
        assert len(of_ranks.unique()) == of_ranks.numel()
        for mine, theirs in zip(whole.tolist(), of_ranks.tolist(), strict=True):
            assert set(mine) <= set(theirs), "alone, nobody needs the last chunk's clean copy"


def test_tokens_are_numbered_for_every_backward() -> None:
    """After the scores, which go forward through other tokens than the rollout that the student's backward runs."""

    class Watched(Noisy):
        def place_tokens(self, positions: Tensor) -> None:
            seen.append(tuple(positions.shape))

        def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
            seen.append("backward")
            super().manual_backward(loss, *args, **kwargs)

    seen: list[Any] = []
    fit(make_module("prompts", Watched), [make_batch("prompts", 0)])
    assert seen == [(2, 16), "backward", (2, (1 + 2) * 16), "backward"]


@pytest.mark.parametrize(
    ("heads", "size", "layout", "message"),
    [
        (6, 3, balanced_layout, "size=3 does not divide both chunk_frames=4 and model.num_heads=6; use 1 or 2: "),
        (4, 2, contiguous_layout, "gives some ranks clean chunks alone.*use strategy=balanced_sp"),
    ],
    ids=["three ranks", "contiguous"],
)
def test_ranks_that_cannot_share_a_step_are_refused(heads: int, size: int, layout: MakeLayout, message: str) -> None:
    """When the data is set up, and where it does not ask, before a network is built."""
    module = split(0, size, layout, heads)
    with pytest.raises(ValueError, match=message):
        module.clip_window(24)
    with pytest.raises(ValueError, match=message):
        module.configure_model()
    assert module.network is None


def test_a_length_that_ranks_cannot_share_is_refused_when_prompts_are_set_up() -> None:
    data = PromptDataModule(["a red circle"], num_frames=12, chunk_frames=4, height=32, width=32)
    data.trainer = SimpleNamespace(lightning_module=split(0, 2))  # type: ignore[assignment]
    with pytest.raises(ValueError, match="sequence_parallel_size=2 does not divide the 3 chunks of a clip; use 1 or 3"):
        data.setup("fit")
