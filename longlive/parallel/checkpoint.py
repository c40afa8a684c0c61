"""Checkpoints that are complete or absent, and which of them a run continues from.

A checkpoint is written beside its final name and renamed when it is on the disk, so a kill at any moment leaves the
earlier ones untouched and no torn one under a name that anybody would load. Loading never unpickles code.

A run of one process writes a file, a sharded run a directory (`checkpoint_directory.py`). What is read here is the same
whole tree of either.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import nn

from longlive.data.atomic import write_aside
from longlive.parallel import checkpoint_directory
from longlive.parallel.checkpoint_directory import (
    SUFFIX,
    is_complete,
    name_of_replaced,
    read_tree,
    read_whole,
    standing,
)
from longlive.parallel.full_disk import full_disk, is_full
from longlive.typing import Tensor


class AtomicCheckpointIO(TorchCheckpointIO):
    """One file per checkpoint, written by rank 0, visible in one step. Reads and removes directories as well."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write it.

        Raises:
            OSError: if it cannot be written; what was there before still is. Of a full disk, it says how full.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint_directory.clean(path)
        try:
            with write_aside(path) as temporary:
                with temporary.open("wb") as file:  # by its name, torch would say of a full disk "unexpected pos"
                    torch.save(checkpoint, file)
                if path.is_dir():
                    checkpoint_directory.step_aside(path)
        except OSError as error:
            if is_full(error):
                raise full_disk(path, checkpoint) from error
            raise
        checkpoint_directory.clean(path)

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return load_checkpoint(path)

    def remove_checkpoint(self, path: str | Path) -> None:
        checkpoint_directory.remove(Path(path))


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint, file or directory, onto the CPU; tensors and plain containers only.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is no checkpoint of this library, or torn: the file is named.
    """
    path = existing(path)
    if path.is_dir():
        return read_whole(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a checkpoint: {error}") from error
    if not isinstance(checkpoint, Mapping) or "state_dict" not in checkpoint:
        raise ValueError(f"{path} is no training checkpoint: it holds no state_dict")
    return dict(checkpoint)


def load_weights_and_config(path: str | Path) -> dict[str, Any]:
    """A checkpoint as `load_checkpoint` reads it, without what only a run that goes on needs and most of it is: the
    optimizers' states and a rollout's cache are not read. The tensors of a file are mapped into memory.

    Raises:
        FileNotFoundError, ValueError: as `load_checkpoint`.
    """
    path = existing(path)
    skipped = ("optimizer_states", "stream")
    tree = read_whole(path, skipped) if path.is_dir() else read_tree(path)
    return {key: value for key, value in tree.items() if key not in skipped}


def is_trainable_only(path: str | Path) -> bool:
    """Whether a checkpoint leaves out what its run did not train.

    Raises:
        FileNotFoundError, ValueError: as `load_checkpoint`.
    """
    return bool(read_tree(existing(path)).get("trainable_only"))


def existing(path: str | Path) -> Path:
    """Where the checkpoint of a name is.

    Raises:
        FileNotFoundError: if there is none, or an incomplete directory.
    """
    found = standing(Path(path))
    if found.is_dir() and not is_complete(found):
        raise FileNotFoundError(
            f"no checkpoint {path}: the directory has no {checkpoint_directory.MARKER}, so it was not written to its "
            f"end; give a complete {SUFFIX} directory or a {SUFFIX} file"
        )
    if not is_complete(found):
        raise FileNotFoundError(f"no checkpoint {path}; give a {SUFFIX} file")
    return found


def newest_checkpoint(directory: str | Path) -> Path | None:
    """The complete checkpoint of the most steps in a directory; None if there is none."""
    directory = Path(directory)
    names = {*directory.glob(f"*{SUFFIX}"), *map(name_of_replaced, directory.glob(f".*{SUFFIX}.replaced"))}
    found = {
        int(match[1]): standing(path)
        for path in sorted(names)
        if is_complete(standing(path)) and (match := re.search(r"step[-=](\d+)", path.name))
    }
    return found[max(found)] if found else None


def find_checkpoint(location: str | Path) -> Path:
    """A checkpoint, or the newest one of a directory or of the `checkpoints` folder inside it.

    Raises:
        FileNotFoundError: if there is none.
    """
    location = standing(Path(location))
    if is_complete(location):
        return location
    found = newest_checkpoint(location) or newest_checkpoint(location / "checkpoints")
    if found is None:
        raise FileNotFoundError(
            f"no checkpoint at {location}: give a {SUFFIX} file, a run's directory or its checkpoints directory"
        )
    return found


def with_frozen(module: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's weights, and the module's own frozen ones where it holds the trainable ones alone."""
    frozen = {name: parameter.detach() for name, parameter in module.named_parameters() if not parameter.requires_grad}
    return frozen | dict(weights)


def check_same_shapes(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], most: int = 5) -> None:
    """Compare names and shapes of a model's and a checkpoint's state dict.

    Raises:
        ValueError: naming the first keys that differ.
    """
    differences = [f"{name}: missing in the checkpoint" for name in ours if name not in theirs]
    differences += [f"{name}: not in this model" for name in theirs if name not in ours]
    differences += [
        f"{name}: {tuple(theirs[name].shape)} in the checkpoint, {tuple(value.shape)} in this model"
        for name, value in ours.items()
        if name in theirs and theirs[name].shape != value.shape
    ]
    if differences:
        shown = "; ".join(differences[:most])
        more = f"; and {len(differences) - most} more" if len(differences) > most else ""
        raise ValueError(
            f"the checkpoint is of another model: {shown}{more}. Use the model settings that it was trained "
            "with, or start a new run in another directory"
        )
