"""NVFP4 on any device: exact codes, multiplied as bfloat16.

    left right^T = g_left g_right sum_k (v s)_left (v s)_right

v * s has at most six significant bits in [2^-10, 2688] and so is exact in bfloat16; products and their sums are
float32, and so is alpha = g_left * g_right. What FP4 tensor cores compute differs by the order of summation alone. On
Ampere and Hopper this GEMM runs at bfloat16's speed; quantising comes on top, and values take 2 bytes where FP4 takes
half a byte.

CPUs have no GEMM from bfloat16 to float32: there the values are multiplied as float32. An operand that the recipe
leaves in high precision is multiplied in float32 everywhere, with TF32 off.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod

import torch

from longlive.precision.nvfp4.backends.base import Backend
from longlive.precision.nvfp4.format import QuantisedTensor
from longlive.precision.nvfp4.gemms import LinearPlan, Operand, quantised_linear
from longlive.precision.nvfp4.linear import NVFP4Linear
from longlive.precision.nvfp4.recipe import NVFP4Recipe
from longlive.typing import Float, Tensor


class EmulatedBackend(Backend):
    """Computes every recipe, on every device."""

    name = "emulated"
    trains = True

    def refusal(self, recipe: NVFP4Recipe) -> str | None:
        return None

    def linear(self, layer: NVFP4Linear, x: Float[Tensor, "tokens features"]) -> Float[Tensor, "tokens out"]:
        plan = LinearPlan(layer.recipe, layer.clock, layer.name, self.matmul)
        return quantised_linear(x, layer.weight if layer.codes is None else layer.codes, layer.bias, plan)

    @staticmethod
    def matmul(left: Operand, right: Operand) -> Float[Tensor, "m n"]:
        """`left [m k]` times the transpose of `right [n k]`, float32."""
        a, b = (operand.values() if isinstance(operand, QuantisedTensor) else operand for operand in (left, right))
        if a.is_cuda and a.dtype == b.dtype == torch.bfloat16:
            product = torch.mm(a, b.t(), out_dtype=torch.float32)
        else:
            with exact_float32():
                product = torch.mm(a.float(), b.float().t())
        scales = [operand.global_scale() for operand in (left, right) if isinstance(operand, QuantisedTensor)]
        return product.mul_(prod(scales)) if scales else product


@contextmanager
def exact_float32() -> Iterator[None]:
    """float32 GEMMs in float32, whatever the program has chosen for others."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
