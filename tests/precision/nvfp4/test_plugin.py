"""NVFP4 in real runs: one process or several, all weights or LoRA, interrupted or not. Everything is emulated."""

from __future__ import annotations

import logging
import os
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision, Precision
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import save_file
from torch import nn
from torch.optim import SGD, AdamW

from helpers.distributed import run_on_ranks
from helpers.runs import assert_same, fake_batches, fit, tiny_module
from helpers.sharded_runs import whole
from longlive.adapters.lora import initialise_adapter
from longlive.callbacks.ema import EMA
from longlive.models.wan.config import WanConfig
from longlive.models.wan.model import CausalWan
from longlive.modules.teacher_forcing import TeacherForcingModule
from longlive.parallel.checkpoint import AtomicCheckpointIO
from longlive.parallel.fsdp import ShardingOptions
from longlive.parallel.materialise import materialise
from longlive.parallel.strategy import BalancedSPStrategy, ShardedStrategy
from longlive.precision.nvfp4.linear import NVFP4Linear
from longlive.precision.nvfp4.plugin import NVFP4Precision, piece_tokens
from longlive.precision.nvfp4.recipe import NVFP4Recipe

MODEL = WanConfig.tiny(num_layers=1, dim=64, ffn_dim=64, num_heads=4)
STRATEGIES = {"single": None, "fsdp": ShardedStrategy, "balanced_sp": BalancedSPStrategy}
PLACES = [("single", 1), ("fsdp", 2), ("balanced_sp", 2), ("balanced_sp", 4)]


class LoRAStage(TeacherForcingModule):
    """The order of `configure_model` with an adapter: it is attached first, so that its base layers are wrapped."""

    def configure_model(self) -> None:
        if self.network is not None:
            return
        with torch.device("meta"):
            network = CausalWan(self.model_config)
            targets = ["self_attn.q", "self_attn.v", "cross_attn.k", "ffn.0"]
            inject_adapter_in_model(LoraConfig(r=4, target_modules=targets), network)
        self.trainer.precision_plugin.convert_module(network)
        if isinstance(self.trainer.strategy, ShardedStrategy):
            self.trainer.strategy.shard(network)
        materialise(network, "cpu", seed=self.seed)
        initialise_adapter(network, "default", self.seed)
        self.network = network


class Notes(Callback):
    """Every loss, and a checkpoint after so many steps."""

    def __init__(self, save: Path | None, after_steps: int) -> None:
        self.save, self.after_steps = save, after_steps
        self.losses: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(float(outputs["loss"]))
        if self.save is not None and trainer.global_step == self.after_steps:
            trainer.save_checkpoint(self.save)


def train(
    steps: range,
    strategy: str = "single",
    stage: type[TeacherForcingModule] = TeacherForcingModule,
    save: Path | None = None,
    checkpoint: Path | None = None,
    precision: Precision | None = None,
    weights: Path | None = None,
    learning_rate: float = 0.01,
    **sharding: Any,
) -> dict[str, Any]:
    """Steps of a run on this rank, a checkpoint after two: its losses, weights and average, gathered."""
    placed: dict[str, Any] = {}
    kind = STRATEGIES[strategy]
    if kind is not None:
        logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
        made = kind(sharding=ShardingOptions(**sharding))
        placed = {"strategy": made, "devices": int(os.environ["WORLD_SIZE"]), "num_nodes": 1}
    optimizer = partial(AdamW if weights is None else SGD, lr=learning_rate)
    module = tiny_module(stage, model=MODEL, optimizer=optimizer, seed=1, weights=weights and str(weights))
    notes, average = Notes(save, 2), EMA(decay=0.5)
    fit(
        module,
        fake_batches(steps.stop, num_frames=16)[steps.start :],
        [average, notes],
        checkpoint=checkpoint,
        max_steps=steps.stop,
        plugins=[AtomicCheckpointIO(), precision or NVFP4Precision(seed=1)],
        **placed,
    )
    return {
        "losses": notes.losses,
        "weights": whole(module.state_dict()),
        "average": whole(average.average),
        "wrapped": sum(isinstance(layer, NVFP4Linear) for layer in module.modules()),
    }


