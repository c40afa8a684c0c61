#!/usr/bin/env python
"""What distillation brings: seconds of rollouts of a many-step model with guidance, and of its few-step students.

    OMP_NUM_THREADS=1 .venv/bin/python tools/bench_rollout.py --teacher checkpoint=runs/toyworld_long \\
        --student checkpoint=runs/toyworld_distill_4step --student checkpoint=runs/toyworld_distill_2step
    OMP_NUM_THREADS=1 .venv/bin/python tools/bench_rollout.py --teacher checkpoint=base.safetensors \\
        --student checkpoint=base.safetensors lora=student.safetensors rollout.num_steps=2

Teacher and students are given by settings of `longlive generate` (`checkpoint`, `lora`, `rollout.*`, `precision`). The
teacher takes 50 steps with its own guidance, unless the settings say otherwise; students take the steps that they were
trained for. In everything else they have to roll out alike. All make the same videos, of prompts of the toy world, in
the same batches, from the same noise.

*Rollout*: all network calls with the KV cache, the solver between them and the noise; latents in the end. *Text*: the
prompts' embeddings. *Decode* and *write*: latents to raw frames, raw frames to files. Ratios are the teacher's seconds
over a student's; that of *rollout* is the one that is meant, *whole* is of all four together. *Processor* is the ratio
of seconds that the process computed, on all its threads: other jobs on the machine change it least (on a CPU).

*Counted*, before anything runs: a chunk of F frames takes a network call per solver step, and one that writes it into
the cache, except for the last chunk of a video. With guidance a call has two rows per video. The counted ratio is one
of rows. The calls of the measured rollouts are counted too; other numbers stop the benchmark. What measured ratios lack
of the counted ones is what a row costs a student more: calls of half as many rows; or an adapter, where it multiplies
beside its base, as `longlive generate` has it over layers that a precision replaces. Elsewhere it is in the weights.

In a round, all students roll out, then the teacher, then the students again; a student's seconds in a round are the
mean of its two. Figures are medians over the rounds, in brackets the lowest and the highest.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins import Precision
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from bench_record import header, main, make_parser, summary, time_of
from longlive.config import compose
from longlive.data.toyworld import random_prompts
from longlive.data.video_writer import write_mp4
from longlive.generate import load_asked, place, precision_of
from longlive.precision.auto import autocast_context
from longlive.rollout.engine import RolloutEngine
from longlive.rollout.settings import RolloutSettings
from longlive.rollout.video import decode_chunk
from longlive.trained import Trained

TEACHER = ("rollout.num_steps=50",)
"""Settings of the teacher that those of the command line replace."""

PHASES = ("text", "rollout", "decode", "write")


@dataclass(frozen=True)
class Calls:
    """Calls of a network, and what all of them together have in their batches."""

    calls: int
    rows: int


@dataclass(frozen=True)
class Contestant:
    """A model that rolls out.

    Attributes:
        name: in tables.
        given: the settings that name it.
        trained: on its device, in its precision.
        engine: of its rollouts.
        precision: around them.
        record: what the record says of it.
    """

    name: str
    given: tuple[str, ...]
    trained: Trained
    engine: RolloutEngine
    precision: Precision | str
    record: dict[str, Any]


def count_calls(settings: RolloutSettings, num_frames: int, batches: Sequence[int]) -> Calls:
    """Of rollouts of videos of `num_frames` frames, in batches of so many videos."""
    num_chunks = settings.num_chunks(num_frames)
    calls = num_chunks * settings.num_steps + num_chunks - 1
    return Calls(calls * len(batches), calls * sum(batches) * (2 if settings.guided else 1))


def batches_of(num_videos: int, batch_size: int) -> list[int]:
    """Sizes of the batches."""
    return [min(batch_size, num_videos - first) for first in range(0, num_videos, batch_size)]


def load(given: Sequence[str], device: str, role: str) -> Contestant:
    """The model that settings of `longlive generate` name.

    Args:
        given: the settings.
        device: where it rolls out.
        role: begins its name.

    Raises:
        ValueError, FileNotFoundError: as `longlive generate`.
    """
    config = compose("generate", [*given, "directory=none"])
    trained, rollout = load_asked(config)
    module = trained.module
    has_adapter = module.adapter is not None
    precision, precision_record = precision_of(trained, config)
    place(module, precision, torch.device(device))
    adapter = None if not has_adapter else "merged" if module.adapter is None else "beside the weights"
    record = {
        "given": list(given),
        "checkpoint": str(trained.path),
        "step": trained.step,
        "lora": None if trained.lora is None else str(trained.lora),
        "adapter": adapter,
        "rollout": asdict(rollout),
        "precision": precision_record,
    }
    name = f"{role}: {rollout.num_steps} steps"
    if rollout.guided:
        name += f", guidance {rollout.guidance_scale:g}"
    if adapter is not None:
        name += f", adapter {adapter}"
    return Contestant(name, tuple(given), trained, module.rollout_engine(rollout), precision, record)


def check(teacher: Contestant, student: Contestant) -> None:
    """Raise the `ValueError` for a pair whose seconds say nothing about steps and guidance."""
    ours, theirs = student.engine.settings, teacher.engine.settings
    if ours.guided or not theirs.guided:
        raise ValueError(
            f"guidance_scale={theirs.guidance_scale} of the teacher, {ours.guidance_scale} of {' '.join(student.given)}"
            ": the teacher takes guidance, a student none; give the one rollout.guidance_scale=3, the other 1"
        )
    other = asdict(replace(theirs, num_steps=ours.num_steps, guidance_scale=1.0, solver=ours.solver))
    differing = [f"rollout.{name}={value}" for name, value in other.items() if value != asdict(ours)[name]]
    if differing:
        raise ValueError(
            f"{' '.join(student.given)} rolls out otherwise than the teacher does with {', '.join(differing)}; give "
            "both the same"
        )
    if student.trained.module.model_config != teacher.trained.module.model_config:
        raise ValueError(f"{' '.join(student.given)} is a network of other sizes than the teacher's")


class Work:
    """The videos that everybody makes.

    Args:
        settings: of the command line.
        teacher: says how large videos are.
    """

    def __init__(self, settings: argparse.Namespace, teacher: Contestant) -> None:
        self.device: str = settings.device
        self.seed: int = settings.seed
        self.num_frames: int = settings.frames
        self.prompts = random_prompts(settings.videos, seed=1000003)  # those of prompt_set=toyworld
        self.batches = batches_of(settings.videos, settings.batch_size)
        data, codec = teacher.trained.config["data"], teacher.trained.module.codec
        self.fps: float = data["fps"]
        self.latent_shape = (
            codec.latent_channels,
            data["height"] // codec.spatial_ratio,
            data["width"] // codec.spatial_ratio,
        )

    @torch.no_grad()
    def run(self, contestant: Contestant, num_chunks: int | None = None) -> dict[str, tuple[float, float]]:
        """Make all videos; of `num_chunks` chunks only, if it is given.

        Returns:
            Seconds by the clock and of the processor, by phase.

        Raises:
            RuntimeError: if the network was called otherwise than counted.
        """
        engine, module = contestant.engine, contestant.trained.module
        num_chunks = num_chunks or engine.settings.num_chunks(self.num_frames)
        seconds = dict.fromkeys(PHASES, (0.0, 0.0))

        def timed(phase: str, function: Callable[[], Any]) -> Any:
            kept: list[Any] = []
            taken = time_of(lambda: kept.append(function()), self.device)
            seconds[phase] = (seconds[phase][0] + taken[0], seconds[phase][1] + taken[1])
            return kept[0]

        rows: list[int] = []
        handle = module.trained_network.register_forward_pre_hook(
            lambda network, arguments, given: rows.append(len(given["latents"])), with_kwargs=True
        )
        try:
            with autocast_context(contestant.precision, engine.device), tempfile.TemporaryDirectory() as folder:
                first = 0
                for size in self.batches:
                    prompts, ids = self.prompts[first : first + size], range(first, first + size)
                    first += size
                    embeds, negative = timed("text", lambda prompts=prompts: self._embeds(contestant, prompts))
                    index = torch.arange(size)[:, None].expand(size, num_chunks)
                    latents = timed(
                        "rollout",
                        lambda embeds=embeds, index=index, ids=ids, negative=negative: (
                            engine.generate(
                                embeds, index, torch.zeros_like(index), self.latent_shape, self.seed, ids, negative
                            ).latents
                        ),
                    )
                    videos = timed("decode", lambda latents=latents: self._decode(contestant, latents))
                    timed("write", lambda videos=videos: self._write(videos, Path(folder)))
        finally:
            handle.remove()
        counted = count_calls(engine.settings, num_chunks * engine.settings.chunk_frames, self.batches)
        if Calls(len(rows), sum(rows)) != counted:
            raise RuntimeError(f"{contestant.name}: {len(rows)} calls of {sum(rows)} rows, but counted were {counted}")
        return seconds

    def _embeds(self, contestant: Contestant, prompts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        encoder, engine = contestant.trained.module.text_encoder, contestant.engine
        negative = encoder.encode([""]).to(engine.device) if engine.settings.guided else None
        return encoder.encode(prompts).to(engine.device), negative

    def _decode(self, contestant: Contestant, latents: Tensor) -> Tensor:
        """Chunk by chunk, as `longlive generate` does."""
        decoder = contestant.trained.module.codec.stream_decoder()
        chunks = latents.split(contestant.engine.settings.chunk_frames, dim=1)
        return torch.cat([decode_chunk(decoder, chunk) for chunk in chunks], dim=1)

    def _write(self, videos: Tensor, folder: Path) -> None:
        for number, video in enumerate(videos):
            write_mp4(folder / f"{number}.mp4", video, self.fps)


def measure(settings: argparse.Namespace) -> dict[str, Any]:
    """The whole record.

    Raises:
        ValueError: if there is nothing to make, or models and settings do not fit.
    """
    for name in ("frames", "videos", "batch_size", "rounds"):
        if getattr(settings, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(settings, name)} must be at least 1")
    record = header(settings)
    torch.set_num_threads(settings.threads)
    teacher = load([*TEACHER, *settings.teacher], settings.device, "teacher")
    students = []
    for number, given in enumerate(settings.student, start=1):
        students.append(load(given, settings.device, f"student {number}"))
        check(teacher, students[-1])
    work = Work(settings, teacher)
    counted = {
        one.name: count_calls(one.engine.settings, settings.frames, work.batches) for one in (teacher, *students)
    }
    round_order = [*students, teacher, *reversed(students)]
    rounds: dict[str, list[list[dict[str, tuple[float, float]]]]] = {name: [] for name in counted}
    with Progress(transient=True) as progress:
        task = progress.add_task(
            "warming up", total=sum(counted[one.name].rows for one in round_order) * settings.rounds
        )
        for contestant in (teacher, *students):
            work.run(contestant, num_chunks=1)
        for number in range(settings.rounds):
            for runs in rounds.values():
                runs.append([])
            for contestant in round_order:
                progress.update(task, description=f"round {number + 1}, {contestant.name}")
                rounds[contestant.name][-1].append(work.run(contestant))
                progress.advance(task, counted[contestant.name].rows)
    rows = {
        one.name: one.record | {"counted": asdict(counted[one.name])} | summarise(rounds[one.name])
        for one in (teacher, *students)
    }
    ratios = {one.name: compare(rows[teacher.name], rows[one.name]) for one in students}
    return record | {"models": rows, "ratios": ratios}


def summarise(rounds: Sequence[Sequence[dict[str, tuple[float, float]]]]) -> dict[str, Any]:
    """Seconds of every round, a mean over the runs in it, by phase; and of the processor in rollouts."""
    return {
        "seconds_by_round": {
            phase: [statistics.mean(run[phase][0] for run in runs) for runs in rounds] for phase in PHASES
        },
        "processor_seconds_by_round": [statistics.mean(run["rollout"][1] for run in runs) for runs in rounds],
    }


def compare(teacher: dict[str, Any], student: dict[str, Any]) -> dict[str, Any]:
    """Ratios of the teacher's to a student's: rows of network calls as counted, and seconds as measured."""

    def whole(row: dict[str, Any]) -> list[float]:
        return [sum(phases) for phases in zip(*row["seconds_by_round"].values(), strict=True)]

    counted = teacher["counted"]["rows"] / student["counted"]["rows"]
    measured = spread(teacher["seconds_by_round"]["rollout"], student["seconds_by_round"]["rollout"])
    return {
        "counted": counted,
        "rollout": measured,
        "measured_over_counted": measured["median"] / counted,
        "processor": spread(teacher["processor_seconds_by_round"], student["processor_seconds_by_round"]),
        "whole": spread(whole(teacher), whole(student)),
    }


def spread(theirs: Sequence[float], ours: Sequence[float]) -> dict[str, Any]:
    """Ratios by round."""
    ratios = [their / our for their, our in zip(theirs, ours, strict=True)]
    return {
        "median": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "by_round": ratios,
    }


def show(record: dict[str, Any]) -> None:
    """Print the record as two tables."""
    console, settings = Console(width=None if Console().is_terminal else 160), record["settings"]
    table = Table(
        title=f"{settings['videos']} videos of {settings['frames']} frames in batches of {settings['batch_size']}: "
        f"seconds, medians of {settings['rounds']} rounds"
    )
    for title in ("", "calls", "rows", *PHASES):
        table.add_column(title, justify="right" if title else "left")
    for name, row in record["models"].items():
        medians = [f"{statistics.median(row['seconds_by_round'][phase]):.2f}" for phase in PHASES]
        counted = row["counted"]
        table.add_row(name, f"{counted['calls']:,}", f"{counted['rows']:,}", *medians)
    console.print(table)
    table = Table(title="the teacher's seconds over a student's")
    for title in ("", "counted", "rollout", "measured / counted", "processor", "whole"):
        table.add_column(title, justify="right" if title else "left")
    for name, ratio in record["ratios"].items():
        table.add_row(
            name,
            f"{ratio['counted']:.1f}x",
            in_words(ratio["rollout"]),
            f"{ratio['measured_over_counted']:.2f}",
            in_words(ratio["processor"]),
            in_words(ratio["whole"]),
        )
    console.print(table)
    console.print(summary(record), highlight=False)


def in_words(ratio: dict[str, Any]) -> str:
    """Median and spread."""
    return f"{ratio['median']:.1f}x ({ratio['lowest']:.1f} - {ratio['highest']:.1f})"


def command_line() -> argparse.ArgumentParser:
    parser = make_parser("bench_rollout", __doc__)
    parser.add_argument("--teacher", nargs="+", required=True, metavar="SETTING", help="of `longlive generate`")
    parser.add_argument("--student", nargs="+", required=True, action="append", metavar="SETTING", help="once for each")
    parser.add_argument("--frames", type=int, default=32, help="latent frames per video")
    parser.add_argument("--videos", type=int, default=48)
    parser.add_argument("--batch-size", type=int, default=16, help="videos that roll out together")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    return parser


if __name__ == "__main__":
    main(command_line(), measure, show)
