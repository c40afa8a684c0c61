"""NVFP4's bits: golden values, a slow formula written once more, torchao's quantiser, and statistics."""

import hashlib

import pytest
import torch
from torch import Tensor
from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize, per_tensor_amax_to_scale

from longlive.precision.nvfp4.format import (
    LIMITS,
    RULES,
    QuantisedTensor,
    decode,
    max_magnitude,
    over_tiles,
    quantise,
    sum_in_order,
    unpack,
)
from longlive.precision.nvfp4.hadamard import hadamard

ELEMENTS = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
WITH_ALTERNATIVE = ("mse", "mae", "abs_max")


def numbers(distribution: str, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(shape, generator=generator)

    if distribution == "normal":
        return normal()
    if distribution == "laplace":
        return normal().square().add(normal().square()).sub(normal().square()).sub(normal().square()) / 2
    assert distribution == "t3"
    return normal() / ((normal().square() + normal().square() + normal().square()) / 3).sqrt()


def bits_of(quantised: QuantisedTensor) -> tuple[str, str]:
    """Scales and packed codes in hexadecimal."""
    scales = quantised.scales.view(torch.uint8).flatten().tolist()
    return bytes(scales).hex(), bytes(quantised.packed.flatten().tolist()).hex()


def assert_same_bits(one: QuantisedTensor, other: QuantisedTensor) -> None:
    assert torch.equal(one.packed, other.packed)
    assert torch.equal(one.scales.view(torch.uint8), other.scales.view(torch.uint8))
    assert torch.equal(one.amax, other.amax)


def slow_quantise(
    x: Tensor, rule: str, tiles: bool = False, random_bits: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes `[rows k]` and scales as floats `[rows k/16]` of float32 x, by comparisons, block by block as stored."""
    M, E = LIMITS[rule]
    amax = x.abs().max()
    S = torch.tensor(M * E) / amax
    D = 1 / S
    blocks = x.unflatten(-1, (-1, 16))
    block_amax = blocks.abs().amax(-1)
    if tiles:
        block_amax = block_amax.unflatten(0, (-1, 16)).amax(1).repeat_interleave(16, 0)
    h = block_amax / M * S

    def code_of(scaled: Tensor) -> Tensor:
        magnitude = scaled.abs()
        if random_bits is not None:
            u = random_bits.view(scaled.shape)
            t = magnitude + u / 256 * step(magnitude)
            magnitude = ((t / step(t)).floor() * step(t)).clamp(max=6)
        code = torch.zeros(scaled.shape, dtype=torch.uint8)
        for index, midpoint in enumerate(MIDPOINTS):
            code += magnitude >= midpoint if index % 2 else magnitude > midpoint
        return code + 8 * scaled.signbit()

    def step(magnitude: Tensor) -> Tensor:
        return torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))

    def candidate(h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scale = h.clamp(max=448).to(torch.float8_e4m3fn).float()
        inverse = (1 / (scale * D)).clamp(max=torch.finfo(torch.float32).max)
        code = code_of((blocks * inverse[..., None]).clamp(-6, 6))
        value = ELEMENTS[(code & 7).long()] * torch.where(code > 7, -1.0, 1.0)
        difference = value * scale[..., None] * amax / (M * E) - blocks
        error = torch.zeros_like(scale)
        for j in range(16):
            d = difference[..., j]
            error = error.maximum(d.abs()) if rule == "abs_max" else error + (d * d if rule == "mse" else d.abs())
        if tiles:
            rows = list(error.unflatten(0, (-1, 16)).unbind(1))
            while len(rows) > 1:
                half = len(rows) // 2
                pairs = zip(rows[:half], rows[half:], strict=True)
                rows = [a.maximum(b) if rule == "abs_max" else a + b for a, b in pairs]
            error = rows[0].repeat_interleave(16, 0)
        return code, scale, error

    code, scale, error = candidate(h)
    if rule in WITH_ALTERNATIVE:
        code_4, scale_4, error_4 = candidate(1.5 * h)
        code = torch.where((error_4 < error)[..., None], code_4, code)
        scale = torch.where(error_4 < error, scale_4, scale)
    return code.flatten(-2), scale


def assert_slow_formula_agrees(x: Tensor, rule: str, tiles: bool, random_bits: Tensor | None = None) -> None:
    quantised = quantise(x, rule, tiles=tiles, random_bits=random_bits)
    codes, scales = slow_quantise(x.float(), rule, tiles, random_bits)
    assert torch.equal(unpack(quantised.packed), codes)
    assert torch.equal(quantised.scales.float(), scales)


@pytest.mark.parametrize(
    ("rule", "scales", "packed"),
    [("static_6", "7e", "0018212ac3546e76"), ("static_4", "7e", "00081129b2435c65"), ("mse", "7c", "00081129b2435c65")],
)
def test_sixteen_numbers_have_the_golden_bits(rule: str, scales: str, packed: str) -> None:
    x = torch.tensor([[0, 0.1, -0.2, 0.3, 0.5, 0.75, -1, 1.25, 1.5, -2, 2.5, 3, -3.5, 4, 5, 6]])
    assert bits_of(quantise(x, rule)) == (scales, packed)


def ramp(rows: int, k: int) -> Tensor:
    return (((37 * torch.arange(rows * k)) % 101) - 50).view(rows, k) / 8


@pytest.mark.parametrize(
    ("rule", "scales", "packed"),
    [
        ("static_6", "7e7e7d7e", "bfe5692ec7f45a0ed6724cafe6613db7f5692ed7f45b8ee6724cafe5603dc7f5"),
        ("mse", "7c7c7c7c", "aed4581cb6e34a0dc5623b9ed4502ca6d4591cb5e34a8dc5613b9ed4502ca6d4"),
        ("mae", "7c7c777c", "aed4581cb6e34a0dc5623b9ed4502ca6f5692ed7f45b8ee6613b9ed4502ca6d4"),
    ],
)
def test_a_ramp_has_the_golden_bits(rule: str, scales: str, packed: str) -> None:
    assert bits_of(quantise(ramp(2, 32), rule)) == (scales, packed)


@pytest.mark.parametrize(
    ("rule", "scale", "digest"), [("static_6", 0x7E, "88dca8ac0500fb4d"), ("mse", 0x7C, "7088b173f36b5101")]
)
def test_a_ramp_in_tiles_has_the_golden_bits(rule: str, scale: int, digest: str) -> None:
    quantised = quantise(ramp(32, 32), rule, tiles=True)
    assert set(quantised.scales.view(torch.uint8).flatten().tolist()) == {scale}
    assert hashlib.sha1(bytes(quantised.packed.flatten().tolist())).hexdigest().startswith(digest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("distribution", ["normal", "laplace", "t3"])
@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_bits_are_those_of_the_formula_written_slowly(
    rule: str, tiles: bool, distribution: str, dtype: torch.dtype
) -> None:
    """A fast path that rounds in another order is right nearly everywhere, and no error says where it is not."""
    assert_slow_formula_agrees(numbers(distribution, (64, 256)).to(dtype), rule, tiles)


@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_stochastic_bits_are_those_of_the_formula_written_slowly(rule: str, tiles: bool) -> None:
    x = numbers("laplace", (64, 256))
    random_bits = torch.randint(0, 256, x.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    assert_slow_formula_agrees(x, rule, tiles, random_bits)


@pytest.mark.parametrize("rule", RULES)
def test_decisions_between_equal_errors_keep_six(rule: str) -> None:
    """Numbers of few bits tie often, and ties show the order of sums."""
    x = torch.randint(-12, 13, (64, 256), generator=torch.Generator().manual_seed(2)) / 2
    assert_slow_formula_agrees(x, rule, tiles=False)
    assert_slow_formula_agrees(x, rule, tiles=True)


@pytest.mark.parametrize("maximum", [11, 23, 37, 50, 77])
def test_scales_between_two_of_e4m3_are_decided_by_the_order_of_operations(maximum: int) -> None:
    """Ratios of small whole numbers are midpoints often: to divide first or last is another scale there."""
    x = torch.randint(-maximum, maximum + 1, (64, 256), generator=torch.Generator().manual_seed(maximum)) / 8
    x *= torch.arange(1, 65)[:, None]
    for rule in RULES:
        assert_slow_formula_agrees(x, rule, tiles=False)


def test_errors_are_added_one_after_the_other() -> None:
    """Beside 2^24 a one is lost, two of them are not."""
    x = torch.ones(16, 3)
    x[0, 0] = x[8, 1] = x[15, 2] = 2.0**24
    assert (sum_in_order(x) - 2.0**24).tolist() == [0.0, 8.0, 16.0]  # the ones after it are lost, 15 are rounded up


def test_errors_of_a_tiles_rows_are_added_in_halves() -> None:
    x = torch.zeros(16, 2)
    x[0, 0], x[1, 0], x[9, 0] = 2.0**24, 1.0, 1.0  # rows 1 and 9 meet first, and two is not lost
    x[0, 1], x[1, 1] = 3.0, 4.0
    assert (over_tiles(x.flatten(), 2, largest=False).view(16, 2) == torch.tensor([2.0**24 + 2, 7.0])).all()
    x[0, 0] = 0.5
    assert (over_tiles(x.flatten(), 2, largest=True).view(16, 2) == torch.tensor([1.0, 4.0])).all()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_midpoints_go_to_the_even_code_and_their_neighbours_to_the_nearest(sign: float) -> None:
    middle = torch.tensor(MIDPOINTS)
    infinity = torch.tensor(torch.inf)
    rows = torch.stack((middle.nextafter(-infinity), middle, middle.nextafter(infinity)))
    x = torch.zeros(3, 16)
    x[:, :7] = sign * rows
    x[:, 15] = 6.0  # with amax = 6 * 448, this makes every scale 1
    quantised = quantise(x, amax=torch.tensor(2688.0))
    codes = unpack(quantised.packed)[:, :7]
    assert (quantised.scales.float() == 1).all()
    assert (codes & 7).tolist() == [[0, 1, 2, 3, 4, 5, 6], [0, 2, 2, 4, 4, 6, 6], [1, 2, 3, 4, 5, 6, 7]]
    assert ((codes >> 3) == (sign < 0)).all()


def assert_like_torchao(x: Tensor, amax: Tensor, per_tensor_scale: Tensor | None, tolerance: float) -> None:
    """Equal codes and scales but where the scaled number is a midpoint, to a relative tolerance."""
    quantised = quantise(x, amax=amax)
    scales, packed = nvfp4_quantize(x, per_tensor_scale=per_tensor_scale)
    ours, theirs = quantised.scales.float(), scales.float()
    assert (ours > 2**-6).all(), "torchao has no scale below"
    exact = x.double().unflatten(-1, (-1, 16)) * 2688 / amax.double()
    h = exact.abs().amax(-1) / 6
    neighbours = (ours.double() + theirs.double()) / 2
    different = ours != theirs
    assert ((h - neighbours).abs() <= tolerance * h)[different].all()
    codes, torchao_codes = unpack(quantised.packed), unpack(packed)
    other = (ELEMENTS[(codes & 7).long()] != ELEMENTS[(torchao_codes & 7).long()]).view(exact.shape)
    other &= ~different[..., None]  # codes under another scale are other codes
    scaled = (exact / ours.double()[..., None]).abs()[other]
    distance = (scaled[:, None] - torch.tensor(MIDPOINTS, dtype=torch.float64)).abs().amin(-1)
    assert (distance <= tolerance * scaled).all()
    agreeing = ~other & ~different[..., None]
    assert agreeing.double().mean() > 0.99
    has_sign = agreeing & ((codes & 7) != 0).view(exact.shape)  # nobody compares the sign of zero
    assert (((codes ^ torchao_codes) & 8).view(exact.shape)[has_sign] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("distribution", ["normal", "laplace", "t3"])
def test_one_level_of_scales_is_torchaos_in_every_bit(distribution: str, dtype: torch.dtype) -> None:
    """With amax = 6 * 448 the matrix's scale is 1, and the two formulas are the same roundings."""
    x = numbers(distribution, (256, 1024)).to(dtype)
    assert_like_torchao(x, torch.tensor(2688.0), None, tolerance=0.0)
    quantised = quantise(x, amax=torch.tensor(2688.0))
    scales, packed = nvfp4_quantize(x)
    assert torch.equal(quantised.scales.float(), scales.float())
    assert torch.equal(decode(quantised.packed), decode(packed))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2.0**-22), (torch.bfloat16, 1e-14)])
