#!/usr/bin/env python
"""What a model makes of its own mistakes over eight times its training length: error recycling on or off x sinks on or
off, and the sinks once more with relative positions (`experiment=toyworld_drift`, `recipes/toyworld_drift.md`).

    .venv/bin/python tools/ablate_drift.py --at-once 6              run what is missing, write the tables
    .venv/bin/python tools/ablate_drift.py --images recipes/images  the pictures as well

A training per seed and setting of error recycling, in `directory/recycling_{off,on}/seed_<n>`, and from each a rollout
per setting of the sinks, in `sinks_{off,on,relative}` there. Killed and started again it goes on: a rollout is finished
when its generation.json has metrics, a training when all its rollouts are, and the commands themselves continue the
rest. The tables are made of the generation.json files alone, the plot too, and the sheets of the contact sheets.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont

from longlive.codecs.base import num_raw_frames
from longlive.generate import RECORD
from longlive.metrics.toyworld import ATTRIBUTES, NUM_QUARTERS

EXPERIMENT = "toyworld_drift"
TRAINING_FRAMES, NUM_FRAMES = 16, 128
TEMPORAL_RATIO, FPS = 4, 24.0
NUM_VIDEOS = 48

LONGLIVE = (sys.executable, "-m", "longlive.cli")

RECYCLING = {"off": ["module.error_recycling=null"], "on": []}
"""Overrides of a training."""
SINKS: dict[str, dict[str, Any]] = {
    "off": {"sink_frames": 0, "relative_rope": False},
    "on": {"sink_frames": 4, "relative_rope": False},
    "relative": {"sink_frames": 4, "relative_rope": True},
}
"""Rollout settings."""


class Cell(NamedTuple):
    """One line of the tables: keys of `RECYCLING` and `SINKS`."""

    recycling: str
    sinks: str


CELLS = tuple(Cell(recycling, sinks) for recycling in RECYCLING for sinks in SINKS)
NEITHER, BOTH = Cell("off", "off"), Cell("on", "on")
PLOTTED = (NEITHER, Cell("off", "on"), Cell("on", "off"), BOTH)
LABELS = dict(zip(PLOTTED, ("neither", "sinks", "error recycling", "both"), strict=True))

MEAN = "mean of the four"
Quarters = dict[str, list[float]]
"""Accuracy in each quarter of the videos, by attribute, and the attributes' mean."""
Results = Mapping[Cell, Mapping[int, Quarters]]
"""By seed of the training."""


