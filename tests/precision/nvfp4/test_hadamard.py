"""The transform against its matrix."""

import pytest
import torch
from torch import Tensor

from longlive.precision.nvfp4.hadamard import SIGNS, hadamard, rotation_matrix


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_hadamard_transform_is_orthogonal() -> None:
    R = rotation_matrix()
    assert torch.equal(R @ R.mT, torch.eye(16))
    assert torch.equal(R[:, 0] * 4, torch.tensor(SIGNS, dtype=torch.float32))
    assert set(R.abs().flatten().tolist()) == {0.25}


def test_the_hadamard_transform_is_the_matrix_product_of_each_group() -> None:
    x = gaussian(5, 48).bfloat16()
    expected = torch.cat([x[:, i : i + 16].double() @ rotation_matrix().double() for i in (0, 16, 32)], dim=-1)
    result = hadamard(x.float())
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.double(), expected, rtol=2**-8, atol=0)


def test_the_hadamard_transform_of_both_operands_cancels() -> None:
    a, b = gaussian(32, 64), gaussian(48, 64, seed=1)
    difference = hadamard(a).double() @ hadamard(b).double().mT - a.double() @ b.double().mT
    assert difference.square().mean().sqrt() < 8 * 2**-8  # three bfloat16 roundings of sums over 64 numbers
    assert (hadamard(a).double() @ b.double().mT - a.double() @ b.double().mT).square().mean().sqrt() > 1


def test_groups_of_the_hadamard_transform_must_be_whole() -> None:
    with pytest.raises(ValueError, match=r"k=40 .*pad to 48"):
        hadamard(torch.zeros(2, 40))
