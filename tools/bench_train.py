#!/usr/bin/env python
"""Steps of a 5B experiment on one GPU, beside what `longlive doctor plan` says of them.

    PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True python tools/bench_train.py --device cuda --longest
    python tools/bench_train.py --device cuda --precisions bf16 --frames 64 --experiment wan5b_multi_shot
    python tools/bench_train.py model.num_layers=2 model.dim=256 model.ffn_dim=1024 model.num_heads=2 data.height=64 \\
        data.width=64

Arguments with `=` are settings of `longlive train`. Module, optimizer, average, precision, sharding and activation
checkpointing are the experiment's; a step is one clip (`data.global_batch_size=1`), on one GPU. Left out: VAE and text
encoder (latents are random, prompt embeddings zero, one prompt per chunk), sample videos, checkpoints, and the values
of the weights, which are drawn on the device and mean nothing. So the plan is made with `pre_encoded=true`.

*Step*: forward, backward, clipping, optimizer and average, by the clock after the device is done. A first step on a
single chunk, not counted, leaves the optimizer's state behind, as every later step finds it. Figures are medians.
*Tokens*: of clean and noisy copies. *FLOPs*: counted by the plan; *hardware* counts what activation checkpointing
computes again, *model* does not. *Peak memory*: the most that the allocator had handed out, and *reserved* the most
that it held of the GPU.

`--longest`: the clip of the most chunks that trains in the first precision. The first try is the longest that the plan
lets fit; from there a chunk more while it fits, or a chunk less until it does. The other precisions train on that clip,
or on the next shorter one that fits. Every try is a process of its own.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import count
from multiprocessing import get_context
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

from bench_record import header, main, make_parser, summary
from longlive.callbacks.rank_measure import memory, restart_high_water_mark
from longlive.config import compose
from longlive.data.batch import BatchSpec, VideoBatch
from longlive.doctor.plan import GIBIBYTE, Plan, make_plan
from longlive.doctor.plan_config import Machine, codec_of, module_of
from longlive.doctor.plan_memory import Sharding
from longlive.doctor.plan_work import training_flops
from longlive.models.wan.model import CausalWan
from longlive.modules.teacher_forcing import TeacherForcingModule
from longlive.parallel.materialise import local_part
from longlive.parallel.strategy import ShardedStrategy
from longlive.precision.plugin import LinearPrecision
from longlive.train import make_trainer

PHASES = ("forward", "backward", "optimizer")
"""Of a step; what draws noise and embeds prompts is forward, clipping and average are the optimizer's."""

NOT_MEASURED = ("checkpoint", "throughput", "loss_breakdown", "samples", "progress", "stop_on_signal")
"""Callbacks that watch or write."""


def overrides(settings: argparse.Namespace, precision: str, num_frames: int) -> list[str]:
    """The command line, after `longlive train`. What the user gave comes last."""
    return [
        f"experiment={settings.experiment}",
        f"precision={precision}",
        f"data.num_frames={num_frames}",
        "data.batch_size=1",
        "data.global_batch_size=1",
        "strategy.sequence_parallel_size=1",
        "callbacks.ema.start_step=0",  # it computes from the first step on, as in a run that has passed its start
        *(f"callbacks.{name}=null" for name in NOT_MEASURED),
        "logger.tensorboard=null",
        f"trainer.accelerator={'gpu' if settings.device == 'cuda' else 'cpu'}",
        "trainer.devices=1",
        f"trainer.max_steps={settings.steps + 1}",
        "+trainer.enable_checkpointing=false",
        "+trainer.enable_progress_bar=false",
        *settings.overrides,
    ]


def planned(config: DictConfig, settings: argparse.Namespace) -> Plan:
    return make_plan(config, Machine(1, gpu_memory=settings.memory, device=settings.device), pre_encoded=True)


class WeightsFromDevice(Callback):
    """Builds the network as the module does, but with weights that are drawn where they stay: five billion numbers
    from the CPU take longer than the steps."""

    @torch.no_grad()
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        assert isinstance(pl_module, TeacherForcingModule)
        assert isinstance(trainer.strategy, ShardedStrategy)
        with torch.device("meta"):
            network = CausalWan(pl_module.model_config)
        trainer.precision_plugin.convert_module(network)
        trainer.strategy.shard(network).to_empty(device=trainer.strategy.root_device)
        for name, parameter in network.named_parameters():
            part, _ = local_part(parameter)
            if "norm" in name or name.endswith("bias"):
                part.fill_(float(name.endswith("weight")))
            else:
                part.normal_(std=parameter[0].numel() ** -0.5)
        pl_module.hold(network)


