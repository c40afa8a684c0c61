#!/usr/bin/env python
"""What low precision costs and brings, on this machine.

    OMP_NUM_THREADS=1 .venv/bin/python tools/bench_precision.py
    .venv/bin/python tools/bench_precision.py --sections quantiser --rows 4096 --columns 3072 --threads 2
    .venv/bin/python tools/bench_precision.py --device cuda --dtype bfloat16 --rows 65536
    .venv/bin/python tools/bench_precision.py --device cuda --sections linear,step --tokens 32768 --layers 8

All versions run in turn, round after round; figures are medians, a speed-up is a ratio of medians. On CUDA, GPU time.

*quantiser*: seconds to encode one matrix in NVFP4 (`bench_quantiser.py`).

*linear*: one layer as training runs it: float32 weight and bias, bfloat16 input and output. *Backward* is the gradients
of input, weight and bias. *Saved* is what forward keeps for backward besides the parameters: what grows with the input,
per element of it, and what does not, per weight.

*step*: a training step of a whole network by Lightning, AdamW included, on random latents; every run is a fit of its
own, whose first step is not timed. *Peak memory* is what a run adds to what the process held before: on CUDA in the
allocator, on a CPU in a process of its own.

*Emulated*: the numbers are rounded as the format rounds them and multiplied in a wider one. What that does to accuracy,
and what it saves for backward, is real. Its times and peak memory are those of the emulation, not of the format.
"""

from __future__ import annotations

import argparse
import gc
import logging
import statistics
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import Precision
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import DataLoader

from bench_quantiser import measure_quantiser, show_quantiser
from bench_record import header, main, make_parser, summary, time_of
from longlive.callbacks.rank_measure import PHASES, RankMeasure
from longlive.codecs.dct import DCTCodec
from longlive.data.batch import BatchSpec, VideoBatch
from longlive.diffusion.schedule import FlowSchedule
from longlive.models.wan.config import WanConfig
from longlive.modules.teacher_forcing import TeacherForcingModule
from longlive.precision.auto import autocast_context, choose_precision
from longlive.precision.plugin import LinearPrecision
from longlive.precision.selection import BLOCK_LINEARS
from longlive.text.toy import ToyTextEncoder

PRECISIONS = ("bf16", "fp8", "nvfp4")
MODELS = {"tiny": WanConfig.tiny, "ti2v_5b": WanConfig.ti2v_5b}
CHUNK_FRAMES = 4

DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {
        "sizes": [(512, 512), (512, 2048)],
        "tokens": 512,
        "calls": 1,
        "model": "tiny",
        "layers": 4,
        "frames": 12,
        "height": 8,
        "width": 8,
        "prompt_tokens": 16,
    },
    # The 5B model's width, on 12 frames of 704 x 1280.
    "cuda": {
        "sizes": [(3072, 3072), (3072, 14336)],
        "tokens": 16384,
        "calls": 4,
        "model": "ti2v_5b",
        "layers": 4,
        "frames": 12,
        "height": 44,
        "width": 80,
        "prompt_tokens": 512,
    },
}
"""Of settings that are not given."""


def make_precision(name: str, device: str, layers: tuple[str, ...] = BLOCK_LINEARS) -> Precision | str:
    """A plugin, or the name of Lightning's own. Imported here: one that cannot be loaded is a row without figures."""
    backend = "auto" if device == "cuda" else "emulated"
    if name == "fp8":
        logging.getLogger("torchao").setLevel(logging.ERROR)  # kernels of other machines that it cannot load
        from longlive.precision.fp8 import FP8Precision

        return FP8Precision(backend=backend, layers=layers)
    if name == "nvfp4":
        from longlive.precision.nvfp4.plugin import NVFP4Precision

        return NVFP4Precision(backend=backend, layers=layers)
    return "bf16-mixed"


def backend_of(precision: Precision | str) -> str:
    """Who multiplies, once there are layers."""
    if isinstance(precision, LinearPrecision):
        return precision.backend_name
    return "native" if choose_precision("auto") == "bf16-mixed" else "emulated"


def or_reason(function: Callable[..., Any], *arguments: Any) -> tuple[Any, str | None]:
    """What a function returns, or why it cannot run here."""
    try:
        return function(*arguments), None
    except (ImportError, ValueError, RuntimeError, AssertionError) as error:
        return None, f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


