"""How far a training is in its data, for all data modules whose samples are named by position (`order.py`).

Lightning never sees an epoch of the training data; ours are internal to the data sets. So a run is measured in steps,
and the position in the data is one number: samples consumed, over all ranks. At a checkpoint it is counted from the
batches that were trained on (`batch_progress`), not from those that the loader has prefetched. A resumed run therefore
draws exactly the samples that the interrupted one would have drawn next. (StatefulDataLoader would save one rank's
loader state, tied to its number of workers.)

Where videos are made in clips, one in a step (`modules.streaming`), a batch comes for all steps that its videos take;
how many it has come for belongs to the position.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from lightning.pytorch import LightningDataModule
from lightning.pytorch.strategies import ParallelStrategy

from longlive.data.order import PositionBatches, RepeatedBatches


@runtime_checkable
class ChecksData(Protocol):
    """A module that cannot train on all data."""

    def check_data(self, data: PositionDataModule) -> None:
        """Raise the `ValueError` for data that it cannot train on."""
        ...


class PositionDataModule(LightningDataModule):
    """Knows its position, keeps it in checkpoints, and has the batches of positions that follow.

    Args:
        num_frames: latent frames of a sample.
        clip_frames: of them, those that a step makes: a batch comes `num_frames / clip_frames` times. None: all.
        batch_size: samples per data rank and batch.

    Raises:
        ValueError: if `batch_size` is not positive, or clips do not make up samples.
    """

    def __init__(self, num_frames: int, clip_frames: int | None, batch_size: int) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        if clip_frames is not None and (clip_frames < 1 or num_frames % clip_frames):
            raise ValueError(
                f"clip_frames={clip_frames} does not divide num_frames={num_frames}: videos are made of whole clips"
            )
        self.num_frames, self.clip_frames, self.batch_size = num_frames, clip_frames, batch_size
        self.num_clips = 1 if clip_frames is None else num_frames // clip_frames
        self._samples_at_start = 0
        self._clips_at_start = 0
        self._batches_at_start = 0

    def setup(self, stage: str) -> None:
        """Refuse, before a network is built, data that the module cannot train on.

        Raises:
            ValueError: by `ChecksData`.
        """
        module: object = None if self.trainer is None else self.trainer.lightning_module
        if stage == "fit" and isinstance(module, ChecksData):
            module.check_data(self)

    def data_parallel(self) -> tuple[int, int]:
        """This process's data rank, and the number of data ranks. Sequence-parallel peers share a data rank.

        Taken from the strategy's own sampler arguments (which know its mesh); override it for another layout.
        """
        if self.trainer is not None and isinstance(self.trainer.strategy, ParallelStrategy):
            kwargs = self.trainer.strategy.distributed_sampler_kwargs
            return int(kwargs["rank"]), int(kwargs["num_replicas"])
        return 0, 1

    @property
    def samples_consumed(self) -> int:
        """Samples that went through all their training steps, over all ranks and since the first step of the run."""
        return self._position(self._num_trained_batches())[0]

    @property
    def clips_trained(self) -> int:
        """Steps that the batch after these samples went through."""
        return self._position(self._num_trained_batches())[1]

    def train_batches(self) -> RepeatedBatches:
        """The positions of every batch of this rank, from where it is when it is iterated over."""
        batches = PositionBatches(lambda: self.samples_consumed, self.batch_size, *self.data_parallel())
        return RepeatedBatches(batches, self.num_clips, lambda: self.clips_trained)

    def state_dict(self) -> dict[str, Any]:
        """The position: that of whole optimizer steps.

        `num_batches` is Lightning's own count at that moment, which it restores too.
        """
        num_batches = self._num_trained_batches()
        samples, clips = self._position(num_batches - self._num_pending_batches())
        return {"samples_consumed": samples, "clips_trained": clips, "num_batches": num_batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._samples_at_start = int(state_dict["samples_consumed"])
        self._clips_at_start = int(state_dict.get("clips_trained", 0))  # older checkpoints know no clips
        self._batches_at_start = int(state_dict["num_batches"])

    def _position(self, num_batches: int) -> tuple[int, int]:
        """Samples and clips, once so many batches are trained on."""
        whole, clips = divmod(self._clips_at_start + num_batches - self._batches_at_start, self.num_clips)
        return self._samples_at_start + whole * self.batch_size * self.data_parallel()[1], clips

    def _num_trained_batches(self) -> int:
        if self.trainer is None:
            return self._batches_at_start
        return int(self.trainer.fit_loop.epoch_loop.batch_progress.total.processed)  # type: ignore[attr-defined]

    def _num_pending_batches(self) -> int:
        """Trained batches whose gradients still wait for their optimizer step."""
        return 0
