"""The Triton kernel against the same operations in torch, bit for bit, where there is a GPU."""

import pytest
import torch
from torch import Tensor

from longlive.precision.nvfp4 import format as nvfp4
from longlive.precision.nvfp4.format import RULES, QuantisedTensor, hadamard, quantise

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


def assert_same_bits(one: QuantisedTensor, other: QuantisedTensor) -> None:
    """Codes under a scale that is NaN say nothing."""
    scales = [quantised.scales.view(torch.uint8).cpu() for quantised in (one, other)]
    assert torch.equal(*scales)
    counts = (scales[0] != 0x7F).repeat_interleave(8, -1)
    assert torch.equal(one.packed.cpu()[counts], other.packed.cpu()[counts])
    torch.testing.assert_close(one.amax.cpu(), other.amax.cpu(), rtol=0, atol=0, equal_nan=True)


def numbers(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).exp()


INPUTS = {
    "normal": numbers(64, 512),
    "bfloat16": numbers(64, 512).bfloat16(),
    "float16": numbers(64, 512).half(),
    "few bits": torch.randint(-12, 13, (64, 512), generator=torch.Generator().manual_seed(1)) / 2,
    "strided": numbers(512, 64).mT,
    "batch": numbers(2, 3, 32, 48) * torch.tensor([1.0, 100.0])[:, None, None, None],
    "far below": torch.cat((2.0 ** -torch.arange(48.0)[:, None].expand(48, 16), numbers(48, 16)), dim=1),
    "zeros": torch.zeros(16, 32),
    "infinity": numbers(32, 64).index_put((torch.tensor(3), torch.tensor(5)), torch.tensor(torch.inf)),
    "nan": numbers(32, 64).index_put((torch.tensor(3), torch.tensor(5)), torch.tensor(torch.nan)),
}


@pytest.mark.parametrize("has_triton", [True, False])
@pytest.mark.parametrize("rule", RULES)
def test_a_gpu_gives_the_bits_of_the_cpu(rule: str, has_triton: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvfp4, "HAS_TRITON", has_triton and nvfp4.HAS_TRITON)
    for x in INPUTS.values():
        random_bits = torch.randint(0, 256, x.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
        amax = torch.full(x.shape[:-2], 4.0)
        for tiles in (False, True):
            assert_same_bits(quantise(x.cuda(), rule, tiles=tiles), quantise(x, rule, tiles=tiles))
            stochastic = quantise(x.cuda(), rule, tiles=tiles, random_bits=random_bits.cuda())
            assert_same_bits(stochastic, quantise(x, rule, tiles=tiles, random_bits=random_bits))
            given = quantise(x.cuda(), rule, tiles=tiles, amax=amax.cuda())
            assert_same_bits(given, quantise(x, rule, tiles=tiles, amax=amax))


def test_shapes_that_fill_no_program_are_encoded_whole() -> None:
    """Rows and blocks beyond the last must be neither read nor written."""
    for shape in ((1, 16), (5, 272), (2, 7, 16), (1000, 3072)):
        assert_same_bits(quantise(numbers(*shape).cuda(), "mse"), quantise(numbers(*shape), "mse"))


def test_what_is_decoded_and_transformed_is_the_same() -> None:
    x = numbers(64, 512)
    assert torch.equal(quantise(x.cuda(), "mse").dequantise().cpu(), quantise(x, "mse").dequantise())
    difference = (hadamard(x.cuda()).cpu().float() - hadamard(x).float()).abs()
    assert (difference <= 2**-8 * hadamard(x).float().abs() + 1e-6).all()
