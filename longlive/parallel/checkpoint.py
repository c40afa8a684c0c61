"""Checkpoints that are complete or absent, and which of them a run continues from.

A checkpoint is written beside its final name and renamed when it is on the disk, so a kill at any moment leaves the
earlier ones untouched and no torn file under a name that anybody would load. Loading never unpickles code.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from longlive.data.atomic import write_aside

SUFFIX = ".ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """One file per checkpoint, written by rank 0, visible in one step."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with write_aside(path) as temporary:
            torch.save(checkpoint, temporary)

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return load_checkpoint(path)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; tensors and plain containers only.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if the file is no checkpoint of this library.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}; give a {SUFFIX} file")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a checkpoint: {error}") from error
    if not isinstance(checkpoint, Mapping) or "state_dict" not in checkpoint:
        raise ValueError(f"{path} is no training checkpoint: it holds no state_dict")
    return dict(checkpoint)


def newest_checkpoint(directory: str | Path) -> Path | None:
    """The complete checkpoint of the most steps in a directory; None if there is none."""
    found = {
        int(match[1]): path
        for path in sorted(Path(directory).glob(f"*{SUFFIX}"))
        if (match := re.search(r"step[-=](\d+)", path.name))
    }
    return found[max(found)] if found else None


def find_checkpoint(location: str | Path) -> Path:
    """A checkpoint file, or the newest one of a directory or of the `checkpoints` folder inside it.

    Raises:
        FileNotFoundError: if there is none.
    """
    location = Path(location)
    if location.is_file():
        return location
    found = newest_checkpoint(location) or newest_checkpoint(location / "checkpoints")
    if found is None:
        raise FileNotFoundError(
            f"no checkpoint at {location}: give a {SUFFIX} file, a run's directory or its checkpoints directory"
        )
    return found
