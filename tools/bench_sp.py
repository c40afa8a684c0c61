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
import json
import logging
import os
import platform
import socket
import statistics
import subprocess
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import multiprocessing
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from longlive.config import compose, instantiate
from longlive.data.batch import BatchSpec, VideoBatch
from longlive.data.shards import write_shards
from longlive.data.toyworld import ToyWorldSource
from longlive.doctor.plan import Plan, make_plan
from longlive.doctor.plan_config import Machine, codec_of, module_of
from longlive.modules.teacher_forcing import TeacherForcingModule

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
PHASES = ("read", "encode", "forward", "backward", "optimizer")
COUNTS = ("tokens", "loss_tokens", "raw_frames")


class CountBytes(TorchDispatchMode):
    """Bytes that this process sends to others, by what they are. A gather sends every part once to every other rank, a
    reduce-scatter as many, an all-reduce is one of each.

    Raises:
        ValueError: for a collective that it does not know.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name, _ = str(func).split(".")
        others = self.size - 1
        if namespace == "c10d":
            match name:
                case "alltoall_base_":
                    self.sent["attention"] += args[1].nbytes * others // self.size
                case "_allgather_base_":
                    self.sent["parameters"] += args[1].nbytes * others
                case "_reduce_scatter_base_":
                    self.sent["gradients"] += args[1].nbytes * others // self.size
                case "send":
                    self.sent["codec"] += sum(tensor.nbytes for tensor in args[0])
                case "allreduce_":
                    self.sent["numbers"] += sum(2 * tensor.nbytes * others // self.size for tensor in args[0])
                case "allgather_":
                    self.sent["numbers"] += sum(tensor.nbytes * others for tensor in args[1])
                case "recv_" | "barrier":
                    pass
                case _:
                    raise ValueError(f"{func} is a collective that this benchmark cannot count; teach it CountBytes")
        elif namespace == "_c10d_functional" and name == "all_reduce":
            self.sent["numbers"] += 2 * args[0].nbytes * others // self.size
        elif namespace == "_c10d_functional" and name != "wait_tensor":
            raise ValueError(f"{func} is a collective that this benchmark cannot count; teach it CountBytes")
        return func(*args, **(kwargs or {}))


def communication_shares(events: Iterable[Any]) -> dict[str, float]:
    """Of every phase, the share of its time in which a collective is under way and this rank computes nothing.

    Args:
        events: the profiler's; phases are ranges named `phase:...`.
    """
    events = list(events)
    on_gpu = any(event.device_type().name == "CUDA" for event in events)
    (thread,) = {event.start_thread_id() for event in events if _is_phase(event)}
    changes = []
    for event in events:
        kind = _kind(event, thread, on_gpu)
        if kind:
            changes += [(event.start_ns(), kind, 1), (event.end_ns(), kind, -1)]
    active: Counter[str] = Counter()
    lasted: Counter[str] = Counter()
    exposed: Counter[str] = Counter()
    phase, before = "", 0
    for now, kind, change in sorted(changes):
        lasted[phase] += now - before
        if active["collective"] and (active["wait"] or not active["compute"]):
            exposed[phase] += now - before
        active[kind] += change
        if kind.startswith("phase:"):
            phase = kind.removeprefix("phase:") if change > 0 else ""
        before = now
    return {phase: exposed[phase] / max(lasted[phase], 1) for phase in PHASES}


def _is_phase(event: Any) -> bool:
    return event.name().startswith("phase:") and event.device_type().name == "CPU"


def _kind(event: Any, thread: int, on_gpu: bool) -> str:
    """Kernels compute; without a GPU, operators do, of the thread that trains."""
    name = event.name()
    if _is_phase(event):
        return name
    if on_gpu:
        is_kernel = event.device_type().name == "CUDA" and not event.is_user_annotation()
        return ("collective" if name.startswith("nccl") else "compute") if is_kernel else ""
    if name.startswith("gloo:"):
        return "collective"
    if event.start_thread_id() != thread:
        return ""
    if "c10d" in name:
        return "wait"  # an operator that asks for what is still on its way has this one inside
    return "compute" if name.startswith("aten::") else ""


class Measure(Callback):
    """Measures one rank: a first step in which work is counted, timed steps, and one under the profiler."""

    def __init__(self, num_steps: int, profiled: bool, on_gpu: bool, num_ranks: int) -> None:
        self.num_steps = num_steps
        self.profiled = profiled
        self.on_gpu = on_gpu
        self.bytes = CountBytes(num_ranks)
        self.counts: Counter[str] = Counter()
        self.losses: list[float] = []
        self.steps: list[dict[str, float]] = [defaultdict(float)]
        self.shares: dict[str, float] = {}
        self.peak_memory = 0
        self._memory_before = 0 if on_gpu else restart_high_water_mark()
        self._counting = ExitStack()
        self._phase, self._start, self._cpu_start = "read", 0.0, 0.0
        self._range: record_function | None = None
        self._profile: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, TeacherForcingModule)
        pl_module.on_phase = self._begin
        pl_module.trained_network.register_forward_pre_hook(self._count_tokens, with_kwargs=True)
        self._counting.enter_context(self.bytes)
        self._start, self._cpu_start = time.perf_counter(), time.process_time()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._begin("encode")
        if self._is_first and batch.raw_frames is not None:
            self.counts["raw_frames"] += batch.batch_size * batch.raw_frames.shape[1]

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Any) -> None:
        self._begin("backward")

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin("optimizer")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._begin("read")
        if self._is_first:
            self.counts["loss_tokens"] += int(outputs["scored"].sum()) * self.counts["tokens_per_frame"]
            self.losses.append(float(outputs["loss"]))
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if self._is_first:
            self._counting.close()
        if len(self.steps) == self.num_steps + 1:
            self.peak_memory = self._high_water_mark()
            if self.profiled:
                self._start_profile()
        elif self._profile is not None:
            self._stop_profile()
        # What was done here belongs to no step.
        self.steps.append(defaultdict(float))
        self._start, self._cpu_start = time.perf_counter(), time.process_time()

    @property
    def _is_first(self) -> bool:
        return len(self.steps) == 1

    def _begin(self, phase: str) -> None:
        """End the running phase and start another one."""
        if self.on_gpu:
            torch.cuda.synchronize()
        now, cpu = time.perf_counter(), time.process_time()
        self.steps[-1][self._phase] += now - self._start
        self.steps[-1]["cpu"] += cpu - self._cpu_start
        self._phase, self._start, self._cpu_start = phase, now, cpu
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._open_range()

    def _open_range(self) -> None:
        self._range = record_function(f"phase:{self._phase}")
        self._range.__enter__()

    def _start_profile(self) -> None:
        self._profile = profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self.on_gpu)
        self._profile.__enter__()
        self._open_range()

    def _stop_profile(self) -> None:
        assert self._range is not None
        self._range.__exit__(None, None, None)
        self._range = None
        self._profile.__exit__(None, None, None)
        self.shares = communication_shares(self._profile.profiler.kineto_results.events())
        self._profile = None

    def _count_tokens(self, network: Any, args: Any, kwargs: Any) -> None:
        if self._is_first:
            batch_size, num_frames, _, height, width = kwargs["latents"].shape
            self.counts["tokens_per_frame"] = network.config.tokens_per_frame(height, width)
            self.counts["tokens"] += batch_size * num_frames * self.counts["tokens_per_frame"]

    def _high_water_mark(self) -> int:
        return torch.cuda.max_memory_allocated() if self.on_gpu else memory("VmHWM") - self._memory_before

    def record(self) -> dict[str, Any]:
        """What this rank has to say, as JSON."""
        return {
            "steps": [dict(step) for step in self.steps[1 : self.num_steps + 1]],
            "communication_shares": self.shares,
            "sent": dict(self.bytes.sent),
            "peak_memory": self.peak_memory,
            "loss": sum(self.losses),  # Lightning has divided each by the number that is accumulated
        } | {name: self.counts[name] for name in COUNTS}


def restart_high_water_mark() -> int:
    """Let the process's peak memory start from what it holds now; returns that."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")
    return memory("VmRSS")


