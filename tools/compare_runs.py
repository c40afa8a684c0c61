#!/usr/bin/env python
"""Runs against the runs that they should equal, pair by pair: what a precision, a strategy or an optimizer costs.

    .venv/bin/python tools/compare_runs.py runs/nvfp4_? --against runs/bf16_?
    .venv/bin/python tools/compare_runs.py runs/tuned --against runs/before --last 100 --videos generated

A table in Markdown: the loss of the last steps over the other run's, and, where both runs have a folder of measured
videos (`longlive generate checkpoint=RUN directory=RUN/videos metric=toyworld`), the differences of the toy world's
accuracies. Of several pairs also the mean, the standard deviation and the standard error of the mean: one pair says
little, as runs that differ in nothing but a last bit end apart, too. Below the table, which settings differ within the
pairs: if they are more than what was to be compared, the ratios do not tell what it costs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from omegaconf import OmegaConf

from longlive.config import to_plain
from longlive.doctor.run import read_curves
from longlive.generate import RECORD
from longlive.metrics.toyworld import ATTRIBUTES

LOSS = "train/loss"
PLACES = {"name", "directory", "shared_directory", "hydra"}
"""Settings that say what a run is called and where it lies, not what it does."""


def last_losses(run: Path, lasts: Sequence[int], curve_name: str = LOSS) -> list[float]:
    """Mean loss of the last steps of a run, for every number of them.

    Raises:
        FileNotFoundError: if the run logged no loss.
        ValueError: if it has not ended, or what it logged does not tell these steps from those before.
    """
    curve = read_curves(run).get(curve_name, {})
    if not curve:
        raise FileNotFoundError(f"{run} has no {curve_name} in its event files: is it the directory of a training?")
    config, logged = settings_of(run), max(curve) + 1
    total, interval = config["trainer.max_steps"], config["trainer.log_every_n_steps"]
    if logged < total - total % interval:
        raise ValueError(f"{run} has logged {logged} of {total} steps; let it end first")
    for last in lasts:
        if last % interval or not 0 < last <= logged:
            raise ValueError(
                f"--last {last}: {run} logs means of {interval} steps, {logged} in all; use a multiple of {interval}"
            )
    return [mean(value for step, value in curve.items() if step >= logged - last) for last in lasts]


def settings_of(run: Path) -> dict[str, Any]:
    """A run's settings by dotted name, without what it is called and where it lies."""
    config = to_plain(OmegaConf.load(run / "config.yaml"))  # type: ignore[arg-type]
    lies_in = config["directory"]
    settings = {name: value for name, value in _flat(config) if name.split(".")[0] not in PLACES}
    return {name: value for name, value in settings.items() if not str(value).startswith(lies_in)}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def differing(own: Mapping[str, Any], other: Mapping[str, Any]) -> set[str]:
    """Names of the settings that are not the same; where another class is made, the name of what it is made for."""
    names = {name for name in {*own, *other} if own.get(name) != other.get(name)}
    made = {name.removesuffix("._target_") for name in names if name.endswith("._target_")}
    return {name for name in names | made if not any(name.startswith(f"{each}.") for each in made)}


def measured(run: Path, videos: str) -> list[float] | None:
    """Accuracies of a run's videos, in the order of `ATTRIBUTES`; None if they were not measured."""
    file = run / videos / RECORD
    metrics = json.loads(file.read_text()).get("metrics", {}) if file.exists() else {}
    return [metrics[attribute] for attribute in ATTRIBUTES] if set(ATTRIBUTES) <= set(metrics) else None


def compare(
    runs: Sequence[Path], against: Sequence[Path], lasts: Sequence[int], videos: str, curve_name: str = LOSS
) -> dict[str, Any]:
    """Both in the same order.

    Returns:
        `ratios` of the losses, a list per pair; `differences` of the accuracies, likewise, or None; `settings`, the
        names of those that differ in some pair.

    Raises:
        FileNotFoundError, ValueError: as `last_losses`.
        ValueError: for other numbers of runs.
    """
    if len(runs) != len(against):
        raise ValueError(f"{len(runs)} runs against {len(against)}: they are compared in pairs")
    ratios: list[list[float]] = []
    differences: list[list[float] | None] = []
    settings: set[str] = set()
    for run, other in zip(runs, against, strict=True):
        own_losses, other_losses = (last_losses(each, lasts, curve_name) for each in (run, other))
        ratios.append([loss / reference for loss, reference in zip(own_losses, other_losses, strict=True)])
        found, reference = measured(run, videos), measured(other, videos)
        differences.append([a - b for a, b in zip(found, reference, strict=True)] if found and reference else None)
        settings |= differing(settings_of(run), settings_of(other))
    return {"ratios": ratios, "differences": differences, "settings": sorted(settings)}


def table(runs: Sequence[Path], lasts: Sequence[int], found: Mapping[str, Any]) -> str:
    """Of what `compare` found, in Markdown."""
    attributes = ATTRIBUTES if any(found["differences"]) else ()
    lines = [_line(["run", *(f"last {last}" for last in lasts), *attributes])]
    lines.append("|" + "---|" * (1 + len(lasts) + len(attributes)))
    for run, ratios, differences in zip(runs, found["ratios"], found["differences"], strict=True):
        cells = [f"{value:+.3f}" for value in differences] if differences else [""] * len(attributes)
        lines.append(_line([str(run), *(f"{ratio:.3f}" for ratio in ratios), *cells]))
    columns = list(zip(*found["ratios"], strict=True))
    complete = [each for each in found["differences"] if each]
    columns += list(zip(*complete, strict=True)) if complete else []
    styles = [".4f"] * len(lasts) + ["+.4f"] * len(attributes)
    if len(runs) > 1:
        spreads = [stdev(each) if len(each) > 1 else None for each in columns]
        errors = [
            None if each is None else each / sqrt(len(column)) for each, column in zip(spreads, columns, strict=True)
        ]
        lines.append(_line(["mean", *(f"{mean(each):{style}}" for each, style in zip(columns, styles, strict=True))]))
        for name, row in (("standard deviation", spreads), ("standard error", errors)):
            lines.append(_line([name, *("" if each is None else f"{each:.4f}" for each in row)]))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="directories of runs that have ended")
    parser.add_argument("--against", type=Path, nargs="+", required=True, help="as many, in the same order")
    parser.add_argument("--last", type=int, nargs="+", default=[50, 100, 300], help="steps at the end of a run")
    parser.add_argument("--curve", default=LOSS, help="which loss, as TensorBoard names it")
    parser.add_argument("--videos", default="videos", help="folder in every run")
    return parser


def main() -> None:
    given = command_line().parse_args()
    try:
        found = compare(given.runs, given.against, given.last, given.videos, given.curve)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"compare_runs: {error}")
    print(table(given.runs, given.last, found))
    print(f"\nsettings that differ within pairs: {', '.join(found['settings']) or 'none'}")


if __name__ == "__main__":
    main()
