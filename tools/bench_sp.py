#!/usr/bin/env python
"""What splitting a clip over ranks costs and brings: no sequence parallelism, the contiguous split, Balanced SP.

    OMP_NUM_THREADS=1 .venv/bin/python tools/bench_sp.py
    OMP_NUM_THREADS=1 .venv/bin/python tools/bench_sp.py --frames 96 data.height=128 data.width=128
    .venv/bin/python tools/bench_sp.py --device cuda --ranks 4 --no-read --frames 96 model=ti2v_5b codec=wan \\
        text=umt5 data.height=704 data.width=1280 strategy.sharding.activation_checkpointing=true

Arguments with `=` are settings of `longlive train`. By default: the tiny network and a tiny random codec with the
structure of Wan2.2's, on clips of the toy world.

Definitions. *Step*: an optimizer step on one clip per rank. `no SP` (strategy=fsdp) trains on them at once, each rank
on a whole clip of its own; the sequence-parallel variants on one after the other, all ranks on a part of each, and
accumulate the gradients. So all variants take the same step on the same clips from the same weights (their losses are
compared), and a ratio of steps is one of clips. All figures are per step, and *peak memory* is that of a micro-batch: a
rank's, on CUDA in the allocator, on a CPU what the process adds to what it held before the model was built.

The exchange encodes a rank's part in one piece, a whole clip is encoded in groups of four raw frames, and small pieces
are slow pieces; `balanced, halo` encodes in groups, too, and shows how much of a difference is that.

*Read*: the rank's raw frames, from shards on the disk, decoded in the training process where nothing hides it (training
decodes in workers, beside the step if cores are free). *Encode*: codec, prompts and noise. *Optimizer*: clipping and
update. *Communication*: of all of these, the time in which a collective is under way and this rank computes nothing, be
it transfer or waiting for a slower rank; the columns before it are without it. Its share is taken from a step under
torch's profiler, the seconds from steps without. *Sent*: bytes to other ranks, counted at every collective of a step.

Every variant runs in fresh processes, the variants in turn, round after round. Figures are medians over the measured
steps of all rounds; the first step of a process is not measured. A step is as long as its slowest rank's. *CPU time* is
what the rank's process computed: other jobs on the machine change it least.

*Counted* is what `longlive doctor plan` counts; tokens, loss tokens, raw frames and bytes of attention and codec that
differ from it stop the benchmark. *Explained* is the ratio of steps that counted work alone would make: read scaled by
raw frames, encode by the codec's FLOPs, the network's phases by its FLOPs, each of the busiest rank; once the balanced
seconds are scaled up, once the other variant's down. The two differ where seconds per unit of work do.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import socket
import statistics
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import multiprocessing
from torch.utils.data import DataLoader

from bench_record import header, main, make_parser, summary
from longlive.callbacks.rank_measure import COUNTS, PHASES, RankMeasure
from longlive.config import compose, instantiate
from longlive.data.batch import BatchSpec, VideoBatch
from longlive.data.shards import write_shards
from longlive.data.toyworld import ToyWorldSource
from longlive.doctor.plan import Plan, make_plan
from longlive.doctor.plan_config import Machine, codec_of, module_of

VARIANTS = {
    "no SP": ["strategy=fsdp"],
    "contiguous": ["strategy=contiguous_sp"],
    "balanced, halo": ["strategy=balanced_sp", "strategy.codec_context=halo"],
    "balanced": ["strategy=balanced_sp"],
}
TINY_CODEC = [
    "codec._target_=longlive.codecs.wan.WanVideoCodec.tiny",
    "model.in_channels=4",
    "model.out_channels=4",
]


def overrides(settings: argparse.Namespace, variant: str, num_frames: int, shards: str = "") -> list[str]:
    """The command line, after `longlive train`, of one variant. What the user gave comes last."""
    codec = [] if any(override.startswith("codec=") for override in settings.overrides) else TINY_CODEC
    return [
        *codec,
        *VARIANTS[variant],
        f"data.train={shards}",
        f"data.num_frames={num_frames}",
        "data.batch_size=1",
        f"data.global_batch_size={settings.ranks}",
        "data.num_workers=0",
        "learning_rate=constant",
        *settings.overrides,
    ]


def fake_clips(plan: Plan, num_steps: int, rank: int) -> list[VideoBatch]:
    """Random latents for the steps of one rank; a clip is the same whoever gets it."""
    work = plan.workload
    spec = BatchSpec(1, work.num_frames, work.chunk_frames, work.model.in_channels, work.height, work.width)
    clips = range(rank // plan.sequence_size, num_steps * plan.global_batch_size, plan.data_size)
    batches = [VideoBatch.fake(spec, seed=clip) for clip in clips]
    for clip, batch in zip(clips, batches, strict=True):
        batch.sample_ids.fill_(clip)
    return batches


def run_rank(
    rank: int,
    settings: argparse.Namespace,
    plan: Plan,
    config_overrides: list[str],
    profiled: bool,
    port: int,
    results: str,
) -> None:
    """One rank of one variant, in a process of its own."""
    gc.freeze()  # what a fork inherits is no garbage of its own, and would take a good part of a small step
    places = {"RANK": rank, "LOCAL_RANK": rank, "NODE_RANK": 0, "WORLD_SIZE": settings.ranks, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in places.items()} | {"MASTER_ADDR": "127.0.0.1"})
    if Path("/sys/class/net/lo").exists():
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # else gloo looks the host's name up, which containers may not have
    torch.set_num_threads(settings.threads)
    warnings.filterwarnings("ignore")
    os.environ["KINETO_LOG_LEVEL"] = "99"
    for name in ("lightning.pytorch", "lightning.fabric", "longlive"):
        logging.getLogger(name).setLevel(logging.ERROR)
    num_steps = 1 + settings.steps + profiled
    measure = RankMeasure(settings.steps, profiled, settings.device == "cuda", settings.ranks)
    config = compose("train", config_overrides)
    trainer = Trainer(
        accelerator=settings.device,
        devices=settings.ranks,
        strategy=instantiate(config.strategy),
        precision=plan.precision,  # type: ignore[arg-type]
        accumulate_grad_batches=plan.accumulation,
        gradient_clip_val=config.trainer.gradient_clip_val,
        max_steps=num_steps,
        max_epochs=-1,
        callbacks=[measure],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
    )
    if settings.read:
        module = module_of(config, instantiate(config.codec))
        trainer.fit(module, datamodule=instantiate(config.data))
    else:
        module = module_of(config, codec_of(config.codec))
        trainer.fit(module, DataLoader(fake_clips(plan, num_steps, rank), batch_size=None))  # type: ignore[arg-type]
    Path(results, f"{rank}.json").write_text(json.dumps(measure.record()))
    torch.distributed.destroy_process_group()


def run_variant(
    settings: argparse.Namespace, plan: Plan, config_overrides: list[str], profiled: bool
) -> list[dict[str, Any]]:
    """Start the ranks of a variant; what each of them measured."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with tempfile.TemporaryDirectory() as results:
        multiprocessing.start_processes(
            run_rank,
            (settings, plan, config_overrides, profiled, port, results),
            nprocs=settings.ranks,
            # A fork has everything imported; a CUDA context does not survive one.
            start_method="spawn" if settings.device == "cuda" else "fork",
        )
        return [json.loads(Path(results, f"{rank}.json").read_text()) for rank in range(settings.ranks)]


