"""NVFP4 weights that other libraries have packed, as `QuantisedTensor`s of the same linear layers.

All of them pack two E2M1 codes per byte, the even element low, and have an E4M3 scale per 16 elements of a row. They
differ in how scales lie and in what the one float32 per matrix says (g is what codes times scales are multiplied by):

| | codes | scales | float32 |
|---|---|---|---|
| here | `[n k/2]` | `[n k/16]`, plain | amax; g = amax / (M E) by the rule |
| torchao 0.18, `NVFP4Tensor` | `[n k/2]` | plain; or swizzled, `[32 R, 16 C]` | g; none: 1 |
| Transformer Engine 2.20 | `[n k/2]` | bytes, padded; plain or swizzled | amax; g = amax / (6 * 448) |
| FourOverSix | padded to 128 and 64 | of the padded; swizzled and flat, or plain | amax; by the rule |

Scales are padded to multiples of 128 rows and 4 columns. FourOverSix's files do not say the rule; the model's config
does. Swizzled is the order of cuBLAS and CUTLASS (`format.swizzle`); R and C count tiles of 128 rows and 4 columns.

Codes and scales come over as they are. Where only g is known, amax is a float32 whose g comes out as that; there is one
whenever g was made by division of an amax. For another g it may be off by one unit in the last place, and so are then
all weights. Dequantised, products are rounded in another order than torchao's: equal to 1 part in 10^7, and exactly if
g is a power of two.

Of these libraries only torchao has a safetensors layout of its own. The readers below take what its
`flatten_tensor_state_dict` makes, FourOverSix's `state_dict` saved as it is, and for Transformer Engine the entries of
a tensor's `get_metadata()` under `<weight>.<entry>`. Columnwise copies, which only training needs, are not looked at.

To roll out from such a file, pack the rest of the network around it:

    codes = {f"{layer}.weight": codes for layer, codes in read_torchao(path)}
    write_export(output, model, weights | codes, NVFP4Format(rule="static_6"), config=config, step=step)
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open

from longlive.precision.nvfp4.format import BLOCK, LIMITS, RULES, QuantisedTensor, unswizzle
from longlive.typing import Float, Tensor

ROWS, COLUMNS = 128, 4
"""Of a tile of scales: what libraries pad them to."""


def from_torchao(
    qdata: Tensor,
    scale: Tensor,
    per_tensor_scale: Tensor | None = None,
    *,
    is_swizzled_scales: bool = False,
) -> QuantisedTensor:
    """torchao's `NVFP4Tensor`, by the names of its attributes.

    Args:
        qdata: uint8 `[n k/2]`.
        scale: float8_e4m3fn, `[n k/16]`, or swizzled in any shape.
        per_tensor_scale: g, float32, one element; None: 1.

    Raises:
        ValueError: if the parts do not belong together, or g is no positive number.
    """
    scales = _scales("scale", scale, qdata, swizzled=is_swizzled_scales)
    g = torch.ones(()) if per_tensor_scale is None else _single("per_tensor_scale", per_tensor_scale).cpu()
    return _quantised(qdata, scales, amax_of(g, "static_6").to(qdata.device), "static_6")


def from_transformer_engine(
    rowwise_data: Tensor,
    rowwise_scale_inv: Tensor,
    amax_rowwise: Tensor,
    *,
    with_gemm_swizzled_scales: bool = False,
) -> QuantisedTensor:
    """Transformer Engine's `NVFP4Tensor`, by the names of its attributes without their underscore.

    Args:
        rowwise_data: uint8 `[n k/2]`.
        rowwise_scale_inv: uint8 or float8_e4m3fn, `[n k/16]` padded to multiples of 128 and 4.
        amax_rowwise: float32, one element.

    Raises:
        ValueError: if the parts do not belong together.
    """
    scales = _scales("rowwise_scale_inv", rowwise_scale_inv, rowwise_data, swizzled=with_gemm_swizzled_scales)
    return _quantised(rowwise_data, scales, _single("amax_rowwise", amax_rowwise), "static_6")


def from_four_over_six(
    values: Tensor,
    scale_factors: Tensor,
    amax: Tensor,
    metadata: Tensor,
    rule: str = "mse",
) -> QuantisedTensor:
    """A quantised weight of FourOverSix, by the names of a layer's buffers without `quantized_weight_`.

    Args:
        values: uint8 `[n k/2]`, padded to multiples of 128 rows and 64 elements.
        scale_factors: float8_e4m3fn, of the padded matrix.
        amax: float32, one element.
        metadata: integers: n, k, both padded, one more, and whether scales are swizzled (if it ends before, they are).
        rule: the `weight_scale_rule` of the model's config.

    Raises:
        ValueError: for an unknown rule, or if the parts do not belong together.
    """
    if rule not in RULES:
        raise ValueError(f"rule={rule!r} is no scale rule; use one of {', '.join(RULES)}")
    numbers = metadata.tolist()
    if len(numbers) < 4:
        raise ValueError(f"metadata={numbers} must begin with rows and columns, plain and padded")
    rows, columns, padded_rows, padded_columns = numbers[:4]
    if values.shape != (padded_rows, padded_columns // 2) or rows > padded_rows or columns > padded_columns:
        raise ValueError(f"values has shape {tuple(values.shape)}, and metadata={numbers}; they are of two layers")
    swizzled = len(numbers) < 6 or numbers[5] == 1
    scales = _scales("scale_factors", scale_factors, values, swizzled=swizzled)
    return _quantised(values[:rows, : columns // 2], scales[:rows, : columns // BLOCK], _single("amax", amax), rule)


def read_torchao(path: str | Path) -> Iterator[tuple[str, QuantisedTensor]]:
    """The packed linear layers of a safetensors file by torchao: names without `.weight`, and codes, one at a time.

    Raises:
        ValueError: if there is none, or as `from_torchao`; the layer is named.
    """
    with safe_open(path, framework="pt") as file:
        about = {name: json.loads(text) for name, text in (file.metadata() or {}).items() if text.startswith("{")}
        names = [name for name, entry in about.items() if entry.get("_type") == "NVFP4Tensor"]
        _check_found(path, names, "torchao, whose metadata name tensors of the _type NVFP4Tensor")
        for name in names:
            layer, _, parameter = name.rpartition(".")
            parts = {
                part: file.get_tensor(f"{layer}._{parameter}_{part}") for part in about[name]["_tensor_data_names"]
            }
            parts.pop("act_per_tensor_scale", None)
            with _naming(path, layer):
                codes = from_torchao(**parts, is_swizzled_scales=about[name]["_data"]["is_swizzled_scales"])
            yield layer, codes


def read_transformer_engine(
    path: str | Path, *, with_gemm_swizzled_scales: bool = False
) -> Iterator[tuple[str, QuantisedTensor]]:
    """The packed linear layers of a safetensors file of Transformer Engine's tensors, as `read_torchao`.

    Raises:
        ValueError: if there is none, or as `from_transformer_engine`; the layer is named.
    """
    entries = ("rowwise_data", "rowwise_scale_inv", "amax_rowwise")
    for layer, parts in _layers(path, ".weight.", entries, "Transformer Engine"):
        with _naming(path, layer):
            codes = from_transformer_engine(*parts, with_gemm_swizzled_scales=with_gemm_swizzled_scales)
        yield layer, codes


def read_four_over_six(path: str | Path, rule: str = "mse") -> Iterator[tuple[str, QuantisedTensor]]:
    """The packed linear layers of a safetensors file by FourOverSix, as `read_torchao`.

    Raises:
        ValueError: if there is none, or as `from_four_over_six`; the layer is named.
    """
    for layer, parts in _layers(path, ".quantized_weight_", ("values", "scale_factors", "amax", "metadata"), "4/6"):
        with _naming(path, layer):
            values, scale_factors, amax, metadata = parts
            codes = from_four_over_six(values, scale_factors, amax, metadata, rule)
        yield layer, codes


def amax_of(g: Float[Tensor, ""], rule: str) -> Float[Tensor, ""]:
    """The amax whose global scale is g under a rule, or the nearest there is; float32.

    Raises:
        ValueError: if g is negative, infinite or no number.
    """
    if not g.isfinite() or g < 0:
        raise ValueError(f"per_tensor_scale={g.item()} must be a finite number that is not negative")
    M, E = LIMITS[rule]
    # Where float32 is finer at amax than at g, relatively, every g comes back from the rounded product; where it is
    # coarser, at most one amax has the quotient g, and it is the nearest to the product.
    return g * torch.full((), M * E)


def _quantised(packed: Tensor, scales: Tensor, amax: Tensor, rule: str) -> QuantisedTensor:
    scales = scales.contiguous()
    rows, columns = scales.shape
    tiles = scales.view(torch.uint8).view(-1, BLOCK, columns) if rows % BLOCK == 0 else None
    shared = tiles is not None and bool((tiles == tiles[:, :1]).all())
    return QuantisedTensor(packed.contiguous(), scales, amax, rule, tiles=shared)


def _scales(name: str, stored: Tensor, packed: Tensor, *, swizzled: bool) -> Tensor:
    """`[n k/16]` float8_e4m3fn of stored scales."""
    if packed.dtype != torch.uint8 or packed.dim() != 2 or 2 * packed.shape[1] % BLOCK:
        raise ValueError(f"codes are {packed.dtype} {list(packed.shape)}; use uint8 [n, k/2], k a multiple of {BLOCK}")
    if stored.dtype not in (torch.uint8, torch.float8_e4m3fn):
        raise ValueError(f"{name} is {stored.dtype}; scales of NVFP4 are float8_e4m3fn, or its bytes as uint8")
    as_bytes = stored.contiguous().view(torch.uint8)
    if (as_bytes > 127).any():
        raise ValueError(f"{name} has negative scales, which NVFP4 has not: the sign means another element format")
    rows, columns = packed.shape[0], 2 * packed.shape[1] // BLOCK
    padded = (rows + -rows % ROWS, columns + -columns % COLUMNS)
    allowed = [padded] if swizzled else [(rows, columns), padded]
    shape = next((shape for shape in allowed if stored.numel() == shape[0] * shape[1]), None)
    if shape is None or (not swizzled and stored.dim() == 2 and stored.shape != shape):
        expected = " or ".join(f"{a} x {b}" for a, b in allowed)
        raise ValueError(
            f"{name} has shape {list(stored.shape)}; scales of {rows} x {columns} are stored as {expected}"
        )
    flat = as_bytes.flatten()
    plain = unswizzle(flat, rows, columns) if swizzled else flat.view(shape)[:rows, :columns]
    return plain.contiguous().view(torch.float8_e4m3fn)


def _single(name: str, amax: Tensor) -> Tensor:
    if amax.numel() != 1:
        raise ValueError(f"{name} has shape {list(amax.shape)}; a weight has one")
    return amax.detach().float().reshape(())


def _layers(path: str | Path, between: str, entries: Sequence[str], library: str) -> Iterator[tuple[str, list[Tensor]]]:
    """The tensors `<layer><between><entry>` of each layer that has the first of the entries."""
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        end = f"{between}{entries[0]}"
        layers = sorted(name.removesuffix(end) for name in names if name.endswith(end))
        _check_found(path, layers, f"{library}, with tensors named <layer>{end}")
        for layer in layers:
            missing = [f"{layer}{between}{entry}" for entry in entries if f"{layer}{between}{entry}" not in names]
            if missing:
                raise ValueError(f"{path} lacks {', '.join(missing)}")
            yield layer, [file.get_tensor(f"{layer}{between}{entry}") for entry in entries]


def _check_found(path: str | Path, names: Sequence[str], what: str) -> None:
    if not names:
        raise ValueError(f"{path} holds no packed layer of {what}")


@contextmanager
def _naming(path: str | Path, layer: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {layer}: {error}") from error