class LinearCase:
    """One layer in one precision, with its inputs."""

    def __init__(self, name: str, size: tuple[int, int], settings: argparse.Namespace) -> None:
        self.settings, (in_features, out_features) = settings, size
        self.generator = torch.Generator(settings.device).manual_seed(0)
        holder = nn.ModuleDict({"linear": nn.Linear(in_features, out_features, device=settings.device)})
        self.precision = make_precision(name, settings.device, ("linear",))
        if isinstance(self.precision, LinearPrecision):
            self.precision.convert_module(holder)
        self.layer = holder["linear"]
        self.parameters = list(holder.parameters())
        self.x = self.random(settings.tokens, in_features).requires_grad_()
        self.gradient = self.random(settings.tokens, out_features)
        self.run()
        self.saved = self.saved_bytes()

    def random(self, num_tokens: int, features: int) -> Tensor:
        return torch.randn(num_tokens, features, generator=self.generator, device=self.settings.device).bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        with autocast_context(self.precision, x.device):
            return self.layer(x)

    def run(self) -> tuple[float, float]:
        """Seconds of a forward and of a backward: of several in a row on a GPU, which would wait for the first."""
        calls, device = self.settings.calls, self.settings.device
        outputs: list[Tensor] = []
        forward, _ = time_of(lambda: outputs.extend(self.forward(self.x) for _ in range(calls)), device)
        backward, _ = time_of(lambda: self.backward(outputs), device)
        return forward / calls, backward / calls

    def backward(self, outputs: list[Tensor]) -> None:
        for y in outputs:
            torch.autograd.grad(y, (self.x, *self.parameters), self.gradient)

    def saved_bytes(self) -> dict[str, float]:
        """What is kept grows with the tokens, or does not: two numbers of tokens tell which, both of whole frames of
        the 5B model, which NVFP4 keeps means of."""
        few, many = 2 * 880, 4 * 880
        fewer, more = self._kept(few), self._kept(many)
        per_token = (more - fewer) / (many - few)
        return {
            "saved_bytes_per_input_element": per_token / self.x.shape[1],
            "saved_bytes_per_weight": (more - many * per_token) / self.parameters[0].numel(),
        }

    def _kept(self, num_tokens: int) -> int:
        own = {parameter.untyped_storage().data_ptr() for parameter in self.parameters}
        kept: dict[int, Tensor] = {}

        def note(tensor: Tensor) -> Tensor:
            address = tensor.untyped_storage().data_ptr()
            if address not in own:
                kept[address] = tensor
            return tensor

        x = self.random(num_tokens, self.x.shape[1]).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            y = self.forward(x)  # holds what is kept: no address is used twice
            del y
        return sum(tensor.nbytes for tensor in kept.values())


def measure_linear(settings: argparse.Namespace) -> dict[str, Any]:
    """One table per size, one row per precision."""
    tables = {}
    for size in settings.sizes:
        cases: dict[str, LinearCase] = {}
        rows: dict[str, dict[str, Any]] = {}
        for name in PRECISIONS:
            case, reason = or_reason(LinearCase, name, size, settings)
            if reason is None:
                cases[name] = case
            else:
                rows[name] = {"reason": reason}
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
        for _ in track(range(settings.repeats), f"linear {size[0]} x {size[1]}", transient=True):
            for name, case in cases.items():
                seconds[name].append(case.run())
        for name, case in cases.items():
            forward, backward = (1e3 * statistics.median(column) for column in zip(*seconds[name], strict=True))
            rows[name] = {
                "backend": backend_of(case.precision),
                "forward_ms": forward,
                "backward_ms": backward,
                "both_ms": 1e3 * statistics.median(map(sum, seconds[name])),
            } | case.saved
        with_speedups(rows, "both_ms")
        tables[f"{size[0]}x{size[1]}"] = {name: rows[name] for name in PRECISIONS}
    return tables


def with_speedups(rows: dict[str, dict[str, Any]], name: str) -> None:
    """Add the speed-up over bf16 to rows that ran, if that ran."""
    for row in rows.values():
        if name in row and name in rows["bf16"]:
            row["speedup"] = rows["bf16"][name] / row[name]


