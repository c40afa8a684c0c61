"""`longlive doctor`: what works on this machine, found by doing it, and why the rest does not.

Every row is one *check*: a function that does the thing (imports the package, multiplies the matrices, encodes three
frames) and returns a line about it, or raises. A raised exception becomes a row that says "no" and gives the reason, so
one broken part never hides the others; the exit code is 0 whatever was found. Nothing is concluded from version numbers
or availability flags alone: they are wrong in both directions (a package may be installed whose shared libraries are
not, and raise anything at all when imported).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import io
import json
import logging
import math
import os
import platform
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from longlive import __version__

PACKAGES = {
    "torch": "torch",
    "lightning": "lightning",
    "torchao": "torchao",
    "torchdata": "torchdata",
    "torchmetrics": "torchmetrics",
    "diffusers": "diffusers",
    "transformers": "transformers",
    "peft": "peft",
    "safetensors": "safetensors",
    "webdataset": "webdataset",
    "av": "av",
    "decord": "decord",
    "einops": "einops",
    "ftfy": "ftfy",
    "hydra-core": "hydra",
    "omegaconf": "omegaconf",
    "jaxtyping": "jaxtyping",
    "numpy": "numpy",
    "pillow": "PIL",
    "rich": "rich",
    "tensorboard": "tensorboard",
}
"""Distributions that longlive depends on, and the module that each is imported as."""

EXTRAS = {
    "transformer-engine": ("transformer_engine.pytorch", "nvfp4"),
    "hydra-submitit-launcher": ("hydra_plugins.hydra_submitit_launcher", "slurm"),
}
"""Optional distributions: the module of each, and the extra of longlive that installs it."""

ENCODERS = {
    "h264": ("libx264", "h264_nvenc", "libopenh264"),
    "hevc": ("libx265", "hevc_nvenc"),
    "vp9": ("libvpx-vp9",),
    "av1": ("libsvtav1", "libaom-av1", "av1_nvenc"),
}
"""Video codecs that longlive reads, and the encoders that can write them, best first."""

MIN_PSNR = 25.0
"""Decibels under which a round trip has lost the picture."""


class UnavailableError(RuntimeError):
    """Something does not work here, for a known reason."""


@dataclass(frozen=True)
class Finding:
    """One row of the report."""

    group: str
    name: str
    works: bool
    detail: str


@dataclass(frozen=True)
class Check:
    """One thing to try. The probe returns a line about what works, or raises what is wrong."""

    group: str
    name: str
    probe: Callable[[], str]

    def run(self) -> Finding:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return Finding(self.group, self.name, True, self.probe())
        except Exception as error:  # anything: `import transformer_engine` raises RuntimeError without CUDA's libraries
            return Finding(self.group, self.name, False, _reason(error))


def report() -> Iterator[Finding]:
    """Run every check, in the order in which they are printed; a first compile alone can take half a minute."""
    for check in checks():
        yield check.run()


def checks() -> list[Check]:
    """Every check, for the best device of this machine."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = [
        Check("versions", "python", lambda: f"{platform.python_version()} on {platform.platform()}"),
        Check("versions", "longlive", lambda: __version__),
    ]
    found += [Check("versions", name, partial(probe_package, name, module)) for name, module in PACKAGES.items()]
    found += [
        Check("extras", name, partial(probe_package, name, module, extra)) for name, (module, extra) in EXTRAS.items()
    ]
    found += [
        Check("devices", "cpu", probe_cpu),
        Check("devices", "cuda", probe_cuda),
        Check("devices", "nccl", probe_nccl),
    ]
    found += [
        Check("devices", f"cuda:{index}", partial(probe_cuda_device, index))
        for index in range(torch.cuda.device_count())
    ]
    found += [
        Check("precisions", "fp32", partial(probe_matmul, torch.float32, device)),
        Check("precisions", "bf16", partial(probe_matmul, torch.bfloat16, device)),
        Check("precisions", "fp8", partial(probe_fp8, device)),
        Check("precisions", "nvfp4", partial(probe_nvfp4, device)),
    ]
    found += [
        Check("kernels", f"SDPA {name}", partial(probe_sdpa, backend, device))
        for name, backend in (
            ("flash", SDPBackend.FLASH_ATTENTION),
            ("cudnn", SDPBackend.CUDNN_ATTENTION),
            ("memory efficient", SDPBackend.EFFICIENT_ATTENTION),
            ("math", SDPBackend.MATH),
        )
    ]
    found += [
        Check("kernels", "FlexAttention forward", partial(probe_flex_attention, device, backward=False)),
        Check("kernels", "FlexAttention backward", partial(probe_flex_attention, device, backward=True)),
        Check("kernels", "torch.compile", partial(probe_compile, device)),
    ]
    for codec in ENCODERS:
        found.append(Check("video codecs", f"encode {codec}", partial(probe_encode, codec)))
        found.append(Check("video codecs", f"decode {codec}", partial(probe_decode, codec)))
    found.append(Check("video codecs", "decode with decord", probe_decord))
    return found