class Steps(Callback):
    """Seconds and peak memory of every step, by phase.

    Args:
        on_gpu: whether phases end when the GPU is done, and memory is the allocator's; else memory is the process's,
            beside what it held when this was made.
    """

    def __init__(self, on_gpu: bool) -> None:
        self.on_gpu = on_gpu
        self.seconds: list[dict[str, float]] = []
        self.peaks: list[dict[str, int]] = []
        self._held = 0 if on_gpu else restart_high_water_mark()
        self._start = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.seconds.append({})
        self.peaks.append({})
        self._begin()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Any) -> None:
        self._end("forward")

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end("backward")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._end("optimizer")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Else Lightning would move tens of GiB to the CPU.
        trainer.strategy.optimizers = []
        pl_module.network = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)

    def _begin(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            restart_high_water_mark()
        self._start = time.perf_counter()

    def _end(self, phase: str) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()
        self.seconds[-1][phase] = time.perf_counter() - self._start
        self.peaks[-1][phase] = torch.cuda.max_memory_allocated() if self.on_gpu else memory("VmHWM") - self._held
        self._begin()


def clips(plan: Plan, num_steps: int) -> list[VideoBatch]:
    """One of a single chunk, then of the plan's length."""
    work = plan.workload
    found = []
    for number in range(1 + num_steps):
        num_frames = work.num_frames if number else work.chunk_frames
        spec = BatchSpec(1, num_frames, work.chunk_frames, work.model.in_channels, work.height, work.width)
        prompts = tuple(f"chunk {chunk}" for chunk in range(spec.num_chunks))
        found.append(replace(VideoBatch.fake(spec, seed=number), prompts=(prompts,)))
    return found


def run(config_overrides: list[str], settings: argparse.Namespace) -> dict[str, Any]:
    """The steps, in a process of its own; `out_of_memory` if they do not fit."""
    torch.set_num_threads(settings.threads)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "longlive", "torchao"):
        logging.getLogger(name).setLevel(logging.ERROR)
    config, on_gpu = compose("train", config_overrides), settings.device == "cuda"
    plan = planned(config, settings)
    module = module_of(config, codec_of(config.codec))
    trainer = make_trainer(config)
    steps = Steps(on_gpu)
    trainer.callbacks += [WeightsFromDevice(), steps]  # type: ignore[attr-defined]
    try:
        trainer.fit(module, DataLoader(clips(plan, settings.steps), batch_size=None))  # type: ignore[arg-type]
    except torch.OutOfMemoryError as error:
        return {"out_of_memory": str(error).partition(". ")[0], "steps_seconds": steps.seconds[1:]}
    plugin, work = trainer.precision_plugin, plan.workload
    measured, peaks = steps.seconds[1:], steps.peaks[1:]
    seconds = statistics.median(sum(step.values()) for step in measured)
    return {
        "backend": plugin.backend_name if isinstance(plugin, LinearPrecision) else "native",
        "step_seconds": seconds,
        "phase_seconds": {phase: statistics.median(step[phase] for step in measured) for phase in PHASES},
        "steps_seconds": measured,
        "tokens_per_second": work.tokens(0) / seconds,
        "hardware_tflops": plan.ranks[0].flops / seconds / 1e12,
        "model_tflops": training_flops(work, 0, Sharding()) / seconds / 1e12,
        "peak_bytes": max(max(step.values()) for step in peaks),
        "phase_peak_bytes": {phase: max(step[phase] for step in peaks) for phase in PHASES},
        "reserved_bytes": torch.cuda.memory_reserved() if on_gpu else None,
    }


def run_alone(config_overrides: list[str], settings: argparse.Namespace) -> dict[str, Any]:
    """`run`, where no other left its memory. A fork has everything imported; a CUDA context does not survive one."""
    context = get_context("spawn" if settings.device == "cuda" else "fork")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as process:
        return process.submit(run, config_overrides, settings).result()


def longest(first: int, fits: Callable[[int], bool], may_grow: bool = True) -> int:
    """The most chunks that fit, tried from `first` on, and no more than these unless it `may_grow`; 0: none."""
    if not fits(first):
        return next((fewer for fewer in range(first - 1, 0, -1) if fits(fewer)), 0)
    while may_grow and fits(first + 1):
        first += 1
    return first


def longest_planned(settings: argparse.Namespace, precision: str) -> int:
    """The most chunks that the plan lets fit; at least 1."""
    config = compose("train", overrides(settings, precision, 0))
    for chunks in count(1):
        config.data.num_frames = (chunks + 1) * config.data.chunk_frames
        if not planned(config, settings).fits:
            return chunks
    raise AssertionError("every clip fits")


