"""`precision=`: the names that Lightning knows and that train here, and `auto`, the faster of them that this machine
multiplies in hardware. The others (`nvfp4`, `fp8`) are plugins."""

from contextlib import AbstractContextManager

import torch
from lightning.pytorch.plugins import Precision

PRECISIONS = ("32-true", "bf16-mixed")
"""float32; or bfloat16 matrix products over float32 weights, gradients and optimizer. Weights that are bfloat16
themselves lose updates below 1/256 of their size, so there is no `bf16-true`."""


def choose_precision(precision: str) -> str:
    """`auto` is mixed bfloat16 where the device has instructions for it, else float32; other names pass unchanged.

    A CPU without such instructions emulates bfloat16, many times slower than float32.

    Raises:
        ValueError: for a name that is not supported.
    """
    if precision != "auto":
        if precision not in PRECISIONS:
            raise ValueError(f"precision={precision!r} is not supported; use auto, {' or '.join(PRECISIONS)}")
        return precision
    if torch.cuda.is_available():
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported() and torch.cpu._is_avx512_bf16_supported()
    return "bf16-mixed" if has_bf16 else "32-true"


def autocast_context(precision: str | Precision, device: torch.device) -> AbstractContextManager[object]:
    """In which a network runs without a Trainer: what a Trainer of this precision would have around its steps."""
    if isinstance(precision, Precision):
        return precision.forward_context()
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed")


def training_context(precision: str | Precision, device: torch.device) -> AbstractContextManager[object]:
    """In which a network trains whose precision is not the run's; it may lie within the context of the run's."""
    if isinstance(precision, Precision):
        return precision.forward_context()
    # Without autocast's cache, as a Trainer has it: a cached copy of a weight would outlive its update.
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed", cache_enabled=False)