@pytest.mark.parametrize("distribution", ["normal", "laplace", "t3"])
def test_two_levels_of_scales_are_torchaos_but_at_midpoints(
    distribution: str, dtype: torch.dtype, tolerance: float
) -> None:
    """torchao divides by amax / 2688 where NVFP4's reference multiplies with 2688 / amax: a last bit apart.

    That decides exact midpoints, which numbers of eight bits hit, and float32 numbers within two roundings of one.
    """
    for seed in range(4):
        x = numbers(distribution, (128, 1024), seed).to(dtype)
        amax = max_magnitude(x)
        assert_like_torchao(x, amax, per_tensor_amax_to_scale(amax), tolerance)


def relative_error(x: Tensor, y: Tensor) -> float:
    return float((x - y).square().sum() / y.square().sum())


@pytest.mark.parametrize(
    ("rule", "tiles", "expected"),
    [
        ("static_6", False, 0.00905),
        ("static_4", False, 0.00964),
        ("mse", False, 0.00756),
        ("mae", False, 0.00780),
        ("abs_max", False, 0.00798),
        ("static_6", True, 0.0124),
    ],
)
def test_errors_on_normal_numbers_are_the_known_ones(rule: str, tiles: bool, expected: float) -> None:
    x = numbers("normal", (512, 1024))
    assert relative_error(quantise(x, rule, tiles=tiles).dequantise(), x) == pytest.approx(expected, rel=0.05)