@dataclass(frozen=True)
class Ablation:
    """Where it lies, and how large it is.

    Attributes:
        directory: of everything.
        seeds: of the trainings; each cell has as many.
        num_steps: of a training.
        num_clips: of the toy world, the same for all trainings.
        overrides: of every training, in addition.
    """

    directory: Path
    seeds: Sequence[int]
    num_steps: int
    num_clips: int
    overrides: Sequence[str] = ()

    def run(self, recycling: str, seed: int) -> Path:
        """The directory of a training."""
        return self.directory / f"recycling_{recycling}" / f"seed_{seed}"

    def videos(self, cell: Cell, seed: int) -> Path:
        """The directory of a rollout."""
        return self.run(cell.recycling, seed) / f"sinks_{cell.sinks}"

    def quarters(self, cell: Cell, seed: int) -> Quarters | None:
        """What a rollout measured; None if it is not finished.

        Raises:
            ValueError: if it was another rollout.
        """
        file = self.videos(cell, seed) / RECORD
        record = json.loads(file.read_text()) if file.exists() else {}
        if "metrics" not in record:
            return None
        found = record["settings"] | record["settings"]["rollout"]
        wanted = SINKS[cell.sinks] | {"step": self.num_steps, "num_frames": NUM_FRAMES, "fps": FPS}
        for name, value in wanted.items():
            if found[name] != value:
                raise ValueError(f"{file} has {name}={found[name]}, not {value}; give another --directory")
        return quarters_of(record["metrics"])

    def results(self) -> Results:
        """Of the rollouts that are finished."""
        found: dict[Cell, dict[int, Quarters]] = {cell: {} for cell in CELLS}
        for cell in CELLS:
            for seed in self.seeds:
                quarters = self.quarters(cell, seed)
                if quarters is not None:
                    found[cell][seed] = quarters
        return found

    def jobs(self) -> list[Job]:
        """What is left to do: per training that some rollout is missing of, itself and those rollouts."""
        jobs = []
        for recycling, off in RECYCLING.items():
            for seed in self.seeds:
                run = self.run(recycling, seed)
                cells = [Cell(recycling, sinks) for sinks in SINKS]
                missing = [cell for cell in cells if self.quarters(cell, seed) is None]
                rollouts = [
                    [
                        "generate",
                        f"checkpoint={run}",
                        f"directory={self.videos(cell, seed)}",
                        "prompt_set=toyworld",
                        "metric=toyworld",
                        f"num_frames={NUM_FRAMES}",
                        f"batch_size={NUM_VIDEOS}",
                        *(f"rollout.{name}={json.dumps(value)}" for name, value in SINKS[cell.sinks].items()),
                    ]
                    for cell in missing
                ]
                train = [
                    "train",
                    f"experiment={EXPERIMENT}",
                    f"directory={run}",
                    f"data.train={self.shards}",
                    f"seed={seed}",
                    f"trainer.max_steps={self.num_steps}",
                    "trainer.devices=1",
                    *off,
                    *self.overrides,
                ]
                if missing:
                    jobs.append(Job(run.with_suffix(".log"), [train, *rollouts]))
        return jobs

    @property
    def shards(self) -> Path:
        return self.directory / "shards"

    def complete(self, at_once: int) -> Results:
        """Run what is left, so many trainings at once on the machine's one device.

        Raises:
            RuntimeError: if a command fails; the others are then ended, and save what they have.
            ValueError: if none may run, or something else lies where the rollouts should.
        """
        if at_once < 1:
            raise ValueError(f"at_once={at_once} must be at least 1")
        jobs = self.jobs()
        if jobs:
            shards = ["shards", "source=toyworld", f"source.num_clips={self.num_clips}", f"directory={self.shards}"]
            shards.append(f"source.num_raw_frames={num_raw_frames(TRAINING_FRAMES, TEMPORAL_RATIO)}")
            run_jobs([Job(self.directory / "shards.log", [shards])], at_once)
            run_jobs(jobs, at_once)
        return self.results()


@dataclass(frozen=True)
class Job:
    """`longlive` commands, one after the other, and where their output goes."""

    log: Path
    commands: list[list[str]]


def run_jobs(jobs: Sequence[Job], at_once: int, program: Sequence[str] = LONGLIVE) -> None:
    """Run jobs, so many at once; the first command that fails ends them all.

    Args:
        jobs: in the order in which they begin.
        at_once: processes.
        program: what the commands are arguments of.

    Raises:
        RuntimeError: naming the log of that command.
    """
    waiting = [(job, list(job.commands)) for job in jobs]
    running: list[tuple[subprocess.Popen[bytes], Job, list[list[str]]]] = []

    def start(job: Job, commands: list[list[str]]) -> None:
        command, *rest = commands
        job.log.parent.mkdir(parents=True, exist_ok=True)
        print(f"longlive {' '.join(command)}", flush=True)
        with job.log.open("ab") as log:
            process = subprocess.Popen([*program, *command], stdout=log, stderr=log)
        running.append((process, job, rest))

    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                start(*waiting.pop(0))
            time.sleep(0.2)
            for entry in [entry for entry in running if entry[0].poll() is not None]:
                process, job, rest = entry
                running.remove(entry)
                if process.returncode:
                    raise RuntimeError(
                        f"exit code {process.returncode}: {job.log} says why; the same command goes on from here"
                    )
                if rest:
                    start(job, rest)
    finally:
        for process, _, _ in running:
            process.terminate()
        for process, _, _ in running:
            process.wait()


def quarters_of(metrics: Mapping[str, float]) -> Quarters:
    """Accuracy by attribute and quarter, from what `metric=toyworld` returns."""
    quarters = {
        attribute: [metrics[f"{attribute}/quarter_{quarter + 1}"] for quarter in range(NUM_QUARTERS)]
        for attribute in ATTRIBUTES
    }
    return {MEAN: [mean(values) for values in zip(*quarters.values(), strict=True)]} | quarters