def count(plan: Plan, num_ranks: int, read: bool) -> list[dict[str, int]]:
    """A step of every rank, as `longlive doctor plan` counts it."""
    ranks = [plan.ranks[rank % plan.sequence_size] for rank in range(num_ranks)]
    return [
        {
            "tokens": plan.accumulation * rank.tokens,
            "loss_tokens": plan.accumulation * rank.loss_tokens,
            "raw_frames": plan.accumulation * rank.encode.raw_frames * read,
            "attention_bytes": plan.step_bytes["attention (all-to-all)"],
            "codec_bytes": plan.accumulation * rank.encode.sent_bytes * read,
            "all_bytes": sum(plan.step_bytes.values()),
            "codec_flops": rank.encode_flops * read,
            "network_flops": rank.flops,
        }
        for rank in ranks
    ]


def check(name: str, measured: list[dict[str, Any]], counted: list[dict[str, int]]) -> None:
    """Raise a `RuntimeError` for a rank whose work is not what was counted."""
    for rank, (found, expected) in enumerate(zip(measured, counted, strict=True)):
        work = {key: found[key] for key in COUNTS}
        work |= {f"{kind}_bytes": found["sent"].get(kind, 0) for kind in ("attention", "codec")}
        for key, value in work.items():
            if value != expected[key]:
                raise RuntimeError(f"{name}, rank {rank}: {key} is {value}, but {expected[key]} was counted")