def test_stochastic_rounding_costs_the_known_error() -> None:
    x = numbers("normal", (512, 1024))
    random_bits = torch.randint(0, 256, x.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    assert relative_error(quantise(x, random_bits=random_bits).dequantise(), x) == pytest.approx(0.0188, rel=0.05)


@pytest.mark.parametrize(
    ("left", "right", "tiles", "expected"),
    [("static_6", "static_6", False, 0.135), ("mse", "mse", False, 0.124), ("mse", "static_6", True, 0.1415)],
)
def test_errors_of_products_are_the_known_ones(left: str, right: str, tiles: bool, expected: float) -> None:
    x, w = numbers("normal", (512, 1024)), numbers("normal", (512, 1024), seed=1)
    product = quantise(x, left).dequantise() @ quantise(w, right, tiles=tiles).dequantise().mT
    assert relative_error(product, x @ w.mT) ** 0.5 == pytest.approx(expected, rel=0.05)


def test_over_all_random_bits_the_mean_is_the_number() -> None:
    """A bias of rounding is invisible in one step and adds up over thousands."""
    x = torch.zeros(256, 1024)
    x[:, :] = torch.linspace(-6, 6, 1024)
    x[:, 15::16] = 6.0  # with amax = 6 * 448, this makes every scale 1
    random_bits = torch.arange(256, dtype=torch.uint8)[:, None].expand(x.shape)
    values = quantise(x, amax=torch.tensor(2688.0), random_bits=random_bits).dequantise()
    magnitude = x[0].abs()
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    short = magnitude - values.mean(0).abs()
    assert (short >= -1e-5).all()
    assert (short <= step / 256 + 1e-5).all()
    assert len(values[:, 1].unique()) == 2


def test_stochastic_rounding_of_random_draws_is_unbiased() -> None:
    x = numbers("normal", (16, 64)).expand(256, 16, 64)
    random_bits = torch.randint(0, 256, x.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    draws = quantise(x, random_bits=random_bits).dequantise().double()
    inside = x[0].abs() < 0.9 * x[0].unflatten(-1, (-1, 16)).abs().amax(-1).repeat_interleave(16, -1)
    # Eight bits lose half of 1/256 of a step, on average; steps are up to a third of a block's largest number.
    z = ((draws.mean(0) - x[0]) / (draws.std(0) / 16 + 2e-3))[inside]
    assert float(z.abs().max()) < 5.0
    assert float(z.square().mean()) < 1.5


def test_autocast_changes_no_bit() -> None:
    """Under it a float32 matrix product is rounded to bfloat16 before anybody sees it."""
    x = numbers("normal", (64, 64))
    with torch.autocast("cpu", torch.bfloat16):
        inside, transformed = quantise(x, "mse"), hadamard(x)
    assert_same_bits(inside, quantise(x, "mse"))
    assert torch.equal(transformed, hadamard(x))
