"""`precision=auto`: the fastest precision that this machine multiplies in hardware and that trains like float32."""

import torch


def choose_precision(precision: str) -> str:
    """`auto` is mixed bfloat16 where the device has instructions for it, else float32; other names pass unchanged.

    A CPU without such instructions emulates bfloat16, many times slower than float32.
    """
    if precision != "auto":
        return precision
    if torch.cuda.is_available():
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported() and torch.cpu._is_avx512_bf16_supported()
    return "bf16-mixed" if has_bf16 else "32-true"
