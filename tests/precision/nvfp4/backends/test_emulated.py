"""The emulated GEMM against float64."""

import pytest
import torch

from longlive.precision.nvfp4.backends.emulated import EmulatedBackend, exact_float32
from longlive.precision.nvfp4.format import RULES, quantise
from longlive.precision.nvfp4.recipe import NVFP4Recipe


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(actual, expected):
    return float((actual.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("left_rule", [None, *RULES])
@pytest.mark.parametrize("right_rule", [None, "static_6", "mse"])
def test_a_product_is_that_of_the_decoded_operands(left_rule, right_rule):
    """A global scale that is forgotten, applied twice, or taken by the other operand's rule."""
    left, right = gaussian(48, 256) * 3e-4, gaussian(80, 256, seed=1) * 50
    operands = [x if rule is None else quantise(x, rule) for x, rule in ((left, left_rule), (right, right_rule))]
    exact = [
        x.double() if rule is None else operand.values().double() * operand.global_scale().double()
        for x, operand, rule in zip((left, right), operands, (left_rule, right_rule), strict=True)
    ]
    product = EmulatedBackend.matmul(*operands)
    assert product.dtype == torch.float32
    assert relative(product, exact[0] @ exact[1].t()) < 1e-6


def test_the_relative_error_of_a_product_is_the_format_s():
    left, right = gaussian(512, 512), gaussian(512, 512, seed=1)
    exact = left.double() @ right.double().t()
    for rule, band in (("static_6", 0.135), ("mse", 0.124)):
        product = EmulatedBackend.matmul(quantise(left, rule), quantise(right, rule))
        assert relative(product, exact) == pytest.approx(band, rel=0.05)


def test_a_lower_precision_of_other_gemms_is_not_this_one_s_and_is_left_as_it_was():
    """With `medium`, oneDNN multiplies float32 as bfloat16 where the CPU can, and CUDA as TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with exact_float32():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_a_gpu_multiplies_as_the_cpu_does():
    left, right = quantise(gaussian(64, 512), "mse"), quantise(gaussian(96, 512, seed=1), "static_6", tiles=True)
    on_gpu = [quantise(x.dequantise().cuda(), x.rule, tiles=x.tiles) for x in (left, right)]
    for ours, theirs in zip(on_gpu, (left, right), strict=True):
        assert torch.equal(ours.values().cpu(), theirs.values())
    assert relative(EmulatedBackend.matmul(*on_gpu).cpu(), EmulatedBackend.matmul(left, right).double()) < 1e-6


def test_it_computes_every_recipe():
    assert EmulatedBackend.trains
    assert EmulatedBackend().refusal(NVFP4Recipe(None, "abs_max", "mse", reduce_amax=True)) is None
