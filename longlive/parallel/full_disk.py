"""A disk that is full while a checkpoint is written: which file, how much it needs, how much there is."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

_FULL = {errno.ENOSPC, errno.EDQUOT}


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or what it was raised from, is the system's about space or a quota."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def full_disk(path: Path, tree: Any) -> OSError:
    """The error to raise. What was begun is removed by now, so what is free is what the next attempt has.

    Args:
        path: of the checkpoint.
        tree: what it was to hold, of all ranks.
    """
    needed, free = num_bytes(tree), shutil.disk_usage(path.parent).free
    return OSError(
        errno.ENOSPC,
        f"the disk is full: a checkpoint needs about {needed:,} bytes, and {free:,} are free in {path.parent} (or "
        "fewer, where there is a quota). It was not written, and what was there before still is; make room, and start "
        "the same command again",
        str(path),
    )


def num_bytes(tree: Any) -> int:
    """Of all tensors in a tree, sharded ones as a whole; those without data have no bytes."""
    if isinstance(tree, torch.Tensor):
        return 0 if tree.is_meta else tree.numel() * tree.element_size()
    if isinstance(tree, Mapping):
        return sum(num_bytes(value) for value in tree.values())
    if isinstance(tree, list | tuple):
        return sum(num_bytes(value) for value in tree)
    return 0
