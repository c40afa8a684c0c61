"""The Triton kernels against the same operations in torch, bit for bit: on a GPU, or interpreted without one."""

import numpy as np
import pytest
import torch
from torch import Tensor

from longlive.precision.nvfp4 import format as nvfp4
from longlive.precision.nvfp4.format import RULES, QuantisedTensor, max_magnitude, quantise
from longlive.precision.nvfp4.hadamard import hadamard
from longlive.precision.nvfp4.recipe import as_int32, hashed_bits

kernels = pytest.importorskip("longlive.precision.nvfp4.kernels", reason="Triton is not installed")

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="there is no GPU here")


@pytest.fixture(autouse=True)
def silent_interpreter():
    """NumPy, which interprets the kernels, says what a GPU does not: that a division was by zero."""
    with np.errstate(all="ignore"):
        yield


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


SIZE = (64, 512) if HAS_GPU else (16, 96)
"""The interpreter takes a second for ten programs."""
INPUTS = {
    "normal": numbers(*SIZE),
    "bfloat16": numbers(*SIZE).bfloat16(),
    "float16": numbers(*SIZE).half(),
    "few bits": torch.randint(-12, 13, SIZE, generator=torch.Generator().manual_seed(1)) / 2,
    "strided": numbers(*SIZE[::-1]).mT,
    "batch": numbers(2, 3, 32, 48) * torch.tensor([1.0, 100.0])[:, None, None, None],
    "far below": torch.cat((2.0 ** -torch.arange(48.0)[:, None].expand(48, 16), numbers(48, 16)), dim=1),
    "zeros": torch.zeros(16, 32),
    "infinity": numbers(32, 64).index_put((torch.tensor(3), torch.tensor(5)), torch.tensor(torch.inf)),
    "nan": numbers(32, 64).index_put((torch.tensor(3), torch.tensor(5)), torch.tensor(torch.nan)),
}


@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_the_kernel_gives_the_bits_of_torch(rule: str, tiles: bool) -> None:
    for x in INPUTS.values():
        random_bits = torch.randint(0, 256, x.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
        own, given = max_magnitude(x), torch.full(x.shape[:-2], 4.0)
        for amax, bits in ((own, None), (given, random_bits)):
            on_device = None if bits is None else bits.to(DEVICE)
            packed, scales = kernels.encode_rows(x.to(DEVICE), amax.to(DEVICE), rule, tiles, on_device)
            encoded = QuantisedTensor(packed, scales, amax, rule, tiles)
            assert_same_bits(encoded, quantise(x, rule, tiles=tiles, amax=amax, random_bits=bits))


def test_shapes_that_fill_no_program_are_encoded_whole() -> None:
    """Rows and blocks beyond the last must be neither read nor written."""
    for shape in ((1, 16), (5, 272), (2, 7, 16), (1000, 3072) if HAS_GPU else (33, 528)):
        x = numbers(*shape)
        packed, scales = kernels.encode_rows(x.to(DEVICE), max_magnitude(x).to(DEVICE), "mse", False, None)
        encoded = QuantisedTensor(packed, scales, max_magnitude(x), "mse")
        assert_same_bits(encoded, quantise(x, "mse"))
        assert torch.equal(kernels.decode_values(packed, scales).cpu(), quantise(x, "mse").values())


def test_every_code_under_every_scale_has_its_value() -> None:
    """The sign of zero and the NaNs too."""
    packed = torch.arange(256, dtype=torch.uint8).repeat(256, 1).view(256, 32, 8)
    scales = torch.arange(256, dtype=torch.uint8)[:, None, None].expand(256, 32, 1).contiguous()
    scales = scales.view(torch.float8_e4m3fn)
    expected = QuantisedTensor(packed, scales, torch.ones(256), "static_6").values()
    found = kernels.decode_values(packed.to(DEVICE), scales.to(DEVICE)).cpu()
    is_number = ~expected.isnan()
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.view(torch.int16)[is_number], expected.view(torch.int16)[is_number])


@pytest.mark.parametrize("key", [0, 16, 12345, 0x7ABCDEF012345678, (1 << 63) - 1])
def test_random_bits_are_those_of_torch(key: int) -> None:
    for num_tokens, features in ((37, 64), (16, 256), (100, 772), (1, 4), (0, 16)):
        positions = torch.randint(-(1 << 40), 1 << 40, (num_tokens,), generator=torch.Generator().manual_seed(3))
        keys = as_int32(key), as_int32(key >> 32), as_int32(key >> 16)
        found = kernels.hash_bits(keys, positions.to(DEVICE), features)
        assert torch.equal(found.cpu(), hashed_bits(key, positions, features))


@needs_gpu
@pytest.mark.parametrize("has_triton", [True, False])
@pytest.mark.parametrize("rule", RULES)
def test_a_gpu_gives_the_bits_of_the_cpu(rule: str, has_triton: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without Triton, its own amax included."""
    monkeypatch.setattr(nvfp4, "HAS_TRITON", has_triton and nvfp4.HAS_TRITON)
    for x in INPUTS.values():
        for tiles in (False, True):
            on_gpu, on_cpu = quantise(x.cuda(), rule, tiles=tiles), quantise(x, rule, tiles=tiles)
            assert_same_bits(on_gpu, on_cpu)
            torch.testing.assert_close(on_gpu.values().cpu(), on_cpu.values(), rtol=0, atol=0, equal_nan=True)


@needs_gpu
def test_what_is_decoded_and_transformed_is_the_same() -> None:
    x = numbers(64, 512)
    assert torch.equal(quantise(x.cuda(), "mse").dequantise().cpu(), quantise(x, "mse").dequantise())
    difference = (hadamard(x.cuda()).cpu().float() - hadamard(x).float()).abs()
    assert (difference <= 2**-8 * hadamard(x).float().abs() + 1e-6).all()
