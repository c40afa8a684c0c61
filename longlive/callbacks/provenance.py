"""Where a run comes from, beside its curves in TensorBoard: its config, as text and as hyper-parameters, the command,
versions, and the commit of the checkout that it was started in.

Which samples a step trained on need not be written down: they are a function of (seed, epoch, position). The text says
so, and `longlive doctor run <dir> --step=N` works them out.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard.summary import hparams

PACKAGES = (
    "longlive", "torch", "lightning", "torchao", "transformer-engine", "diffusers", "transformers", "peft",
    "webdataset", "av", "numpy",
)  # fmt: skip
"""Whose version may change what a run does."""

SAMPLES = """Optimizer step s (counted from 0) trains on the positions s G .. (s + 1) G - 1 of the data, where G is the
number of clips per step. Position p is sample `epoch_order(N, seed, p // N)[p % N]` of the N samples of the shards
(`longlive.data.order.samples_at`; with reader=indexed). `longlive doctor run <directory> --step=s` prints them."""


def origin(directory: Path) -> dict[str, Any]:
    """Command, versions and commit.

    Args:
        directory: that the run is started in.
    """
    return {"command": list(sys.argv), "versions": versions(), "commit": commit(directory)}


def versions() -> dict[str, str]:
    """Of Python and of what is installed of `PACKAGES`."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit(directory: Path, seconds: float = 5.0) -> str | None:
    """The commit of the checkout that a directory is in, `-dirty` if files that it tracks differ. None without a
    checkout or git, or if git does not answer in so many seconds: a run does not fail for that."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=directory,
            capture_output=True,
            text=True,
            timeout=seconds,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return described.stdout.strip() or None if described.returncode == 0 else None


class Provenance(Callback):
    """Writes it once per start, at the step at which the start begins. `longlive train` adds it to every run.

    Args:
        config: resolved, plain.
        origin: see `origin`.
    """

    def __init__(self, config: Mapping[str, Any], origin: Mapping[str, Any]) -> None:
        self.config = config
        self.origin = origin

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            if not isinstance(logger, TensorBoardLogger):
                continue
            writer = logger.experiment
            texts = {"config": _as_code(self.config), "origin": _as_code(self.origin), "samples": SAMPLES}
            for name, text in texts.items():
                writer.add_text(f"run/{name}", text, global_step=trainer.global_step)
            # By hand: `add_hparams` opens a run of its own, and Lightning's would add a point to a curve.
            for summary in hparams(dict(_flat(self.config)), {"train/loss": 0.0}):
                writer.file_writer.add_summary(summary, trainer.global_step)


def _as_code(tree: Mapping[str, Any]) -> str:
    """Markdown that shows JSON as it is."""
    return "".join(f"    {line}\n" for line in json.dumps(dict(tree), indent=2, default=str).splitlines())


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, int | float | str]]:
    """Scalars of a config by dotted name; lists and truth values as text."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(tree, int | float | str) and not isinstance(tree, bool):
        yield prefix, tree
    elif tree is not None:
        yield prefix, str(tree)
