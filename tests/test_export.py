"""`longlive export`, and rollouts from what it writes: the same bits as from the checkpoint."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.exporting import PACKED_LAYERS, PROMPTS, make, noted_rollouts
from helpers.generating import train_visibly
from helpers.runs import assert_same, checkpoint
from longlive.callbacks.ema import averaged_weights
from longlive.cli import main
from longlive.config import compose
from longlive.export import export
from longlive.generate import generate
from longlive.precision.nvfp4.linear import NVFP4Linear
from longlive.trained import load_trained


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The average is not the weights."""
    return train_visibly(tmp_path_factory)


@pytest.fixture(scope="module")
def files(trained, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    choices = {
        "bf16": ["format=bf16"],
        "fp32": ["format=fp32"],
        "diffusers": ["format=fp32", "naming=diffusers"],
        "nvfp4": ["format=nvfp4"],
        "nvfp4_fp32": ["format=nvfp4", "format.others=fp32"],
        "static": ["format=nvfp4", "format.others=fp32", "format.rule=static_6", "format.layers=['blocks.*.ffn.[02]']"],
        "rows": ["format=nvfp4", "format.others=fp32", "format.tiles=false"],
    }
    for name, settings in choices.items():
        make(trained, folder / f"{name}.safetensors", *settings)
    return {name: folder / f"{name}.safetensors" for name in choices}


@pytest.fixture(scope="module")
def latents(tmp_path_factory) -> Iterator[Callable[..., torch.Tensor]]:
    with noted_rollouts(tmp_path_factory) as of:
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


def test_rows_of_a_file_may_have_scales_of_their_own(files, trained, latents):
    expected = latents(trained, "precision=nvfp4", "precision.recipe.weight_tiles=false")
    assert torch.equal(latents(files["rows"]), expected)
    assert not torch.equal(latents(files["nvfp4_fp32"]), expected)


def test_rule_and_layers_are_those_of_the_file(files, trained, latents):
    same = ("precision=nvfp4", "precision.recipe.weights=static_6", "precision.layers=['blocks.*.ffn.[02]']")
    expected = latents(trained, *same)
    assert torch.equal(latents(files["static"]), expected)
    assert torch.equal(latents(files["static"], *same), expected)
    for different in (same[:2], (same[0], same[2]), ("precision=nvfp4",)):
        message = (
            r"static\.safetensors is packed with rule=static_6, layers=\['blocks\.\*\.ffn\.\[02\]'\], "
            r"keep_last_blocks_bf16=0"
        )
        with pytest.raises(ValueError, match=message):
            latents(files["static"], *different)


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
    assert record["precision"]["recipe"]["weights"] == "mse"


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