def memory(name: str) -> int:
    """A line of /proc/self/status in bytes; 0 where there is none."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


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
    measure = Measure(settings.steps, profiled, settings.device == "cuda", settings.ranks)
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
    torch.set_num_threads(settings.threads)
    load_average = os.getloadavg()[0]
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
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "hardware": hardware(settings),
        "load_average": load_average,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "settings": {name: value for name, value in vars(settings).items() if name != "json"},
        "clips": found,
    }


def check_losses(losses: dict[str, float], plan: Plan) -> None:
    """Raise a `RuntimeError` if the variants did not train on the same."""
    tolerance = 1e-5 if plan.precision == "32-true" else 1e-2
    if max(losses.values()) - min(losses.values()) > tolerance * max(losses.values()):
        raise RuntimeError(f"the loss of the first step differs: {losses}")


def hardware(settings: argparse.Namespace) -> str:
    """The name of what computes."""
    if settings.device == "cuda":
        return f"{settings.ranks} x {torch.cuda.get_device_name()}"
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    threads = f"{settings.threads} thread{'s' if settings.threads > 1 else ''}"
    return f"{names[0] if names else platform.machine()}, {settings.ranks} ranks x {threads}, {os.cpu_count()} cores"


def commit() -> str:
    """The commit of this checkout, marked if the tree differs from it."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    return described.stdout.strip() or "unknown"


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
    versions, settings = record["versions"], record["settings"]
    console.print(
        f"{record['hardware']}, load average before {record['load_average']:.1f}; torch {versions['torch']}; commit "
        f"{record['commit']}; {settings['rounds']} rounds of {settings['steps']} steps"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--frames", type=int, nargs="+", default=[24, 96], help="clip lengths")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="timed steps per round and variant")
    parser.add_argument("--threads", type=int, default=1, help="per rank")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--no-read", dest="read", action="store_false", help="random latents: no shards, no codec")
    parser.add_argument("--json", type=Path, default=Path("runs/bench_sp.json"))
    parser.add_argument("overrides", nargs="*", help="settings of `longlive train`, such as data.height=128")
    settings = parser.parse_args()
    record = measure(settings)
    show(record)
    settings.json.parent.mkdir(parents=True, exist_ok=True)
    settings.json.write_text(json.dumps(record, indent=2) + "\n")
    Console().print(f"written to {settings.json}")


if __name__ == "__main__":
    main()
