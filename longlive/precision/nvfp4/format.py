"""NVFP4 numbers: E2M1 codes in blocks of 16 with E4M3 scales, and one float32 amax per matrix.

    x = v * s * g,    v in +-{0, .5, 1, 1.5, 2, 3, 4, 6},    g = amax / (M * E)

A *block* is 16 neighbours along the last dim, which is the reduction dim of the GEMM that reads the tensor; s is its
scale. The *rule* says how scales are chosen and what M and E are, so it is part of every stored tensor. `static_6` and
`static_4` map the block's largest magnitude to 6 or 4. The 4/6 rules (`mse`, `mae`, `abs_max`; FourOverSix, arXiv
2512.02010) encode a block both ways and keep 4 only if its error is strictly smaller. With *tiles* (weights) a scale is
shared by 16 x 16 elements, which makes the codes of the transpose the transpose of the codes.

Every step is one float32 operation with one rounding, in the order of Transformer Engine's reference, so that codes and
scales are the same bits on every device. A compiler would contract and approximate them: `torch.compile` sees one
opaque operator, which runs as written here. torchao's `nvfp4_quantize` has the same formula, but no scale below 2^-6.

Zero, and a block whose scale rounds to zero, decode to zero. An infinity or a NaN is passed on and not looked for, as
that would wait for the device: the whole matrix decodes to NaN, or, if its amax is given and finite, the block does.

Memory: x is read twice, once for amax and once for everything else; the second reading goes by groups of rows whose
intermediate results stay in the processor's cache, and writes 0.5625 bytes per element. Within a group a block lies
across 16 rows of a `[16 blocks]` array, so that every operation on it, the sums over a block included, is elementwise
over long contiguous rows, and a scale is broadcast without being copied. On a GPU with Triton `kernels.py` does all of
the second reading in one kernel, to the same bits; without Triton what is here runs, in a few dozen.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from longlive.typing import Float, UInt8

Rule = Literal["static_6", "static_4", "mse", "mae", "abs_max"]

RULES: tuple[Rule, ...] = get_args(Rule)
BLOCK = 16
"""Elements that share a scale, along the last dim."""

LIMITS: dict[str, tuple[float, float]] = {
    "static_6": (6.0, 448.0),
    "static_4": (4.0, 448.0),
    "mse": (6.0, 256.0),
    "mae": (6.0, 256.0),
    "abs_max": (6.0, 256.0),
}
"""(M, E) of a rule: the element and the scale that a matrix's largest magnitude is stored with. The 4/6 rules leave
room above 256, because the alternative scale is 1.5 times as large."""

MAX_ELEMENT, MAX_SCALE, MAX_FLOAT = 6.0, 448.0, torch.finfo(torch.float32).max
ELEMENTS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

HAS_TRITON = find_spec("triton") is not None

GROUP = {"cpu": 1 << 17}
"""Elements that are quantised together: on a CPU few enough for its cache."""
GROUP_ELSEWHERE = 1 << 26


@dataclass(frozen=True, eq=False)
class QuantisedTensor:
    """A matrix `[rows k]`, or a batch of them, in NVFP4.

    Attributes:
        packed: `[... rows k/2]` uint8, element 2j in the low nibble of byte j; bit 3 of a nibble is the sign.
        scales: `[... rows k/16]` float8_e4m3fn, in plain order (`swizzle` gives the GEMM's).
        amax: `[...]` float32, one per matrix.
        rule: which of RULES made it, and so what amax means.
        tiles: whether scales are shared by 16 x 16 elements (they are stored for each of the 16 rows all the same).
    """

    packed: UInt8[Tensor, "*batch rows bytes"]
    scales: Tensor
    amax: Float[Tensor, "*batch"]
    rule: str
    tiles: bool = False

    @property
    def shape(self) -> torch.Size:
        """`[... rows k]`, the shape of the tensor that was quantised."""
        return torch.Size((*self.packed.shape[:-1], 2 * self.packed.shape[-1]))

    def values(self) -> Float[Tensor, "*batch rows k"]:
        """v * s in bfloat16, exact: 2 * 4 significant bits at most, and magnitudes in [2^-10, 2688]."""
        if self.packed.is_cuda and HAS_TRITON:
            from longlive.precision.nvfp4 import kernels

            return kernels.decode_values(self.packed, self.scales)
        elements = decode(self.packed)
        blocks = elements.unflatten(-1, (-1, BLOCK)) * self.scales.to(torch.bfloat16).unsqueeze(-1)
        return blocks.flatten(-2)

    def global_scale(self) -> Float[Tensor, "*batch"]:
        """g = amax / (M * E), float32."""
        M, E = LIMITS[self.rule]
        return self.amax / torch.full((), M * E, device=self.amax.device)

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "*batch rows k"]:
        """v * s * g, computed in float32."""
        return (self.values().float() * self.global_scale()[..., None, None]).to(dtype)

    def transpose(self) -> QuantisedTensor:
        """The transposed matrices `[... k rows]`, the same numbers.

        Quantising the transpose gives the same bits under a static rule; under a 4/6 rule it sums errors in another
        order, which can turn a close decision.

        Raises:
            ValueError: without tiles: the scales of rows are not those of columns.
        """
        if not self.tiles:
            raise ValueError("tiles=False: scales of 1 x 16 blocks do not transpose; quantise with tiles=True")
        scales = self.scales.view(torch.uint8)[..., ::BLOCK, :].mT.repeat_interleave(BLOCK, dim=-2)
        packed = pack(unpack(self.packed).mT).contiguous()
        return replace(self, packed=packed, scales=scales.contiguous().view(torch.float8_e4m3fn))


def quantise(
    x: Float[Tensor, "... k"],
    rule: str = "static_6",
    *,
    tiles: bool = False,
    amax: Float[Tensor, ...] | None = None,
    random_bits: UInt8[Tensor, ...] | None = None,
) -> QuantisedTensor:
    """Encode matrices in NVFP4, without gradients.

    Args:
        x: `[... rows k]` float32, bfloat16 or float16, of any strides.
        rule: how scales are chosen, one of RULES.
        tiles: one scale per 16 x 16 elements in place of 1 x 16.
        amax: `[...]`, the magnitude that scales are relative to, at least that of every element of the matrix (e.g. the
            largest over ranks). By default each matrix's own.
        random_bits: `[... rows k]`, eight for each element, turn rounding to nearest into stochastic rounding.

    Raises:
        ValueError: for a rule, a shape or a dtype that NVFP4 has no place for.
    """
    if rule not in RULES:
        raise ValueError(f"rule={rule!r} is no scale rule; use one of {', '.join(RULES)}")
    if x.dim() < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; NVFP4 is of matrices [... rows k]: add a dim of rows")
    rows, k = x.shape[-2:]
    if k % BLOCK:
        raise ValueError(f"k={k} of shape {tuple(x.shape)} is no multiple of {BLOCK}; pad to {-(-k // BLOCK) * BLOCK}")
    if tiles and rows % BLOCK:
        fix = f"pad to {-(-rows // BLOCK) * BLOCK}, or use tiles=False"
        raise ValueError(
            f"rows={rows} of shape {tuple(x.shape)} is no multiple of {BLOCK}, the height of a tile; {fix}"
        )
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"x is {x.dtype}; use float32, bfloat16 or float16")
    if amax is not None and amax.shape != x.shape[:-2]:
        raise ValueError(f"amax has shape {tuple(amax.shape)}; x has matrices {tuple(x.shape[:-2])}: one amax for each")
    if random_bits is not None and (random_bits.shape != x.shape or random_bits.dtype != torch.uint8):
        raise ValueError(
            f"random_bits is {random_bits.dtype} {tuple(random_bits.shape)}; use uint8 {tuple(x.shape)}, the shape of x"
        )
    x = x.detach()
    # A copy: what is stored must not change with what a caller reduces in place later.
    amax = max_magnitude(x) if amax is None else amax.detach().float().clone()
    packed, scales = encode(x, amax, rule, tiles, random_bits)
    return QuantisedTensor(packed, scales, amax, rule, tiles)


def max_magnitude(x: Float[Tensor, "*batch rows k"]) -> Float[Tensor, "*batch"]:
    """The largest magnitude of each matrix, float32; NaN where there is one, 0 for a matrix without elements."""
    if not x.numel():
        return x.new_zeros(x.shape[:-2], dtype=torch.float32)
    if x.is_cuda:
        return torch.linalg.vector_norm(x, torch.inf, (-2, -1), dtype=torch.float32)
    # Two plain reductions run at the speed of memory; one for both, or a norm, takes a CPU ten times as long.
    return torch.maximum(x.amax((-2, -1)), -x.amin((-2, -1))).float()


def pack(codes: UInt8[Tensor, "*shape k"]) -> UInt8[Tensor, "*shape bytes"]:
    """Two codes of four bits per byte, the even element low."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: UInt8[Tensor, "*shape bytes"]) -> UInt8[Tensor, "*shape k"]:
    """The codes that `pack` was given."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def decode(packed: UInt8[Tensor, "*shape bytes"]) -> Float[Tensor, "*shape k"]:
    """The elements of packed codes, bfloat16."""
    return pairs_of_elements(packed.device)[packed.int().contiguous()].view(torch.bfloat16)


@cache
@torch.inference_mode(False)
def pairs_of_elements(device: torch.device) -> Tensor:
    """The two bfloat16 elements of each byte, as one int32: `[256]`. Kept: a copy to a GPU would be waited for."""
    values = torch.tensor((*ELEMENTS, *(-element for element in ELEMENTS)), dtype=torch.bfloat16, device="cpu")
    low, high = values.repeat(16), values.repeat_interleave(16)
    return torch.stack((low, high), dim=-1).view(torch.int32).flatten().to(device)


def swizzle(scales: Tensor) -> Tensor:
    """Scales `[... R C]` in the order that cuBLAS and CUTLASS read: `[... n]`, n = R and C rounded up to 128 and 4.

    The scale of row r and column c is at ((r//128) * C/4 + c//4) * 512 + (r%32) * 16 + ((r%128)//32) * 4 + c%4.
    Padding is zero.
    """
    rows, columns = scales.shape[-2:]
    padded = F.pad(scales.view(torch.uint8), (0, -columns % 4, 0, -rows % 128))
    parts = padded.unflatten(-1, (-1, 4)).unflatten(-3, (-1, 4, 32))
    return parts.movedim(-2, -4).transpose(-2, -3).flatten(-5).view(scales.dtype)


def unswizzle(swizzled: Tensor, rows: int, columns: int) -> Tensor:
    """The scales `[... rows columns]` that `swizzle` was given.

    Raises:
        ValueError: if the number of scales is not that of `rows` and `columns`, padded.
    """
    padded_rows, padded_columns = rows + -rows % 128, columns + -columns % 4
    if swizzled.shape[-1] != padded_rows * padded_columns:
        raise ValueError(
            f"{swizzled.shape[-1]} scales are not those of rows={rows}, columns={columns}, which are "
            f"{padded_rows} x {padded_columns} when padded; give the shape that was swizzled"
        )
    parts = swizzled.view(torch.uint8).unflatten(-1, (padded_rows // 128, padded_columns // 4, 32, 4, 4))
    plain = parts.transpose(-2, -3).movedim(-4, -2).flatten(-2).flatten(-4, -2)
    return plain[..., :rows, :columns].contiguous().view(swizzled.dtype)


@torch.library.custom_op(
    "longlive::nvfp4_encode",
    mutates_args=(),
    schema="(Tensor x, Tensor amax, str rule, bool tiles, Tensor? random_bits) -> (Tensor, Tensor)",
)
def encode(x: Tensor, amax: Tensor, rule: str, tiles: bool, random_bits: Tensor | None) -> tuple[Tensor, Tensor]:
    """Packed codes and scales of what `quantise` has checked: by groups of rows, or on a GPU in one kernel."""
    packed, scales = _empty(x, amax, rule, tiles, random_bits)
    if not x.numel():
        return packed, scales
    if x.is_cuda and HAS_TRITON:
        from longlive.precision.nvfp4 import kernels

        return kernels.encode_rows(x, amax, rule, tiles, random_bits)
    k = x.shape[-1]
    rows, packed_rows, scale_rows = x.reshape(-1, k), packed.view(-1, k // 2), scales.view(-1, k // BLOCK)
    bits = None if random_bits is None else random_bits.reshape(-1, k)
    amax_of_rows = amax.reshape(-1, 1).expand(-1, x.shape[-2]).flatten()
    step = max(GROUP.get(x.device.type, GROUP_ELSEWHERE) // k // BLOCK, 1) * BLOCK
    for start in range(0, len(rows), step):
        group = slice(start, start + step)
        packed_rows[group], scale_rows[group] = _encode_rows(
            rows[group], amax_of_rows[group], rule, tiles, None if bits is None else bits[group]
        )
    return packed, scales


@encode.register_fake
def _empty(x: Tensor, amax: Tensor, rule: str, tiles: bool, random_bits: Tensor | None) -> tuple[Tensor, Tensor]:
    *batch, k = x.shape
    packed = torch.empty((*batch, k // 2), dtype=torch.uint8, device=x.device)
    return packed, torch.empty((*batch, k // BLOCK), dtype=torch.float8_e4m3fn, device=x.device)


def _encode_rows(
    rows: Tensor, amax_of_rows: Tensor, rule: str, tiles: bool, bits: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Packed codes and scales of rows `[r k]`. Everything between is `[16 blocks]` or `[blocks]`."""
    num_rows, k = rows.shape
    # A clone even of one block, whose transpose is contiguous as it is: the caller's tensor is not ours to change.
    x = rows.float().reshape(-1, BLOCK).t().clone(memory_format=torch.contiguous_format)
    u = None if bits is None else bits.reshape(-1, BLOCK).t().float()
    is_negative = x.view(torch.int32) < 0  # -0 is, too
    magnitude = x.abs_()

    def constant(value: float) -> Tensor:
        """A tensor of the device: a GPU divides by Python's numbers as a product with their inverse."""
        return torch.full((), value, device=x.device)

    M, E = LIMITS[rule]
    block_amax = magnitude.amax(0)
    if tiles:
        block_amax = over_tiles(block_amax, k // BLOCK, largest=True)
    encode_scale = (constant(M * E) / amax_of_rows).clamp_(max=MAX_FLOAT).masked_fill_(amax_of_rows == 0, 1.0)
    blocks_per_row = k // BLOCK
    decode_scale = encode_scale.reciprocal().repeat_interleave(blocks_per_row)
    amax = amax_of_rows.repeat_interleave(blocks_per_row)
    h = (block_amax / constant(M)) * encode_scale.repeat_interleave(blocks_per_row)
    # Of all NaNs one, whose sign does not depend on the device.
    h.masked_fill_(h.isnan() | block_amax.isinf(), torch.nan)

    def to_scale(h: Tensor) -> Tensor:
        # Clamped before the cast: beyond 448 the cast gives NaN before torch 2.12.
        return h.clamp(max=MAX_SCALE).to(torch.float8_e4m3fn)

    def elements_at(scale: Tensor) -> Tensor:
        inverse = (scale.float() * decode_scale).reciprocal_().clamp_(max=MAX_FLOAT)
        scaled = (magnitude * inverse).clamp_(max=MAX_ELEMENT)
        return round_nearest(scaled) if u is None else round_stochastic(scaled, u)

    def error(elements: Tensor, scale: Tensor) -> Tensor:
        difference = (elements * scale.float()).mul_(amax).div_(constant(M * E)).sub_(magnitude)
        if rule == "abs_max":
            total = difference.abs_().amax(0)
        else:
            total = sum_in_order(difference.square_() if rule == "mse" else difference.abs_())
        return over_tiles(total, k // BLOCK, largest=rule == "abs_max") if tiles else total

    scale = to_scale(h)
    elements = elements_at(scale)
    if rule in ("mse", "mae", "abs_max"):
        scale_4 = to_scale(h * 1.5)
        elements_4 = elements_at(scale_4)
        better = error(elements_4, scale_4) < error(elements, scale)
        elements = torch.where(better, elements_4, elements)
        scale = torch.where(better, scale_4.view(torch.uint8), scale.view(torch.uint8)).view(torch.float8_e4m3fn)
    codes = codes_of(elements).bitwise_or_(is_negative.view(torch.uint8) << 3)
    packed = codes[0::2] | (codes[1::2] << 4)
    return packed.t().reshape(num_rows, k // 2), scale.view(num_rows, blocks_per_row)


def sum_in_order(x: Tensor) -> Tensor:
    """The sum of `[16 blocks]` over the 16, one after the other, as the reference adds them."""
    total = x[0].clone()
    for element in x[1:]:
        total += element
    return total


def over_tiles(x: Tensor, blocks_per_row: int, *, largest: bool) -> Tensor:
    """Of each block's number, the largest or the sum over the 16 rows of its tile, for each of them: `[blocks]`.

    The sum is a tree of halves, rows 0 to 7 plus rows 8 to 15 first, as a GPU's lanes add theirs.
    """
    tiles = x.view(-1, BLOCK, blocks_per_row)
    reduced = tiles.amax(1, keepdim=True) if largest else tiles
    while reduced.shape[1] > 1:
        upper, lower = reduced.chunk(2, dim=1)
        reduced = upper + lower
    return reduced.expand(tiles.shape).reshape(-1)


def round_nearest(scaled: Tensor) -> Tensor:
    """Magnitudes up to 6 to the nearest element, ties to the even code; overwrites its argument.

    Elements are .5 apart below 2, 1 below 4 and 2 above: a quarter of the power of two p below, if that is 1 or more,
    times 2. Adding and subtracting 1.5 * 2^22 * p, whose last bit is worth p / 2, rounds to it, ties to even.
    """
    power = scaled.view(torch.int32).bitwise_and(0x7F800000).clamp_(min=0x3F800000)
    anchor = power.add_((22 << 23) | 0x400000).view(torch.float32)
    return scaled.add_(anchor).sub_(anchor)


def round_stochastic(scaled: Tensor, u: Tensor) -> Tensor:
    """Magnitudes up to 6 to the element below or above, up with a probability of their distance, by u in 0..255.

    The random part is added with the step at the magnitude, and cut off with the step at the sum.
    """
    t = (u / 256).mul_(step_at(scaled)).add_(scaled)
    step = step_at(t)
    return (t / step).floor_().mul_(step).clamp_(max=MAX_ELEMENT)


def step_at(magnitude: Tensor) -> Tensor:
    """The distance of elements at a magnitude below 8: .5 below 2, 1 below 4, then 2."""
    power = magnitude.view(torch.int32).bitwise_and(0x7F800000).clamp_(min=0x3F800000)
    return power.view(torch.float32).mul_(0.5)


def codes_of(elements: Tensor) -> Tensor:
    """uint8 codes 0..7 of 0, .5, 1, 1.5, 2, 3, 4, 6: twice the element, with the gaps of 1 and 2 closed."""
    twice = (elements * 2).to(torch.uint8)
    return twice.minimum((twice >> 1).add_(2)).minimum((twice >> 2).add_(4))
