"""Measures one rank of a sharded run: what it computes, what it sends, and where its time goes.

`tools/bench_sp.py` compares strategies with it. The first step counts tokens, raw frames and bytes at every collective;
timed steps follow undisturbed; a last one runs under torch's profiler, which tells how much of every phase is
communication that nothing hides.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

from longlive.modules.teacher_forcing import TeacherForcingModule

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
                    raise ValueError(f"{func} is a collective that is not counted; teach it to CountBytes")
        elif namespace == "_c10d_functional" and name == "all_reduce":
            self.sent["numbers"] += 2 * args[0].nbytes * others // self.size
        elif namespace == "_c10d_functional" and name != "wait_tensor":
            raise ValueError(f"{func} is a collective that is not counted; teach it to CountBytes")
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


class RankMeasure(Callback):
    """See the module docstring. The module's `on_phase` becomes this callback's.

    Args:
        num_steps: timed optimizer steps, after the first one.
        profiled: whether one more step runs under the profiler.
        on_gpu: whether phases end when the GPU is done.
        num_ranks: of the run.
    """

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
