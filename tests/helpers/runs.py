"""Tiny runs: a network of one layer on the toy world (or on random latents), trained for a few steps in a second."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.util.tensor_util import make_ndarray
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.data import DataLoader, IterableDataset

from longlive.codecs.dct import DCTCodec
from longlive.config import compose
from longlive.data.batch import BatchSpec, VideoBatch
from longlive.data.shards import write_shards
from longlive.data.toyworld import ToyWorldSource
from longlive.diffusion.schedule import FlowSchedule
from longlive.models.wan.config import WanConfig
from longlive.models.wan.model import CausalWan
from longlive.modules.teacher_forcing import TeacherForcingModule
from longlive.parallel.checkpoint import load_checkpoint
from longlive.text.toy import ToyTextEncoder
from longlive.train import train

TINY = (
    "experiment=toyworld",
    "model.num_layers=1",
    "model.dim=32",
    "model.ffn_dim=32",
    "model.num_heads=2",
    "data.num_frames=8",
    "data.batch_size=2",
    "data.num_workers=0",
    "data.height=32",
    "data.width=32",
    "learning_rate.num_warmup_steps=2",
    "trainer.accelerator=cpu",
    "trainer.max_steps=12",
    "trainer.log_every_n_steps=1",
    "callbacks.checkpoint.every_n_train_steps=4",
    "+trainer.enable_progress_bar=false",
    "callbacks.progress=null",
    "callbacks.samples=null",
    "precision=32-true",
)
"""Overrides of `train.yaml`: 8 frames in 2 chunks, 2 clips a batch, a checkpoint every 4 of 12 steps."""


def write_toyworld(directory: Path, num_clips: int = 5, num_raw_frames: int = 29) -> Path:
    """Real shards of real mp4 files."""
    write_shards(ToyWorldSource(num_clips, num_raw_frames), directory, clips_per_shard=3, progress=False)
    return directory


def overrides(directory: Path, shards: Path, *more: str) -> list[str]:
    """The command line, after `longlive train`, of a tiny run."""
    return [*TINY, f"directory={directory}", f"data.train={shards}", *more]


def config_of(directory: Path, shards: Path, *more: str) -> DictConfig:
    """The tiny run's; composed once for all ranks of a run, for it takes as long as two of its steps."""
    return compose("train", overrides(directory, shards, *more))


def run(directory: Path, shards: Path, *more: str) -> Trainer:
    """The tiny run in this process."""
    return train(config_of(directory, shards, *more))


def distil(directory: Path, initialise_from: Path | None, *more: str, steps: int) -> Trainer:
    """The tiny distillation in this process, of the tiny run or of another one."""
    sizes = ("model.num_layers=1", "model.dim=32", "model.ffn_dim=32", "model.num_heads=2")
    data = ("data.num_frames=8", "data.batch_size=1", "data.height=32", "data.width=32", "data.prompts.num_prompts=4")
    adapters = ("module.lora.rank=4", "module.lora.alpha=8", "module.student_every=1", "module.guidance=0.0")
    steps_of_run = (f"trainer.max_steps={steps}", "callbacks.checkpoint.every_n_train_steps=2")
    quiet = tuple(
        override for override in TINY if override.startswith(("callbacks.progress", "callbacks.samples", "+"))
    )
    on = ("trainer.accelerator=cpu", "precision=32-true", "optimizer.lr=0.05", "learning_rate.num_warmup_steps=0")
    where = (f"directory={directory}", f"initialise_from={initialise_from or 'null'}")
    overridden = (*sizes, *data, *adapters, *steps_of_run, *quiet, *on, *where, *more)
    return train(compose("train", ["experiment=toyworld_distill_4step", *overridden]))


def checkpoint(directory: Path, step: int) -> dict[str, Any]:
    """A run's checkpoint, as torch reads it."""
    return torch.load(directory / "checkpoints" / f"step-{step:07d}.ckpt", weights_only=True)


def events(directory: Path) -> Iterable[Any]:
    """What TensorBoard finds in a run: (step, value) of every summary, oldest file first."""
    for file in sorted((directory / "tensorboard").glob("events.*")):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                yield event.step, value


def curves(directory: Path) -> dict[str, dict[int, float]]:
    """Scalars of a run by tag and step: the last value of each, as TensorBoard shows it."""
    found: dict[str, dict[int, float]] = {}
    for step, value in events(directory):
        if value.metadata.plugin_data.plugin_name == "scalars":
            found.setdefault(value.tag, {})[step] = float(make_ndarray(value.tensor))
    return found


def curve_values(directory: Path) -> dict[str, dict[int, float]]:
    """Those that do not measure time."""
    return {tag: curve for tag, curve in curves(directory).items() if not tag.startswith("throughput/")}


def state_after(directory: Path, step: int) -> dict[str, Any]:
    """All that a run's checkpoint holds, but how long it took and where it lies."""
    saved = load_checkpoint(directory / "checkpoints" / f"step-{step:07d}.ckpt")
    callbacks = {name: saved["callbacks"][name] for name in ("EMA", "LossBreakdown")}
    names = ("state_dict", "optimizer_states", "lr_schedulers", "VideoDataModule", "global_step")
    return {name: saved[name] for name in names} | {"callbacks": callbacks}


