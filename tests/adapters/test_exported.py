"""Reading a file back: the same bits in the right places, without a float weight for what is packed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helpers.runs import random_network
from longlive.adapters.export import CastFormat, NVFP4Format, write_export
from longlive.adapters.exported import load_network, read_description
from longlive.models.wan.config import WanConfig
from longlive.models.wan.model import CausalWan
from longlive.precision.nvfp4.format import quantise
from longlive.precision.nvfp4.linear import NVFP4Linear
from longlive.precision.nvfp4.recipe import NVFP4Recipe

CONFIG = WanConfig.tiny(
    num_layers=2, dim=64, ffn_dim=96, num_heads=2, in_channels=4, out_channels=4, text_dim=16, freq_dim=16
)
RUN = {"module": {}, "data": {"fps": 24.0}}
PACKED = {"rule": "mse", "tiles": True, "layers": ["a"], "keep_last_blocks_bf16": 0.0}


@pytest.fixture(scope="module")
def network() -> CausalWan:
    return random_network(CONFIG)


@pytest.fixture(scope="module")
def files(network, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    formats = {
        "bf16": (CastFormat("bf16"), "original"),
        "diffusers": (CastFormat("fp32"), "diffusers"),
        "nvfp4": (NVFP4Format(rule="mse", keep_last_blocks_bf16=0.5), "original"),
    }
    for name, (format, naming) in formats.items():
        path = folder / f"{name}.safetensors"
        write_export(path, network.config, network.state_dict(), format, config=RUN, step=7, naming=naming)
    return {name: folder / f"{name}.safetensors" for name in formats}


def load(path: Path, config: WanConfig = CONFIG) -> CausalWan:
    return load_network(read_description(path), config)


def rewrite(source: Path, target: Path, about: dict[str, Any] | None = None, **tensors: torch.Tensor | None) -> Path:
    """A copy with other metadata, or other tensors; None removes one."""
    with safe_open(source, framework="pt") as file:
        metadata = file.metadata()
    if about is not None:
        metadata["longlive"] = json.dumps(json.loads(metadata["longlive"]) | about)
    stored = load_file(source) | tensors
    save_file({name: tensor for name, tensor in stored.items() if tensor is not None}, target, metadata=metadata)
    return target


def test_a_file_says_what_was_written(files):
    found = read_description(files["nvfp4"])
    assert (found.format, found.naming, found.step, found.config) == ("nvfp4", "original", 7, RUN)
    assert (found.packing.rule, found.packing.tiles, found.packing.keep_last_blocks_bf16) == ("mse", True, 0.5)
    assert read_description(files["diffusers"]).naming == "diffusers"
    assert read_description(files["bf16"]).packing is None


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("diffusers", torch.float32)])
def test_a_cast_comes_back_in_float32(network, files, name, dtype):
    """bfloat16 parameters would make every sum of the network bfloat16."""
    loaded = load(files[name])
    for key, weight in network.state_dict().items():
        assert loaded.state_dict()[key].dtype == torch.float32
        assert torch.equal(loaded.state_dict()[key], weight.to(dtype).float()), key
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_packed_layers_come_back_packed(network, files):
    loaded = load(files["nvfp4"])
    layers = {name: layer for name, layer in loaded.named_modules() if isinstance(layer, NVFP4Linear)}
    assert len(layers) == 10
    for name, layer in layers.items():
        assert name.startswith("blocks.0.")
        assert layer.weight is None
        expected = quantise(network.get_submodule(name).weight.detach(), "mse", tiles=True)
        assert (layer.codes.rule, layer.codes.tiles, layer.name) == ("mse", True, name)
        assert torch.equal(layer.codes.packed, expected.packed)
        assert torch.equal(layer.codes.scales.float(), expected.scales.float())
        assert torch.equal(layer.codes.amax, expected.amax)
        assert torch.equal(layer.bias, network.get_submodule(name).bias.bfloat16().float())
    assert type(loaded.blocks[1].ffn[0]) is nn.Linear
    assert torch.equal(loaded.blocks[1].ffn[0].weight, network.blocks[1].ffn[0].weight.bfloat16().float())


class Largest(TorchDispatchMode):
    """The largest floating-point tensor that any operation made in memory."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if (
                isinstance(tensor, torch.Tensor)
                and not tensor.is_meta
                and tensor.dtype in (torch.float, torch.bfloat16)
            ):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_packed_weights_never_exist_as_numbers(tmp_path):
    """The 5B model has 10 GB of them in bfloat16."""
    wide = replace(CONFIG, ffn_dim=1024)
    whole = CausalWan(wide)
    largest = {}
    for name, format in (("nvfp4", NVFP4Format(layers=["blocks.*.ffn.[02]"])), ("bf16", CastFormat("bf16"))):
        path = tmp_path / f"{name}.safetensors"
        write_export(path, wide, whole.state_dict(), format, config=RUN, step=7)
        with Largest() as seen:
            load(path, wide)
        largest[name] = seen.elements
    assert largest == {"nvfp4": 6 * 64 * 64, "bf16": 1024 * 64}