def last(quarters: Sequence[float]) -> float:
    """Accuracy in the last quarter."""
    return quarters[-1]


def drift(quarters: Sequence[float]) -> float:
    """The last quarter minus the first."""
    return quarters[-1] - quarters[0]


def spread(values: Sequence[float], form: str) -> str:
    """`0.78 ± 0.02`: mean and standard deviation over the seeds; of one seed its value."""
    return f"{mean(values):{form}}" + (f" ± {stdev(values):{form.lstrip('+')}}" if len(values) > 1 else "")


def margin(results: Results) -> float:
    """By how much the worst seed with both is better in the last quarter than the best one with neither."""
    return min(values(results, BOTH, MEAN, last)) - max(values(results, NEITHER, MEAN, last))


def values(results: Results, cell: Cell, name: str, of: Callable[[Sequence[float]], float]) -> list[float]:
    """A number per seed."""
    return [of(quarters[name]) for quarters in results[cell].values()]


def tables(results: Results) -> str:
    """All cells as markdown: the attributes' mean by seed, then last quarter and drift by attribute.

    Args:
        results: of the same seeds in every cell.
    """
    seeds = [str(seed) for seed in results[NEITHER]]
    rows = [["error recycling", "sinks", *(f"seed {seed}" for seed in seeds), "all seeds", "drift, all seeds"]]
    for cell in CELLS:
        found = values(results, cell, MEAN, last)
        drifts = values(results, cell, MEAN, drift)
        rows.append([*cell, *(f"{value:.3f}" for value in found), spread(found, ".3f"), spread(drifts, "+.3f")])
    parts = [f"Accuracy in the last quarter, mean of {', '.join(ATTRIBUTES)}:\n\n{markdown(rows)}"]
    for title, of, form in (("Accuracy in the last quarter", last, ".2f"), ("Drift", drift, "+z.2f")):
        rows = [["error recycling", "sinks", *ATTRIBUTES]]
        for cell in CELLS:
            found_by = [values(results, cell, attribute, of) for attribute in ATTRIBUTES]
            rows.append([*cell, *(f"{mean(each):{form}} ({listed(each, form)})" for each in found_by)])
        parts.append(f"{title}, mean over the seeds (and each of them: {', '.join(seeds)}):\n\n{markdown(rows)}")
    best = f"Worst seed with both minus best seed with neither: {margin(results):+.3f}\n"
    return "\n".join([*parts, best])


def listed(values: Sequence[float], form: str) -> str:
    return ", ".join(f"{value:{form}}" for value in values)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |\n" for row in rows]
    return "".join([lines[0], f"|{'---|' * len(rows[0])}\n", *lines[1:]])


@dataclass(frozen=True)
class Curve:
    """Accuracy against video time: at the middles of the quarters, mean, least and greatest of the seeds."""

    seconds: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]


def curve(results: Results, cell: Cell, name: str) -> Curve:
    """A line of the plot, of an attribute or `MEAN`."""
    length = num_raw_frames(NUM_FRAMES, TEMPORAL_RATIO) / FPS
    by_quarter = list(zip(*(quarters[name] for quarters in results[cell].values()), strict=True))
    return Curve(
        [(quarter + 0.5) * length / NUM_QUARTERS for quarter in range(NUM_QUARTERS)],
        [mean(each) for each in by_quarter],
        [min(each) for each in by_quarter],
        [max(each) for each in by_quarter],
    )


