"""The random Hadamard transform of the weight gradient's operands, along the tokens."""

from __future__ import annotations

from functools import cache

import torch

from longlive.precision.nvfp4.format import BLOCK
from longlive.typing import Float, Tensor

SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)
"""The fixed sign vector of the random Hadamard transform, Transformer Engine's."""


def hadamard(x: Float[Tensor, "*shape k"]) -> Float[Tensor, "*shape k"]:
    """x R in bfloat16, for R = diag(SIGNS) H / 4 on groups of 16 along the last dim.

    R is orthogonal, so (A R)(R^T B) = A B: a GEMM whose operands are both transformed along its reduction dim is
    unchanged, while single large elements are spread over their group. It does not make NVFP4's rounding smaller.

    Raises:
        ValueError: if k is no multiple of 16.
    """
    k = x.shape[-1]
    if k % BLOCK:
        raise ValueError(f"k={k} of shape {tuple(x.shape)} is no multiple of {BLOCK}; pad to {-(-k // BLOCK) * BLOCK}")
    # Inputs and R are exact in bfloat16, sums are float32: on a GPU that is what its bfloat16 GEMM does. On a CPU such
    # a GEMM may sum in bfloat16, so that autocast must not ask for it.
    dtype = torch.bfloat16 if x.is_cuda else torch.float32
    rotation = rotation_matrix(x.device, dtype)
    groups = x.to(torch.bfloat16).unflatten(-1, (-1, BLOCK)).to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        return (groups @ rotation).to(torch.bfloat16).flatten(-2)


@cache
@torch.inference_mode(False)
def rotation_matrix(device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> Float[Tensor, "16 16"]:
    """R = diag(SIGNS) H / 4 with Sylvester's H, on the CPU or another device. Kept, as it is small and asked for in
    every layer: not to be changed in place."""
    H = torch.ones(1, 1, dtype=torch.float32, device="cpu")
    for _ in range(4):
        H = torch.cat((torch.cat((H, H), 1), torch.cat((H, -H), 1)))
    return (torch.tensor(SIGNS, dtype=torch.float32, device="cpu")[:, None] * H / 4).to(device or "cpu", dtype)
