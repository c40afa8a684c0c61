"""What is in a file, name by name and bit by bit, and what is refused before one is written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from helpers.runs import random_network
from longlive.adapters import export
from longlive.adapters.export import CastFormat, ExportSummary, NVFP4Format, check_export, write_export
from longlive.models.wan.config import WanConfig
from longlive.models.wan.model import CausalWan
from longlive.models.wan.weights import load_weights
from longlive.precision.nvfp4.format import QuantisedTensor, quantise

SIZES = {"num_heads": 2, "in_channels": 4, "out_channels": 4, "text_dim": 16, "freq_dim": 16}
CONFIG = WanConfig.tiny(num_layers=2, dim=64, ffn_dim=96, **SIZES)
BLOCK_LAYERS = [f"{side}_attn.{part}" for side in ("self", "cross") for part in "qkvo"] + ["ffn.0", "ffn.2"]
RUN = {"module": {"model": {"dim": 64}}, "data": {"train": "somewhere", "fps": 24.0}}


@pytest.fixture(scope="module")
def network() -> CausalWan:
    return random_network(CONFIG)


def write(path: Path, network: CausalWan, format: Any, **settings: Any) -> ExportSummary:
    weights = settings.pop("weights", network.state_dict())
    return write_export(path, network.config, weights, format, config=RUN, step=7, **settings)


def about(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["longlive"])


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_a_cast_holds_every_weight_under_wans_name(network, tmp_path, name, dtype):
    summary = write(tmp_path / "network.safetensors", network, CastFormat(name))
    stored = load_file(tmp_path / "network.safetensors")
    assert stored.keys() == network.state_dict().keys()
    assert "blocks.1.cross_attn.norm_q.weight" in stored
    for key, weight in network.state_dict().items():
        assert stored[key].dtype == dtype
        assert torch.equal(stored[key], weight.to(dtype)), key
    assert summary.num_parameters == sum(weight.numel() for weight in stored.values())
    assert summary.tensors == {str(dtype).removeprefix("torch."): len(stored)}


def test_a_cast_is_an_ordinary_file_of_wan_weights(network, tmp_path):
    """A run starts from it with `module.weights=`."""
    write(tmp_path / "network.safetensors", network, CastFormat("fp32"))
    other = CausalWan(CONFIG)
    load_weights(other, tmp_path / "network.safetensors")
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in network.state_dict().items())


def test_diffusers_names_are_those_of_its_class(network, tmp_path):
    write(tmp_path / "network.safetensors", network, CastFormat("fp32"), naming="diffusers")
    stored = load_file(tmp_path / "network.safetensors")
    assert torch.equal(stored["blocks.1.attn1.to_out.0.weight"], network.blocks[1].self_attn.o.weight)
    assert torch.equal(stored["blocks.0.ffn.net.0.proj.bias"], network.blocks[0].ffn[0].bias)
    assert torch.equal(stored["scale_shift_table"], network.head.modulation)
    assert len(stored) == len(network.state_dict())


def test_the_file_says_what_it_is(network, tmp_path):
    write(tmp_path / "network.safetensors", network, NVFP4Format(rule="mse", keep_last_blocks_bf16=0.5))
    found = about(tmp_path / "network.safetensors")
    assert (found["format"], found["naming"], found["step"], found["layout"]) == ("nvfp4", "original", 7, 1)
    assert found["config"] == RUN
    assert found["nvfp4"] == {
        "rule": "mse",
        "tiles": True,
        "layers": ["blocks.*.self_attn.[qkvo]", "blocks.*.cross_attn.[qkvo]", "blocks.*.ffn.[02]"],
        "keep_last_blocks_bf16": 0.5,
        "scale_layout": "plain",
    }
    with safe_open(tmp_path / "network.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "pt"
    write(tmp_path / "cast.safetensors", network, CastFormat("bf16"))
    assert "nvfp4" not in about(tmp_path / "cast.safetensors")


def test_nvfp4_packs_the_blocks_linear_layers_and_rounds_the_rest(network, tmp_path):
    write(tmp_path / "network.safetensors", network, NVFP4Format())
    stored = load_file(tmp_path / "network.safetensors")
    layers = {f"blocks.{block}.{layer}" for block in (0, 1) for layer in BLOCK_LAYERS}
    assert {name.removesuffix(".weight_packed") for name in stored if name.endswith("_packed")} == layers
    for name, weight in network.state_dict().items():
        if name.removesuffix(".weight") not in layers:
            assert torch.equal(stored[name], weight.bfloat16()), name
            continue
        assert name not in stored
        n, k = weight.shape
        packed, scale, amax = (stored[f"{name}_{part}"] for part in ("packed", "scale", "amax"))
        assert (packed.shape, packed.dtype) == ((n, k // 2), torch.uint8)
        assert (scale.shape, scale.dtype) == ((n, k // 16), torch.float8_e4m3fn)
        assert (amax.shape, amax.dtype) == ((), torch.float32)
        assert amax == weight.abs().max()
        # Of the master: of a rounded copy some codes would be others.
        expected = quantise(weight, "mse", tiles=True)
        assert torch.equal(packed, expected.packed)
        assert torch.equal(scale.float(), expected.scales.float())
    assert len(stored) == len(network.state_dict()) + 2 * len(layers)


@pytest.mark.parametrize("rule", ["static_6", "mse"])
def test_what_is_packed_decodes_to_the_weights(network, tmp_path, rule):
    """By the format's formula, written out: with another rule's M and E all weights would be 4/7 of themselves."""
    write(tmp_path / "network.safetensors", network, NVFP4Format(rule=rule))
    stored = load_file(tmp_path / "network.safetensors")
    name = "blocks.1.ffn.2.weight"
    packed, scale, amax = (stored[f"{name}_{part}"] for part in ("packed", "scale", "amax"))
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
    codes = torch.stack((packed % 16, packed // 16), dim=-1).flatten(-2).long()
    largest = {"static_6": 6 * 448, "mse": 6 * 256}[rule]
    decoded = values[codes] * scale.float().repeat_interleave(16, dim=1) * amax / largest
    weight = network.get_parameter(name)
    assert 0.009 < (decoded - weight).square().mean() / weight.square().mean() < 0.0131


def test_the_chosen_layers_are_the_plugins(tmp_path):
    """Sizes that do not fit stay, and so do the last blocks and what no pattern names."""
    network = random_network(WanConfig.tiny(num_layers=2, dim=64, ffn_dim=80, **SIZES))
    write(tmp_path / "sizes.safetensors", network, NVFP4Format(keep_last_blocks_bf16=0.5))
    packed = [name for name in load_file(tmp_path / "sizes.safetensors") if name.endswith("_packed")]
    assert sorted(packed) == sorted(f"blocks.0.{layer}.weight_packed" for layer in BLOCK_LAYERS[:8])
    write(tmp_path / "named.safetensors", network, NVFP4Format(layers=["blocks.*.cross_attn.[kv]"]))
    packed = [name for name in load_file(tmp_path / "named.safetensors") if name.endswith("_packed")]
    assert sorted(packed) == [f"blocks.{block}.cross_attn.{part}.weight_packed" for block in (0, 1) for part in "kv"]


def test_sizes_are_said_as_they_are(network, tmp_path):
    summary = write(tmp_path / "network.safetensors", network, NVFP4Format(others="fp32"))
    elements = 2 * (8 * 64 * 64 + 2 * 64 * 96)
    assert summary.tensor_bytes["uint8"] == elements // 2
    assert summary.tensor_bytes["float8_e4m3fn"] == elements // 16
    assert summary.tensor_bytes["float32"] == 4 * (20 + summary.num_parameters - elements)
    assert summary.num_bytes == (tmp_path / "network.safetensors").stat().st_size
    header = summary.num_bytes - sum(summary.tensor_bytes.values())
    assert 0 < header < 20_000
    assert summary.ratio == pytest.approx(2 * summary.num_parameters / summary.num_bytes)


def test_the_5b_model_takes_less_than_a_third():
    """Without weights: 4.9 of its 5.0 thousand million parameters are packed."""
    with torch.device("meta"):
        network = CausalWan(WanConfig.ti2v_5b())
    stored = [tensor for tensors in NVFP4Format().tensors(network, network.state_dict()) for tensor in tensors.values()]
    packed = 30 * (8 * 3072**2 + 2 * 3072 * 14336)
    num_bytes = packed * 9 // 16 + 300 * 4 + 2 * (4_999_787_712 - packed)
    assert sum(tensor.nbytes for tensor in stored) == num_bytes == 2_945_281_584
    assert 3.39 < 2 * 4_999_787_712 / num_bytes < 3.40


def test_codes_of_elsewhere_are_stored_as_they_are(network, tmp_path):
    """Blocks of 1 x 16, as other libraries have them; the file says so."""
    names = [f"blocks.{block}.ffn.0.weight" for block in (0, 1)]
    codes = {name: quantise(network.get_parameter(name).detach(), "mse") for name in names}
    weights: dict[str, torch.Tensor | QuantisedTensor] = {**network.state_dict(), **codes}
    write(tmp_path / "network.safetensors", network, NVFP4Format(rule="mse"), weights=weights)
    stored = load_file(tmp_path / "network.safetensors")
    assert all(torch.equal(stored[f"{name}_packed"], codes[name].packed) for name in names)
    assert about(tmp_path / "network.safetensors")["nvfp4"]["tiles"] is False
    for format, message in (
        (NVFP4Format(rule="static_6"), r"blocks\.0\.ffn\.0 is packed with rule=mse, and the file would have rule=stat"),
        (NVFP4Format(rule="mse", layers=["blocks.*.ffn.2"]), r"blocks\.0\.ffn\.0 is packed .* in the layers blocks\."),
        (CastFormat("bf16"), r"blocks\.0\.ffn\.0\.weight is packed, and format=bf16 would lose that"),
    ):
        with pytest.raises(ValueError, match=message):
            write(tmp_path / "other.safetensors", network, format, weights=weights)


def test_a_file_is_complete_or_absent(network, tmp_path, monkeypatch):
    def torn(tensors: Any, path: Path, **settings: Any) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(export, "save_file", torn)
    with pytest.raises(OSError, match="no space left"):
        write(tmp_path / "network.safetensors", network, CastFormat("bf16"))
    assert list(tmp_path.iterdir()) == []


def test_a_file_may_be_read_by_whoever_may_read_new_files(network, tmp_path):
    """safetensors makes files that only their owner can read: on a shared disk nobody else finds out why."""
    before = os.umask(0o022)
    try:
        write(tmp_path / "network.safetensors", network, CastFormat("bf16"))
    finally:
        os.umask(before)
    assert (tmp_path / "network.safetensors").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CastFormat("fp16"), "dtype='fp16' is unknown; use bf16 or fp32"),
        (lambda: NVFP4Format(rule="static_5"), "rule='static_5' is no scale rule; use one of static_6,"),
        (lambda: NVFP4Format(others="nvfp4"), "others='nvfp4' is unknown; use bf16 or fp32"),
        (lambda: NVFP4Format(keep_last_blocks_bf16=1.0), r"keep_last_blocks_bf16=1\.0 must be at least 0 and below 1"),
    ],
)
def test_a_format_that_does_not_exist_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_bad_place_or_naming_is_refused(tmp_path):
    (tmp_path / "there.safetensors").write_bytes(b"mine")
    for name, format, naming, message in (
        ("there.safetensors", CastFormat("bf16"), "original", r"there\.safetensors exists, and nothing is overwritten"),
        ("network.pt", CastFormat("bf16"), "original", r"network\.pt must end in \.safetensors"),
        ("a.safetensors", NVFP4Format(), "diffusers", "naming='diffusers': format=nvfp4 has the names of original"),
        (
            "a.safetensors",
            CastFormat("bf16"),
            "wan",
            "naming='wan': format=bf16 has the names of original or diffusers",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            check_export(tmp_path / name, format, naming)
    assert (tmp_path / "there.safetensors").read_bytes() == b"mine"


def test_weights_of_another_network_are_named_and_nothing_is_written(network, tmp_path):
    weights = dict(network.state_dict())
    del weights["blocks.1.ffn.2.bias"]
    weights["head.head.bias"] = torch.zeros(3)
    message = r"blocks\.1\.ffn\.2\.bias: missing in the checkpoint; head\.head\.bias: \(3,\) in the checkpoint, \(16,\)"
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "network.safetensors", network, CastFormat("bf16"), weights=weights)
    with pytest.raises(ValueError, match=r"no layer is named 'blocks\.\*\.mlp'"):
        write(tmp_path / "network.safetensors", network, NVFP4Format(layers=["blocks.*.mlp"]))
    with pytest.raises(ValueError, match="format=nvfp4 would pack no layer"):
        write(tmp_path / "network.safetensors", network, NVFP4Format(layers=["patch_embedding"]))
    assert list(tmp_path.iterdir()) == []
