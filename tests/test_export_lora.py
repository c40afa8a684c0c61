"""LoRAs that `longlive export` writes, and networks with a LoRA in their weights: what a rollout makes of both."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.exporting import PACKED_LAYERS, PROMPTS, make, noted_rollouts
from helpers.generating import train_visibly
from helpers.runs import assert_same, checkpoint
from longlive.adapters.exported import read_metadata
from longlive.adapters.lora_files import WEIGHTS_FILE, find_adapter
from longlive.callbacks.ema import averaged_weights
from longlive.config import compose
from longlive.generate import generate
from longlive.precision.nvfp4.format import quantise
from longlive.train import train
from longlive.trained import load_trained, with_lora

OWN_STEPS = ("precision=32-true", "rollout.num_steps=null")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    return train_visibly(tmp_path_factory)


@pytest.fixture(scope="module")
def latents(tmp_path_factory) -> Iterator[Callable[..., torch.Tensor]]:
    with noted_rollouts(tmp_path_factory) as of:
        yield of


@pytest.fixture(scope="module")
def distilled(trained, tmp_path_factory) -> Path:
    """Two steps of distillation from that run, with other noise levels; the student's average is not its weights."""
    directory = tmp_path_factory.mktemp("distilled")
    sizes = ["model.num_layers=1", "model.dim=32", "model.ffn_dim=32", "model.num_heads=2"]
    data = ["data.num_frames=8", "data.batch_size=1", "data.height=32", "data.width=32", "data.prompts.num_prompts=4"]
    off = ["callbacks.progress=null", "callbacks.samples=null", "+trainer.enable_progress_bar=false"]
    learning = [
        "optimizer.lr=0.05",
        "learning_rate.num_warmup_steps=0",
        "module.student_every=1",
        "module.guidance=0.0",
    ]
    settings = ["module.lora.rank=4", "module.lora.alpha=8", "rollout.num_steps=3", "schedule.shift=7.0"]
    run = ["trainer.max_steps=2", "trainer.accelerator=cpu", "precision=32-true", "callbacks.ema.start_step=0"]
    of = [f"directory={directory}", f"initialise_from={trained}", "callbacks.checkpoint.every_n_train_steps=2"]
    train(compose("train", ["experiment=toyworld_distill_4step", *sizes, *data, *off, *learning, *settings, *run, *of]))
    return directory