def summarise(rounds: list[list[dict[str, Any]]], plan: Plan, counted: list[dict[str, int]]) -> dict[str, Any]:
    """Medians of a variant over the steps of all rounds. `rounds[round][rank]` is what a rank measured."""
    ranks = []
    for rank, expected in enumerate(counted):
        runs = [run[rank] for run in rounds]
        seconds = {name: statistics.median(step[name] for run in runs for step in run["steps"]) for name in PHASES}
        share = runs[0]["communication_shares"]
        own = {name: seconds[name] * (1 - share[name]) for name in PHASES}
        ranks.append(
            {
                "seconds": own | {"communication": sum(seconds.values()) - sum(own.values())},
                "communication_by_phase": {name: seconds[name] * share[name] for name in PHASES},
                "cpu_seconds": statistics.median(step["cpu"] for run in runs for step in run["steps"]),
                "sent_bytes": runs[0]["sent"],
                "peak_memory_bytes": statistics.median(run["peak_memory"] for run in runs),
                "counted": expected,
            }
            | {name: runs[0][name] for name in COUNTS}
        )
    steps = []
    for run in rounds:
        together = zip(*(rank["steps"] for rank in run), strict=True)
        steps.append([max(sum(step[name] for name in PHASES) for step in of_ranks) for of_ranks in together])
    return {
        "step_seconds": statistics.median(step for run in steps for step in run),
        "step_seconds_by_round": [statistics.median(run) for run in steps],
        "loss": statistics.mean(rank["loss"] for rank in rounds[0]),
        "attention_bytes_per_layer_and_clip": plan.layer_bytes,
        "ranks": ranks,
    }