def show_linear(record: dict[str, Any], settings: dict[str, Any], console: Console) -> None:
    """Print the section as tables."""
    columns = {
        "forward": ("forward_ms", "{:.2f} ms"),
        "backward": ("backward_ms", "{:.2f} ms"),
        "speed-up": ("speedup", "{:.2f}x"),
        "saved per input element": ("saved_bytes_per_input_element", "{:.3f} B"),
        "saved per weight": ("saved_bytes_per_weight", "{:.3f} B"),
    }
    for size, rows in record.items():
        show_precisions(f"linear layer, {size}, {settings['tokens']} tokens", rows, columns, console)


def show_precisions(
    title: str, rows: dict[str, dict[str, Any]], columns: dict[str, tuple[str, str]], console: Console
) -> None:
    """A table of precisions; `columns` are title -> (key of a row, format)."""
    table = Table(title=title)
    table.add_column("precision")
    table.add_column("backend")
    for column in columns:
        table.add_column(column, justify="right")
    for name, row in rows.items():
        cells = [shape.format(row[key]) if key in row else "" for key, shape in columns.values()]
        table.add_row(name, row.get("backend", "none"), *cells)
    console.print(table)
    for name, row in rows.items():
        if "reason" in row:
            console.print(f"{name} cannot run here: {row['reason']}", highlight=False)


