"""What a folder holds, and processes that write to one and may be killed."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()
    }


def in_a_process(function: Callable[[], object]) -> int | None:
    """Run a function in a forked process; its exit code (negative: the signal that ended it)."""
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    process.join(60)
    return process.exitcode
