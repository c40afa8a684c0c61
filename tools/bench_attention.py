#!/usr/bin/env python
"""How fast teacher-forcing attention is, and what it costs in memory: dense rectangles against a dense mask.

    .venv/bin/python tools/bench_attention.py
    .venv/bin/python tools/bench_attention.py --tokens 512 --threads 2
    .venv/bin/python tools/bench_attention.py --device cuda --dtype bfloat16 --tokens 1024 --heads 24 --head-dim 128

Definitions. *Time*: forward and backward of one self-attention, rotation included, on one sample of `chunks` clean and
as many noisy chunks. All functions run in turn, repeat after repeat, in one process; the table shows medians, and a
speed-up is a ratio of medians. *Useful*: the share of the score entries computed that visibility asks for. *Of ideal*:
the speed-up over the dense mask, relative to what computing only useful entries would give at the mask's speed. *Peak
memory*: what forward and backward add to the process (on CUDA: to the allocator) above the inputs, each function in a
fresh process after a small warm-up.
"""

from __future__ import annotations

import argparse
import statistics
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench_record import header, main, make_parser, summary, time_of
from longlive.callbacks.rank_measure import memory, restart_high_water_mark
from longlive.models.attention import ChunkedAttention, FlexAttention, MaskedAttention, TeacherForcingAttention
from longlive.models.visibility import VisibilityRule, count_entries, count_useful_entries, teacher_forcing_segments
from longlive.models.wan.rope import rotation

FUNCTIONS: dict[str, type[TeacherForcingAttention]] = {
    "dense mask": MaskedAttention,
    "chunked": ChunkedAttention,
    "flex": FlexAttention,
}
BASELINE = "dense mask"


class Case:
    """One attention function with its inputs."""

    def __init__(self, name: str, settings: argparse.Namespace, tokens: int) -> None:
        segments = teacher_forcing_segments(settings.chunks, tokens)
        shots = torch.zeros(1, settings.chunks, dtype=torch.int64)
        self.device = torch.device(settings.device)
        self.attention: Any = FUNCTIONS[name](segments, shots, VisibilityRule())
        num_tokens = 2 * settings.chunks * tokens
        options: dict[str, Any] = {"device": self.device, "dtype": getattr(torch, settings.dtype)}
        generator = torch.Generator(self.device).manual_seed(0)
        shape = (1, num_tokens, settings.heads, settings.head_dim)
        *self.inputs, self.gradient = (torch.randn(shape, generator=generator, **options) for _ in range(4))
        for x in self.inputs:
            x.requires_grad_()
        positions = torch.arange(num_tokens // 2, device=self.device).repeat(2)[None]
        self.rotation = rotation(positions, 1, 1, settings.head_dim)

    def run(self) -> float:
        """Seconds of one forward and backward."""
        for x in self.inputs:
            x.grad = None
        return time_of(self.forward_and_backward, self.device.type)[0]

    def forward_and_backward(self) -> None:
        self.attention(*self.inputs, self.rotation, layer=0).backward(self.gradient)


def peak_memory(name: str, settings: argparse.Namespace) -> int | None:
    """Bytes that a forward and backward add; None where the system does not tell. Runs in its own process."""
    torch.set_num_threads(settings.threads)
    # Threads, libraries and compiled kernels are loaded once, and are not what attention needs.
    Case(name, settings, tokens=16).run()
    case = Case(name, settings, settings.tokens)
    if case.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        case.run()
        return int(torch.cuda.max_memory_allocated() - before)
    # The high-water mark of imports would hide what attention needs.
    before = restart_high_water_mark()
    case.run()
    return memory("VmHWM") - before if before else None


def measure(settings: argparse.Namespace) -> dict[str, Any]:
    """The whole record: what ran where, and one row per function."""
    record = header(settings)
    torch.set_num_threads(settings.threads)
    # On the CPU FlexAttention has no backward.
    names = [name for name in FUNCTIONS if name != "flex" or settings.device == "cuda"]
    peaks = {}
    for name in track(names, "memory", transient=True):
        with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as process:
            peaks[name] = process.submit(peak_memory, name, settings).result()

    cases = {name: Case(name, settings, settings.tokens) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for case in cases.values():
        case.run()
    for _ in track(range(settings.repeats), "time", transient=True):
        for name, case in cases.items():
            seconds[name].append(case.run())

    segments = teacher_forcing_segments(settings.chunks, settings.tokens)
    useful = count_useful_entries(segments, (0,) * settings.chunks, VisibilityRule())
    computed = {name: count_entries(segments) if name == BASELINE else useful for name in names}
    ideal = count_entries(segments) / useful
    medians = {name: statistics.median(seconds[name]) for name in names}
    return record | {
        "useful_share_of_all_entries": useful / count_entries(segments),
        "functions": {
            name: {
                "median_ms": 1e3 * medians[name],
                "min_ms": 1e3 * min(seconds[name]),
                "speedup": medians[BASELINE] / medians[name],
                "speedup_of_ideal": medians[BASELINE] / medians[name] / ideal,
                "useful_share_of_computed": useful / computed[name],
                "peak_memory_bytes": peaks[name],
            }
            for name in names
        },
    }


def show(record: dict[str, Any]) -> None:
    """Print the record as a table."""
    settings = record["settings"]
    table = Table(
        title=f"{settings['chunks']} clean + {settings['chunks']} noisy chunks x {settings['tokens']} tokens, "
        f"{settings['heads']} heads x {settings['head_dim']}, {settings['dtype']}, forward + backward",
        caption=f"{summary(record)}; useful entries {record['useful_share_of_all_entries']:.1%} of all; medians of "
        f"{settings['repeats']}",
    )
    for title in ("function", "median", "fastest", "speed-up", "of ideal", "useful", "peak memory"):
        table.add_column(title, justify="left" if title == "function" else "right")
    for name, row in record["functions"].items():
        peak = row["peak_memory_bytes"]
        table.add_row(
            name,
            f"{row['median_ms']:.1f} ms",
            f"{row['min_ms']:.1f} ms",
            f"{row['speedup']:.2f}x",
            f"{row['speedup_of_ideal']:.0%}",
            f"{row['useful_share_of_computed']:.0%}",
            "unknown" if peak is None else f"{peak / 2**20:.0f} MiB",
        )
    console = Console()
    console.print(table)
    if settings["device"] == "cpu":
        console.print("flex: no backward on the CPU, so not measured", style="dim")


def command_line() -> argparse.ArgumentParser:
    parser = make_parser("bench_attention", __doc__)
    parser.add_argument("--chunks", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=128, help="per chunk")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    return parser


if __name__ == "__main__":
    main(command_line(), measure, show)
