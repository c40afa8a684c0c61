"""What the benchmarks share: the clock, and a record that says which machine, which code and which settings."""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from longlive.doctor.machine import commit, processor_name

PACKAGES = ("torch", "lightning", "torchao", "triton")


def make_parser(name: str, description: str) -> argparse.ArgumentParser:
    """A command line with the settings that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1, help="per process")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--commit", default=commit(Path(__file__)), help="of the code, where this is no checkout")
    parser.add_argument("--json", type=Path, default=Path(f"runs/{name}.json"))
    return parser


def header(settings: argparse.Namespace, num_ranks: int = 1) -> dict[str, Any]:
    """What ran where; made before anything is measured, for the load that others put on the machine."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": settings.commit,
        "hardware": hardware(settings, num_ranks),
        "load_average": os.getloadavg()[0],
        "versions": {"python": platform.python_version()} | _versions(),
        "settings": {name: value for name, value in vars(settings).items() if name not in ("json", "commit")},
    }


def hardware(settings: argparse.Namespace, num_ranks: int = 1) -> str:
    """The name of what computes."""
    if settings.device == "cuda":
        gpus = f"{num_ranks} x " if num_ranks > 1 else ""
        return f"{gpus}{torch.cuda.get_device_name()}"
    ranks = f"{num_ranks} ranks x " if num_ranks > 1 else ""
    return f"{processor_name()}, {ranks}{settings.threads} of {os.cpu_count()} cores"


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def summary(record: dict[str, Any]) -> str:
    """One line of the header, for under a table."""
    return (
        f"{record['hardware']}, load average before {record['load_average']:.1f}; torch {record['versions']['torch']}; "
        f"commit {record['commit']}"
    )


def time_of(function: Callable[[], Any], device: str) -> tuple[float, float]:
    """Seconds by the clock (the GPU's, on CUDA) and of the processor."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        processor = time.process_time()
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3, time.process_time() - processor
    clock, processor = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - clock, time.process_time() - processor


def main(
    parser: argparse.ArgumentParser,
    measure: Callable[[argparse.Namespace], dict[str, Any]],
    show: Callable[[dict[str, Any]], None],
) -> None:
    """The benchmark as a command: measure, print, and keep the record as JSON."""
    settings = parser.parse_args()
    record = measure(settings)
    show(record)
    settings.json.parent.mkdir(parents=True, exist_ok=True)
    settings.json.write_text(json.dumps(record, indent=2) + "\n")
    Console().print(f"written to {settings.json}")