def compare(variants: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Ratios to `balanced`: measured, over the rounds, and explained by counted work."""
    balanced = variants["balanced"]
    found = {}
    for name, variant in variants.items():
        by_round = zip(variant["step_seconds_by_round"], balanced["step_seconds_by_round"], strict=True)
        ratios = [theirs / ours for theirs, ours in by_round]
        scale = {}
        for key in ("raw_frames", "codec_flops", "network_flops"):
            theirs, ours = (max(rank["counted"][key] for rank in of["ranks"]) for of in (variant, balanced))
            scale[key] = theirs / ours if ours else 1.0
        by_phase = {"read": scale["raw_frames"], "encode": scale["codec_flops"]} | dict.fromkeys(
            ("forward", "backward"), scale["network_flops"]
        )
        ours, theirs = (_mean_seconds(of) for of in (balanced, variant))
        more = sum(by_phase.get(phase, 1.0) * value for phase, value in ours.items())
        less = sum(value / by_phase.get(phase, 1.0) for phase, value in theirs.items())
        found[name] = {
            "step": variant["step_seconds"] / balanced["step_seconds"],
            "cpu": _most(variant, "cpu_seconds") / _most(balanced, "cpu_seconds"),
            "lowest_of_rounds": min(ratios),
            "highest_of_rounds": max(ratios),
            "explained_by_counted_work": [more / sum(ours.values()), sum(theirs.values()) / less],
            "counted": scale,
        }
    return found


def _mean_seconds(variant: dict[str, Any]) -> dict[str, float]:
    """Of the ranks, by phase."""
    ranks = variant["ranks"]
    return {phase: statistics.mean(rank["seconds"][phase] for rank in ranks) for phase in ranks[0]["seconds"]}


def _most(variant: dict[str, Any], name: str) -> float:
    """Of the busiest rank."""
    return max(float(rank[name]) for rank in variant["ranks"])


def measure(settings: argparse.Namespace) -> dict[str, Any]:
    """The whole record."""
    record = header(settings, settings.ranks)
    torch.set_num_threads(settings.threads)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as shards, Progress(transient=True) as progress:
        task = progress.add_task("writing clips", total=settings.rounds * len(settings.frames) * len(VARIANTS))
        plans: dict[tuple[int, str], Plan] = {}
        commands: dict[tuple[int, str], list[str]] = {}
        machine = Machine(settings.ranks, gpus_per_node=settings.ranks, device=settings.device)
        for num_frames in settings.frames:
            for variant in VARIANTS:
                case = num_frames, variant
                commands[case] = overrides(settings, variant, num_frames, shards)
                plans[case] = make_plan(compose("train", commands[case]), machine)
        if settings.read:
            longest = max(settings.frames)
            ratio = instantiate(compose("train", commands[longest, "balanced"]).codec).temporal_ratio
            num_clips = settings.ranks * (settings.steps + 2)
            write_shards(ToyWorldSource(num_clips, 1 + ratio * (longest - 1)), shards, progress=False)
        runs: dict[tuple[int, str], list[list[dict[str, Any]]]] = {case: [] for case in plans}
        for number in range(settings.rounds):
            for case, plan in plans.items():
                name = f"{case[0]} frames, {case[1]}"
                progress.update(task, description=f"round {number + 1}: {name}")
                runs[case].append(run_variant(settings, plan, commands[case], profiled=not number))
                check(name, runs[case][-1], count(plan, settings.ranks, settings.read))
                progress.advance(task)
    for num_frames in settings.frames:
        variants = {
            variant: summarise(
                runs[num_frames, variant],
                plans[num_frames, variant],
                count(plans[num_frames, variant], settings.ranks, settings.read),
            )
            for variant in VARIANTS
        }
        check_losses({name: variant["loss"] for name, variant in variants.items()}, plans[num_frames, "balanced"])
        found[str(num_frames)] = {"variants": variants, "ratios_to_balanced": compare(variants)}
    return record | {"clips": found}


def check_losses(losses: dict[str, float], plan: Plan) -> None:
    """Raise a `RuntimeError` if the variants did not train on the same."""
    tolerance = 1e-5 if plan.precision == "32-true" else 1e-2
    if max(losses.values()) - min(losses.values()) > tolerance * max(losses.values()):
        raise RuntimeError(f"the loss of the first step differs: {losses}")


def show(record: dict[str, Any]) -> None:
    """Print the record: one table per clip length, and the ratios under it."""
    console = Console(width=None if Console().is_terminal else 200)
    cpu = ["CPU time"] * (record["settings"]["device"] == "cpu")
    for num_frames, clips in record["clips"].items():
        table = Table(title=f"{num_frames} frames, seconds per step of {record['settings']['ranks']} clips")
        titles = (*PHASES, "communication", "step", *cpu, "tokens", "loss tokens", "raw frames", "sent", "peak memory")
        for title in ("", "rank", *titles):
            table.add_column(title, justify="left" if not title else "right")
        for name, variant in clips["variants"].items():
            for number, rank in enumerate(variant["ranks"]):
                table.add_row(
                    name if not number else "",
                    str(number),
                    *(f"{rank['seconds'][phase]:.3f}" for phase in (*PHASES, "communication")),
                    f"{variant['step_seconds']:.3f}" if not number else "",
                    *(f"{rank['cpu_seconds']:.3f}" for _ in cpu),
                    *(str(rank[key]) for key in COUNTS),
                    f"{sum(rank['sent_bytes'].values()) / 2**20:.2f} MiB",
                    f"{rank['peak_memory_bytes'] / 2**20:.0f} MiB",
                    end_section=number == len(variant["ranks"]) - 1,
                )
        console.print(table)
        for name, ratio in clips["ratios_to_balanced"].items():
            counted, sent = ratio["counted"], clips["variants"][name]["attention_bytes_per_layer_and_clip"]
            lowest, highest = ratio["lowest_of_rounds"], ratio["highest_of_rounds"]
            more, less = ratio["explained_by_counted_work"]
            console.print(
                f"[bold]{name} / balanced[/bold]: step {ratio['step']:.2f}x (rounds {lowest:.2f} .. {highest:.2f}), "
                f"CPU time {ratio['cpu']:.2f}x, explained {more:.2f}x and {less:.2f}x\n"
                f"  counted: raw frames {counted['raw_frames']:.2f}x, codec FLOPs {counted['codec_flops']:.2f}x, "
                f"network FLOPs {counted['network_flops']:.2f}x; attention sends {sent} B per rank, layer and clip, as "
                "counted",
                highlight=False,
            )
    settings = record["settings"]
    console.print(f"{summary(record)}; {settings['rounds']} rounds of {settings['steps']} steps")


def command_line() -> argparse.ArgumentParser:
    parser = make_parser("bench_sp", __doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--frames", type=int, nargs="+", default=[24, 96], help="clip lengths")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="timed steps per round and variant")
    parser.add_argument("--no-read", dest="read", action="store_false", help="random latents: no shards, no codec")
    parser.add_argument("overrides", nargs="*", help="settings of `longlive train`, such as data.height=128")
    return parser


if __name__ == "__main__":
    main(command_line(), measure, show)