def through_and_resumed(save: Path, **settings: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    environment = dict(os.environ)
    through = train(range(3), save=save, **settings)
    os.environ.update(environment)  # Lightning has forgotten which rank this is
    return through, train(range(2, 3), checkpoint=save, **settings)


@pytest.mark.parametrize("stage", [TeacherForcingModule, LoRAStage], ids=["full", "lora"])
@pytest.mark.parametrize(("strategy", "num_ranks"), PLACES)
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, strategy, num_ranks, stage):
    """Random bits that came from a generator, or from a count of calls, would be others after a resume."""
    run = partial(through_and_resumed, tmp_path / "two.ckpt", strategy=strategy, stage=stage)
    for through, resumed in run_on_ranks(run, num_ranks, init_process_group=False):
        assert through["wrapped"] == 10
        assert len(through["losses"]) == 3
        assert_same(through["losses"][2:], resumed["losses"])
        assert_same(through["weights"], resumed["weights"])
        assert_same(through["average"], resumed["average"])


def test_forward_of_the_last_steps_is_that_of_bfloat16(tmp_path, caplog):
    """The first loss is what another precision makes of the same weights; backward stays in NVFP4. Where the run is
    interrupted does not show."""
    caplog.set_level(logging.INFO, "longlive.precision.nvfp4.plugin")
    through = train(range(4), save=tmp_path / "two.ckpt", precision=ending_in_bfloat16(0.5))
    train(range(2), save=tmp_path / "nvfp4.ckpt", precision=ending_in_bfloat16(0.0))
    assert caplog.messages.count("precision nvfp4: from step 2 on forward products in bfloat16") == 1
    resumed = train(range(2, 4), checkpoint=tmp_path / "two.ckpt", precision=ending_in_bfloat16(0.5))
    other = train(range(2, 4), checkpoint=tmp_path / "nvfp4.ckpt", precision=MixedPrecision("bf16-mixed", "cpu"))
    low = train(range(4), precision=ending_in_bfloat16(0.0))
    assert_same(through["losses"][2:], resumed["losses"])
    assert_same(through["weights"], resumed["weights"])
    assert through["losses"][:2] == low["losses"][:2]
    assert through["losses"][2] == other["losses"][0] != low["losses"][2]
    assert any(not torch.equal(through["weights"][name], other["weights"][name]) for name in other["weights"])


def ending_in_bfloat16(share: float) -> NVFP4Precision:
    """Without means, whose sum with the rest is rounded once more."""
    return NVFP4Precision(recipe=NVFP4Recipe(mean_tokens=None), seed=1, keep_last_steps_bf16=share)


def test_last_steps_that_cannot_be_in_bfloat16_are_refused():
    with pytest.raises(ValueError, match=r"keep_last_steps_bf16=1\.0 must be at least 0 and below 1"):
        ending_in_bfloat16(1.0)
    plugin = ending_in_bfloat16(0.5)
    with pytest.raises(ValueError, match=r"a share of trainer\.max_steps, which is -1"):
        fit(tiny_module(TeacherForcingModule, model=MODEL), fake_batches(1), max_steps=-1, plugins=[plugin])


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A network whose head is not zero, as it is at first: then nothing below it would show in the loss."""
    network = CausalWan(MODEL)
    network.init_weights(0)
    nn.init.normal_(network.head.head.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    file = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file(network.state_dict(), file)
    return file


def test_a_second_trainers_plugin_takes_the_layers_over():
    """Layers of the first Trainer would go on with a clock that nobody advances: the same random bits at every step."""
    network = CausalWan(MODEL)
    NVFP4Precision(seed=1).convert_module(network)
    second = NVFP4Precision(recipe=NVFP4Recipe(activations="static_6"), seed=2)
    second.convert_module(network)
    layers = [layer for layer in network.modules() if isinstance(layer, NVFP4Linear)]
    assert len(layers) == 10 == sum(layer.reason is None for layer in second.layers)
    assert all(layer.clock is second.clock and layer.recipe is second.recipe for layer in layers)


def test_a_backend_that_cannot_run_here_is_refused_before_any_work(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = "backend=transformer_engine cannot run here: there is no CUDA device.*would run emulated instead"
    with pytest.raises(ValueError, match=message):
        NVFP4Precision(backend="transformer_engine")
    with pytest.raises(
        ValueError, match="backend='cutlass' is unknown; use auto, emulated, transformer_engine, torchao"
    ):
        NVFP4Precision(backend="cutlass")


def test_frozen_weights_are_packed_for_rollouts_and_answer_alike():
    precision, network = NVFP4Precision(), CausalWan(MODEL).requires_grad_(False)
    network.init_weights(0)
    precision.convert_module(network)
    layer, x = network.blocks[0].ffn[0], torch.randn(32, 64)
    with precision.forward_context():
        before = layer(x)
        precision.freeze(network)
        assert layer.weight is None
        torch.testing.assert_close(layer(x), before, rtol=0, atol=0)


class Float32Around(NVFP4Precision):
    """Without autocast: bfloat16's rounding of what ranks sum (1e-3 of a gradient) would hide what is tested."""

    @contextmanager
    def forward_context(self) -> Generator[None, None, None]:
        yield


