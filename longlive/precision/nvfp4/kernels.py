"""NVFP4's passes over memory as Triton kernels, to the bits of `format.py` and `recipe.py`: `encode_rows`, which reads
x once after its amax, `decode_values` and `hash_bits`.

A program of the encoder takes 16 rows by a few blocks of 16 columns: one lane per block, which goes through its 16
elements in order, once for their largest magnitude, under a 4/6 rule once for the errors of both scales, and once for
the codes (the second and third time they come from the cache). So errors are summed one after the other, and a tile's
16 rows are next to each other for the tree of sums.

What keeps its bits equal to the float32 operations of `format.py`: divisions round to nearest (`div_rn`, as Triton's
own are approximate), products and sums are not fused (`enable_fp_fusion=False`), and both roundings, to E2M1 and to
E4M3, are sums of float32 in place of hardware conversions, which not every GPU has.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from longlive.precision.nvfp4.format import BLOCK, LIMITS, MAX_FLOAT

BLOCKS_PER_PROGRAM = 16
"""Of the encoder."""
BLOCKS_DECODED = 128
"""By one program."""
TOKENS_HASHED, WORDS_HASHED = 16, 64
"""By one program, and words of four bytes."""


def encode_rows(x: Tensor, amax: Tensor, rule: str, tiles: bool, random_bits: Tensor | None) -> tuple[Tensor, Tensor]:
    """Packed codes and scales of matrices `[... rows k]` on a GPU; see `format.encode`."""
    *batch, num_rows, k = x.shape
    rows = x.reshape(-1, k)
    num_blocks = k // BLOCK
    packed = torch.empty((*batch, num_rows, k // 2), dtype=torch.uint8, device=x.device)
    scales = torch.empty((*batch, num_rows, num_blocks), dtype=torch.uint8, device=x.device)
    M, E = LIMITS[rule]
    bits = packed if random_bits is None else random_bits.reshape(-1, k)
    grid = (triton.cdiv(len(rows), BLOCK), triton.cdiv(num_blocks, BLOCKS_PER_PROGRAM))
    with torch.cuda.device_of(x):
        _encode_kernel[grid](
            rows,
            bits,
            amax.reshape(-1),
            packed.view(torch.int32),
            scales,
            len(rows),
            num_rows,
            num_blocks,
            rows.stride(0),
            rows.stride(1),
            bits.stride(-2),
            bits.stride(-1),
            max_element=M,
            limit=M * E,
            rule=rule,
            tiles=tiles,
            stochastic=random_bits is not None,
            blocks=BLOCKS_PER_PROGRAM,
            max_float=MAX_FLOAT,
            enable_fp_fusion=False,
        )
    return packed, scales.view(torch.float8_e4m3fn)


def decode_values(packed: Tensor, scales: Tensor) -> Tensor:
    """v * s of codes `[... k/2]` with scales `[... k/16]` on a GPU, bfloat16 `[... k]`."""
    packed, scales = packed.contiguous(), scales.contiguous()
    values = torch.empty((*packed.shape[:-1], 2 * packed.shape[-1]), dtype=torch.bfloat16, device=packed.device)
    num_blocks = scales.numel()
    if num_blocks:
        with torch.cuda.device_of(packed):
            _decode_kernel[(triton.cdiv(num_blocks, BLOCKS_DECODED),)](
                packed, scales.view(torch.uint8), values, num_blocks, blocks=BLOCKS_DECODED
            )
    return values


def hash_bits(keys: tuple[int, int, int], positions: Tensor, features: int) -> Tensor:
    """`recipe.hashed_bits` on a GPU.

    Args:
        keys: 32 bits for the lower half of a position, for the upper half, and for the features; signed.
    """
    bits = torch.empty((len(positions), features), dtype=torch.uint8, device=positions.device)
    num_words = features // 4
    grid = (triton.cdiv(len(positions), TOKENS_HASHED), triton.cdiv(num_words, WORDS_HASHED))
    if bits.numel():
        with torch.cuda.device_of(positions):
            _hash_kernel[grid](
                positions, bits.view(torch.int32), *keys, len(positions), num_words, TOKENS_HASHED, WORDS_HASHED
            )
    return bits


def compiled(function: Callable[..., Any], **options: Any) -> Any:
    """`triton.jit` of the function as written: Triton reads its source, and not what type checking wraps it in."""
    return triton.jit(inspect.unwrap(function), **options)


@compiled
def _power_below(x: tl.tensor, minimum_bits: tl.constexpr) -> tl.tensor:
    """The power of two below a magnitude, but at least that of the given bits."""
    return tl.maximum(x.to(tl.int32, bitcast=True) & 0x7F800000, minimum_bits)


@compiled
def _round_scale(h: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """E4M3 bits and float of a scale 0..448 (or NaN), to nearest, ties to even."""
    # The last bit of 1.5 * 2^23 * 2^(e - 3) is worth 2^(e - 3), the distance of scales of exponent e, at least -6.
    anchor = (_power_below(h, (127 - 6) << 23) + (((23 - 3) << 23) | 0x400000)).to(tl.float32, bitcast=True)
    scale = (h + anchor) - anchor
    normal = (scale.to(tl.int32, bitcast=True) >> 20) - (120 << 3)
    bits = tl.where(scale < 0.015625, (scale * 512.0).to(tl.int32), normal)
    return tl.where(scale == scale, bits, 0x7F), scale


@compiled
def _round_element(x: tl.tensor, inverse: tl.tensor, u: tl.tensor, stochastic: tl.constexpr) -> tl.tensor:
    """The element nearest to |x| * inverse, as a float; the element above or below by u if stochastic."""
    scaled = tl.abs(x) * inverse
    scaled = tl.where(scaled > 6.0, 6.0, scaled)
    if stochastic:
        step = _power_below(scaled, 127 << 23).to(tl.float32, bitcast=True) * 0.5
        t = (u * 0.00390625) * step + scaled
        step_of_sum = _power_below(t, 127 << 23).to(tl.float32, bitcast=True) * 0.5
        # Steps are powers of two: multiplying by the inverse is exact.
        inverse_step = tl.where(step_of_sum == 0.5, 2.0, tl.where(step_of_sum == 1.0, 1.0, 0.5))
        element = tl.floor(t * inverse_step) * step_of_sum
        return tl.where(element > 6.0, 6.0, element)
    else:
        anchor = (_power_below(scaled, 127 << 23) + ((22 << 23) | 0x400000)).to(tl.float32, bitcast=True)
        return (scaled + anchor) - anchor


@compiled
def _over_rows(x: tl.tensor, blocks: tl.constexpr, take_largest: tl.constexpr) -> tl.tensor:
    """The sum over 16 rows as a tree, upper half plus lower half, or the largest, for each row: `[16 blocks]`."""
    if take_largest:
        total = tl.max(x, axis=0)
    else:
        upper, lower = tl.split(tl.permute(tl.reshape(x, (2, 8, blocks)), (1, 2, 0)))
        upper, lower = tl.split(tl.permute(tl.reshape(upper + lower, (2, 4, blocks)), (1, 2, 0)))
        upper, lower = tl.split(tl.permute(tl.reshape(upper + lower, (2, 2, blocks)), (1, 2, 0)))
        upper, lower = tl.split(tl.permute(tl.reshape(upper + lower, (2, 1, blocks)), (1, 2, 0)))
        total = tl.reshape(upper + lower, (blocks,))
    return tl.broadcast_to(total[None, :], (16, blocks))


@compiled
def _error(
    x: tl.tensor, element: tl.tensor, scale: tl.tensor, amax: tl.tensor, limit: tl.constexpr, rule: tl.constexpr
) -> tl.tensor:
    """How far a decoded element is from |x|."""
    difference = tl.div_rn((element * scale) * amax, tl.full(x.shape, limit, tl.float32)) - tl.abs(x)
    if rule == "mse":
        return difference * difference
    else:
        return tl.abs(difference)


@compiled
def _encode_kernel(
    x_ptr: tl.tensor,
    bits_ptr: tl.tensor,
    amax_ptr: tl.tensor,
    packed_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    num_rows: tl.tensor,
    rows_per_matrix: tl.tensor,
    num_blocks: tl.tensor,
    stride_row: tl.tensor,
    stride_column: tl.tensor,
    bits_stride_row: tl.tensor,
    bits_stride_column: tl.tensor,
    max_element: tl.constexpr,
    limit: tl.constexpr,
    rule: tl.constexpr,
    tiles: tl.constexpr,
    stochastic: tl.constexpr,
    blocks: tl.constexpr,
    max_float: tl.constexpr,
) -> None:
    """Codes, as two words of eight per block, and scales of 16 rows x `blocks` blocks."""
    row = (tl.program_id(0) * 16 + tl.arange(0, 16)).to(tl.int64)[:, None]
    block = (tl.program_id(1) * blocks + tl.arange(0, blocks)).to(tl.int64)[None, :]
    inside = (row < num_rows) & (block < num_blocks)
    matrix = tl.minimum(row, num_rows - 1) // rows_per_matrix
    amax = tl.broadcast_to(tl.load(amax_ptr + matrix), (16, blocks))
    one = tl.full((16, blocks), 1.0, tl.float32)
    encode_scale = tl.div_rn(tl.full((16, blocks), limit, tl.float32), amax)
    encode_scale = tl.where(amax == 0, 1.0, tl.where(encode_scale > max_float, max_float, encode_scale))
    decode_scale = tl.div_rn(one, encode_scale)
    first = x_ptr + row * stride_row + block * 16 * stride_column
    first_bits = bits_ptr + row * bits_stride_row + block * 16 * bits_stride_column

    largest = tl.zeros((16, blocks), tl.float32)
    is_finite = largest == 0
    for j in range(16):
        magnitude = tl.abs(tl.load(first + j * stride_column, inside, 0.0).to(tl.float32))
        is_finite = is_finite & (magnitude <= max_float)
        largest = tl.where(magnitude > largest, magnitude, largest)
    # Comparisons lose a NaN, and a finite amax makes a scale of infinity: both are put back at the end.
    is_bad = tl.where(is_finite, 0, 1)
    if tiles:
        largest = _over_rows(largest, blocks, True)
        is_bad = _over_rows(is_bad, blocks, True)

    h = tl.div_rn(largest, tl.full((16, blocks), max_element, tl.float32)) * encode_scale
    h = tl.where(is_bad == 1, float("nan"), h)
    code_6, scale_6 = _round_scale(tl.where(h > 448.0, 448.0, h))
    inverse_6 = tl.div_rn(one, scale_6 * decode_scale)
    inverse = tl.where(inverse_6 > max_float, max_float, inverse_6)
    scale_code = code_6
    if (rule == "mse") or (rule == "mae") or (rule == "abs_max"):
        inverse_6 = inverse
        h_4 = h * 1.5
        code_4, scale_4 = _round_scale(tl.where(h_4 > 448.0, 448.0, h_4))
        inverse_4 = tl.div_rn(one, scale_4 * decode_scale)
        inverse_4 = tl.where(inverse_4 > max_float, max_float, inverse_4)
        error_6 = tl.zeros((16, blocks), tl.float32)
        error_4 = tl.zeros((16, blocks), tl.float32)
        for j in range(16):
            x = tl.load(first + j * stride_column, inside, 0.0).to(tl.float32)
            u = x
            if stochastic:
                u = tl.load(first_bits + j * bits_stride_column, inside, 0).to(tl.float32)
            e_6 = _error(x, _round_element(x, inverse_6, u, stochastic), scale_6, amax, limit, rule)
            e_4 = _error(x, _round_element(x, inverse_4, u, stochastic), scale_4, amax, limit, rule)
            if rule == "abs_max":
                error_6 = tl.where(e_6 > error_6, e_6, error_6)
                error_4 = tl.where(e_4 > error_4, e_4, error_4)
            else:
                error_6 = error_6 + e_6
                error_4 = error_4 + e_4
        if tiles:
            error_6 = _over_rows(error_6, blocks, rule == "abs_max")
            error_4 = _over_rows(error_4, blocks, rule == "abs_max")
        better = error_4 < error_6
        inverse = tl.where(better, inverse_4, inverse_6)
        scale_code = tl.where(better, code_4, code_6)

    tl.store(scales_ptr + row * num_blocks + block, scale_code.to(tl.uint8), inside)
    for word in range(2):
        codes = tl.zeros((16, blocks), tl.int32)
        for j in range(8):
            column = word * 8 + j
            x = tl.load(first + column * stride_column, inside, 0.0).to(tl.float32)
            u = x
            if stochastic:
                u = tl.load(first_bits + column * bits_stride_column, inside, 0).to(tl.float32)
            twice = (_round_element(x, inverse, u, stochastic) * 2.0).to(tl.int32)
            code = tl.minimum(twice, tl.minimum((twice >> 1) + 2, (twice >> 2) + 4)) & 7
            sign = (x.to(tl.int32, bitcast=True) >> 28) & 8
            codes = codes | ((code | sign) << (4 * j))
        tl.store(packed_ptr + (row * num_blocks + block) * 2 + word, codes, inside)


@compiled
def _decode_kernel(
    packed_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    values_ptr: tl.tensor,
    num_blocks: tl.tensor,
    blocks: tl.constexpr,
) -> None:
    """16 values of each of so many blocks."""
    block = tl.program_id(0).to(tl.int64) * blocks + tl.arange(0, blocks)[:, None]
    inside = block < num_blocks
    scale = _scale_of(tl.load(scales_ptr + block, inside, 0).to(tl.int32))
    column = tl.arange(0, 16)[None, :]
    byte = tl.load(packed_ptr + block * 8 + column // 2, inside, 0).to(tl.int32)
    code = (byte >> ((column % 2) * 4)) & 15
    magnitude = code & 7
    # Twice the element: 0 1 2 3 4 6 8 12.
    twice = tl.where(magnitude < 4, magnitude, tl.where(magnitude < 6, 2 * magnitude - 4, 4 * magnitude - 16))
    element = _with_sign(twice.to(tl.float32) * 0.5, code >> 3)
    tl.store(values_ptr + block * 16 + column, (element * scale).to(tl.bfloat16), inside)


@compiled
def _scale_of(bits: tl.tensor) -> tl.tensor:
    """The float of E4M3 bits."""
    normal = (((bits & 0x7F) << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    scale = tl.where((bits & 0x78) == 0, (bits & 7).to(tl.float32) * 0.001953125, normal)
    scale = tl.where((bits & 0x7F) == 0x7F, float("nan"), scale)
    return _with_sign(scale, bits >> 7)


@compiled
def _with_sign(magnitude: tl.tensor, sign: tl.tensor) -> tl.tensor:
    """Zero has one, too."""
    return (magnitude.to(tl.int32, bitcast=True) | (sign << 31)).to(tl.float32, bitcast=True)


def _hash(
    positions_ptr: tl.tensor,
    words_ptr: tl.tensor,
    key_low: tl.tensor,
    key_high: tl.tensor,
    key_features: tl.tensor,
    num_tokens: tl.tensor,
    num_words: tl.tensor,
    tokens: tl.constexpr,
    words: tl.constexpr,
) -> None:
    """Words of four random bytes, `tokens` x `words` of them."""
    token = (tl.program_id(0) * tokens + tl.arange(0, tokens)).to(tl.int64)[:, None]
    word = tl.program_id(1) * words + tl.arange(0, words)[None, :]
    inside = (token < num_tokens) & (word < num_words)
    position = tl.load(positions_ptr + token, token < num_tokens, 0)
    row = _mix(position.to(tl.int32) ^ key_low)
    row = _mix(row ^ (position >> 32).to(tl.int32) ^ key_high)
    column = _mix(word ^ key_features)
    tl.store(words_ptr + token * num_words + word, _mix(row + column), inside)


@compiled
def _mix(x: tl.tensor) -> tl.tensor:
    """`recipe.mix`; 0x846CA68B as a signed number."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * -2073254261
    return x ^ ((x >> 16) & 0xFFFF)


# Compiled for any key: every layer, operand and step has another one.
_hash_kernel = compiled(_hash, do_not_specialize=["key_low", "key_high", "key_features"])
