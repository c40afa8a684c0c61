"""What both plugins promise: the same Parameters under the same names, converted once, in a real run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import AdamW

from helpers.distributed import run_on_ranks
from helpers.runs import assert_same, fake_batches, fit, run, tiny_module, write_toyworld
from longlive.config import compose, instantiate
from longlive.generate import generate
from longlive.models.wan.config import WanConfig
from longlive.models.wan.model import CausalWan
from longlive.modules.teacher_forcing import TeacherForcingModule
from longlive.parallel.fsdp import ShardingOptions
from longlive.parallel.strategy import ShardedStrategy
from longlive.precision.fp8 import FP8Precision
from longlive.precision.nvfp4.backends import transformer_engine
from longlive.precision.nvfp4.plugin import NVFP4Precision
from longlive.precision.plugin import LinearPrecision
from longlive.train import make_trainer

MakePlugin = Callable[..., LinearPrecision]
PLUGINS = pytest.mark.parametrize("make_plugin", [NVFP4Precision, FP8Precision], ids=["nvfp4", "fp8"])
NVFP4_OPTIONS = ("nvfp4", "nvfp4_static", "nvfp4_weights")
MODEL = WanConfig.tiny(num_layers=2, dim=32, ffn_dim=64, num_heads=2)


def network(device: str = "cpu") -> CausalWan:
    with torch.device(device):
        return CausalWan(MODEL)


def module(**changes: Any) -> TeacherForcingModule:
    return tiny_module(model=MODEL, optimizer=partial(AdamW, lr=0.01), **changes)


@PLUGINS
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_parameters_are_the_very_same_under_the_same_names(make_plugin, device):
    """New ones would leave the optimizer, the average or a checkpoint with the old."""
    ours = network(device)
    before = dict(ours.named_parameters())
    plugin = make_plugin()
    assert plugin.convert_module(ours) is ours
    after = dict(ours.named_parameters())
    assert list(before) == list(after) == list(ours.state_dict())
    assert all(before[name] is after[name] for name in before)
    assert sum(isinstance(layer, plugin.linear_class) for layer in ours.modules()) == 20


@PLUGINS
def test_a_second_conversion_finds_nothing_to_do(make_plugin):
    """Lightning converts the module that holds the network once more, and its parameters are sharded by then."""
    plugin, holder = make_plugin(), torch.nn.Module()
    holder.network = plugin.convert_module(network())
    before, table = list(holder.modules()), plugin.layers
    plugin.convert_module(holder)
    assert all(one is other for one, other in zip(before, holder.modules(), strict=True))
    assert plugin.layers is table


@PLUGINS
def test_a_layer_that_is_sharded_already_is_refused(make_plugin):
    """FSDP would go on with the layer that was replaced, and the new one with a shard of its weight."""

    def convert() -> str:
        ours = network()
        fully_shard(ours, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(RuntimeError) as error:
            make_plugin().convert_module(ours)
        return str(error.value)

    (message,) = run_on_ranks(convert, 1)
    assert "blocks.0.self_attn.q is sharded already" in message
    assert "convert_module(network) in configure_model" in message


@PLUGINS
def test_an_adapter_on_top_learns_and_the_wrapped_layer_below_does_not(make_plugin):
    """peft wraps subclasses of nn.Linear; attached after the conversion, it must multiply by the wrapped layer."""
    plugin, x = make_plugin(), torch.randn(2, 16, 32)
    ours = plugin.convert_module(network().requires_grad_(False))
    ours.init_weights(0)
    layer = ours.blocks[0].self_attn.q
    with plugin.forward_context():
        before = layer(x)
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["self_attn.q"]), ours)
    adapted = ours.blocks[0].self_attn.q
    assert adapted.base_layer is layer
    with plugin.forward_context():
        after = adapted(x)
    torch.testing.assert_close(after, before, rtol=0, atol=0)  # an adapter starts as nothing
    after.float().square().sum().backward()
    assert layer.weight.grad is None
    assert float(adapted.lora_B["default"].weight.grad.norm()) > 0
    plugin.convert_module(ours)
    assert adapted.base_layer is layer


@PLUGINS
def test_a_checkpoint_of_one_precision_continues_in_another(make_plugin, tmp_path):
    batches = fake_batches(3)
    first = module()
    trainer = fit(first, batches[:2], plugins=[make_plugin()])
    trainer.save_checkpoint(tmp_path / "low.ckpt")
    weights = copy.deepcopy(first.state_dict())
    other = module()
    trainer = fit(other, batches[2:], checkpoint=tmp_path / "low.ckpt", max_steps=3, precision="bf16-mixed")
    assert trainer.global_step == 3
    trainer.save_checkpoint(tmp_path / "bf16.ckpt")
    assert set(torch.load(tmp_path / "bf16.ckpt", weights_only=True)["state_dict"]) == set(weights)
    back = module()
    plugin = make_plugin()
    trainer = fit(
        back, fake_batches(4)[3:], checkpoint=tmp_path / "bf16.ckpt", max_steps=4, max_epochs=3, plugins=[plugin]
    )
    assert (trainer.global_step, trainer.precision_plugin) == (4, plugin)


@PLUGINS
def test_recomputed_activations_change_nothing(make_plugin):
    """Under activation checkpointing every layer runs twice, with its random draws."""

    def train(recompute: bool) -> dict[str, torch.Tensor]:
        strategy = ShardedStrategy(sharding=ShardingOptions(activation_checkpointing=recompute))
        ours = module()
        fit(ours, fake_batches(3), plugins=[make_plugin()], strategy=strategy, devices=1, num_nodes=1)
        return {name: value.full_tensor() for name, value in ours.state_dict().items()}

    one, other = (
        run_on_ranks(partial(train, recompute), 1, init_process_group=False)[0] for recompute in (True, False)
    )
    assert_same(one, other)


def test_the_clock_follows_optimizer_steps_under_accumulation(monkeypatch):
    """Microbatches of a step differ by their draws; the step itself must be the one a resumed run starts with."""
    plugin, steps = NVFP4Precision(seed=3), []
    advance = plugin.clock.advance
    monkeypatch.setattr(plugin.clock, "advance", lambda step: (steps.append(step), advance(step)))
    fit(module(), fake_batches(4), plugins=[plugin], max_steps=2, accumulate_grad_batches=2)
    assert (plugin.clock.seed, steps) == (3, [0, 0, 1, 1])


@pytest.mark.parametrize(
    ("option", "name", "kind"),
    [
        ("32-true", "32-true", object),
        ("fp32", "32-true", object),
        ("bf16-mixed", "bf16-mixed", object),
        ("bf16", "bf16-mixed", object),
        ("fp8", "fp8", FP8Precision),
        ("nvfp4", "nvfp4", NVFP4Precision),
        ("nvfp4_static", "nvfp4", NVFP4Precision),
    ],
)
def test_the_option_reaches_the_trainer(tmp_path, option, name, kind):
    config = compose(
        "train", [f"precision={option}", f"directory={tmp_path}", "data.train=.", "trainer.accelerator=cpu"]
    )
    trainer = make_trainer(config)
    assert trainer.precision == name
    assert isinstance(trainer.precision_plugin, kind)


def test_settings_reach_the_plugin(tmp_path):
    more = ["precision.recipe.activations=static_6", "precision.keep_last_blocks_bf16=0.5", "seed=7"]
    plugin = instantiate(compose("train", ["precision=nvfp4", *more]).precision)
    assert (plugin.recipe.activations, plugin.recipe.weights, plugin.clock.seed) == ("static_6", "mse", 7)
    plugin.convert_module(network())
    assert {layer.name.split(".")[1] for layer in plugin.layers if layer.reason is None} == {"0"}


def test_of_the_options_one_is_what_transformer_engine_computes():
    recipes = {name: instantiate(compose("train", [f"precision={name}"]).precision).recipe for name in NVFP4_OPTIONS}
    assert [name for name, recipe in recipes.items() if transformer_engine.refusal(recipe) is None] == ["nvfp4_static"]


def test_an_unknown_precision_is_answered_with_those_there_are():
    with pytest.raises(ValueError, match=r"(?s)Could not find 'precision/fp4'.*bf16.*fp32.*fp8.*nvfp4"):
        compose("train", ["precision=fp4"])


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return write_toyworld(tmp_path_factory.mktemp("shards"))


@pytest.mark.parametrize("option", ["nvfp4", "fp8"])
def test_a_run_of_the_command_trains_and_its_checkpoint_rolls_out(tmp_path, shards, option):
    trainer = run(tmp_path, shards, f"precision={option}", "trainer.max_steps=4", "optimizer.lr=0.02")
    assert trainer.global_step == 4
    made = {}
    for name in (option, "32-true"):
        given = [
            f"checkpoint={tmp_path}",
            f"directory={tmp_path / name}",
            "prompts=[a red circle]",
            f"precision={name}",
        ]
        made[name] = generate(compose("generate", [*given, "rollout.num_steps=2"]))["settings"]["precision"]
    assert made["32-true"] == "32-true"
    assert made[option]["_target_"].endswith("Precision")
    low, high = ((tmp_path / name / "000-a-red-circle.mp4").read_bytes() for name in (option, "32-true"))
    assert low != high, "the rollout multiplied in high precision"
