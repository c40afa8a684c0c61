"""What a checkpoint's weights go over.

A checkpoint may hold what its run trained alone (`trainable_only`). All else is as the run started: from another
checkpoint (`initialise_from` of its config), which may be such a one too, or from a file of weights. The config names
the very checkpoint; a run's directory would stand for another one as soon as that run is trained further.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from longlive.parallel.checkpoint import existing, find_checkpoint
from longlive.parallel.checkpoint_directory import read_tree


@dataclass(frozen=True)
class Sources:
    """Weights that are taken one over the other.

    Attributes:
        weights: a file or folder, the first of all; None: there is none.
        checkpoints: the oldest first.
    """

    weights: str | None = None
    checkpoints: tuple[Path, ...] = ()


def sources_under(checkpoint: Mapping[str, Any], path: Path) -> Sources:
    """What a checkpoint's weights go over; nothing, if it holds all of them.

    Args:
        checkpoint: its tree, perhaps without data.
        path: what to call it.

    Raises:
        ValueError: if something of it is not there any more.
    """
    if not checkpoint.get("trainable_only"):
        return Sources()
    config = checkpoint.get("config") or {}
    location = config.get("initialise_from")
    if location is None:
        return Sources(weights=config.get("module", {}).get("weights"))
    try:
        return sources_of(find_checkpoint(location))
    except FileNotFoundError as error:
        raise ValueError(f"{lost(path, location)}; put it there again, or a link to where it is now") from error


def sources_of(path: Path) -> Sources:
    """What another run takes that starts from a checkpoint: all that it goes over, and itself.

    Raises:
        FileNotFoundError, ValueError: if it is not there, or is over weights that are not.
    """
    checkpoint = read_tree(existing(path))
    under = sources_under(checkpoint, path)
    if checkpoint.get("trainable_only") and under == Sources():
        raise ValueError(
            f"{path} holds what its run trained alone, over initial weights, which are that run's own; store all of it "
            "with strategy.checkpoints.trainable_only=false, or start from a run that began with weights"
        )
    return replace(under, checkpoints=(*under.checkpoints, path))


def lost(path: Path, location: str) -> str:
    """The first half of an error."""
    return (
        f"{path} holds what its run trained alone, over the weights of initialise_from={location}, which is not there "
        "any more"
    )