def assert_same(ours: Any, theirs: Any, where: str = "") -> None:
    """Two trees of tensors and plain values are equal bit for bit."""
    assert type(ours) is type(theirs), where
    if isinstance(ours, Mapping):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            assert_same(ours[key], theirs[key], f"{where}/{key}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), where
        for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(one, other, f"{where}/{index}")
    elif isinstance(ours, torch.Tensor):
        assert ours.dtype == theirs.dtype, where
        assert torch.equal(ours, theirs), where
    else:
        assert ours == theirs, where


class Snapshot(Callback):
    """Copies the run's directory when a batch starts: what a kill at that moment leaves on the disk.

    Args:
        source, target: directories.
        after_batches: batches of the run before that moment.
    """

    def __init__(self, source: str, target: str, after_batches: int) -> None:
        self.source, self.target, self.after_batches = source, target, after_batches

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.total.completed == self.after_batches:
            shutil.copytree(self.source, self.target)


class Pause(Callback):
    """Makes steps last long enough for a kill to hit one."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        time.sleep(self.seconds)


SPEC = BatchSpec(batch_size=2, num_frames=8, chunk_frames=4, channels=16, height=4, width=4)


def tiny_module(
    module_class: type[TeacherForcingModule] = TeacherForcingModule, **changes: Any
) -> TeacherForcingModule:
    """One layer, on the CPU, without data."""
    settings: dict[str, Any] = {
        "model": WanConfig.tiny(num_layers=1, dim=32, ffn_dim=32, num_heads=2),
        "codec": DCTCodec(),
        "text_encoder": ToyTextEncoder(embed_dim=64, num_tokens=12),
        "schedule": FlowSchedule(num_steps=1000, shift=3.0),
        "chunk_frames": 4,
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    }
    return module_class(**settings | changes)


def fake_batches(number: int, **changes: Any) -> list[VideoBatch]:
    """Random latents, other ones in every batch."""
    return [VideoBatch.fake(BatchSpec(**vars(SPEC) | changes), seed=index) for index in range(number)]


def samples_of_rank(batch: VideoBatch, rank: int, size: int) -> VideoBatch:
    """A data rank's samples of a global batch, as latents."""
    assert batch.latents is not None
    mine = slice(rank * batch.batch_size // size, (rank + 1) * batch.batch_size // size)
    return replace(
        batch,
        latents=batch.latents[mine],
        shot_index=batch.shot_index[mine],
        prompts=batch.prompts[mine],
        num_valid_frames=batch.num_valid_frames[mine],
        sample_ids=batch.sample_ids[mine],
    )


class MemoryLogger(Logger):
    """Keeps what is logged: a list of (step, values)."""

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[tuple[int, dict[str, float]]] = []

    @property
    def name(self) -> str:
        return "memory"

    @property
    def version(self) -> int:
        return 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        self.logged.append((step, dict(metrics)))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Not kept."""

    def of(self, tag: str) -> dict[int, float]:
        """Values of one tag by step."""
        return {step: values[tag] for step, values in self.logged if tag in values}


class Stream(IterableDataset[VideoBatch]):
    """Batches without a length: as with the real data, Lightning sees no epoch and knows no position."""

    def __init__(self, batches: Sequence[VideoBatch]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[VideoBatch]:
        return iter(self.batches)


def fit(
    module: LightningModule,
    batches: Sequence[VideoBatch],
    callbacks: Sequence[Callback] = (),
    logger: Logger | None = None,
    validation: Sequence[VideoBatch] = (),
    checkpoint: Path | None = None,
    **settings: Any,
) -> Trainer:
    """Train on batches that exist already, a resumed run on those that are left; `settings` are the Trainer's."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    trainer = Trainer(
        **{
            "accelerator": "cpu",
            "max_steps": len(batches),
            "max_epochs": 2,
            "callbacks": list(callbacks),
            "logger": logger or False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "num_sanity_val_steps": 0,
            "check_val_every_n_epoch": None,
            "use_distributed_sampler": False,
        }
        | settings
    )
    val_loader = DataLoader(list(validation), batch_size=None) if validation else None
    trainer.fit(
        module, DataLoader(Stream(batches), batch_size=None), val_loader, ckpt_path=checkpoint, weights_only=True
    )
    return trainer


class Randomise(Callback):
    """The head starts at zero, where most gradients vanish; a parity of zeros proves nothing."""

    @torch.no_grad()
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for name, parameter in pl_module.named_parameters():
            noise = 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
            if isinstance(parameter, DTensor):
                noise = distribute_tensor(noise, parameter.device_mesh, parameter.placements)
            parameter.add_(noise)


def random_network(config: WanConfig) -> CausalWan:
    """No weight is zero, one, or a number of bfloat16."""
    network = CausalWan(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data.normal_(generator=generator)
    return network
