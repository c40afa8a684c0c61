"""Multi-shot clips with padding, a given frame and error recycling: one rank and several train alike, also after a
resume."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed.tensor import DTensor

from helpers.distributed import run_on_ranks
from helpers.runs import Randomise, assert_same, fit, samples_of_rank, tiny_module
from longlive.data.batch import BatchSpec, VideoBatch
from longlive.models.wan.config import WanConfig
from longlive.modules.multi_shot import MultiShotModule
from longlive.objectives.error_recycling import ErrorRecycling, Step
from longlive.objectives.teacher_forcing import InjectedErrors
from longlive.parallel.checkpoint import AtomicCheckpointIO
from longlive.parallel.strategy import BalancedSPStrategy
from longlive.typing import Int, Latents, Tensor

SPEC = BatchSpec(batch_size=2, num_frames=16, chunk_frames=4, channels=16, height=4, width=4)
SHOTS = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 2]])
STEPS, HALF = 5, 3
MESHES = {"1 x 1": (1, 1), "1 x 2": (1, 2), "2 x 2": (2, 2), "1 x 4": (1, 4)}
"""Data ranks x sequence ranks."""


def make_batch(seed: int) -> VideoBatch:
    """Two clips with cuts at different places, the second one padded; ids fall, so they are not in order."""
    prompts = tuple(tuple(f"a {('red', 'blue', 'green')[shot]} circle" for shot in row) for row in SHOTS.tolist())
    return replace(
        VideoBatch.fake(SPEC, seed),
        shot_index=SHOTS,
        prompts=prompts,
        num_valid_frames=torch.tensor([16, 6 + seed]),
        sample_ids=torch.tensor([41, 7]) - seed,
    )


class Noted(ErrorRecycling):
    """Remembers what it injected: by kind, step, sample and chunk."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.injected: dict[tuple[str, int, int, int], Tensor] = {}

    def inject(
        self,
        step: Step,
        latents: Latents,
        history: Sequence[int],
        targets: Sequence[int],
        grid_index: Int[Tensor, "b g"],
    ) -> InjectedErrors:
        errors = super().inject(step, latents, history, targets, grid_index)
        for kind, chunks in (("history", history), ("latents", targets), ("noise", targets)):
            found = getattr(errors, kind)
            for row, sample in enumerate(step.sample_ids if found is not None else ()):
                for column, chunk in enumerate(chunks):
                    error = found[row, 4 * column : 4 * column + 4]
                    # Nobody sees the last chunk's clean copy, and one rank alone has none.
                    if error.any() and (kind, chunk) != ("history", 3):
                        self.injected[kind, step.step, sample, chunk] = error.clone()
        return errors


def recycling() -> Noted:
    """Few buckets and high rates: in five steps every kind of error is injected."""
    return Noted(budget_mib=1, num_buckets=3, warm_up_steps=HALF, clean_probability=0.1, noise_probability=0.6)


def make_module(error_recycling: ErrorRecycling | None) -> MultiShotModule:
    """Four heads, for four ranks."""
    module = tiny_module(
        module_class=MultiShotModule,
        model=WanConfig.tiny(num_layers=1, dim=32, ffn_dim=32, num_heads=4),
        window=12,
        sink_frames=4,
        shot_sink=True,
        given_frames=1,
        prompt_dropout=0.2,
        noise_augmentation=0.1,
        error_recycling=error_recycling,
    )
    assert isinstance(module, MultiShotModule)
    return module


@dataclass
class Seen:
    """What a process saw of a run: losses (mean over the ranks) and what was injected; at its end the weights and the
    errors that it holds."""

    losses: list[float] = field(default_factory=list)
    injected: dict[tuple[str, int, int, int], Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[str, Any] = field(default_factory=dict)


class Record(Callback):
    """Fills a `Seen`, and saves at half of the run."""

    def __init__(self, save: Path | None) -> None:
        self.seen = Seen()
        self.save = save

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, MultiShotModule)
        loss = pl_module.sum_over_ranks(outputs["loss"].detach()) / trainer.world_size
        self.seen.losses.append(float(loss))
        if self.save is not None and trainer.global_step == HALF:
            trainer.save_checkpoint(self.save)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, MultiShotModule)
        for name, parameter in pl_module.named_parameters():
            value = parameter.detach()
            self.seen.weights[name] = (value.full_tensor() if isinstance(value, DTensor) else value).clone()
        if isinstance(pl_module.error_recycling, Noted):
            self.seen.injected = pl_module.error_recycling.injected
            self.seen.errors = pl_module.error_recycling.state_dict()


def train(mesh: str = "1 x 1", save: Path | None = None, checkpoint: Path | None = None, recycled: bool = True) -> Seen:
    """The run, or what is left of it after a checkpoint, as this rank sees it."""
    data_size, sequence_size = MESHES[mesh]
    world = data_size * sequence_size
    strategy = {"strategy": BalancedSPStrategy(sequence_size), "devices": world} if world > 1 else {}
    data_rank = int(os.environ["RANK"]) // sequence_size if world > 1 else 0
    batches = [
        samples_of_rank(make_batch(seed), data_rank, data_size) for seed in range(HALF if checkpoint else 0, STEPS)
    ]
    record = Record(save)
    callbacks = [record] if checkpoint else [Randomise(), record]
    module = make_module(recycling() if recycled else None)
    fit(
        module, batches, callbacks, checkpoint=checkpoint, max_steps=STEPS, plugins=[AtomicCheckpointIO()], **strategy
    )  # fmt: skip
    return record.seen


