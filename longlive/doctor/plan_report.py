"""`longlive doctor plan`: a training run's shares, memory, communication and arithmetic, before it runs.

    longlive doctor plan num_gpus=64 gpu_memory=80 model=ti2v_5b strategy=balanced_sp ...

Every override is one of `longlive train`; `num_gpus`, `gpus_per_node`, `gpu_memory` (GiB), `device`, `pre_encoded`
(true: clips come as latents) and `json` belong to the plan. What `train` would refuse is refused, in the same words and
with exit code 1; so is, with exit code 2, a run that does not fit into `gpu_memory`. `longlive.doctor.plan_memory` says
what the model of memory is.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from longlive.config import compose
from longlive.doctor.plan import GIBIBYTE, Plan, make_plan
from longlive.doctor.plan_config import Machine


def _flag(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError(f"{text} is neither true nor false")
    return text == "true"


_OF_THE_PLAN: dict[str, Callable[[str], Any]] = {
    "num_gpus": int,
    "gpus_per_node": int,
    "gpu_memory": float,
    "device": str,
    "json": str,
    "pre_encoded": _flag,
}
DOES_NOT_FIT = 2

_ADVICE = {
    "encode": "Encoding takes most; strategy.codec_context=halo encodes in small groups, and latents that are encoded "
    "before (pre_encoded=true) need none",
    "samples": "The rollouts of the samples take most; fewer or shorter ones, or callbacks.samples=null",
    "optimizer": "The optimizer takes most; more GPUs, or an optimizer that keeps less",
    "forward": "Training takes most; a larger sequence_parallel_size, activation checkpointing "
    "(strategy.sharding.activation_checkpointing=true), a window or a smaller batch_size",
}


def main(arguments: Sequence[str]) -> int:
    """Print the plan as tables, with `--json` as JSON; `json=PATH` writes JSON beside the tables.

    Returns:
        0; 1 if the run is refused; 2 if it does not fit into `gpu_memory`.
    """
    parser = argparse.ArgumentParser(
        prog="longlive doctor plan",
        description="What a training run takes, without building it: longlive doctor plan num_gpus=64 gpu_memory=80 "
        "experiment=... strategy=balanced_sp strategy.sequence_parallel_size=8",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of longlive train, and " + _names())
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--config-dir", help="a folder of your own config files")
    options = parser.parse_intermixed_args(arguments)
    try:
        own, overrides = _split(options.overrides)
        path, pre_encoded = own.pop("json", None), own.pop("pre_encoded", False)
        plan = make_plan(compose("train", overrides, options.config_dir), Machine(**own), pre_encoded)
    except ValueError as error:
        print(f"longlive doctor plan: {error}", file=sys.stderr)
        return 1
    content = json.dumps(as_dict(plan), indent=2)
    if path is not None:
        Path(path).write_text(content + "\n")
    if options.json:
        print(content)
    else:
        print_plan(plan, Console())
    return DOES_NOT_FIT if plan.fits is False else 0


def _names() -> str:
    return ", ".join(f"{name}=" for name in _OF_THE_PLAN)


def _split(arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The plan's own settings, and the overrides of the config.

    Raises:
        ValueError: if `num_gpus` is missing, or a value is no number.
    """
    own: dict[str, Any] = {}
    overrides = []
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name not in _OF_THE_PLAN:
            overrides.append(argument)
            continue
        try:
            own[name] = _OF_THE_PLAN[name](value)
        except ValueError:
            kind = "neither true nor false" if _OF_THE_PLAN[name] is _flag else "no number"
            raise ValueError(f"{name}={value} is {kind}") from None
    if "num_gpus" not in own:
        raise ValueError("num_gpus=... must be given: how many GPUs (or CPU processes) the run is planned for")
    return own, overrides


def as_dict(plan: Plan) -> dict[str, Any]:
    """The plan as plain containers, with what is derived beside what is given. Bytes, FLOPs, counts."""
    workload = plan.workload
    return {
        "machine": asdict(plan.machine),
        "strategy": plan.strategy,
        "mesh": {"data_parallel": plan.data_size, "sequence_parallel": plan.sequence_size},
        "precision": plan.precision,
        "accumulation": plan.accumulation,
        "global_batch_size": plan.global_batch_size,
        "clip": {
            "frames": workload.num_frames,
            "chunks": workload.num_chunks,
            "tokens_per_frame": workload.tokens_per_frame,
            "tokens": 2 * workload.num_frames * workload.tokens_per_frame,
        },
        "num_parameters": plan.num_parameters,
        "useful_share_of_attention": plan.useful_share,
        "codec_context": plan.context,
        "ranks": [
            {
                "tokens": rank.tokens,
                "loss_tokens": rank.loss_tokens,
                "raw_frames": rank.encode.raw_frames,
                "window": asdict(rank.encode.window) if rank.encode.window else None,
                "encoded_frames": rank.encode.encoded_frames,
                "frames": rank.encode.frames,
                "flops_per_step": rank.flops,
                "flops_by_part": dict(rank.parts),
                "encode_flops_per_step": rank.encode_flops,
                "memory": {
                    "always": dict(rank.memory.always),
                    "phases": {name: dict(held) for name, held in rank.memory.phases.items()},
                    "fullest": rank.memory.fullest,
                    "peak": rank.memory.peak,
                },
            }
            for rank in plan.ranks
        ],
        "activations_of_a_block": dict(plan.activations_of_a_block),
        "bytes_sent_per_step": dict(plan.step_bytes),
        "bytes_sent_per_layer": plan.layer_bytes,
        "flops_per_step": plan.step_flops,
        "peak_bytes": plan.peak_bytes,
        "fits": plan.fits,
    }


