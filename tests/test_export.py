"""`longlive export`, and rollouts from what it writes: the same bits as from the checkpoint."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.runs import assert_same, checkpoint, run, write_toyworld
from longlive.adapters.export import ExportSummary
from longlive.adapters.exported import read_metadata
from longlive.adapters.lora_files import WEIGHTS_FILE, find_adapter
from longlive.callbacks.ema import averaged_weights
from longlive.cli import main
from longlive.config import compose
from longlive.export import export
from longlive.generate import generate
from longlive.precision.nvfp4.format import quantise
from longlive.precision.nvfp4.linear import NVFP4Linear
from longlive.rollout.engine import RolloutEngine
from longlive.train import train
from longlive.trained import load_trained, with_lora

PROMPTS = "prompts=[a red circle moves right,a blue square]"
PACKED_LAYERS = 10


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """12 steps with a visible learning rate; the average is not the weights."""
    directory = tmp_path_factory.mktemp("trained")
    run(directory, write_toyworld(tmp_path_factory.mktemp("shards")), "optimizer.lr=0.02")
    return directory


def make(trained: Path, output: Path, *settings: str) -> ExportSummary:
    return export(compose("export", [f"checkpoint={trained}", f"output={output}", *settings]))


@pytest.fixture(scope="module")
def files(trained, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    choices = {
        "bf16": ["format=bf16"],
        "fp32": ["format=fp32"],
        "diffusers": ["format=fp32", "naming=diffusers"],
        "nvfp4": ["format=nvfp4"],
        "nvfp4_fp32": ["format=nvfp4", "format.others=fp32"],
        "mse": ["format=nvfp4", "format.others=fp32", "format.rule=mse", "format.layers=['blocks.*.ffn.[02]']"],
    }
    for name, settings in choices.items():
        make(trained, folder / f"{name}.safetensors", *settings)
    return {name: folder / f"{name}.safetensors" for name in choices}


@pytest.fixture(scope="module")
def latents(tmp_path_factory) -> Iterator[Callable[..., torch.Tensor]]:
    """Rolls out and returns the chunks before anything is rounded to pixels; the same rollout is made once."""
    seen: list[torch.Tensor] = []
    made: dict[tuple[Path, tuple[str, ...]], torch.Tensor] = {}
    real = RolloutEngine.rollout

    def noted(engine: RolloutEngine, *arguments: Any) -> Iterator[torch.Tensor]:
        for chunk in real(engine, *arguments):
            seen.append(chunk.clone())
            yield chunk

    def of(location: Path, *settings: str) -> torch.Tensor:
        if (location, settings) not in made:
            seen.clear()
            fixed = (PROMPTS, "num_frames=8", "rollout.num_steps=2", f"directory={tmp_path_factory.mktemp('videos')}")
            generate(compose("generate", [f"checkpoint={location}", *fixed, *settings]))
            made[location, settings] = torch.cat(seen, dim=1)
        return made[location, settings]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RolloutEngine, "rollout", noted)
        yield of


@pytest.fixture(scope="module")
def rounded(trained, tmp_path_factory) -> Path:
    """The checkpoint with its averaged weights rounded to bfloat16."""
    return rounded_checkpoint(trained, tmp_path_factory.mktemp("rounded") / "step-0000012.ckpt")


def rounded_checkpoint(trained: Path, path: Path, but: tuple[str, ...] = ()) -> Path:
    saved = checkpoint(trained, 12)
    for state in saved["callbacks"].values():
        for name, average in state.get("average", {}).items():
            if not name.endswith(but or ("nothing",)):
                state["average"][name] = average.bfloat16().float()
    torch.save(saved, path)
    return path


@pytest.mark.parametrize("precision", ["32-true", "bf16"])
def test_a_rollout_from_bf16_is_that_of_the_rounded_weights(files, rounded, trained, latents, precision):
    """In bfloat16 parameters sums would be rounded, too."""
    ours = latents(files["bf16"], f"precision={precision}")
    assert torch.equal(ours, latents(rounded, f"precision={precision}"))
    assert not torch.equal(ours, latents(trained, f"precision={precision}"))


@pytest.mark.parametrize("name", ["fp32", "diffusers"])
def test_a_rollout_from_fp32_is_that_of_the_checkpoint(files, trained, latents, name):
    assert torch.equal(latents(files[name], "precision=32-true"), latents(trained, "precision=32-true"))


def test_a_rollout_from_nvfp4_is_that_of_the_checkpoint_in_nvfp4(files, trained, latents):
    expected = latents(trained, "precision=nvfp4")
    assert torch.equal(latents(files["nvfp4_fp32"]), expected)
    assert torch.equal(latents(files["nvfp4_fp32"], "precision=nvfp4"), expected)
    assert not torch.equal(latents(trained, "precision=bf16"), expected)


def test_with_the_rest_in_bf16_it_is_that_of_the_checkpoint_whose_rest_is_rounded(files, trained, tmp_path, latents):
    """The packed weights come from the masters all the same."""
    blocks = [f".{side}_attn.{part}.weight" for side in ("self", "cross") for part in "qkvo"]
    path = rounded_checkpoint(trained, tmp_path / "step-0000012.ckpt", but=(*blocks, ".ffn.0.weight", ".ffn.2.weight"))
    expected = latents(path, "precision=nvfp4")
    assert torch.equal(latents(files["nvfp4"]), expected)
    assert not torch.equal(latents(trained, "precision=nvfp4"), expected)


def test_rule_and_layers_are_those_of_the_file(files, trained, latents):
    same = ("precision=nvfp4", "precision.recipe.weights=mse", "precision.layers=['blocks.*.ffn.[02]']")
    expected = latents(trained, *same)
    assert torch.equal(latents(files["mse"]), expected)
    assert torch.equal(latents(files["mse"], *same), expected)
    for different in (same[:2], (same[0], same[2]), ("precision=nvfp4",)):
        message = (
            r"mse\.safetensors is packed with rule=mse, layers=\['blocks\.\*\.ffn\.\[02\]'\], keep_last_blocks_bf16=0"
        )
        with pytest.raises(ValueError, match=message):
            latents(files["mse"], *different)


def test_activations_may_stay_unquantised(files, latents):
    weights_only = latents(files["nvfp4"], "precision=nvfp4", "precision.recipe.activations=null")
    assert weights_only.isfinite().all()
    assert not torch.equal(weights_only, latents(files["nvfp4"]))


@pytest.mark.parametrize("precision", ["bf16", "32-true", "fp8"])
def test_another_precision_than_the_files_is_refused(files, latents, precision):
    """Weights would be multiplied in NVFP4, and the record would say otherwise."""
    with pytest.raises(ValueError, match=r"nvfp4\.safetensors holds NVFP4 weights; use precision=nvfp4 \(or auto\)"):
        latents(files["nvfp4"], f"precision={precision}")


def test_the_record_of_a_rollout_names_the_file_and_what_it_multiplies_in(files, trained, tmp_path):
    settings = [f"checkpoint={files['nvfp4']}", PROMPTS, "num_frames=4", "rollout.num_steps=1", f"directory={tmp_path}"]
    record = generate(compose("generate", settings))["settings"]
    assert (record["checkpoint"], record["step"], record["fps"]) == (str(files["nvfp4"]), 12, 24.0)
    assert record["precision"]["precision"] == "nvfp4"
    assert record["precision"]["recipe"]["weights"] == "static_6"


def test_what_is_exported_is_the_average(files, trained):
    """The weights of the last step alone make worse videos."""
    saved = checkpoint(trained, 12)
    stored = load_file(files["fp32"])
    expected = {name.removeprefix("network."): weight for name, weight in averaged_weights(saved).items()}
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[name], weight) for name, weight in expected.items())
    assert any(not torch.equal(stored[name.removeprefix("network.")], w) for name, w in saved["state_dict"].items())


def test_a_trained_network_is_found_in_either(files, trained):
    packed = load_trained(files["nvfp4"])
    assert packed.config == load_trained(trained).config
    assert packed.step == 12
    layers = [layer for layer in packed.module.trained_network.modules() if isinstance(layer, NVFP4Linear)]
    assert len(layers) == PACKED_LAYERS
    assert all(layer.weight is None for layer in layers)


def test_the_codes_from_a_file_in_fp32_are_those_from_the_run(files, tmp_path):
    make(files["fp32"], tmp_path / "again.safetensors", "format=nvfp4")
    assert_same(load_file(tmp_path / "again.safetensors"), load_file(files["nvfp4"]))


def in_hydra(folder: Path, arguments: list[str]) -> None:
    """A process of its own, as Hydra changes logging; forked, as torch is imported already."""
    os.chdir(folder)
    with Path("stdout").open("w") as file, redirect_stdout(file):
        code = main(arguments)
    os._exit(code)


def test_the_command_prints_what_it_wrote_and_leaves_nothing_else(trained, tmp_path):
    """Inside Hydra, whose log file would lie in the working directory."""
    arguments = ["export", f"checkpoint={trained}", "format=nvfp4", "output=made/network.safetensors"]
    process = multiprocessing.get_context("fork").Process(target=in_hydra, args=(tmp_path, arguments))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    size = (tmp_path / "made" / "network.safetensors").stat().st_size
    lines = (tmp_path / "stdout").read_text().splitlines()
    assert lines[1].split() == ["bfloat16", "32", "47,424"]
    assert lines[2].split() == ["uint8", "10", "5,120"]
    assert lines[-1].startswith(f"made/network.safetensors: 33,952 parameters in {size:,} bytes; in bfloat16 they")
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert names == {"made", "made/network.safetensors", "stdout"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("format=bf16", "output=there.safetensors"), r"output=there\.safetensors exists, and nothing is overwritten"),
        (("format=bf16", "output=network.pt"), r"output=network\.pt must end in \.safetensors"),
        (("format=nvfp4", "naming=diffusers"), "naming='diffusers': format=nvfp4 has the names of original"),
        (("format=nvfp4", "format.rule=static_5"), "format: rule='static_5' is no scale rule"),
        (("format=nvfp4", "format.layers=[blocks.*.mlp]"), r"no layer is named 'blocks\.\*\.mlp'"),
        (
            ("format=fp32", "rank=2"),
            "rank=2 is of format=lora; format=fp32 has the adapter in its weights",
        ),
        (("format=lora", "output=lora", "rank=0"), "rank=0 must be a whole number of at least 1, or null: as trained"),
        (("format=lora", "output=lora", "rank=1.5"), "rank=1.5 must be a whole number"),
        (("format=int8",), r"(?s)Could not find 'format/int8'.*bf16.*fp32.*nvfp4"),
    ],
)
def test_bad_input_is_one_clear_message_and_nothing_is_written(trained, tmp_path, monkeypatch, settings, message):
    monkeypatch.chdir(tmp_path)
    Path("there.safetensors").write_bytes(b"mine")
    given = {"checkpoint": str(trained), "output": "network.safetensors"} | dict(s.split("=", 1) for s in settings)
    with pytest.raises(ValueError, match=message):
        export(compose("export", [f"{name}={value}" for name, value in given.items()]))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"there.safetensors": b"mine"}


def test_a_checkpoint_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nowhere: give a \.ckpt file, a run's directory"):
        make(tmp_path / "nowhere", tmp_path / "network.safetensors", "format=bf16")
    assert list(tmp_path.iterdir()) == []


def test_nvfp4_is_never_exported_again(files, tmp_path):
    """As bf16 it would look like a full-precision network."""
    with pytest.raises(
        ValueError, match=r"nvfp4\.safetensors is in NVFP4, and what was rounded away does not come back"
    ):
        make(files["nvfp4"], tmp_path / "network.safetensors", "format=bf16")
    assert not (tmp_path / "network.safetensors").exists()


def test_a_checkpoint_of_another_network_than_its_config_is_refused(trained, tmp_path):
    saved = checkpoint(trained, 12)
    saved["config"]["module"]["model"]["num_layers"] = 2
    torch.save(saved, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"another model: network\.blocks\.1\.[\w.]+: missing in the checkpoint; "):
        make(tmp_path / "other.ckpt", tmp_path / "network.safetensors", "format=bf16")


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


OWN_STEPS = ("precision=32-true", "rollout.num_steps=null")


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


def test_a_lora_over_a_packed_base_rolls_out_as_over_the_base_in_nvfp4(trained, loras, latents, files):
    """The adapter stays in high precision beside codes, as it is where the base is packed for the rollout."""
    lora = f"lora={loras['original']}"
    packed = latents(files["nvfp4_fp32"], lora)
    assert torch.equal(packed, latents(trained, "precision=nvfp4", lora))
    assert not torch.equal(packed, latents(files["nvfp4_fp32"]))


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
        codes = quantise(expected[name.removesuffix("_packed")], "static_6", tiles=True)
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
