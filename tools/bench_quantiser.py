"""The quantiser's section of `bench_precision.py`: seconds to encode one matrix in NVFP4, by
`longlive.precision.nvfp4.format` and by a plain torch version, which writes the formula down candidate by candidate.

*Throughput* counts the bytes of the input once. *Processor time* is what the process computed, on all its threads:
other jobs on the machine change it least. *Differing blocks*: the plain version sums a block's errors in whatever order
torch does, which can turn a decision between two nearly equal errors.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from bench_record import time_of
from longlive.precision.nvfp4.format import BLOCK, LIMITS, max_magnitude, quantise

QUANTISER_RULES = ("static_6", "mse")


def naive_quantise(x: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    """Packed codes and scales of a matrix, 1 x 16 blocks, each operation over the whole matrix."""
    M, E = LIMITS[rule]
    amax = x.float().abs().max()
    S = (M * E / amax).clamp(max=torch.finfo(torch.float32).max)
    blocks = x.float().unflatten(-1, (-1, BLOCK))
    h = blocks.abs().amax(-1, keepdim=True) / M * S
    elements = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], device=x.device)
    candidates = []
    for factor in (1.0, 1.5) if E == 256 else (1.0,):
        scale = (factor * h).clamp(max=448).to(torch.float8_e4m3fn)
        inverse = (1 / (scale.float() * (1 / S))).clamp(max=torch.finfo(torch.float32).max)
        scaled = (blocks * inverse).clamp(-6, 6)
        magnitude = scaled.abs()
        code = torch.zeros_like(magnitude, dtype=torch.uint8)
        for index, midpoint in enumerate((0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)):
            code += magnitude >= midpoint if index % 2 else magnitude > midpoint
        decoded = elements[code.long()] * scaled.sign() * scale.float() * amax / (M * E)
        error = (decoded - blocks).square().sum(-1, keepdim=True)
        candidates.append((code | (scaled.signbit().to(torch.uint8) << 3), scale.view(torch.uint8), error))
    code, scale_bits, error = candidates[0]
    for other_code, other_scale, other_error in candidates[1:]:
        code = torch.where(other_error < error, other_code, code)
        scale_bits = torch.where(other_error < error, other_scale, scale_bits)
    codes = code.flatten(-2)
    return codes[..., 0::2] | (codes[..., 1::2] << 4), scale_bits.squeeze(-1).view(torch.float8_e4m3fn)


def differing_blocks(x: Tensor, rule: str) -> int:
    """How many blocks the two versions encode differently."""
    quantised = quantise(x, rule)
    packed, scales = naive_quantise(x, rule)
    different = (packed != quantised.packed).unflatten(-1, (-1, BLOCK // 2)).any(-1)
    return int((different | (scales.view(torch.uint8) != quantised.scales.view(torch.uint8))).sum())


def measure_quantiser(settings: argparse.Namespace) -> dict[str, Any]:
    """One row per version and rule."""
    generator = torch.Generator(settings.device).manual_seed(0)
    shape = (settings.rows, settings.columns)
    x = torch.randn(shape, generator=generator, device=settings.device).to(getattr(torch, settings.dtype))
    versions: dict[str, Callable[[], Any]] = {"amax alone": partial(max_magnitude, x)}
    for rule in QUANTISER_RULES:
        versions[f"naive {rule}"] = partial(naive_quantise, x, rule)
        versions[f"longlive {rule}"] = partial(quantise, x, rule)
        versions[f"longlive {rule}, tiles"] = partial(quantise, x, rule, tiles=True)
    for version in versions.values():
        version()
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in versions}
    for _ in track(range(settings.repeats), "quantiser", transient=True):
        for name, version in versions.items():
            seconds[name].append(time_of(version, settings.device))
    rows = {}
    for name, times in seconds.items():
        wall, processor = (statistics.median(column) for column in zip(*times, strict=True))
        rows[name] = {"median_ms": 1e3 * wall, "processor_ms": 1e3 * processor, "gb_per_s": x.nbytes / wall / 1e9}
    for rule in QUANTISER_RULES:
        naive = rows[f"naive {rule}"]
        for name in (f"longlive {rule}", f"longlive {rule}, tiles"):
            rows[name]["speedup"] = naive["median_ms"] / rows[name]["median_ms"]
            rows[name]["speedup_of_processor_time"] = naive["processor_ms"] / rows[name]["processor_ms"]
    return {
        "versions": rows,
        "num_blocks": x.numel() // BLOCK,
        "differing_blocks": {rule: differing_blocks(x, rule) for rule in QUANTISER_RULES},
    }


def show_quantiser(record: dict[str, Any], settings: dict[str, Any], console: Console) -> None:
    """Print the section as a table."""
    table = Table(
        title=f"NVFP4 quantiser, {settings['rows']} x {settings['columns']} {settings['dtype']}",
        caption=f"differing blocks of {record['num_blocks']}: {record['differing_blocks']}",
    )
    for title in ("version", "median", "processor", "throughput", "speed-up", "by processor time"):
        table.add_column(title, justify="left" if title == "version" else "right")
    for name, row in record["versions"].items():
        table.add_row(
            name,
            f"{row['median_ms']:.2f} ms",
            f"{row['processor_ms']:.2f} ms",
            f"{row['gb_per_s']:.2f} GB/s",
            f"{row['speedup']:.2f}x" if "speedup" in row else "",
            f"{row['speedup_of_processor_time']:.2f}x" if "speedup" in row else "",
        )
    console.print(table)