def of_all(ranks: list[Seen]) -> Seen:
    """What the ranks saw together; what they all saw is the same."""
    for seen in ranks[1:]:
        assert seen.losses == ranks[0].losses
        assert_same(seen.errors, ranks[0].errors)
    return replace(ranks[0], injected={key: value for seen in ranks for key, value in seen.injected.items()})


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Seen]:
    """By mesh: whole runs, those that went on on the same ranks, and those that went on from other ranks' checkpoint:
    `writer`, `writer > reader`."""
    folder = tmp_path_factory.mktemp("checkpoints")
    saved = {mesh: folder / f"{mesh.replace(' ', '')}.ckpt" for mesh in MESHES}

    def several(*meshes: tuple[str, str | None]) -> dict[str, Seen]:
        """Runs on these ranks, one after the other: (mesh, writer of the checkpoint that it begins from)."""
        found = {}
        for mesh, writer in meshes:
            name = mesh if writer is None else f"{writer} > {mesh}"
            save, checkpoint = (saved[mesh], None) if writer is None else (None, saved[writer])
            found[name] = train(mesh, save, checkpoint)
        return found

    def on_ranks(world: int, *meshes: tuple[str, str | None]) -> dict[str, Seen]:
        ranks = run_on_ranks(partial(several, *meshes), world, init_process_group=False)
        return {name: of_all([seen[name] for seen in ranks]) for name in ranks[0]}

    found = several(("1 x 1", None), ("1 x 1", "1 x 1"))
    found |= on_ranks(4, ("2 x 2", None), ("2 x 2", "2 x 2"), ("1 x 4", None))
    found |= on_ranks(2, ("1 x 2", None), ("1 x 2", "2 x 2"))
    return found | several(("1 x 1", "2 x 2"))


@pytest.mark.parametrize("mesh", ["1 x 2", "2 x 2", "1 x 4"])
def test_losses_over_five_steps_are_those_of_one_rank(runs: dict[str, Seen], mesh: str) -> None:
    expected, found = runs["1 x 1"], runs[mesh]
    assert len(expected.losses) == STEPS
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    assert found.injected.keys() == expected.injected.keys()
    for key, error in expected.injected.items():
        torch.testing.assert_close(found.injected[key], error, atol=1e-5, rtol=1e-2)
    sizes = [[len(block) for ring in seen.errors["errors"] for block in ring["blocks"]] for seen in (found, expected)]
    assert sizes[0] == sizes[1]


def test_the_runs_above_inject_every_kind_of_error_and_it_shows(runs: dict[str, Seen]) -> None:
    """Without errors, runs agree whatever becomes of them."""
    expected = runs["1 x 1"]
    for kind in ("history", "latents", "noise"):
        sizes = {
            step: float(error.abs().max()) for (name, step, _, _), error in expected.injected.items() if name == kind
        }
        assert sizes, kind
        assert max(sizes.values()) > 0.1
    without = train(recycled=False)
    differences = [abs(one - other) for one, other in zip(without.losses, expected.losses, strict=True)]
    assert differences[0] == 0, "there are no errors yet"
    assert min(differences[HALF:]) > 0.05


@pytest.mark.parametrize("mesh", ["1 x 1", "2 x 2"])
def test_a_run_resumed_on_the_same_ranks_is_the_run_that_was_not_stopped(runs: dict[str, Seen], mesh: str) -> None:
    """Bit for bit: losses, weights, the errors that were injected, and those in the buffers."""
    whole, resumed = runs[mesh], runs[f"{mesh} > {mesh}"]
    assert resumed.losses == whole.losses[HALF:]
    assert_same(resumed.weights, whole.weights)
    assert_same(resumed.errors, whole.errors)
    left = {key: error for key, error in whole.injected.items() if key[1] >= HALF}
    assert len(left) > 8
    assert_same(dict(sorted(resumed.injected.items())), dict(sorted(left.items())))


@pytest.mark.parametrize(("writer", "reader"), [("2 x 2", "1 x 2"), ("2 x 2", "1 x 1")])
def test_a_run_resumed_on_other_ranks_injects_the_same_errors(runs: dict[str, Seen], writer: str, reader: str) -> None:
    """The first step after the resume injects from what the checkpoint holds: the same to the last bit."""
    whole, resumed = runs[writer], runs[f"{writer} > {reader}"]
    assert resumed.losses == pytest.approx(whole.losses[HALF:], rel=1e-5)
    left = {key: error for key, error in whole.injected.items() if key[1] >= HALF}
    assert resumed.injected.keys() == left.keys()
    assert {key[1] for key in left} == set(range(HALF, STEPS))
    for key, error in left.items():
        if key[1] == HALF:
            assert torch.equal(resumed.injected[key], error), key
        torch.testing.assert_close(resumed.injected[key], error, atol=1e-5, rtol=1e-2)
