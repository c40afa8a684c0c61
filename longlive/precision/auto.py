"""`precision=`: the names that train, and `auto`, the fastest of them that this machine multiplies in hardware."""

import torch

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
