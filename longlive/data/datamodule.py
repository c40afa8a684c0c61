"""What Lightning gets: one endless stream of training batches, and a finite one for validation.

A resumed run draws exactly the samples that the interrupted one would have drawn next (`position.py`), also with
another number of workers or, for the indexed reader, of ranks.

`global_batch_size` declares how many clips an optimizer step trains on, whatever the hardware: the number of batches
whose gradients are accumulated follows from it, and a run that is resumed on another number of ranks trains on the same
clips step by step. A checkpoint from the middle of an accumulation has lost that step's gradients, so its position is
where the step began.

Under sequence parallelism, peers read the same samples, each its own window of them (`ReadsWindows`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from longlive.data.indexed import IndexedShards
from longlive.data.latents import EncodesClips
from longlive.data.order import FinitePositionBatches, accumulation
from longlive.data.position import PositionDataModule
from longlive.data.reader import ShardReader
from longlive.data.sample import ClipSpec, ReadsWindows, collate
from longlive.data.shards import is_local
from longlive.data.shots import SCENE_CUT_PHRASE, ShotRules
from longlive.data.streamed import StreamedShards
from longlive.data.workers import WatchedLoader

log = logging.getLogger(__name__)

Locations = str | Path | Sequence[str | Path] | None


class VideoDataModule(PositionDataModule):
    """Batches of clips from shards.

    Args:
        train, val: directories of video shards or of latent shards, or URLs of them; several of one kind are read as
            one set. None: there is no such data.
        num_frames: latent frames per clip, a multiple of `chunk_frames`.
        chunk_frames: frames per chunk.
        height, width: pixels.
        fps: raw frames per second of the clips; sources of any rate are resampled.
        clip_frames: as in `PositionDataModule`; what a batch holds is read and decoded anew for each of its steps.
        batch_size: clips per data rank and batch.
        global_batch_size: clips per optimizer step, over all data ranks and accumulated batches; sets the Trainer's
            `accumulate_grad_batches`. None: the Trainer's setting stays as it is.
        num_workers: decoding processes of each loader; 0 decodes in the training process. Never changes the order.
        seed: of the order and of the temporal crops.
        reader: `"indexed"` (local directories), `"streamed"` (anything WebDataset can open), or `"auto"`.
        reader_timeout: seconds that training waits for a batch of the data workers before it gives up, naming the
            sample; None: for ever. Without workers nobody watches the reader.
        temporal_ratio: raw frames per frame, the codec's.
        decoder: `"pyav"`, or `"decord"` (decord where it is frame-accurate, PyAV elsewhere).
        scene_cut_phrase, max_chunks_per_shot, forced_cut_margin: what becomes of the shots of a video; see `ShotRules`.

    Raises:
        ValueError: if the sizes do not fit together or the reader does not fit the location.
        FileNotFoundError: if a directory, its index or one of its shards is missing.
    """

    def __init__(
        self,
        train: Locations = None,
        val: Locations = None,
        *,
        num_frames: int,
        chunk_frames: int,
        height: int,
        width: int,
        fps: float | int = 24.0,
        clip_frames: int | None = None,
        batch_size: int = 1,
        global_batch_size: int | None = None,
        num_workers: int = 1,
        seed: int = 0,
        reader: str = "auto",
        reader_timeout: float | int | None = None,
        temporal_ratio: int = 4,
        decoder: str = "pyav",
        scene_cut_phrase: str = SCENE_CUT_PHRASE,
        max_chunks_per_shot: int | None = None,
        forced_cut_margin: float | int = 1.0,
    ) -> None:
        super().__init__(num_frames, clip_frames, batch_size)
        self.spec = ClipSpec(
            num_frames,
            chunk_frames,
            height,
            width,
            fps,
            temporal_ratio,
            decoder,
            shot_rules=ShotRules(scene_cut_phrase, max_chunks_per_shot, forced_cut_margin),
        )
        if num_workers < 0:
            raise ValueError(f"num_workers={num_workers} must be at least 0 (0: decode in the training process)")
        if reader_timeout is not None and reader_timeout <= 0:
            raise ValueError(f"reader_timeout={reader_timeout} must be positive, or null to wait for ever")
        if reader not in ("auto", "indexed", "streamed"):
            raise ValueError(f"reader={reader!r} is unknown; use 'auto', 'indexed' or 'streamed'")
        if global_batch_size is not None:
            accumulation(global_batch_size, batch_size, data_size=1)
        self.global_batch_size = global_batch_size
        self.num_workers, self.seed, self.reader = num_workers, seed, reader
        self.reader_timeout = reader_timeout
        remote = [str(location) for location in (*_as_list(train), *_as_list(val)) if not is_local(location)]
        if reader == "indexed" and remote:
            raise ValueError(
                f"reader='indexed' needs local directories, {remote[0]} is none; use reader='streamed' or 'auto'"
            )
        self.locations = {"train": _as_list(train), "val": _as_list(val)}
        if not any(self.locations.values()):
            raise ValueError(
                "neither train nor val is given; name a directory of shards (`longlive shards` writes one)"
            )
        self._datasets: dict[str, ShardReader] = {}
        self._loaders: list[WatchedLoader] = []

    def setup(self, stage: str) -> None:
        """Open the indices, and set the Trainer's accumulation.

        Raises:
            ValueError: if the module cannot train on these clips, the ranks do not divide the global batch, the Trainer
                accumulates something else, or it would replace the order.
        """
        super().setup(stage)
        if stage == "fit":
            self._declare_global_batch()
        spec = self.window_spec()
        names = {"fit": ("train", "val"), "validate": ("val",)}.get(stage, ())
        for name in names:
            if self.locations[name] and (name not in self._datasets or self._datasets[name].spec != spec):
                self._datasets[name] = self._open(name, spec)
                self._check_latents(name)
        if (
            self.trainer is not None
            and max(self.trainer.world_size, self.data_parallel()[1]) > 1
            and self.trainer._accelerator_connector.use_distributed_sampler
        ):
            raise ValueError(
                "Trainer(use_distributed_sampler=True) would replace the data order by Lightning's own; "
                "set use_distributed_sampler=False, the data module splits by data rank itself"
            )

    def _check_latents(self, name: str) -> None:
        """Of a set of latents: that this run would have made the same ones. Says which clips they are of."""
        dataset = self._datasets[name]
        module: object = None if self.trainer is None else self.trainer.lightning_module
        if isinstance(module, EncodesClips):
            dataset.check_encoders(module)
        if not dataset.shuffle or (self.trainer is not None and not self.trainer.is_global_zero):
            return
        for location, latents in dataset.latents.items():
            log.info(
                "%s holds latents of the clips that seed %d draws in the first %d epoch%s; later ones read them again",
                location,
                latents.seed,
                latents.num_epochs,
                "s" if latents.num_epochs > 1 else "",
            )

    def window_spec(self) -> ClipSpec:
        """The clip, with the window that this rank's module reads of it.

        Raises:
            ValueError: if the window reaches beyond the clip.
        """
        module: object = None if self.trainer is None else self.trainer.lightning_module
        if not isinstance(module, ReadsWindows):
            return self.spec
        return replace(self.spec, window=module.clip_window(self.spec.num_frames))

    def _declare_global_batch(self) -> None:
        if self.trainer is None or self.global_batch_size is None:
            return
        data_size, module = self.data_parallel()[1], self.trainer.lightning_module
        number = accumulation(self.global_batch_size, self.batch_size, data_size)
        equation = (
            f"global batch {self.global_batch_size} = {data_size} data rank{'s' if data_size > 1 else ''} "
            f"x {self.batch_size} clip{'s' if self.batch_size > 1 else ''} x {number} accumulated"
        )
        if self.trainer.accumulate_grad_batches not in (1, number):
            raise ValueError(
                f"accumulate_grad_batches={self.trainer.accumulate_grad_batches} contradicts the declared {equation}; "
                "leave one of the two out: accumulate_grad_batches=1, or global_batch_size=null"
            )
        if number > 1 and not module.automatic_optimization:
            raise ValueError(
                f"{equation}, but {type(module).__name__} steps its optimizers by hand, where Lightning accumulates "
                f"nothing; use global_batch_size={self.batch_size * data_size}, or another batch_size"
            )
        self.trainer.accumulate_grad_batches = number
        if self.trainer.is_global_zero:
            log.info(equation)

    def _open(self, name: str, spec: ClipSpec) -> ShardReader:
        locations, shuffle = self.locations[name], name == "train"
        if self.reader == "indexed" or (self.reader == "auto" and all(map(is_local, locations))):
            return IndexedShards(locations, spec, seed=self.seed, shuffle=shuffle)
        data_rank, data_size = self.data_parallel()
        return StreamedShards(
            locations,
            spec,
            seed=self.seed,
            shuffle=shuffle,
            batch_size=self.batch_size,
            data_rank=data_rank,
            data_size=data_size,
        )

    @property
    def num_unreadable(self) -> int:
        """Distinct samples that were unreadable and replaced so far, in this process and its workers."""
        return sum(dataset.unreadable.count for dataset in self._datasets.values())

    def keys_of(self, sample_ids: Sequence[int]) -> list[str]:
        """What the training shards call these samples."""
        samples = self._datasets["train"].samples
        return [samples[sample_id].entry.key for sample_id in sample_ids]

    def on_exception(self, exception: BaseException) -> None:
        """A worker's death is noticed wherever the training process is at that moment."""
        for loader in self._loaders:
            explained = loader.explain(exception)
            if explained is not None:
                exception.add_note(explained)

    def _num_pending_batches(self) -> int:
        if self.trainer is None:
            return 0
        num_batches = int(self._epoch_batches.processed)
        is_last = num_batches >= self.trainer.num_training_batches  # it steps with what there is
        return 0 if is_last else num_batches % self.trainer.accumulate_grad_batches

    @property
    def _epoch_batches(self) -> Any:
        """Lightning's count of batches in its epoch, from which it tells when to step."""
        return self.trainer.fit_loop.epoch_loop.batch_progress.current  # type: ignore[union-attr]

    def _resume_at_a_whole_step(self) -> None:
        """Count the epoch's batches as if all its steps had accumulated what they do now.

        Lightning steps whenever its restored count is a multiple of `accumulate_grad_batches`. After a change of that
        number, or from the middle of an accumulation, the first step would come too early.
        """
        if self.trainer is None or not self.trainer.lightning_module.automatic_optimization:
            return
        progress = self.trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress
        num_batches = progress.optimizer.step.current.completed * self.trainer.accumulate_grad_batches
        shift = num_batches - self._epoch_batches.processed
        for name in ("ready", "started", "processed", "completed"):
            setattr(self._epoch_batches, name, getattr(self._epoch_batches, name) + shift)

    def train_dataloader(self) -> DataLoader[Any]:
        if "train" not in self._datasets:
            raise ValueError("train is not given; name a directory of shards (`longlive shards` writes one)")
        self._resume_at_a_whole_step()
        return self._loader(self._datasets["train"], self.train_batches())

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        if "val" not in self._datasets:
            return []
        dataset = self._datasets["val"]
        return self._loader(dataset, FinitePositionBatches(len(dataset), self.batch_size, *self.data_parallel()))

    def _loader(self, dataset: ShardReader, batches: Sampler[list[int]]) -> DataLoader[Any]:
        if self.reader_timeout is not None and not self.num_workers:
            log.info("num_workers=0: the training process reads its samples itself, and reader_timeout watches nobody")
        loader = WatchedLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=self.num_workers,
            timeout=self.reader_timeout,
            pin_memory=torch.cuda.is_available(),
        )
        self._loaders.append(loader)
        return loader


def _as_list(locations: Locations) -> list[str | Path]:
    if locations is None:
        return []
    return [locations] if isinstance(locations, str | Path) else list(locations)
