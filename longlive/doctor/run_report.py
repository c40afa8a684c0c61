"""`longlive doctor run DIRECTORY`: a page about a run that finished, crashed or still trains, and what to do next.

`--step=N` prints instead which clips optimizer step N (counted from 0) trained on, `--json` the page as JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from longlive.callbacks.throughput import PHASES
from longlive.doctor.run import (
    RunState,
    continuation,
    duration,
    look_at,
    median_of_last,
    num_samples,
    samples_of_step,
)

_CONFIG = (
    "module._target_", "initialise_from", "seed", "model.num_layers", "model.dim", "data.train", "data.num_frames",
    "data.height", "data.width", "data.batch_size", "data.global_batch_size", "optimizer.lr", "trainer.max_steps",
    "trainer.accumulate_grad_batches", "strategy._target_", "precision.precision",
)  # fmt: skip
"""What a run is, in short; the rest is in its config.yaml."""


def main(arguments: Sequence[str]) -> int:
    """Print the page.

    Returns:
        0; 1 if the directory is none of a run, or the samples of a step cannot be told.
    """
    parser = argparse.ArgumentParser(
        prog="longlive doctor run", description="What became of a run, and what to do next: longlive doctor run runs/x"
    )
    parser.add_argument("directory", help="the run's: directory=... of longlive train")
    parser.add_argument("--step", type=int, help="print which clips this optimizer step trained on, counted from 0")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options = parser.parse_args(arguments)
    try:
        run = look_at(Path(options.directory))
        if options.step is not None:
            samples = samples_of_step(run, options.step)
            rows = [f"{sample}\t{key}".rstrip() for sample, key in samples]
            print(json.dumps(samples) if options.json else "\n".join(rows))
            return 0
    except (OSError, ValueError) as error:
        print(f"longlive doctor run: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(as_dict(run), indent=2))
        return 0
    print_run(run, Console())
    return 0


def as_dict(run: RunState) -> dict[str, Any]:
    """The page as plain containers."""
    newest = run.newest
    return {
        "directory": str(run.directory),
        "state": run.state,
        "how": run.how,
        "error": run.error,
        "last_step": run.last_step,
        "newest_checkpoint": None if newest is None else newest.name,
        "checkpoints": [vars(checkpoint) for checkpoint in run.checkpoints],
        "tables": {title: dict(rows) for title, rows in _tables(run)},
        "starts": run.starts,
        "non_finite": run.non_finite,
        "next": advice(run),
    }


def print_run(run: RunState, console: Console) -> None:
    """The page as tables."""
    for title, rows in _tables(run):
        if not rows:
            continue
        table = Table(
            title=title, title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=False
        )
        table.add_column(min_width=24, no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in rows:
            table.add_row(f"  {name}", value)
        console.print(table)
        console.print()
    console.print(f"{run.state}: {run.how}", highlight=False, soft_wrap=True, markup=False)
    for line in advice(run):
        console.print(f"- {line}", highlight=False, soft_wrap=True, markup=False)


def _tables(run: RunState) -> list[tuple[str, list[tuple[str, str]]]]:
    return [
        ("run", list(_summary(run))),
        ("starts", list(_starts(run))),
        ("curves", list(_curves(run))),
        ("data", list(_data(run))),
        ("checkpoints", list(_checkpoints(run))),
    ]


def _summary(run: RunState) -> Iterator[tuple[str, str]]:
    yield "directory", str(run.directory)
    for name in _CONFIG:
        value: Any = run.config
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            yield name.removesuffix("._target_"), str(value)
    if run.starts:
        last = run.starts[-1]
        versions = last["versions"]
        yield "processes", f"{last['world_size']} ({last['device']})"
        yield "longlive, torch", f"{versions.get('longlive')}, {versions.get('torch')}"
        yield "commit", last["commit"] or "none: started outside of a checkout"


def _starts(run: RunState, most: int = 8) -> Iterator[tuple[str, str]]:
    if len(run.starts) > most:
        yield "...", f"{len(run.starts) - most} earlier ones"
    for number, start in [*enumerate(run.starts)][-most:]:
        is_last = number == len(run.starts) - 1
        state = run.state if is_last else {"running": "killed"}.get(start["state"], start["state"])
        took = "" if start["ended"] is None else f", {duration(start['ended'] - start['began'])}"
        by = f" by {start['signal']}" if start["signal"] else ""
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(start["began"]))
        yield began, f"steps {start['first_step']} to {start['last_step']} of {start['max_steps']}{took}: {state}{by}"


def _curves(run: RunState) -> Iterator[tuple[str, str]]:
    yield "last step", f"{run.last_step}"
    loss = run.curves.get("train/loss", {})
    finite = {step: value for step, value in loss.items() if math.isfinite(value)}
    if finite:
        lowest = min(finite, key=lambda step: finite[step])
        first, last = min(finite), max(finite)
        yield (
            "loss",
            f"{finite[first]:.4f} (step {first}), last {finite[last]:.4f} (step {last}), least {finite[lowest]:.4f} "
            f"(step {lowest})",
        )
    for name, tag in (("gradient norm", "train/gradient_norm"), ("validation loss", "validation/loss")):
        if run.curves.get(tag):
            yield name, f"last {[*run.curves[tag].values()][-1]:.4g}"
    speed, step = (run.curves.get(f"throughput/{name}", {}) for name in ("tokens_per_second", "step_seconds"))
    if speed and step:
        yield "throughput", f"{median_of_last(speed):,.0f} tokens/s, {median_of_last(step):.3g} s per step"
    split = {phase: run.curves.get(f"throughput/seconds_{phase}", {}) for phase in PHASES}
    seconds = {phase: median_of_last(curve) for phase, curve in split.items() if curve}
    if sum(seconds.values()) > 0:
        shares = (f"{phase} {value / sum(seconds.values()):.0%}" for phase, value in seconds.items())
        yield "time of a step", ", ".join(shares)


def _data(run: RunState) -> Iterator[tuple[str, str]]:
    newest = run.newest
    if newest is None or newest.samples_consumed is None:
        return
    total, clips = num_samples(run), run.clips_per_step
    epochs = f", {newest.samples_consumed / total:.2f} epochs of {total} samples" if total else ""
    yield "positions seen", f"0 to {newest.samples_consumed - 1}, up to {newest.name}{epochs}"
    if clips is not None:
        yield "of step s", f"s x {clips} to s x {clips} + {clips - 1}; --step=s lists the clips"


def _checkpoints(run: RunState) -> Iterator[tuple[str, str]]:
    for checkpoint in run.checkpoints:
        yield checkpoint.name, f"{checkpoint.num_bytes:,} bytes, {checkpoint.fault or 'complete'}"


def _override(key: str, path: Path) -> str:
    """As it is typed in a shell: Hydra takes a value with characters of its own grammar in quotes."""
    is_plain = re.fullmatch(r"[\w/.+-]+", str(path), re.ASCII)
    return f"{key}={path}" if is_plain else shlex.quote(f'{key}="{path}"')


def advice(run: RunState) -> list[str]:
    """What to do next, most important first."""
    error = run.error or {}
    if run.state == "running":
        return ["Nothing: it trains. SIGTERM stops it at the end of a step, with a checkpoint."]
    if run.state == "finished":
        return [
            f"longlive generate {_override('checkpoint', run.directory)} prompts=... makes videos; "
            "longlive export writes one file.",
            "To train on, start the same command with a larger trainer.max_steps.",
        ]
    again = f"Start the same command again: {continuation(run)}."
    if run.non_finite is not None or error.get("type") == "NonFiniteError":
        return [
            f"Look at the clips that {run.directory / 'non_finite.json'} lists, and at the gradient's norm before.",
            "The same command would meet the same numbers: use a smaller optimizer.lr or trainer.gradient_clip_val.",
            f"Then {again[0].lower()}{again[1:]}",
        ]
    known = {
        "DataWorkerError": "See whether the sample's storage answers, its file is whole, and memory is left.",
        "OutOfMemoryError": "longlive doctor plan num_gpus=... gpu_memory=... says what fits.",
    }
    first = known.get(str(error.get("type")))
    if "No space left" in str(error.get("message")) or "disk is full" in str(error.get("message")):
        first = "Make room on the disk; older checkpoints of other runs are the usual place."
    if run.state == "killed":
        first = "If memory ran out (dmesg tells), use fewer data.num_workers or a smaller data.batch_size."
    if run.state == "failed" and first is None:
        first = "Mend what the error says; the log has its traceback."
    return [line for line in (first, again) if line]
