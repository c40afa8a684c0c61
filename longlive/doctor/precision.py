"""`longlive doctor precision`: which layers a run multiplies in low precision, which not and why, and who multiplies.

    longlive doctor precision experiment=... precision=nvfp4

Of a distillation also which roles share a base, and the bytes of weights that they hold (`role_memory.py`).

Every override is one of `longlive train`. The network is built without weights, so the 5B model takes a second; what
`train` would refuse about its precision is refused in the same words, with exit code 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from lightning.pytorch.plugins import Precision
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from rich.text import Text

from longlive.adapters.lora import LoRASettings
from longlive.config import compose, instantiate
from longlive.doctor.role_memory import RoleMemory, role_memory
from longlive.models.wan.config import WanConfig
from longlive.models.wan.model import CausalWan
from longlive.modules.roles import CRITIC, STUDENT, read_precisions
from longlive.precision.plugin import LinearPrecision
from longlive.precision.selection import Layer, LayerSelection, grouped


@dataclass(frozen=True)
class PrecisionReport:
    """What a precision does to a network.

    Attributes:
        precision: its name.
        backend: who multiplies in the wrapped layers; None: none is wrapped.
        layers: every layer with a weight matrix.
        roles: what those of a distillation hold; None: there are none.
    """

    precision: str
    backend: str | None
    layers: tuple[Layer, ...]
    roles: RoleMemory | None = None

    @property
    def share(self) -> float:
        """Of these layers' weights, those of wrapped ones."""
        sizes = [(layer.in_features * layer.out_features, layer.reason is None) for layer in self.layers]
        return sum(size for size, wrapped in sizes if wrapped) / sum(size for size, _ in sizes)


def make_report(overrides: Sequence[str], config_directory: str | None = None) -> PrecisionReport:
    """What `longlive train <overrides>` would do on this machine.

    Raises:
        ValueError: if the precision is refused.
    """
    config = compose("train", overrides, config_directory)
    with torch.device("meta"):
        network = CausalWan(instantiate(config.model))
    precision = instantiate(config.precision)
    roles = roles_of(config, network.config, precision) if "role_precision" in config.module else None
    if isinstance(precision, LinearPrecision):
        precision.convert_module(network)
        return PrecisionReport(precision.precision, precision.backend_name, precision.layers, roles)
    reason = f"precision={precision} wraps none"
    layers = tuple(replace(layer, reason=reason) for layer in LayerSelection(1).of(network))
    return PrecisionReport(precision, None, layers, roles)


def roles_of(config: DictConfig, model: WanConfig, precision: Precision | str) -> RoleMemory:
    """What the roles of a distillation hold.

    Raises:
        ValueError: if the precision of one is refused.
    """
    module = config.module
    lora: LoRASettings = instantiate(module.lora)
    critic_lora = lora if module.critic_lora is None else instantiate(module.critic_lora)
    own = {
        str(role): instantiate(value) if isinstance(value, DictConfig) else value
        for role, value in (module.role_precision or {}).items()
    }
    return role_memory(model, {STUDENT: lora, CRITIC: critic_lora}, read_precisions(own, config.seed), precision)


def main(arguments: Sequence[str]) -> int:
    """Print the report as a table, with `--json` as JSON.

    Returns:
        0; 1 if the precision is refused.
    """
    parser = argparse.ArgumentParser(
        prog="longlive doctor precision",
        description="Which layers multiply in low precision: longlive doctor precision experiment=... precision=nvfp4",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of longlive train")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--config-dir", help="a folder of your own config files")
    options = parser.parse_intermixed_args(arguments)
    try:
        report = make_report(options.overrides, options.config_dir)
    except ValueError as error:
        print(f"longlive doctor precision: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(as_dict(report), indent=2))
    else:
        print_report(report, Console())
    return 0


def as_dict(report: PrecisionReport) -> dict[str, Any]:
    """The report as plain containers; `reason` is null for a wrapped layer."""
    return {
        "precision": report.precision,
        "backend": report.backend,
        "share_of_weights": report.share,
        "layers": [asdict(layer) for layer in report.layers],
        "roles": None if report.roles is None else roles_as_dict(report.roles, report.precision),
    }


def roles_as_dict(memory: RoleMemory, of_run: str) -> dict[str, Any]:
    """Bases and bytes as plain containers."""
    return {
        "bases": [
            {"roles": list(base.roles), "precision": name_of(base.precision, of_run), "bytes": held}
            for base, held in memory.bases
        ],
        "adapters": dict(memory.adapters),
        "bytes": memory.total,
        "bfloat16_copies": memory.copies,
    }


def name_of(precision: Precision | str | None, of_run: str) -> str:
    """A base's precision."""
    if precision is None:
        return of_run
    return precision if isinstance(precision, str) else str(precision.precision)


def print_report(report: PrecisionReport, console: Console) -> None:
    """The layers as a table, equal ones of several blocks in one row."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("layer", "number", "in", "out"):
        table.add_column(heading, justify="left" if heading == "layer" else "right", no_wrap=True)
    table.add_column("wrapped", no_wrap=True)
    table.add_column("why not")
    for row in grouped(report.layers):
        mark = Text("yes", style="green") if row.reason is None else Text("no")
        sizes = (f"{size:,}" for size in (row.number, row.in_features, row.out_features))
        table.add_row(Text(row.name), *sizes, mark, Text(row.reason or ""))
    console.print(table)
    wrapped = sum(layer.reason is None for layer in report.layers)
    console.print(
        f"precision={report.precision}: {wrapped} of {len(report.layers)} layers, {report.share:.1%} of their weights, "
        + (f"multiply in {report.precision}, by the backend {report.backend}." if report.backend else "are wrapped."),
        highlight=False,
        soft_wrap=True,
    )
    if report.roles is not None:
        print_roles(report.roles, report.precision, console)


def print_roles(memory: RoleMemory, of_run: str, console: Console) -> None:
    """Which roles share a base, and the bytes of all."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("roles", "weights", "GiB"):
        table.add_column(heading, justify="right" if heading == "GiB" else "left", no_wrap=True)
    for base, held in memory.bases:
        table.add_row(", ".join(base.roles), f"base, {name_of(base.precision, of_run)}", f"{held / 2**30:.2f}")
    for role, held in memory.adapters.items():
        table.add_row(role, "adapter, float32", f"{held / 2**30:.2f}")
    console.print()
    console.print(table)
    share = memory.total / memory.copies
    console.print(
        f"Together {memory.total / 2**30:.2f} GiB of weights, {share:.3f} of a bfloat16 copy of the network per role.",
        highlight=False,
        soft_wrap=True,
    )