def test_blocks_of_one_row_multiply_right_also_backwards(network, tmp_path):
    """Scales of 1 x 16 blocks taken for tiles give gradients of another matrix, silently."""
    name = "blocks.0.ffn.0"
    codes = quantise(network.get_submodule(name).weight.detach(), "static_6")
    path = tmp_path / "network.safetensors"
    weights = {**network.state_dict(), f"{name}.weight": codes}
    write_export(path, network.config, weights, NVFP4Format(rule="static_6", layers=[name]), config=RUN, step=7)
    layer = load(path).get_submodule(name)
    layer.recipe = NVFP4Recipe(weights="static_6", activations=None, gradients=None)
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    expected = F.linear(x.double(), codes.dequantise().double(), layer.bias.double())
    assert (layer(x) - expected).abs().max() < 1e-4
    weights = torch.randn(32, layer.out_features, generator=torch.Generator().manual_seed(2))
    (gradient,) = torch.autograd.grad((layer(x) * weights).sum(), x)
    assert (gradient - weights.double() @ codes.dequantise().double()).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"layout": 2}, r"copy\.safetensors has layout 2, and this version reads 1; export it again"),
        ({"nvfp4": PACKED | {"rule": "new"}}, "packed with rule='new'"),
        ({"nvfp4": PACKED | {"scale_layout": "swizzled"}}, "scale_layout='swizzled'; .* reads the rules .* in plain"),
        ({"nvfp4": None}, r"packs blocks\.0\.\S+ and does not say how"),
    ],
)
def test_a_file_of_another_kind_is_refused(files, tmp_path, about, message):
    path = rewrite(files["nvfp4"], tmp_path / "copy.safetensors", about)
    with pytest.raises(ValueError, match=message):
        load(path)


def test_a_file_without_a_description_or_torn_is_refused(files, tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match=r"plain\.safetensors holds no config, .* not written by `longlive export`"):
        read_description(tmp_path / "plain.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(files["bf16"].read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"torn\.safetensors cannot be read as safetensors"):
        read_description(tmp_path / "torn.safetensors")


@pytest.mark.parametrize("name", ["bf16", "nvfp4", "diffusers"])
def test_a_file_that_does_not_fit_its_config_names_the_first_differences(files, name):
    with pytest.raises(
        ValueError, match=rf"{name}\.safetensors does not fit its config: .*blocks\.2\.modulation: missi"
    ):
        load(files[name], replace(CONFIG, num_layers=3))
    with pytest.raises(ValueError, match=r"does not fit its config: .*text_embedding\.0\.weight: \(64, 16\) in the"):
        load(files[name], replace(CONFIG, text_dim=32))


def test_a_packed_tensor_that_is_missing_or_of_another_dtype_is_named(files, tmp_path):
    name = "blocks.0.ffn.0.weight_amax"
    path = rewrite(files["nvfp4"], tmp_path / "missing.safetensors", **{name: None})
    with pytest.raises(ValueError, match=r"blocks\.0\.ffn\.0\.weight_amax: missing in the checkpoint"):
        load(path)
    other = rewrite(files["nvfp4"], tmp_path / "other.safetensors", **{name: torch.zeros((), dtype=torch.float64)})
    with pytest.raises(ValueError, match=r"blocks\.0\.ffn\.0\.weight_amax is torch\.float64, not torch\.float32"):
        load(other)
