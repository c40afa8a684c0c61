#!/usr/bin/env python
"""The plans of the 5B experiments as tables: `recipes/wan5b_plans.md`.

    .venv/bin/python tools/plan_table.py                   print them
    .venv/bin/python tools/plan_table.py --write           write the file

Every figure is `longlive doctor plan`'s; nothing is measured, and the same code prints the same tables on any machine.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from longlive.config import compose
from longlive.doctor.plan import GIBIBYTE, Plan, make_plan
from longlive.doctor.plan_config import Machine

FILE = Path(__file__).resolve().parent.parent / "recipes" / "wan5b_plans.md"
GPUS = (1, 8, 32)
MEMORY = {"80": 79.0, "141": 139.0, "180": 178.0}
"""GiB that torch finds on GPUs that are sold as so many GB."""

CLIPS = {"tuning": ("16s", "32s", "64s"), "distillation": ("5s", "16s", "32s", "64s")}


@dataclass(frozen=True)
class Row:
    """One line: an experiment's clip and precision, planned for every number of GPUs."""

    clip: str
    precision: str
    plans: tuple[Plan, ...]


@dataclass(frozen=True)
class Section:
    """One table.

    Attributes:
        title: above it.
        text: under that.
        experiment: what is planned.
        clips: lengths.
        precisions: that make a difference.
        pre_encoded: whether clips come as latents.
    """

    title: str
    text: str
    experiment: str
    clips: Sequence[str]
    precisions: Sequence[str] = ("bf16",)
    pre_encoded: bool = False


SECTIONS = (
    Section(
        "Tuning on latents",
        "`wan5b_teacher_forcing`, `wan5b_multi_shot` and `wan5b_i2v` on clips that were encoded before "
        "(`longlive shards stage=encode`). A clip is taken to be one shot, which takes most, so the three are alike; "
        "so are bf16, fp8 and nvfp4, whose products are counted alike and whose activations are taken to be kept in "
        "bfloat16. On an H200, bf16 took 3 % less than planned and fp8 7 % more ([benchmarks](benchmarks.md)).",
        "wan5b_teacher_forcing",
        CLIPS["tuning"],
        pre_encoded=True,
    ),
    Section(
        "Tuning on videos",
        "The same, on clips that every step encodes.",
        "wan5b_teacher_forcing",
        CLIPS["tuning"],
    ),
    Section(
        "Distillation to 4 steps",
        "`wan5b_distill_4step`. FLOPs are a mean over steps, of which every fifth is the student's as well; memory is "
        "that of such a step.",
        "wan5b_distill_4step",
        CLIPS["distillation"],
        ("bf16", "fp8", "nvfp4"),
    ),
    Section(
        "Distillation to 2 steps",
        "`wan5b_distill_2step`: memory is that of 4 steps, which roll out for longer.",
        "wan5b_distill_2step",
        CLIPS["distillation"],
    ),
)


def rows_of(section: Section) -> Iterator[Row]:
    """The lines of a table."""
    for clip in section.clips:
        for precision in section.precisions:
            chosen = [f"experiment={section.experiment}", f"clip={clip}", f"precision={precision}"]
            config = compose("train", chosen)
            plans = tuple(plan_for(config, num_gpus, section.pre_encoded) for num_gpus in GPUS)
            yield Row(clip, precision, plans)


def plan_for(config: DictConfig, num_gpus: int, pre_encoded: bool) -> Plan:
    """The plan on so many GPUs. A clip is shared by as many as there are at most, and every data rank has one."""
    config = OmegaConf.create(config)
    size = config.strategy.sequence_parallel_size = min(config.strategy.sequence_parallel_size, num_gpus)
    if "global_batch_size" in config.data:
        config.data.global_batch_size = max(config.data.global_batch_size, num_gpus // size)
    return make_plan(config, Machine(num_gpus), pre_encoded)


def memory_of(plan: Plan) -> str:
    """`38.1 (encode): 80`: the peak, its phase, and the smallest GPU that it fits on."""
    peak = plan.peak_bytes / GIBIBYTE
    phase = max((rank.memory for rank in plan.ranks), key=lambda memory: memory.peak).fullest
    fits = next((name for name, memory in MEMORY.items() if peak <= memory), "none")
    return f"{peak:.1f} ({phase}): {fits}"


def table_of(section: Section, rows: Sequence[Row]) -> str:
    """A section as markdown."""
    by_precision = len(section.precisions) > 1
    titles = [
        "clip",
        *(["precision"] if by_precision else []),
        "GPUs that share a clip",
        "tokens per clip",
        "PFLOP per clip",
        *(f"GiB on {number} GPU{'s' * (number > 1)}" for number in GPUS),
    ]
    lines = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    for row in rows:
        largest = row.plans[-1]
        cells = [
            row.clip,
            *([row.precision] if by_precision else []),
            str(largest.sequence_size),
            f"{sum(rank.tokens for rank in largest.ranks):,}",
            f"{largest.step_flops / largest.global_batch_size / 1e15:.1f}",
            *(memory_of(plan) for plan in row.plans),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return f"## {section.title}\n\n{textwrap.fill(section.text, 120)}\n\n" + "\n".join(lines) + "\n"


HEAD = """# Plans of the 5B experiments

Made by `tools/plan_table.py --write` from what `longlive doctor plan` counts; nothing here is measured, and nobody has
trained the real weights with these experiments yet. `longlive.doctor.plan_memory` says what the model of memory is and
how far measurements were from it.

*GiB*: the peak of the fullest GPU, the phase that it is in, and the smallest GPU that it fits on: 80, 141 or 180 GB,
taken as {memory} GiB. CUDA's context and the allocator's fragmentation come on top.
*PFLOP*: of network and codec, what activation checkpointing computes again included; per clip of an optimizer step.
*Tokens*: of clean and noisy copies. Where there are fewer GPUs than the clip asks for, all of them share it.
"""


def document(sections: Sequence[Section] = SECTIONS) -> str:
    """The whole file."""
    tables = [table_of(section, list(rows_of(section))) for section in sections]
    return "\n".join([HEAD.format(memory=", ".join(f"{memory:g}" for memory in MEMORY.values())), *tables])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"write {FILE.name}, instead of printing")
    if parser.parse_args().write:
        FILE.write_text(document())
    else:
        print(document(), end="")


if __name__ == "__main__":
    main()