def run_fit(name: str, settings: argparse.Namespace) -> dict[str, Any]:
    """One fit in one precision: what `RankMeasure` records of it."""
    warnings.filterwarnings("ignore")
    for logger in ("lightning.pytorch", "lightning.fabric", "longlive"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    on_gpu = settings.device == "cuda"
    codec = DCTCodec()
    channels = codec.latent_channels
    model = replace(MODELS[settings.model](), num_layers=settings.layers, in_channels=channels, out_channels=channels)
    module = TeacherForcingModule(
        model=model,
        codec=codec,
        text_encoder=ToyTextEncoder(model.text_dim, settings.prompt_tokens),
        schedule=FlowSchedule(),
        chunk_frames=CHUNK_FRAMES,
        optimizer=partial(AdamW, lr=1e-4),
    )
    spec = BatchSpec(settings.batch, settings.frames, CHUNK_FRAMES, channels, settings.height, settings.width)
    batches = [VideoBatch.fake(spec, seed=number) for number in range(1 + settings.steps)]
    precision = make_precision(name, settings.device)
    held = 0
    if on_gpu:
        gc.collect()  # the run before this one
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    measure = RankMeasure(settings.steps, profiled=False, on_gpu=on_gpu, num_ranks=1)
    trainer = Trainer(
        accelerator=settings.device,
        devices=1,
        plugins=[precision] if isinstance(precision, Precision) else None,
        precision=None if isinstance(precision, Precision) else precision,  # type: ignore[arg-type]
        gradient_clip_val=1.0,
        max_steps=len(batches),
        max_epochs=-1,
        callbacks=[measure],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    record = measure.record()
    return record | {"backend": backend_of(precision), "peak_memory": record["peak_memory"] - held}


def run_alone(name: str, settings: argparse.Namespace) -> dict[str, Any]:
    """A fit where no other left its memory: on CUDA the allocator counts exactly, on a CPU a new process is needed."""
    if settings.device == "cuda":
        return run_fit(name, settings)
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("fork")) as process:
        return process.submit(run_fit, name, settings).result()


def measure_step(settings: argparse.Namespace) -> dict[str, Any]:
    """One row per precision."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in PRECISIONS}
    rows: dict[str, dict[str, Any]] = {name: {} for name in PRECISIONS}
    for _ in track(range(settings.rounds), "step", transient=True):
        for name in PRECISIONS:
            if "reason" not in rows[name]:
                found, reason = or_reason(run_alone, name, settings)
                if reason is None:
                    runs[name].append(found)
                else:
                    rows[name] = {"reason": reason}
    for name, row in rows.items():
        if "reason" in row:
            continue
        steps = [step for fit in runs[name] for step in fit["steps"]]
        row["backend"] = runs[name][0]["backend"]
        row["loss"] = runs[name][0]["loss"]
        for phase in PHASES:
            row[f"{phase}_ms"] = 1e3 * statistics.median(step[phase] for step in steps)
        row["step_ms"] = 1e3 * statistics.median(sum(step[phase] for phase in PHASES) for step in steps)
        row["processor_ms"] = 1e3 * statistics.median(step["cpu"] for step in steps)
        row["peak_memory_bytes"] = statistics.median(fit["peak_memory"] for fit in runs[name])
        row["peak_memory_mib"] = row["peak_memory_bytes"] / 2**20
    with_speedups(rows, "step_ms")
    return rows


def show_step(record: dict[str, Any], settings: dict[str, Any], console: Console) -> None:
    """Print the section as a table."""
    columns = {
        "forward": ("forward_ms", "{:.1f} ms"),
        "backward": ("backward_ms", "{:.1f} ms"),
        "optimizer": ("optimizer_ms", "{:.1f} ms"),
        "step": ("step_ms", "{:.1f} ms"),
        "processor": ("processor_ms", "{:.1f} ms"),
        "speed-up": ("speedup", "{:.2f}x"),
        "peak memory": ("peak_memory_mib", "{:.0f} MiB"),
    }
    size = f"{settings['batch']} x {settings['frames']} frames of {settings['height']} x {settings['width']} latents"
    show_precisions(
        f"training step, {settings['model']}, {settings['layers']} layers, {size}", record, columns, console
    )


@dataclass(frozen=True)
class Section:
    """A part of the benchmark: what measures it and what prints its record."""

    measure: Callable[[argparse.Namespace], dict[str, Any]]
    show: Callable[[dict[str, Any], dict[str, Any], Console], None]


SECTIONS = {
    "quantiser": Section(measure_quantiser, show_quantiser),
    "linear": Section(measure_linear, show_linear),
    "step": Section(measure_step, show_step),
}


def measure(settings: argparse.Namespace) -> dict[str, Any]:
    """The whole record: what ran where, and one entry per section."""
    given = {name: value for name, value in vars(settings).items() if value is not None}
    settings = argparse.Namespace(**DEFAULTS[settings.device] | given)
    record = header(settings)
    torch.set_num_threads(settings.threads)
    # Steps first: they fork, which no process survives whose threads have computed.
    order = sorted(settings.sections, key=lambda name: name != "step")
    measured = {name: SECTIONS[name].measure(settings) for name in order}
    return record | {"sections": {name: measured[name] for name in SECTIONS if name in measured}}


def show(record: dict[str, Any]) -> None:
    """Print the record as tables."""
    console = Console(width=None if Console().is_terminal else 140)
    for name, section in record["sections"].items():
        SECTIONS[name].show(section, record["settings"], console)
    console.print("emulated: accuracy and what is saved for backward are real, times and peak memory are not")
    console.print(summary(record), highlight=False)


def sections(text: str) -> list[str]:
    """Names with commas between them."""
    names = text.split(",")
    if unknown := set(names) - set(SECTIONS):
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: use some of {','.join(SECTIONS)}")
    return names


def layer_size(text: str) -> tuple[int, int]:
    """`3072x14336`: in and out features."""
    in_features, _, out_features = text.partition("x")
    return int(in_features), int(out_features)


def command_line() -> argparse.ArgumentParser:
    parser = make_parser("bench_precision", __doc__)
    parser.add_argument("--sections", type=sections, default=list(SECTIONS), help="by default all")
    parser.add_argument("--repeats", type=int, default=5, help="of quantiser and linear")
    quantiser = parser.add_argument_group("quantiser")
    quantiser.add_argument("--rows", type=int, default=4096)
    quantiser.add_argument("--columns", type=int, default=3072)
    quantiser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    linear = parser.add_argument_group("linear")
    linear.add_argument("--sizes", type=layer_size, nargs="+", help="in x out features, such as 3072x14336")
    linear.add_argument("--tokens", type=int)
    linear.add_argument("--calls", type=int, help="in a row, in one measurement")
    step = parser.add_argument_group("step")
    step.add_argument("--model", choices=MODELS)
    step.add_argument("--layers", type=int)
    step.add_argument("--frames", type=int)
    step.add_argument("--height", type=int, help="of the latents")
    step.add_argument("--width", type=int, help="of the latents")
    step.add_argument("--prompt-tokens", type=int)
    step.add_argument("--batch", type=int, default=1, help="clips")
    step.add_argument("--rounds", type=int, default=3, help="fits of each precision")
    step.add_argument("--steps", type=int, default=3, help="timed steps of a fit")
    return parser


if __name__ == "__main__":
    main(command_line(), measure, show)
