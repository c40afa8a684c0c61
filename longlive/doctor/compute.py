"""Devices, precisions and kernels: each is run, and its result compared with one that is known to be right."""

import importlib
import os
import platform
import shutil
import time
import warnings
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from longlive.doctor.check import UnavailableError
from longlive.doctor.packages import EXTRAS, probe_package


def probe_cpu() -> str:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and limit.read_text().strip().isdigit():
        memory = min(memory, int(limit.read_text()))
    return f"{model}, {usable} usable cores, {torch.get_num_threads()} torch threads, {memory / 2**30:.1f} GiB"


def probe_cuda() -> str:
    if torch.version.cuda is None:
        raise UnavailableError(f"torch {torch.__version__} is not a CUDA build")
    if not torch.cuda.is_available():
        torch.cuda.init()  # says why
        raise UnavailableError(f"torch {torch.__version__} sees no CUDA device")
    torch.ones(1, device="cuda").add_(1)
    return f"CUDA {torch.version.cuda}, {torch.cuda.device_count()} devices"


def probe_nccl() -> str:
    if not torch.distributed.is_nccl_available():
        raise UnavailableError(f"torch {torch.__version__} is built without it; several processes use gloo")
    return ".".join(map(str, torch.cuda.nccl.version()))


def probe_cuda_device(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    return (
        f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
        f"{total / 2**30:.1f} GiB, {free / 2**30:.1f} GiB free"
    )


def probe_matmul(dtype: torch.dtype, device: torch.device) -> str:
    """A product, compared with float64 and timed beside float32."""
    size = 4096 if device.type == "cuda" else 512
    left, right = _normal((size, size), device), _normal((size, size), device)
    product = left.to(dtype) @ right.to(dtype)
    exact = left[:64].double() @ right.double()
    error = float((product[:64].double() - exact).norm() / exact.norm())
    if not error < 0.02:
        raise UnavailableError(f"a product has a relative error of {error:.1e}")
    detail = f"{size} x {size} on {device.type}: relative error {error:.0e}"
    if dtype != torch.float32:
        speed = _seconds(left, right) / _seconds(left.to(dtype), right.to(dtype))
        detail += f", {speed:.1f}x the speed of float32"
    return detail


def probe_fp8(device: torch.device) -> str:
    """A scaled float8 product on the tensor cores."""
    _require_capability(device, (8, 9), "FP8 matrix units")
    left, right = _normal((256, 256), device), _normal((256, 256), device)
    one = torch.ones((), device=device)
    product = torch._scaled_mm(
        left.to(torch.float8_e4m3fn), right.to(torch.float8_e4m3fn).t(), one, one, out_dtype=torch.bfloat16
    )
    exact = left @ right.t()
    error = float((product.float() - exact).norm() / exact.norm())
    if not error < 0.1:
        raise UnavailableError(f"a product has a relative error of {error:.1e}")
    return f"relative error {error:.0e}"


def probe_nvfp4(device: torch.device) -> str:
    """Training GEMMs in NVFP4 need both the matrix units and Transformer Engine."""
    missing = []
    try:
        _require_capability(device, (10, 0), "NVFP4 matrix units")
    except UnavailableError as error:
        missing.append(str(error))
    try:
        probe_package("transformer-engine", *EXTRAS["transformer-engine"])
    except UnavailableError as error:
        missing.append(f"transformer-engine: {error}")
    if missing:
        raise UnavailableError("; ".join(missing))
    recipe = importlib.import_module("transformer_engine.common.recipe")
    return f"Transformer Engine's {recipe.NVFP4BlockScaling.__name__}"


def probe_sdpa(backend: SDPBackend, device: torch.device) -> str:
    """Forward and backward, with no other backend allowed."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    query = _normal((1, 4, 256, 64), device).to(dtype).requires_grad_()
    with warnings.catch_warnings(record=True) as reasons, sdpa_kernel(backend):
        warnings.simplefilter("always")
        try:
            scaled_dot_product_attention(query, query, query).sum().backward()
        except RuntimeError as error:
            # torch says why in warnings, and only on CUDA.
            said = [str(reason.message).partition(" (Triggered")[0] for reason in reasons]
            raise UnavailableError(" ".join(said) or f"torch has none for {device.type}") from error
    return f"forward and backward, {str(dtype).removeprefix('torch.')} on {device.type}"


def probe_flex_attention(device: torch.device, backward: bool) -> str:
    """On CUDA as it is used there, compiled; on CPU, uncompiled."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled = device.type == "cuda"
    attention = torch.compile(flex_attention) if compiled else flex_attention
    query = _normal((1, 2, 128, 64), device).requires_grad_(backward)
    result = attention(query, query, query)
    torch.testing.assert_close(result, scaled_dot_product_attention(query, query, query), rtol=0, atol=2e-2)
    if backward:
        result.sum().backward()
    return f"{'compiled' if compiled else 'uncompiled'} on {device.type}"


def probe_compile(device: torch.device) -> str:
    """A small function, by the default backend: Triton on CUDA, C++ on CPU."""
    begin = time.perf_counter()
    numbers = torch.arange(8.0, device=device)
    try:
        result = torch.compile(lambda x: torch.sin(x) + 1.0)(numbers)
    except Exception as error:
        if device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
            raise UnavailableError("needs a C++ compiler, and neither g++ nor clang++ is there") from error
        raise
    torch.testing.assert_close(result, torch.sin(numbers) + 1.0)
    return f"on {device.type}, {time.perf_counter() - begin:.1f} s for a first small function"


def _require_capability(device: torch.device, needed: tuple[int, int], what: str) -> None:
    rule = f"{what} come with CUDA devices of compute capability {needed[0]}.{needed[1]} and newer"
    if device.type != "cuda":
        raise UnavailableError(f"{rule}, and there is no CUDA device")
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < needed:
        raise UnavailableError(f"{rule}; this one has {major}.{minor}")


def _normal(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)


def _seconds(left: torch.Tensor, right: torch.Tensor) -> float:
    """The fastest of five products."""
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        product = left @ right
        if product.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return min(times)
