#!/usr/bin/env python
"""What the precision of the roles does to a distillation, and to the memory that their weights take.

    OMP_NUM_THREADS=1 .venv/bin/python tools/measure_role_precision.py runs/toyworld_long
    .venv/bin/python tools/measure_role_precision.py runs/toyworld_long --steps 20 --overrides data.batch_size=2

Distils a run (the first argument, as `initialise_from` takes it) for a few steps, with the roles in bfloat16, then one
role after the other in NVFP4; all from the same weights, prompts and draws. *Loss* is its mean over the last steps in
which the role learned. *Apart* is how far that is from the first row's, relative; the goal is 5 %.

*Bytes* are those of `longlive doctor precision`, in the 5B model: bases and adapters, over a bfloat16 copy of the
network per role. *Unshared*: if every role had a base for itself.

`--overrides` are those of `longlive train`. Where NVFP4 is emulated, its losses are real, its seconds are not.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table

from bench_record import header, main, make_parser, summary
from longlive.adapters.lora import LoRASettings
from longlive.config import compose, instantiate
from longlive.doctor.role_memory import RoleMemory, role_memory
from longlive.models.wan.config import WanConfig
from longlive.modules.roles import ROLES, read_precisions
from longlive.parallel.checkpoint import find_checkpoint
from longlive.train import initialise, make_trainer

LEARN = ("student", "critic")
COMBINATIONS = ((), ("student",), ("student", "teacher"), ("student", "teacher", "critic"))
"""Which roles are in NVFP4."""


class Losses(Callback):
    """The loss of every role in the steps in which it learned."""

    def __init__(self) -> None:
        self.of: dict[str, dict[int, float]] = {role: {} for role in LEARN}
        """By role and step, counted from 0."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for role, losses in self.of.items():
            if f"{role}/loss" in outputs["values"]:
                losses[trainer.global_step - 1] = outputs["values"][f"{role}/loss"]


def distil(settings: argparse.Namespace, precisions: dict[str, str]) -> dict[str, Any]:
    """One run."""
    config = compose(
        "train",
        [
            f"experiment={settings.experiment}",
            f"precision={settings.precision}",
            f"trainer.max_steps={settings.steps}",
            f"trainer.accelerator={'gpu' if settings.device == 'cuda' else 'cpu'}",
            "++trainer.enable_checkpointing=false",
            "++trainer.enable_progress_bar=false",
            *(f"+module.role_precision.{role}={name}" for role, name in precisions.items()),
            *settings.overrides,
        ],
    )
    config.callbacks, config.logger = {}, {}
    module, datamodule = instantiate(config.module), instantiate(config.data)
    trainer, losses = make_trainer(config), Losses()
    trainer.callbacks.append(losses)
    initialise(trainer, module, find_checkpoint(settings.checkpoint))
    start = time.perf_counter()
    trainer.fit(module, datamodule)
    return {"losses": losses.of, "seconds": time.perf_counter() - start, "bases": module.held_as()}


def memory(precisions: dict[str, str], of_run: str) -> RoleMemory:
    """Of the 5B model."""
    lora = {role: LoRASettings() for role in LEARN}
    return role_memory(WanConfig.ti2v_5b(), lora, read_precisions(precisions, 0), of_run)


def mean_from(losses: dict[int, float], first: int) -> float:
    """Over the steps from `first` on."""
    return statistics.mean(loss for step, loss in losses.items() if step >= first)


def measure(settings: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(settings.threads)
    record = header(settings)
    rows = []
    for roles in COMBINATIONS:
        precisions = dict.fromkeys(roles, "nvfp4")
        run = distil(settings, precisions)
        held = memory(precisions, settings.precision)
        means = {role: mean_from(losses, settings.steps - settings.last) for role, losses in run["losses"].items()}
        rows.append(
            {
                "precision": {role: precisions.get(role, settings.precision) for role in ROLES},
                "mean": means,
                "apart": {role: mean / rows[0]["mean"][role] - 1 if rows else 0.0 for role, mean in means.items()},
                "bytes": held.total,
                "of_copies": held.total / held.copies,
                "of_copies_unshared": held.unshared / held.copies,
                **run,
            }
        )
    return record | {"rows": rows, "summary": summary(record)}


def show(record: dict[str, Any]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("in NVFP4", "student", "apart", "critic", "apart", "bytes (5B)", "of 3 copies", "unshared", "s"):
        table.add_column(heading, no_wrap=True)
    for row in record["rows"]:
        chosen = [role for role, name in row["precision"].items() if name == "nvfp4"]
        losses = (f"{row[key][role]:{style}}" for role in LEARN for key, style in (("mean", ".5f"), ("apart", "+.1%")))
        table.add_row(
            ", ".join(chosen) or "none",
            *losses,
            f"{row['bytes'] / 2**30:.2f} GiB",
            f"{row['of_copies']:.3f}x",
            f"{row['of_copies_unshared']:.3f}x",
            f"{row['seconds']:.0f}",
        )
    console = Console(width=140)
    console.print(table)
    console.print(record["summary"])


def command_line() -> argparse.ArgumentParser:
    parser = make_parser("role_precision", __doc__ or "")
    parser.add_argument("checkpoint", help="the run that is distilled")
    parser.add_argument("--experiment", default="toyworld_distill_4step")
    parser.add_argument("--precision", default="bf16-mixed", help="of the run, and so of roles that are not in NVFP4")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--last", type=int, default=25, help="steps that the mean is over")
    parser.add_argument("--overrides", nargs="*", default=[], metavar="key=value", help="of longlive train")
    return parser


if __name__ == "__main__":
    main(command_line(), measure, show)