@pytest.fixture(scope="module")
def loras(distilled, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("loras")
    for naming in ("original", "diffusers"):
        make(distilled, folder / naming, "format=lora", f"naming={naming}")
    return {naming: folder / naming for naming in ("original", "diffusers")}


@pytest.mark.parametrize("naming", ["original", "diffusers"])
def test_a_lora_over_its_base_rolls_out_as_the_run_that_trained_it(trained, distilled, loras, latents, naming):
    """With that run's steps and noise levels, which the base does not have."""
    expected = latents(distilled, *OWN_STEPS)
    assert torch.equal(latents(trained, f"lora={loras[naming]}", *OWN_STEPS), expected)
    # The same network under settings given here.
    other = (f"lora={loras[naming]}", "precision=32-true")
    assert torch.equal(latents(trained, *other), latents(distilled, "precision=32-true"))
    assert not torch.equal(latents(trained, *other), expected)


def test_a_lora_of_another_program_rolls_out_as_the_settings_say(trained, loras, latents, tmp_path):
    """Nothing but weights: the base's noise levels, and its number of steps."""
    shutil.copytree(loras["original"], tmp_path / "plain")
    save_file(load_file(tmp_path / "plain" / WEIGHTS_FILE), tmp_path / "plain" / WEIGHTS_FILE)
    made = latents(trained, f"lora={tmp_path / 'plain'}", "precision=32-true")
    assert not torch.equal(made, latents(trained, "precision=32-true"))
    assert not torch.equal(made, latents(trained, f"lora={loras['original']}", "precision=32-true"))
    base = load_trained(trained)
    rollout, schedule = base.module.rollout, base.module.schedule
    over = with_lora(base, tmp_path / "plain").module
    assert over.rollout == rollout
    assert over.schedule is schedule


def test_a_lora_over_a_packed_base_rolls_out_as_over_the_base_in_nvfp4(trained, loras, latents, tmp_path):
    """The adapter stays in high precision beside codes, as it is where the base is packed for the rollout."""
    lora = f"lora={loras['original']}"
    base = tmp_path / "base.safetensors"
    make(trained, base, "format=nvfp4", "format.others=fp32")
    packed = latents(base, lora)
    assert torch.equal(packed, latents(trained, "precision=nvfp4", lora))
    assert not torch.equal(packed, latents(base))


def merged_by_hand(distilled: Path) -> dict[str, torch.Tensor]:
    """Wan's names and float32 weights, from the checkpoint alone: base + alpha / rank B A of the student's average."""
    weights = averaged_weights(checkpoint(distilled, 2))
    merged = {}
    for name, weight in weights.items():
        layer = name.removesuffix(".base_layer.weight")
        if ".lora_" in name:
            continue
        if layer != name:
            product = weights[f"{layer}.lora_B.student.weight"] @ weights[f"{layer}.lora_A.student.weight"]
            weight = torch.add(weight, product, alpha=8 / 4)
            assert product.abs().max() > 1e-4
        merged[name.removeprefix("network.").replace(".base_layer.", ".")] = weight
    return merged


def test_what_is_exported_of_a_distillation_is_base_and_averaged_student_in_one(distilled, latents, tmp_path):
    """Every format packs or rounds the merged masters; the critic is in none."""
    expected = merged_by_hand(distilled)
    for name, settings in (("fp32", []), ("bf16", []), ("nvfp4", ["format.others=fp32"])):
        make(distilled, tmp_path / f"{name}.safetensors", f"format={name}", *settings)
    stored = {name: load_file(tmp_path / f"{name}.safetensors") for name in ("fp32", "bf16", "nvfp4")}
    assert_same(stored["fp32"], expected)
    assert_same(stored["bf16"], {name: weight.bfloat16() for name, weight in expected.items()})
    for name in [name for name in stored["nvfp4"] if name.endswith("_packed")]:
        codes = quantise(expected[name.removesuffix("_packed")], "mse", tiles=True)
        assert torch.equal(stored["nvfp4"][name], codes.packed)
    assert sum(name.endswith("_packed") for name in stored["nvfp4"]) == PACKED_LAYERS
    assert torch.equal(latents(tmp_path / "fp32.safetensors", *OWN_STEPS), latents(distilled, *OWN_STEPS))
    make(tmp_path / "fp32.safetensors", tmp_path / "again.safetensors", "format=nvfp4", "format.others=fp32")
    assert_same(load_file(tmp_path / "again.safetensors"), stored["nvfp4"])


def test_a_lora_file_holds_the_students_average(distilled, loras):
    saved = checkpoint(distilled, 2)
    stored = load_file(loras["original"] / WEIGHTS_FILE)
    averages = {
        name.replace("network.", "base_model.model.").replace(".student.", "."): weight
        for name, weight in averaged_weights(saved).items()
        if ".student." in name
    }
    assert_same(stored, averages)
    last = {name: weight for name, weight in saved["state_dict"].items() if ".student." in name}
    assert any(not torch.equal(averaged_weights(saved)[name], weight) for name, weight in last.items())


@pytest.mark.parametrize("naming", ["original", "diffusers"])
def test_a_lora_of_a_lower_rank_says_what_it_lacks(trained, distilled, latents, tmp_path, capsys, naming):
    """And goes over the base as any other."""
    summary = make(distilled, tmp_path / "whole", "format=lora", f"naming={naming}", "rank=4")
    small = make(distilled, tmp_path / "small", "format=lora", f"naming={naming}", "rank=2")
    assert 2 * small.num_parameters == summary.num_parameters
    weights, name = averaged_weights(checkpoint(distilled, 2)), "network.blocks.0.ffn.0"
    up, down = (weights[f"{name}.lora_{matrix}.student.weight"].double() for matrix in "BA")
    lost = torch.linalg.svdvals(2 * up @ down)
    about = json.loads(read_metadata(find_adapter(tmp_path / "small"))["longlive"])["truncation"]
    assert (about["rank"], about["trained_rank"]) == (2, 4)
    assert 0 < about["error"] <= about["worst_error"]
    assert about["worst_error"] >= lost[2:].norm() / lost.norm() * (1 - 1e-9)
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[-2]
        == f"{small.num_parameters:,} parameters are {small.num_parameters / 33_952:.2%} of the 33,952 of its base"
    )
    assert lines[-1] == (
        f"rank 2 of 4: lacks {about['error']:.3%} of the trained update, in {about['worst_layer']} "
        f"{about['worst_error']:.3%} (Frobenius norm)"
    )
    expected = latents(distilled, *OWN_STEPS)
    over = {rank: latents(trained, f"lora={tmp_path / rank}", *OWN_STEPS) for rank in ("whole", "small")}
    torch.testing.assert_close(over["whole"], expected, atol=1e-4, rtol=0)
    assert (over["small"] - expected).abs().max() > 1e-3


def test_what_was_trained_alone_is_completed_by_the_weights_that_it_started_from(trained, distilled, tmp_path):
    """A sharded run may leave its frozen base out (`trainable_only`); initial weights in its place would be noise."""
    whole = checkpoint(distilled, 2)
    learned = {name: weight for name, weight in whole["state_dict"].items() if "lora_" in name}
    part = whole | {"state_dict": learned, "trainable_only": True}
    torch.save(part, tmp_path / "step-0000002.ckpt")
    ours = load_trained(tmp_path / "step-0000002.ckpt").module.state_dict()
    assert_same(dict(ours), dict(load_trained(distilled).module.state_dict()))
    torch.save(part | {"config": part["config"] | {"initialise_from": "gone"}}, tmp_path / "step-0000003.ckpt")
    with pytest.raises(ValueError, match=r"holds what its run trained alone, over the weights of initialise_from=gone"):
        load_trained(tmp_path / "step-0000003.ckpt")


def test_a_lora_in_the_wrong_place_is_refused(trained, distilled, loras, tmp_path):
    def rolled_out(*settings: str) -> None:
        generate(compose("generate", [PROMPTS, f"directory={tmp_path / 'videos'}", *settings]))

    with pytest.raises(ValueError, match="has no adapter; format=lora is for runs that train one"):
        make(trained, tmp_path / "lora", "format=lora")
    file = loras["original"] / WEIGHTS_FILE
    with pytest.raises(ValueError, match=r"holds a LoRA, not a network: give its base as checkpoint="):
        rolled_out(f"checkpoint={file}")
    with pytest.raises(ValueError, match="has an adapter of its own, 'student'; give lora="):
        rolled_out(f"checkpoint={distilled}", f"lora={file}")
    with pytest.raises(ValueError, match=r"has no adapter_model\.safetensors and no pytorch_lora_weights"):
        rolled_out(f"checkpoint={trained}", f"lora={tmp_path}")
    with pytest.raises(ValueError, match="rank=5 must be 1 to 4, the rank of the trained adapter"):
        make(distilled, tmp_path / "lora", "format=lora", "rank=5")
    assert list(tmp_path.iterdir()) == []
