"""NVFP4's containers: shapes, strides, batches, layouts, and numbers at the ends of what it can hold."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torchao.prototype.mx_formats.utils import to_blocked

from longlive.precision.nvfp4 import format as nvfp4
from longlive.precision.nvfp4.format import (
    LIMITS,
    RULES,
    QuantisedTensor,
    decode,
    encode,
    pack,
    quantise,
    swizzle,
    unpack,
    unswizzle,
)
from longlive.precision.nvfp4.hadamard import hadamard

INFINITY = float("inf")
NAN = float("nan")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def bytes_of(scales: Tensor) -> Tensor:
    return scales.view(torch.uint8)


def assert_same_bits(one: QuantisedTensor, other: QuantisedTensor) -> None:
    assert torch.equal(one.packed, other.packed)
    assert torch.equal(bytes_of(one.scales), bytes_of(other.scales))
    assert torch.equal(one.amax, other.amax)


def test_the_even_element_is_in_the_low_nibble() -> None:
    assert pack(torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8)).tolist() == [[0x21, 0x0F]]


def test_every_byte_unpacks_and_decodes() -> None:
    packed = torch.arange(256, dtype=torch.int64).to(torch.uint8).view(4, 64)
    codes = unpack(packed)
    assert torch.equal(pack(codes), packed)
    assert codes[0, :4].tolist() == [0, 0, 1, 0]
    elements = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    assert torch.equal(decode(packed).float(), torch.cat((elements, -elements))[codes.long()])


@pytest.mark.parametrize("rule", RULES)
def test_dequantised_numbers_are_element_times_scale_times_the_matrixs(rule: str) -> None:
    quantised = quantise(normal(32, 64) * torch.logspace(-6, 3, 32)[:, None], rule)
    exact = decode(quantised.packed).double() * quantised.scales.double().repeat_interleave(16, -1)
    assert quantised.values().dtype == torch.bfloat16
    assert torch.equal(quantised.values().double(), exact)
    M, E = LIMITS[rule]
    assert float(quantised.global_scale()) == pytest.approx(float(quantised.amax) / (M * E), rel=1e-7)
    expected = exact * float(quantised.global_scale())
    torch.testing.assert_close(quantised.dequantise(torch.float64), expected, rtol=2**-24, atol=0)
    assert quantised.dequantise(torch.bfloat16).dtype == torch.bfloat16


def test_every_product_of_element_and_scale_is_exact_in_bfloat16() -> None:
    scales = torch.arange(127).to(torch.uint8).view(torch.float8_e4m3fn)  # 0 to 448; 127 is NaN
    packed = torch.tensor([[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]], dtype=torch.uint8).expand(127, 8)
    values = QuantisedTensor(packed, scales[:, None], torch.tensor(1.0), "static_6").values()
    assert torch.equal(values.double(), decode(packed).double() * scales.double()[:, None])


def test_an_element_takes_nine_sixteenths_of_a_byte() -> None:
    quantised = quantise(normal(64, 256))
    assert quantised.packed.nbytes + quantised.scales.nbytes == 0.5625 * 64 * 256
    assert quantised.shape == (64, 256)


@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_a_batch_is_quantised_matrix_by_matrix(rule: str, tiles: bool) -> None:
    """An amax over the batch would make one sample's numbers depend on another's."""
    x = normal(2, 3, 32, 64) * torch.tensor([1.0, 100.0])[:, None, None, None]
    batch = quantise(x, rule, tiles=tiles)
    assert (batch.shape, batch.amax.shape) == (x.shape, (2, 3))
    for i in range(2):
        for j in range(3):
            one = QuantisedTensor(batch.packed[i, j], batch.scales[i, j], batch.amax[i, j], batch.rule, batch.tiles)
            assert_same_bits(quantise(x[i, j], rule, tiles=tiles), one)
            assert torch.equal(batch.dequantise()[i, j], one.dequantise())


@pytest.mark.parametrize("tiles", [False, True])
def test_groups_of_rows_change_no_bit(tiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x = normal(3, 48, 64)
    random_bits = torch.randint(0, 256, x.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    whole = [quantise(x, "mse", tiles=tiles), quantise(x, "mse", tiles=tiles, random_bits=random_bits)]
    monkeypatch.setitem(nvfp4.GROUP, "cpu", 2048)
    assert_same_bits(quantise(x, "mse", tiles=tiles), whole[0])
    assert_same_bits(quantise(x, "mse", tiles=tiles, random_bits=random_bits), whole[1])


def test_strides_change_no_bit() -> None:
    x = normal(64, 48)
    assert_same_bits(quantise(x.mT, "mse"), quantise(x.mT.contiguous(), "mse"))
    wide = normal(64, 96)
    assert_same_bits(quantise(wide[:, ::2], "mse"), quantise(wide[:, ::2].contiguous(), "mse"))
    batch = normal(4, 32, 5, 16).transpose(1, 2)
    assert_same_bits(quantise(batch, "mse"), quantise(batch.contiguous(), "mse"))
    assert torch.equal(hadamard(x.mT), hadamard(x.mT.contiguous()))


@pytest.mark.parametrize("shape", [(1, 16), (16, 16), (64, 64), (1, 1, 16)])
def test_what_is_quantised_is_not_changed(shape: tuple[int, ...]) -> None:
    """The transpose of one block is contiguous as it stands: what works on it in place writes into the input."""
    x = -normal(*shape).abs()
    before = x.clone()
    quantise(x, "mse")
    quantise(x, "mse", random_bits=torch.zeros(shape, dtype=torch.uint8))
    assert torch.equal(x, before)


def test_a_matrix_without_rows_stays_one() -> None:
    quantised = quantise(torch.zeros(2, 0, 32))
    assert (quantised.shape, quantised.scales.shape, quantised.amax.tolist()) == ((2, 0, 32), (2, 0, 2), [0.0, 0.0])
    assert quantised.dequantise().shape == (2, 0, 32)


@pytest.mark.parametrize("rule", RULES)
def test_the_transpose_of_tiles_is_the_quantised_transpose(rule: str) -> None:
    x = normal(2, 32, 64)
    transposed = quantise(x, rule, tiles=True).transpose()
    assert transposed.shape == (2, 64, 32)
    assert torch.equal(transposed.dequantise(), quantise(x, rule, tiles=True).dequantise().mT)
    assert_same_bits(transposed, quantise(x.mT, rule, tiles=True))
    assert_same_bits(transposed.transpose(), quantise(x, rule, tiles=True))


def test_blocks_of_a_row_do_not_transpose() -> None:
    with pytest.raises(ValueError, match="quantise with tiles=True"):
        quantise(normal(16, 16)).transpose()


def test_an_amax_over_ranks_sets_the_scales_and_is_kept_as_it_was() -> None:
    x, amax = normal(2, 16, 32), torch.tensor([7.0, 9.0])
    quantised = quantise(x, amax=amax)
    amax.zero_()
    assert quantised.amax.tolist() == [7.0, 9.0]
    together = quantise(torch.cat((x[0], torch.full((1, 32), 7.0))))
    assert torch.equal(quantised.packed[0], together.packed[:16])
    assert torch.equal(bytes_of(quantised.scales[0]), bytes_of(together.scales[:16]))


@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_zeros_decode_to_zeros(rule: str, tiles: bool) -> None:
    zeros = quantise(torch.zeros(2, 16, 32), rule, tiles=tiles)
    assert not zeros.packed.any()
    assert not bytes_of(zeros.scales).any()
    assert not zeros.dequantise().any()
    x = normal(16, 32)
    x[:, 16:] = 0
    beside = quantise(x, rule, tiles=tiles).dequantise()
    assert not beside[:, 16:].any()
    assert beside[:, :16].any()


@pytest.mark.parametrize("rule", RULES)
def test_a_block_far_below_its_matrix_has_a_subnormal_scale_or_none(rule: str) -> None:
    """Scales end at 2^-9: what they no longer hold must become zero, and never infinity or NaN."""
    x = 2.0 ** -torch.arange(40.0)[:, None].expand(40, 16)
    quantised = quantise(x, rule)
    scales, values = quantised.scales.float().flatten(), quantised.dequantise()
    assert ((scales > 0) & (scales < 2**-6)).any()
    assert (scales == 0).any()
    assert values.isfinite().all()
    assert torch.equal(values == 0, (scales == 0)[:, None].expand(values.shape))
    assert ((values / x - 1).abs()[scales >= 2**-6] < 1 / 6).all()


@pytest.mark.parametrize("magnitude", [1e-44, 1e-38, 1e-30, 1e30, 3e38])
@pytest.mark.parametrize("rule", RULES)
def test_numbers_near_the_ends_of_float32_stay_finite(rule: str, magnitude: float) -> None:
    x = torch.full((1, 16), magnitude)
    values = quantise(x, rule).dequantise()
    assert values.isfinite().all()
    if magnitude > 1e-36:  # below, the matrix's scale is a subnormal number itself
        torch.testing.assert_close(values, x, rtol=0.1, atol=0)


def test_a_scale_that_was_rounded_down_clips_the_largest_number() -> None:
    """Its scaled magnitude is up to 6.375; under a subnormal scale it would round to a code that does not exist."""
    x = torch.zeros(2, 16)
    x[0, 0], x[0, 1] = 6.374, -6.374
    x[1, 0], x[1, 1] = 8.99 * 2**-9, -8.99 * 2**-9
    quantised = quantise(x, amax=torch.tensor(2688.0))
    assert quantised.scales.float().flatten().tolist() == [1.0, 2**-9]
    assert decode(quantised.packed)[:, :2].tolist() == [[6.0, -6.0], [6.0, -6.0]]


def test_numbers_above_a_given_amax_saturate() -> None:
    x = torch.full((1, 16), 100.0)
    quantised = quantise(x, amax=torch.tensor(10.0))
    assert quantised.scales.float().item() == 448.0
    torch.testing.assert_close(quantised.dequantise(), torch.full((1, 16), 10.0))


@pytest.mark.parametrize("bad", [INFINITY, -INFINITY, NAN])
@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_a_number_that_is_none_makes_its_whole_matrix_nan(rule: str, tiles: bool, bad: float) -> None:
    """Saturated to 6, an overflow would train on as if nothing had happened."""
    x = normal(2, 32, 32)
    x[1, 3, 5] = bad
    values = quantise(x, rule, tiles=tiles).dequantise()
    assert values[1].isnan().all()
    assert torch.equal(values[0], quantise(x[0], rule, tiles=tiles).dequantise())


@pytest.mark.parametrize("bad", [INFINITY, -INFINITY, NAN])
@pytest.mark.parametrize("rule", RULES)
def test_under_a_finite_given_amax_its_block_is_nan(rule: str, bad: float) -> None:
    x = normal(16, 32)
    x[3, 5] = bad
    x[4, 20] = -bad
    quantised = quantise(x, rule, amax=torch.tensor(8.0))
    values = quantised.dequantise()
    assert values[3, :16].isnan().all()
    assert values[4, 16:].isnan().all()
    assert (bytes_of(quantised.scales) == 0x7F).sum() == 2, "of E4M3's two NaNs one"
    assert values.isnan().sum() == 32


def test_the_sign_of_zero_is_kept() -> None:
    x = torch.tensor([[0.0, -0.0, 1e-3, -1e-3] * 4])
    x[0, 0] = 6.0
    assert (unpack(quantise(x).packed) >> 3).tolist() == [[0, 1, 0, 1] * 4]


@pytest.mark.parametrize("shape", [(128, 4), (1, 1), (130, 9), (3, 200, 6)])
def test_swizzled_scales_are_where_the_formula_says(shape: tuple[int, ...]) -> None:
    scales = torch.randint(1, 127, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    scales = scales.view(torch.float8_e4m3fn)
    swizzled = swizzle(scales)
    rows, columns = shape[-2:]
    padded_columns = -(-columns // 4) * 4
    r, c = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    offset = ((r // 128) * (padded_columns // 4) + c // 4) * 512 + (r % 32) * 16 + ((r % 128) // 32) * 4 + c % 4
    assert torch.equal(bytes_of(swizzled)[..., offset], bytes_of(scales))
    assert int(bytes_of(swizzled).count_nonzero()) == scales.numel(), "padding is zero"
    assert torch.equal(bytes_of(unswizzle(swizzled, rows, columns)), bytes_of(scales))
    if len(shape) == 2:
        assert torch.equal(bytes_of(swizzled), bytes_of(to_blocked(bytes_of(scales))))


def test_scales_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"512 scales are not those of rows=200, columns=4.*256 x 4"):
        unswizzle(swizzle(quantise(normal(128, 64)).scales), 200, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.zeros(4, 40)}, r"k=40 .*no multiple of 16; pad to 48"),
        ({"x": torch.zeros(4, 32), "tiles": True}, r"rows=4 .*no multiple of 16.*pad to 16, or use tiles=False"),
        ({"x": torch.zeros(32)}, r"shape \(32,\).*add a dim of rows"),
        ({"x": torch.zeros(4, 32), "rule": "mean"}, r"rule='mean'.*static_6, static_4, mse, mae, abs_max"),
        ({"x": torch.zeros(4, 32, dtype=torch.float64)}, r"x is torch.float64; use float32"),
        ({"x": torch.zeros(2, 4, 32), "amax": torch.zeros(3)}, r"amax has shape \(3,\); x has matrices \(2,\)"),
        ({"x": torch.zeros(4, 32), "random_bits": torch.zeros(4, 16, dtype=torch.uint8)}, r"use uint8 \(4, 32\)"),
    ],
)
def test_what_has_no_place_in_nvfp4_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantise(**arguments)


def test_a_compiled_caller_gets_the_same_bits_without_a_graph_break() -> None:
    """Fused into a compiled graph, divisions and products would be approximated and contracted."""

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        return encode(x * 1.5, torch.tensor(9.0), "mse", False, None)

    packed, scales = torch.compile(forward, fullgraph=True, backend="aot_eager")(normal(32, 64))
    expected = quantise(normal(32, 64) * 1.5, "mse", amax=torch.tensor(9.0))
    assert_same_bits(QuantisedTensor(packed, scales, torch.tensor(9.0), "mse"), expected)


def test_the_operator_says_truly_what_it_returns() -> None:
    torch.library.opcheck(encode, (normal(2, 16, 32), torch.ones(2), "mse", True, None))


def test_a_parameter_is_quantised_without_a_gradient() -> None:
    quantised = quantise(torch.nn.Parameter(normal(16, 32)))
    assert not quantised.scales.requires_grad
    assert not quantised.amax.requires_grad
