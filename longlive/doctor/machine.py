"""What a benchmark's record says of where it ran."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path


def processor_name() -> str:
    """The CPU's name, or at least its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def commit(file: Path) -> str:
    """The commit of a file's checkout, marked if the tree differs from it; `unknown` without one, or without git."""
    if shutil.which("git") is None:
        return "unknown"
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"],
        cwd=file.parent,
        capture_output=True,
        text=True,
    )
    return described.stdout.strip() or "unknown"