def print_plan(plan: Plan, console: Console) -> None:
    """The plan as tables. Where ranks differ, the least and the most are shown, and their ratio."""
    for title, rows in _tables(plan):
        table = Table(
            title=title, title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=False
        )
        table.add_column(min_width=44)
        table.add_column()
        for name, value in rows:
            table.add_row(f"  {name}", value)
        console.print(table)
        console.print()
    console.print(_verdict(plan), highlight=False, soft_wrap=True)


def _tables(plan: Plan) -> list[tuple[str, list[tuple[str, str]]]]:
    workload, ranks, encode = plan.workload, plan.ranks, [rank.encode for rank in plan.ranks]
    first_rank = max(ranks, key=lambda rank: rank.memory.peak)
    first = first_rank.memory
    nodes = f"{plan.num_nodes} node{'s' if plan.num_nodes > 1 else ''}"
    return [
        (
            "run",
            [
                ("strategy, precision", f"{plan.strategy}, {plan.precision}"),
                (
                    "mesh (data x sequence)",
                    f"{plan.data_size} x {plan.sequence_size} = {plan.machine.num_gpus} processes on {nodes}",
                ),
                (
                    "clips per step",
                    f"{plan.global_batch_size} = {workload.batch_size} per micro-batch x {plan.data_size} data ranks "
                    f"x {plan.accumulation} accumulated",
                ),
                (
                    "clip",
                    f"{workload.num_frames} frames in {workload.num_chunks} chunks, "
                    f"{workload.tokens_per_frame:,} tokens per frame",
                ),
                ("parameters", f"{plan.num_parameters:,}"),
            ],
        ),
        (
            "per rank and micro-batch",
            [
                ("tokens, clean and noisy", _spread([rank.tokens for rank in ranks], "{:,}")),
                ("loss tokens", _spread([rank.loss_tokens for rank in ranks], "{:,}")),
                ("frames whose latents it needs", _spread([cost.frames for cost in encode], "{:,}")),
                (
                    f"frames encoded for them ({plan.context})",
                    _spread([cost.encoded_frames for cost in encode], "{:,}"),
                ),
                ("raw frames read per clip", _spread([cost.raw_frames for cost in encode], "{:,}")),
            ],
        ),
        (
            "memory per rank" + (", of the fullest" if len({rank.memory.peak for rank in ranks}) > 1 else ""),
            [
                *_byte_rows(first.always),
                *((f"in {name}, beside", _bytes(sum(held.values()))) for name, held in first.phases.items()),
                *((f"  {name}", value) for name, value in _byte_rows(first.phases[first.fullest])),
                (f"peak: in {first.fullest}", _bytes(first.peak)),
            ],
        ),
        ("activations of one block", _byte_rows(plan.activations_of_a_block)),
        (
            "sent per rank and optimizer step",
            [
                *_byte_rows(plan.step_bytes),
                ("all", _bytes(sum(plan.step_bytes.values()))),
                ("attention, per layer and micro-batch", f"{_bytes(plan.layer_bytes)} ({plan.layer_bytes:,} bytes)"),
            ],
        ),
        (
            "arithmetic per optimizer step",
            [
                ("network, per rank", _spread([rank.flops for rank in ranks], "{:.4g} FLOPs")),
                *(
                    (f"  {name}", f"{flops:.4g} FLOPs")
                    for name, flops in first_rank.parts.items()
                    if len(first_rank.parts) > 1
                ),
                ("  of that, attention scores", f"{plan.attention_flops:.4g} FLOPs"),
                ("codec, per rank", _spread([rank.encode_flops for rank in ranks], "{:.4g} FLOPs")),
                ("all ranks", f"{plan.step_flops:.4g} FLOPs"),
                ("attention scores that are needed", f"{plan.useful_share:.1%} of all"),
            ],
        ),
    ]


def _spread(values: Sequence[int], form: str) -> str:
    least, most = min(values), max(values)
    if least == most:
        return form.format(most)
    ratio = f"max/min {most / least:.3f}" if least else "none on some ranks"
    return f"{form.format(least)} to {form.format(most)} ({ratio})"


def _byte_rows(rows: Mapping[str, int]) -> list[tuple[str, str]]:
    return [(name, _bytes(number)) for name, number in rows.items()]


def _bytes(number: int) -> str:
    for unit, size in (("GiB", GIBIBYTE), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= size:
            return f"{number / size:,.2f} {unit}"
    return f"{number} bytes"


def _verdict(plan: Plan) -> str:
    peak = _bytes(plan.peak_bytes)
    if plan.fits is None:
        return f"{peak} per GPU by the model of memory; gpu_memory=... (GiB) says whether that fits."
    memory = f"gpu_memory={plan.machine.gpu_memory:g} GiB"
    if plan.fits:
        return f"yes: {peak} per GPU by the model of memory, within {memory}."
    most = max((rank.memory for rank in plan.ranks), key=lambda memory: memory.peak)
    advice = _ADVICE.get(most.fullest, _ADVICE["forward"])
    return f"no: {peak} per GPU by the model of memory, more than {memory}. {advice}."