def draw_plot(results: Results, path: Path) -> None:
    """The attributes' mean large, each of them small: a line per cell, and a band from the worst to the best seed."""
    import matplotlib  # here, because the machine that trains needs no plot

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MultipleLocator

    colours = {"off": "#c1502e", "on": "#1f6fb2"}
    styles = {"off": ("--", "o"), "on": ("-", "s")}
    layout = [[MEAN, *ATTRIBUTES[:2]], [MEAN, *ATTRIBUTES[2:]]]
    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with pyplot.rc_context(style):
        figure, panels = pyplot.subplot_mosaic(layout, figsize=(10, 4.6), width_ratios=[2, 1, 1], layout="constrained")
        for name, panel in panels.items():
            for cell in PLOTTED:
                line = curve(results, cell, name)
                colour, (stroke, marker) = colours[cell.recycling], styles[cell.sinks]
                panel.fill_between(line.seconds, line.low, line.high, color=colour, alpha=0.13, linewidth=0)
                panel.plot(line.seconds, line.mean, stroke, color=colour, marker=marker, markersize=4.5)
            panel.set_title(name, fontsize=10, loc="left")
            panel.set_ylim(0, 1.04)
            panel.set_xlim(0, num_raw_frames(NUM_FRAMES, TEMPORAL_RATIO) / FPS)
            panel.xaxis.set_major_locator(MultipleLocator(5))
            panel.yaxis.set_major_locator(MultipleLocator(0.2))
            panel.grid(color="0.9", linewidth=0.6)
            panel.set_axisbelow(True)
            clip = num_raw_frames(TRAINING_FRAMES, TEMPORAL_RATIO) / FPS
            panel.axvspan(0, clip, color="0.93", linewidth=0, zorder=0)
        large = panels[MEAN]
        large.set_xlabel("video time (s); grey: the length of a training clip")
        large.set_ylabel("share of the videos that show what the prompt says")
        handles = [
            pyplot.Line2D([], [], linestyle=styles[cell.sinks][0], marker=styles[cell.sinks][1], markersize=4.5,
                          color=colours[cell.recycling], label=LABELS[cell])
            for cell in reversed(PLOTTED)
        ]  # fmt: skip
        large.legend(handles=handles, loc="lower left", bbox_to_anchor=(0.13, 0.0), frameon=False, handlelength=3)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
        pyplot.close(figure)


def draw_sheets(sheets: Mapping[Cell, Path], path: Path, num_rows: int = 4, rows_of_sheet: int = 12) -> None:
    """The first rows of four contact sheets, two beside two, under the cells' names."""
    title = 24
    parts = []
    for cell, file in sheets.items():
        with Image.open(file) as image:
            sheet = image.convert("RGB")
        part = Image.new("RGB", (sheet.width, title + num_rows * sheet.height // rows_of_sheet), "white")
        part.paste(sheet, (0, title))
        ImageDraw.Draw(part).text((2, 3), LABELS[cell], fill="black", font=ImageFont.load_default(16))
        parts.append(part)
    gap, (width, height) = 16, parts[0].size
    whole = Image.new("RGB", (2 * width + gap, 2 * height), "white")
    for index, part in enumerate(parts):
        whole.paste(part, (index % 2 * (width + gap), index // 2 * height))
    whole.save(path, optimize=True)


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--directory", type=Path, default=Path(f"runs/{EXPERIMENT}"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the trainings")
    parser.add_argument("--steps", type=int, default=3000, help="of a training")
    parser.add_argument("--clips", type=int, default=3000, help="of the toy world, for all trainings")
    parser.add_argument("--at-once", type=int, default=1, help="trainings that share the device")
    parser.add_argument("--images", type=Path, help="draw the plot and the sheets into this folder")
    parser.add_argument("overrides", nargs="*", help="after --: settings of every training, such as model.dim=32")
    return parser


def main() -> None:
    settings = command_line().parse_args()
    # As by Ctrl-C: what runs is ended, and saves what it has.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    ablation = Ablation(settings.directory, settings.seeds, settings.steps, settings.clips, settings.overrides)
    try:
        results = ablation.complete(settings.at_once)
    except (RuntimeError, ValueError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")
    text = tables(results)
    (settings.directory / "tables.md").write_text(text)
    print(text, end="")
    if settings.images is not None:
        draw_plot(results, settings.images / f"{EXPERIMENT}.png")
        sheets = {cell: ablation.videos(cell, settings.seeds[0]) / "contact_sheet.png" for cell in PLOTTED}
        draw_sheets(sheets, settings.images / f"{EXPERIMENT}_videos.png")


if __name__ == "__main__":
    main()
