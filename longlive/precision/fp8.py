"""FP8 by torchao: the linear layers' three products in float8, on Hopper's and Ada's matrix units.

Activations, weights and gradients are scaled at every step from what they are then (dynamic scaling). `tensorwise`: one
scale per tensor, gradients in e5m2; the fastest. `rowwise`: one scale per row of either operand, a power of two, all in
e4m3; the more accurate. Weights, their gradients, the optimizer and everything that is saved stay as they are; what
backward keeps of a layer is its input in bfloat16, as without FP8.

The matrix units take sizes that are multiples of 16. Layers of other sizes stay in bfloat16 and are named; the product
over tokens, in the weight's gradient, is padded with zeros. Elsewhere than on such units the same numbers are computed
in float32: exact in what is rounded, and slow.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import nn
from torchao.float8 import Float8LinearConfig, convert_to_float8_training
from torchao.float8.float8_linear import Float8Linear

from longlive.precision.plugin import LinearPrecision
from longlive.precision.selection import BLOCK_LINEARS, Layer

log = logging.getLogger(__name__)

SCALINGS = ("tensorwise", "rowwise")
BACKENDS = ("auto", "torchao", "emulated")
CAPABILITY = (8, 9)
"""The first compute capability with FP8 matrix units (Ada); Hopper is 9.0."""


class FP8Precision(LinearPrecision):
    """`precision=fp8`.

    Args:
        scaling: `tensorwise` or `rowwise`.
        backend: `torchao`, FP8 matrix units; `emulated`, anywhere; `auto`, the first where it runs.
        layers, keep_last_blocks_bf16: see `LayerSelection`.

    Raises:
        ValueError: for an unknown scaling or backend, or if `torchao` is asked for where it cannot run.
    """

    precision = "fp8"
    linear_class = Float8Linear

    def __init__(
        self,
        *,
        scaling: str = "tensorwise",
        backend: str = "auto",
        layers: Sequence[str] = BLOCK_LINEARS,
        keep_last_blocks_bf16: float = 0.0,
    ) -> None:
        super().__init__(multiple=16, layers=layers, keep_last_blocks_bf16=keep_last_blocks_bf16)
        if scaling not in SCALINGS:
            raise ValueError(f"scaling={scaling!r} is unknown; use {' or '.join(SCALINGS)}")
        if backend not in BACKENDS:
            raise ValueError(f"backend={backend!r} is unknown; use {', '.join(BACKENDS)}")
        missing = _missing()
        if backend == "torchao" and missing:
            raise ValueError(f"backend=torchao cannot run: {missing}; backend=auto would run emulated here")
        self.emulate = backend == "emulated" or bool(missing)
        self.config = dataclasses.replace(
            Float8LinearConfig.from_recipe_name(scaling), emulate=self.emulate, pad_inner_dim=True
        )
        if self.emulate:
            _say_emulated(missing or "as asked for")

    @property
    def backend_name(self) -> str:
        return "emulated" if self.emulate else "torchao"

    @property
    def settings(self) -> tuple[Any, ...]:
        return (self.config, self.selection)

    def replace(self, module: nn.Module, layers: Sequence[Layer]) -> None:
        chosen = {layer.name for layer in layers}
        convert_to_float8_training(module, config=self.config, module_filter_fn=lambda _, name: name in chosen)


def _missing() -> str | None:
    """What FP8 products lack here; None: nothing."""
    rule = f"FP8 matrix units come with compute capability {CAPABILITY[0]}.{CAPABILITY[1]} and newer"
    if not torch.cuda.is_available():
        return f"{rule}, and there is no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability < CAPABILITY:
        return f"{rule}; this device has {capability[0]}.{capability[1]}"
    return None


@rank_zero_only
def _say_emulated(why: str) -> None:
    log.info("FP8 is emulated (%s): accuracy is real, speed and memory of its products are not", why)
