"""Weights that others have packed: torchao's own class makes the files of torchao; the layouts of the others are laid
out here scale by scale, from their documentation, and never by this library's own `swizzle`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

from longlive.adapters.export import NVFP4Format, write_export
from longlive.adapters.exported import load_network, read_description
from longlive.adapters.nvfp4_files import (
    amax_of,
    from_four_over_six,
    from_torchao,
    from_transformer_engine,
    read_four_over_six,
    read_torchao,
    read_transformer_engine,
)
from longlive.models.wan.config import WanConfig
from longlive.models.wan.model import CausalWan
from longlive.precision.nvfp4.format import QuantisedTensor, quantise

VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
SHAPES = [(32, 64), (96, 32), (160, 96), (48, 208)]
"""Less than a tile of 128 rows and 4 scales, and more than one, in either direction."""


def weight(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))


def decoded(codes: QuantisedTensor) -> torch.Tensor:
    """codes * scales, float64, without the global scale."""
    elements = VALUES[torch.stack((codes.packed % 16, codes.packed // 16), dim=-1).flatten(-2).long()]
    return elements * codes.scales.double().repeat_interleave(16, dim=1)


def by_position(scales: torch.Tensor) -> torch.Tensor:
    """Flat bytes in the order of cuBLAS ("1D block scaling factors layout"): tiles of 128 x 4; in a tile 32 times the
    four scales of a row of each of its quarters."""
    rows, columns = scales.shape
    tiles_down, tiles_across = -(-rows // 128), -(-columns // 4)
    flat = torch.zeros(tiles_down * tiles_across * 512, dtype=torch.uint8)
    for row in range(rows):
        for column in range(columns):
            tile = (row // 128) * tiles_across + column // 4
            flat[tile * 512 + (row % 32) * 16 + (row % 128) // 32 * 4 + column % 4] = scales[row, column]
    return flat


def padded(matrix: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """With bytes that would show if they were read."""
    result = torch.full((matrix.shape[0] + -matrix.shape[0] % rows, matrix.shape[1] + -matrix.shape[1] % columns), 99)
    result = result.to(matrix.dtype)
    result[: matrix.shape[0], : matrix.shape[1]] = matrix
    return result


def same(ours: QuantisedTensor, theirs: QuantisedTensor) -> None:
    assert torch.equal(ours.packed, theirs.packed)
    assert torch.equal(ours.scales.view(torch.uint8), theirs.scales.view(torch.uint8))
    assert torch.equal(ours.amax, theirs.amax)
    assert (ours.rule, ours.tiles) == (theirs.rule, theirs.tiles)
    assert ours.packed.is_contiguous()
    assert ours.scales.is_contiguous()


@pytest.mark.parametrize("swizzled", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_torchao_tensor_has_the_same_values_here(shape, swizzled):
    """Exact where its product and ours are: with a scale that is a power of two, or none."""
    for per_tensor_scale in (None, torch.tensor(2.0**-9)):
        made = NVFP4Tensor.to_nvfp4(weight(*shape), per_tensor_scale=per_tensor_scale, is_swizzled_scales=swizzled)
        ours = from_torchao(made.qdata, made.scale, made.per_tensor_scale, is_swizzled_scales=swizzled)
        assert torch.equal(ours.dequantise(), made.dequantize(torch.float32))
        g = 1.0 if per_tensor_scale is None else 2.0**-9
        assert torch.equal(ours.global_scale(), torch.tensor(g))
        assert not ours.tiles


@pytest.mark.parametrize("swizzled", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_with_torchaos_usual_scale_codes_scales_and_global_scale_are_the_same(shape, swizzled):
    """amax / 2688. The product of three numbers is rounded in another order, so values are compared to the last bit but
    one, and all three factors exactly."""
    x = weight(*shape)
    scale = per_tensor_amax_to_scale(x.abs().max())
    made = NVFP4Tensor.to_nvfp4(x, per_tensor_scale=scale, is_swizzled_scales=swizzled)
    ours = from_torchao(made.qdata, made.scale, made.per_tensor_scale, is_swizzled_scales=swizzled)
    assert torch.equal(ours.global_scale(), scale)
    torch.testing.assert_close(ours.dequantise(), made.dequantize(torch.float32), rtol=2**-22, atol=0)
    exact = decoded(ours) * scale.double()
    torch.testing.assert_close(made.dequantize(torch.float32).double(), exact, rtol=2**-22, atol=0)


def test_an_amax_is_found_for_every_scale_that_came_from_one():
    """One unit in the last place off is another weight matrix."""
    generator = torch.Generator().manual_seed(0)
    for rule, limit in (("static_6", 2688), ("static_4", 1792), ("mse", 1536)):
        amax = torch.rand(500, generator=generator).mul_(8).exp_()
        for scale in amax / torch.tensor(float(limit)):
            found = amax_of(scale, rule)
            assert torch.equal(found / torch.tensor(float(limit)), scale)
    assert amax_of(torch.zeros(()), "mse") == 0
    for other in (1.7, 1.99):  # no float32 amax has this quotient: the nearest
        assert amax_of(torch.tensor(other), "static_6") / 2688 == pytest.approx(other, rel=2**-22)


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_a_scale_that_is_no_scale_is_refused(bad):
    with pytest.raises(ValueError, match=r"per_tensor_scale=.* must be a finite number that is not negative"):
        amax_of(torch.tensor(bad), "static_6")


@pytest.mark.parametrize("swizzled", [False, True])
@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_transformer_engine_tensor_comes_over_bit_by_bit(shape, tiles, swizzled):
    """Scales as bytes, padded; 16 x 16 ones are found to be such."""
    codes = quantise(weight(*shape), "static_6", tiles=tiles)
    scales = codes.scales.view(torch.uint8)
    stored = padded(scales, 128, 4)
    if swizzled:
        stored = by_position(scales).view(stored.shape)
    ours = from_transformer_engine(codes.packed, stored, codes.amax[None], with_gemm_swizzled_scales=swizzled)
    same(ours, codes)


@pytest.mark.parametrize("rule", ["mse", "static_6", "static_4"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["swizzled", "swizzled, not said", "plain", "plain and flat"])
def test_a_four_over_six_weight_comes_over_bit_by_bit(shape, rule, kind):
    """Codes and scales are padded, to 128 rows and 64 elements."""
    codes = quantise(weight(*shape), rule)
    values, scales = padded(codes.packed, 128, 32), codes.scales.view(torch.uint8)
    stored = by_position(scales) if kind.startswith("swizzled") else padded(scales, 128, 4)
    stored = stored.flatten() if kind == "plain and flat" else stored
    metadata = torch.tensor([*shape, values.shape[0], 2 * values.shape[1], 1, int(kind == "swizzled")])
    metadata = metadata[:4] if kind == "swizzled, not said" else metadata
    same(from_four_over_six(values, stored.view(torch.float8_e4m3fn), codes.amax[None], metadata, rule), codes)


def torchao_file(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    flat, metadata = flatten_tensor_state_dict(tensors)
    save_file(flat, path, metadata=metadata)


def test_a_torchao_file_is_read_layer_by_layer(tmp_path):
    """Written by torchao itself, beside tensors that are not packed."""
    made = {}
    for name, swizzled in (("blocks.0.ffn.0", True), ("blocks.1.ffn.0", False)):
        x = weight(96, 64)
        made[name] = NVFP4Tensor.to_nvfp4(
            x, per_tensor_scale=per_tensor_amax_to_scale(x.abs().max()), is_swizzled_scales=swizzled
        )
    others = {"blocks.0.ffn.0.bias": torch.ones(96)}
    path = tmp_path / "torchao.safetensors"
    torchao_file(path, {f"{name}.weight": tensor for name, tensor in made.items()} | others)
    found = dict(read_torchao(path))
    assert found.keys() == made.keys()
    for name, codes in found.items():
        tensor = made[name]
        same(codes, from_torchao(tensor.qdata, tensor.scale, tensor.per_tensor_scale,
                                 is_swizzled_scales=tensor.is_swizzled_scales))  # fmt: skip
        torch.testing.assert_close(codes.dequantise(), tensor.dequantize(torch.float32), rtol=2**-22, atol=0)


def test_files_of_the_others_are_read_layer_by_layer(tmp_path):
    first, second = quantise(weight(96, 64), "static_6", tiles=True), quantise(weight(32, 64), "mse")
    engine = {
        "blocks.0.ffn.0.weight.rowwise_data": first.packed,
        "blocks.0.ffn.0.weight.rowwise_scale_inv": padded(first.scales.view(torch.uint8), 128, 4),
        "blocks.0.ffn.0.weight.amax_rowwise": first.amax[None],
        "blocks.0.ffn.0.bias": torch.ones(96),
    }
    save_file(engine, tmp_path / "engine.safetensors")
    ((name, codes),) = read_transformer_engine(tmp_path / "engine.safetensors")
    assert name == "blocks.0.ffn.0"
    same(codes, first)
    values = padded(second.packed, 128, 32)
    four_over_six = {
        "blocks.1.ffn.2.quantized_weight_values": values,
        "blocks.1.ffn.2.quantized_weight_scale_factors": by_position(second.scales.view(torch.uint8)),
        "blocks.1.ffn.2.quantized_weight_amax": second.amax[None],
        "blocks.1.ffn.2.quantized_weight_metadata": torch.tensor([32, 64, 128, 64, 1, 1], dtype=torch.int32),
    }
    save_file(four_over_six, tmp_path / "four_over_six.safetensors")
    ((name, codes),) = read_four_over_six(tmp_path / "four_over_six.safetensors", rule="mse")
    assert name == "blocks.1.ffn.2"
    same(codes, second)


def test_a_network_is_packed_around_the_layers_of_a_torchao_file(tmp_path):
    """The way that the module's docstring describes, to the end: packed layers multiply by torchao's values."""
    config = WanConfig.tiny(num_layers=1, dim=64, ffn_dim=96, num_heads=2, in_channels=4, out_channels=4, text_dim=16)
    network = CausalWan(config)
    network.init_weights()
    made = {}
    for name in ("ffn.0", "ffn.2"):
        x = network.get_submodule(f"blocks.0.{name}").weight.detach()
        made[f"blocks.0.{name}.weight"] = NVFP4Tensor.to_nvfp4(
            x, per_tensor_scale=per_tensor_amax_to_scale(x.abs().max()), is_swizzled_scales=True
        )
    torchao_file(tmp_path / "torchao.safetensors", made)
    codes = {f"{layer}.weight": codes for layer, codes in read_torchao(tmp_path / "torchao.safetensors")}
    output, format = tmp_path / "network.safetensors", NVFP4Format(rule="static_6", layers=["blocks.*.ffn.[02]"])
    write_export(output, config, network.state_dict() | codes, format, config={}, step=0)
    loaded = load_network(read_description(output), config)
    for name, tensor in made.items():
        layer = loaded.get_submodule(name.removesuffix(".weight"))
        torch.testing.assert_close(layer.codes.dequantise(), tensor.dequantize(torch.float32), rtol=2**-22, atol=0)


CODES = quantise(weight(32, 64), "static_6")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: from_torchao(CODES.packed.int(), CODES.scales), r"codes are torch\.int32 \[32, 32\]; use uint8"),
        (
            lambda: from_torchao(CODES.packed[:, :30], CODES.scales),
            r"\[32, 30\]; use uint8 \[n, k/2\], k a multiple of",
        ),
        (lambda: from_torchao(CODES.packed, CODES.scales.float()), r"scale is torch\.float32; scales of NVFP4 are"),
        (
            lambda: from_torchao(CODES.packed, CODES.scales[:16]),
            r"scale has shape \[16, 4\]; scales of 32 x 4 are stored as 32 x 4 or 128 x 4",
        ),
        (lambda: from_torchao(CODES.packed, CODES.scales.t()), r"scale has shape \[4, 32\]; scales of 32 x 4"),
        (
            lambda: from_torchao(CODES.packed, CODES.scales, is_swizzled_scales=True),
            r"scale has shape \[32, 4\]; scales of 32 x 4 are stored as 128 x 4",
        ),
        (
            lambda: from_transformer_engine(CODES.packed, CODES.scales.view(torch.uint8) + 128, CODES.amax),
            "rowwise_scale_inv has negative scales, .* another element format",
        ),
        (
            lambda: from_transformer_engine(CODES.packed, CODES.scales, torch.ones(2)),
            r"amax_rowwise has shape \[2\]; a weight has one",
        ),
        (
            lambda: from_four_over_six(CODES.packed, CODES.scales, CODES.amax, torch.tensor([32, 64, 128, 64, 1, 1])),
            r"values has shape \(32, 32\), and metadata=\[32, 64, 128, 64, 1, 1\]; they are of two layers",
        ),
        (
            lambda: from_four_over_six(CODES.packed, CODES.scales, CODES.amax, torch.tensor([32])),
            r"metadata=\[32\] must begin with rows and columns",
        ),
        (
            lambda: from_four_over_six(CODES.packed, CODES.scales, CODES.amax, torch.tensor([32, 64, 32, 64]), "4/6"),
            "rule='4/6' is no scale rule; use one of static_6",
        ),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(make: Callable[[], Any], message):
    """Scales in another order than they are read in give weights that look like weights."""
    with pytest.raises(ValueError, match=message):
        make()


def test_a_file_of_another_library_or_with_a_part_missing_is_named(tmp_path):
    path = tmp_path / "plain.safetensors"
    save_file({"blocks.0.ffn.0.weight": torch.zeros(4, 4)}, path)
    for read in (read_torchao, read_transformer_engine, read_four_over_six):
        with pytest.raises(ValueError, match=r"plain\.safetensors holds no packed layer of "):
            list(read(path))
    save_file({"ffn.weight.rowwise_data": CODES.packed, "ffn.weight.amax_rowwise": CODES.amax}, path)
    with pytest.raises(ValueError, match=r"plain\.safetensors lacks ffn\.weight\.rowwise_scale_inv"):
        list(read_transformer_engine(path))
    made = NVFP4Tensor.to_nvfp4(weight(32, 64))
    torchao_file(path, {"ffn.weight": made})
    stored = load_file(path) | {"ffn._weight_scale": made.scale[:3].contiguous()}
    about = {"_type": "NVFP4Tensor", "_data": {"is_swizzled_scales": False}, "_tensor_data_names": ["qdata", "scale"]}
    save_file(stored, path, metadata={"ffn.weight": json.dumps(about)})
    with pytest.raises(ValueError, match=r"plain\.safetensors: ffn: scale has shape \[3, 4\]"):
        list(read_torchao(path))