def attempt(settings: argparse.Namespace, precision: str, num_frames: int) -> dict[str, Any]:
    """One run beside its plan."""
    given = overrides(settings, precision, num_frames)
    plan = planned(compose("train", given), settings)
    memory_ = plan.ranks[0].memory
    found = {
        "precision": precision,
        "frames": num_frames,
        "tokens": plan.ranks[0].tokens,
        "planned": {
            "peak_bytes": memory_.peak,
            "fullest": memory_.fullest,
            "phase_bytes": {phase: memory_.of(phase) for phase in memory_.phases},
            "flops": plan.ranks[0].flops,
        },
        **run_alone(given, settings),
    }
    Console().print(describe(found), highlight=False, soft_wrap=True)
    return found


def measure(settings: argparse.Namespace) -> dict[str, Any]:
    """The whole record.

    Raises:
        ValueError: if the longest clip is asked for, and the memory is not known.
    """
    record = header(settings)
    if settings.memory is None and settings.device == "cuda":
        settings.memory = torch.cuda.get_device_properties(0).total_memory / GIBIBYTE
    if settings.longest and settings.memory is None:
        raise ValueError("--longest needs --memory where there is no GPU: how many GiB there are")
    first, *others = settings.precisions
    chunk_frames = compose("train", overrides(settings, first, 0)).data.chunk_frames
    runs: list[dict[str, Any]] = []

    def fits(precision: str, num_chunks: int) -> bool:
        runs.append(attempt(settings, precision, num_chunks * chunk_frames))
        return "out_of_memory" not in runs[-1]

    if settings.longest:
        num_chunks = longest(longest_planned(settings, first), partial(fits, first))
        searches = [partial(longest, num_chunks or 1, partial(fits, name), may_grow=False) for name in others]
    else:
        searches = [partial(fits, name, settings.frames // chunk_frames) for name in settings.precisions]
    failures = []
    for search in searches:
        try:
            search()
        except (ImportError, RuntimeError, ValueError) as error:  # one precision cannot run here; the others are kept
            failures.append(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
    return record | {"memory_gib": settings.memory, "runs": runs, "failures": failures}


def describe(found: dict[str, Any]) -> str:
    """One line of a run."""
    name = f"{found['precision']}, {found['frames']} frames, {found['tokens']:,} tokens: "
    expected = f"planned {found['planned']['peak_bytes'] / GIBIBYTE:.1f} GiB in {found['planned']['fullest']}"
    if "out_of_memory" in found:
        return f"{name}out of memory; {expected}"
    return (
        f"{name}{found['step_seconds']:.2f} s per step, {found['tokens_per_second']:,.0f} tokens/s, "
        f"{found['hardware_tflops']:.3g} TFLOP/s, peak {found['peak_bytes'] / GIBIBYTE:.1f} GiB; {expected}"
    )


def show(record: dict[str, Any]) -> None:
    """Print the record as a table."""
    titles = {
        "precision": "",
        "backend": "",
        "frames": "",
        "tokens": ",",
        "step (s)": ".2f",
        "tokens/s": ",.0f",
        "hardware TFLOP/s": ".3g",
        "model TFLOP/s": ".3g",
        "peak (GiB)": ".1f",
        "reserved (GiB)": ".1f",
        "planned (GiB)": ".1f",
    }
    table = Table(title=f"training steps of {record['settings']['experiment']}, one clip each")
    for title in titles:
        table.add_column(title, justify="left" if title in ("precision", "backend") else "right")
    for run_ in record["runs"]:
        gib = {name: run_[f"{name}_bytes"] / GIBIBYTE for name in ("peak", "reserved") if run_.get(f"{name}_bytes")}
        values = (
            run_["precision"],
            run_.get("backend", "out of memory"),
            run_["frames"],
            run_["tokens"],
            *(run_.get(key) for key in ("step_seconds", "tokens_per_second", "hardware_tflops", "model_tflops")),
            gib.get("peak"),
            gib.get("reserved"),
            run_["planned"]["peak_bytes"] / GIBIBYTE,
        )
        table.add_row(
            *("" if value is None else format(value, form) for value, form in zip(values, titles.values(), strict=True))
        )
    console = Console(width=None if Console().is_terminal else 160)
    console.print(table)
    for failure in record["failures"]:
        console.print(f"did not run: {failure}", highlight=False)
    console.print(summary(record), highlight=False)


def command_line() -> argparse.ArgumentParser:
    parser = make_parser("bench_train", __doc__)
    parser.add_argument("--experiment", default="wan5b_teacher_forcing")
    parser.add_argument("--precisions", type=lambda text: text.split(","), default=["bf16", "fp8"], help="bf16,fp8,...")
    parser.add_argument("--frames", type=int, default=16, help="latent frames of the clip")
    parser.add_argument("--longest", action="store_true", help="find the longest clip that trains, instead")
    parser.add_argument("--memory", type=float, help="GiB of the GPU; by default, what it has")
    parser.add_argument("--steps", type=int, default=3, help="that are measured")
    parser.add_argument("overrides", nargs="*", help="settings of longlive train, key=value")
    return parser


if __name__ == "__main__":
    main(command_line(), measure, show)