def probe_package(distribution: str, module: str, extra: str | None = None) -> str:
    """The version of a package that can be imported."""
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        fix = f"pip install longlive[{extra}]" if extra else "pip install longlive"
        raise UnavailableError(f"not installed; {fix}") from None
    try:
        importlib.import_module(module)
    except Exception as error:
        raise UnavailableError(f"{version} is installed, but import {module} fails: {_reason(error)}") from error
    return version


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
    if device.type == "cpu" and not (
        compiler := os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    ):
        raise UnavailableError("needs a C++ compiler, and there is neither g++ nor clang++; install g++ or set CXX")
    begin = time.perf_counter()
    numbers = torch.arange(8.0, device=device)
    result = torch.compile(lambda x: torch.sin(x) + 1.0)(numbers)
    torch.testing.assert_close(result, torch.sin(numbers) + 1.0)
    backend = "Triton" if device.type == "cuda" else compiler
    return f"with {backend}; {time.perf_counter() - begin:.1f} s for a first small function"


def probe_encode(codec: str) -> str:
    content, encoder = encode_video(codec)
    return f"{encoder} in mp4, {len(content)} bytes for 3 frames"


def probe_decode(codec: str) -> str:
    import av

    try:
        content, _ = encode_video(codec)
    except Exception as error:
        raise UnavailableError("not tried: nothing here could encode a file for it") from error
    with av.open(io.BytesIO(content), "r") as container:
        decoder = container.streams.video[0].codec_context.codec.name
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    return f"{decoder}, 3 frames, {_psnr(frames):.0f} dB"


def probe_decord() -> str:
    import decord

    content, _ = encode_video("h264")
    frames = decord.VideoReader(io.BytesIO(content), num_threads=1).get_batch([0, 1, 2]).asnumpy()
    return f"h264 from memory, 3 frames, {_psnr(frames):.0f} dB"


def encode_video(codec: str) -> tuple[bytes, str]:
    """Three known frames as an mp4 in memory, and the encoder that wrote it.

    Raises:
        UnavailableError: if every encoder of the codec fails; the reasons by name.
    """
    import av

    reasons = []
    for encoder in ENCODERS[codec]:
        try:
            buffer = io.BytesIO()
            with _silenced_native_stderr(), av.open(buffer, "w", format="mp4") as container:
                # Its statistics come later, when the encoder is freed.
                options = {"x265-params": "log-level=none"} if encoder == "libx265" else {}
                stream = container.add_stream(encoder, rate=24, options=options)
                assert isinstance(stream, av.VideoStream)
                stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
                for pixels in _test_frames():
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
                container.mux(stream.encode(None))
            return buffer.getvalue(), encoder
        except Exception as error:
            reasons.append(f"{encoder}: {_reason(error)}")
    raise UnavailableError("; ".join(reasons))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report as tables, or with `--json` as a list of objects; returns 0."""
    parser = argparse.ArgumentParser(prog="longlive doctor", description="What works on this machine, and why not.")
    parser.add_argument("--json", action="store_true", help="print a list of {group, name, works, detail}")
    options = parser.parse_args(arguments)
    with _quiet_logs():
        if options.json:
            print(json.dumps([asdict(finding) for finding in report()], indent=2))
        else:
            _print_tables()
    return 0


def _print_tables() -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("", "works", "detail"):
        table.add_column(heading, no_wrap=heading == "works")
    group = None
    all_checks = checks()
    with Console(stderr=True).status("checking") as status:
        for check in all_checks:
            status.update(f"checking {check.name}")
            finding = check.run()
            if finding.group != group:
                group = finding.group
                table.add_row(Text(group, style="bold"))
            mark = Text("yes", style="green") if finding.works else Text("no", style="red")
            table.add_row(f"  {finding.name}", mark, Text(finding.detail))
    console.print(table)


def _reason(error: BaseException) -> str:
    """One line of at most 300 characters; a known reason speaks for itself, other errors with their type."""
    message = " ".join(str(error).split())
    if not isinstance(error, UnavailableError):
        message = f"{type(error).__name__}: {message}" if message else type(error).__name__
    return message if len(message) <= 300 else f"{message[:297]}..."


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


def _test_frames() -> np.ndarray:
    """Three frames of 64 x 64: a smooth ramp that moves."""
    y, x = np.mgrid[:64, :64]
    frames = [np.stack((2 * x + 20 * i, 2 * y + 20 * i, x + y + 20 * i), axis=-1) for i in range(3)]
    return np.stack(frames).astype(np.uint8)


def _psnr(frames: np.ndarray) -> float:
    expected = _test_frames()
    if frames.shape != expected.shape:
        raise UnavailableError(f"frames came back as {frames.shape} instead of {expected.shape}")
    error = float(np.mean((frames.astype(np.float64) - expected) ** 2))
    psnr = 20 * math.log10(255) - 10 * math.log10(error) if error else math.inf
    if psnr < MIN_PSNR:
        raise UnavailableError(f"frames came back wrong, at {psnr:.0f} dB")
    return psnr


@contextlib.contextmanager
def _quiet_logs() -> Iterator[None]:
    """Packages log warnings while they are imported; what is wrong with them is said in the report."""
    previous = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(previous)


@contextlib.contextmanager
def _silenced_native_stderr() -> Iterator[None]:
    """Encoders write their banners straight to file descriptor 2."""
    sys.stderr.flush()
    saved = os.dup(2)
    try:
        with open(os.devnull, "w") as devnull:
            os.dup2(devnull.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