@pytest.mark.parametrize("mean_tokens", [None, 4, 880])
def test_ranks_that_share_a_clip_compute_what_one_rank_does_if_they_share_amax(weights, mean_tokens):
    """Random bits by a rank's own count of tokens, or scales of its own, would give other losses. The prompts' two
    layers are left out: every rank quantises its own part of their gradient, which one rank has as a sum. The one rank
    is one of balanced_sp, too: outside it the last chunk's clean copy is left out, and with it what it adds to amax."""
    layers = ("blocks.*.self_attn.[qkvo]", "blocks.*.cross_attn.[qo]", "blocks.*.ffn.[02]")

    def losses(num_ranks: int, reduce_amax: bool) -> torch.Tensor:
        recipe = NVFP4Recipe(reduce_amax=reduce_amax, mean_tokens=mean_tokens)
        precision = Float32Around(recipe=recipe, layers=layers, seed=1)
        settings = {"precision": precision, "weights": weights, "learning_rate": 5e-3}
        results = run_on_ranks(partial(train, range(3), "balanced_sp", **settings), num_ranks, init_process_group=False)
        return torch.tensor([result["losses"] for result in results], dtype=torch.float64).mean(dim=0)

    alone = losses(1, True)
    for num_ranks in (2, 4) if mean_tokens != 880 else ():  # ranks have means of their own where a chunk is smaller
        torch.testing.assert_close(losses(num_ranks, True), alone, rtol=1e-5, atol=0)
    by_rank = (losses(2, False) / alone - 1).abs()
    assert 1e-4 < float(by_rank.max()) < 0.02, "each rank scales by its own amax and means: nearly the same"


def test_tokens_that_share_a_mean_on_every_rank_are_read_from_their_numbers():
    chunk = torch.arange(12)
    assert piece_tokens(torch.cat((chunk, 12 + chunk))) == 24, "consecutive chunks are one piece"
    assert piece_tokens(torch.cat((chunk, 36 + chunk))) == 12, "a clean chunk and a noisy one"
    assert piece_tokens(torch.cat((48 + chunk, 24 + chunk))) == 12
    assert piece_tokens(torch.arange(8, 16)) == 8, "a rank's share of a chunk"
    assert piece_tokens(torch.arange(6, 18)) == 6, "twelve tokens that begin in the middle of another twelve"


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        (NVFP4Recipe(reduce_amax=True), "mean_tokens=880 does not divide the 12 tokens"),
        (NVFP4Recipe(reduce_amax=True, mean_tokens=8), "mean_tokens=8 does not divide the 12 tokens"),
        (NVFP4Recipe(reduce_amax=True, mean_tokens=4), None),
        (NVFP4Recipe(reduce_amax=True, mean_tokens=None), None),
        (NVFP4Recipe(reduce_amax=True, activations=None), None),
        (NVFP4Recipe(), None),
    ],
)
def test_ranks_that_share_amax_and_not_means_are_told_once(recipe, says, caplog):
    precision = NVFP4Precision(recipe=recipe)
    precision.place_tokens(torch.arange(24)[None])
    assert not caplog.messages, "a process alone has nobody to differ from"
    precision.clock.reduce = lambda values: values
    held = torch.cat((torch.arange(12), 36 + torch.arange(12)))
    for sample in range(2):
        precision.place_tokens((held + 48 * sample)[None])
    assert len(caplog.messages) == (says is not None)
    assert says is None or says in caplog.text
