"""What Lightning trains on, step by step, and after every kind of interruption."""

import logging
import multiprocessing
import os
import pickle
import signal
import warnings
from itertools import chain
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from longlive.data.batch import VideoBatch
from longlive.data.datamodule import VideoDataModule
from longlive.data.order import epoch_order
from longlive.data.sample import ClipWindow

SETTINGS: dict[str, Any] = {
    "num_frames": 3, "chunk_frames": 1, "height": 16, "width": 32, "batch_size": 2, "num_workers": 0, "seed": 5,
}  # fmt: skip


class Recorder(LightningModule):
    """Trains one number, and notes which samples it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[int]] = []
        self.validated: list[tuple[int, int]] = []
        self.batches_at_steps: list[int] = []

    def training_step(self, batch: VideoBatch, batch_index: int) -> torch.Tensor:
        self.seen.append(batch.sample_ids.tolist())
        return self.weight * batch.raw_frames.float().mean()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.batches_at_steps.append(len(self.seen))

    @property
    def steps(self) -> list[list[int]]:
        """Which samples each optimizer step saw."""
        return [
            list(chain(*self.seen[first:last]))
            for first, last in zip([0, *self.batches_at_steps], self.batches_at_steps, strict=False)
        ]

    def validation_step(self, batch: VideoBatch, batch_index: int) -> None:
        self.validated += zip(batch.sample_ids.tolist(), batch.num_valid_frames.tolist(), strict=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer_of(max_steps: int, **settings: Any) -> Trainer:
    return Trainer(
        **{
            "accelerator": "cpu",
            "max_steps": max_steps,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "use_distributed_sampler": False,
            "num_sanity_val_steps": 0,
        }
        | settings
    )


def train(
    data: VideoDataModule, max_steps: int, checkpoint: Path | None = None, save: Path | None = None, **settings: Any
) -> Recorder:
    model, trainer = Recorder(), trainer_of(max_steps, **settings)
    trainer.fit(model, datamodule=data, ckpt_path=checkpoint)
    if save is not None:
        trainer.save_checkpoint(save)
    return model


@pytest.fixture(autouse=True)
def no_lightning_advice() -> None:
    """Lightning advises more workers and steps than a test wants."""
    warnings.filterwarnings("ignore", module="lightning")


def test_training_reads_the_order_of_seed_and_epoch(pristine_shards: Path) -> None:
    seen = train(VideoDataModule(pristine_shards, **SETTINGS), 11).seen
    assert list(chain(*seen)) == [*epoch_order(11, 5, 0), *epoch_order(11, 5, 1)]


@pytest.mark.parametrize("reader", ["indexed", "streamed"])
@pytest.mark.parametrize(("stop_at", "accumulate"), [(3, 1), (4, 2), (7, 1)])
def test_a_resumed_run_draws_what_the_interrupted_one_would_have_drawn(
    pristine_shards: Path, tmp_path: Path, reader: str, stop_at: int, accumulate: int
) -> None:
    """Prefetched batches that count as consumed are skipped after a resume; a restart at 0 repeats the first ones."""

    def data(**changes: Any) -> VideoDataModule:
        return VideoDataModule(pristine_shards, **(SETTINGS | {"reader": reader} | changes))

    settings = {"accumulate_grad_batches": accumulate}
    whole = train(data(), 10, **settings).seen
    first = train(data(num_workers=2), stop_at, save=tmp_path / "stopped.ckpt", **settings).seen
    rest = train(data(num_workers=1), 10, checkpoint=tmp_path / "stopped.ckpt", **settings).seen
    assert len(whole) == 10 * accumulate
    assert first + rest == whole


def call_pickled(function: bytes) -> None:
    pickle.loads(function)()


def test_a_run_killed_without_warning_resumes_exactly(pristine_shards: Path, tmp_path: Path) -> None:
    class Kill(Callback):
        def on_train_batch_start(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
            if trainer.global_step == 6:
                os.kill(os.getpid(), signal.SIGKILL)

    def data() -> VideoDataModule:
        return VideoDataModule(pristine_shards, pristine_shards, **(SETTINGS | {"num_workers": 1}))

    def checkpoints() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)

    def killed() -> None:
        train(data(), 10, callbacks=[checkpoints(), Kill()], enable_checkpointing=True, val_check_interval=3)

    # Spawned, because neither CUDA nor autograd's threads survive a fork.
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
    process = context.Process(target=call_pickled, args=(cloudpickle.dumps(killed),))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ["step=4.ckpt"]
    resumed = train(data(), 10, checkpoint=tmp_path / "step=4.ckpt").seen
    assert resumed == train(data(), 10).seen[4:]


def test_a_checkpoint_of_a_resumed_run_resumes_too(pristine_shards: Path, tmp_path: Path) -> None:
    def data() -> VideoDataModule:
        return VideoDataModule(pristine_shards, **SETTINGS)

    whole = train(data(), 9).seen
    train(data(), 2, save=tmp_path / "2.ckpt")
    train(data(), 5, checkpoint=tmp_path / "2.ckpt", save=tmp_path / "5.ckpt")
    assert train(data(), 9, checkpoint=tmp_path / "5.ckpt").seen == whole[5:]


def test_epochs_of_the_trainer_do_not_restart_the_data(pristine_shards: Path) -> None:
    """With `limit_train_batches` Lightning iterates the same loader again and again."""
    for num_workers in (0, 1):
        data = VideoDataModule(pristine_shards, **(SETTINGS | {"num_workers": num_workers}))
        assert train(data, 8, limit_train_batches=3).seen == train(VideoDataModule(pristine_shards, **SETTINGS), 8).seen


def test_a_second_fit_continues(pristine_shards: Path) -> None:
    data, model = VideoDataModule(pristine_shards, **SETTINGS), Recorder()
    trainer = trainer_of(3)
    trainer.fit(model, datamodule=data)
    trainer.fit_loop.epoch_loop.max_steps = 6
    trainer.fit(model, datamodule=data)
    assert model.seen == train(VideoDataModule(pristine_shards, **SETTINGS), 6).seen


class OneOfManyRanks(VideoDataModule):
    """A data rank without its peers."""

    def __init__(self, *args: Any, data_rank: int, data_size: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.place = data_rank, data_size

    def data_parallel(self) -> tuple[int, int]:
        return self.place


def test_another_number_of_ranks_continues_with_the_same_global_batches(pristine_shards: Path, tmp_path: Path) -> None:
    def rank(data_rank: int, data_size: int) -> OneOfManyRanks:
        settings = SETTINGS | {"batch_size": 4 // data_size}
        return OneOfManyRanks(pristine_shards, data_rank=data_rank, data_size=data_size, **settings)

    whole = [sorted(batch) for batch in train(rank(0, 1), 7).seen]
    shares = [train(rank(data_rank, 2), 3, save=tmp_path / "two.ckpt").seen for data_rank in range(2)]
    assert [sorted(first + second) for first, second in zip(*shares, strict=True)] == whole[:3]
    shares = [train(rank(data_rank, 4), 7, checkpoint=tmp_path / "two.ckpt").seen for data_rank in range(4)]
    assert [sorted(chain(*batches)) for batches in zip(*shares, strict=True)] == whole[3:]


def global_steps(directory: Path, data_size: int, batch_size: int, max_steps: int, **files: Path) -> list[list[int]]:
    """Samples of every optimizer step over all data ranks, of a run with a global batch of 4."""
    ranks = [
        train(
            OneOfManyRanks(
                directory,
                data_rank=data_rank,
                data_size=data_size,
                **(SETTINGS | {"batch_size": batch_size, "global_batch_size": 4}),
            ),
            max_steps,
            **files,
        ).steps
        for data_rank in range(data_size)
    ]
    return [sorted(chain(*step)) for step in zip(*ranks, strict=True)]


@pytest.mark.parametrize(("data_size", "batch_size"), [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 1)])
def test_a_run_with_a_global_batch_continues_on_any_number_of_ranks(
    data_size: int, batch_size: int, pristine_shards: Path, tmp_path: Path
) -> None:
    """Lightning steps when its restored count of batches is a multiple of the accumulation: after a change of that, the
    first step came too early, on a part of the global batch."""
    whole = global_steps(pristine_shards, 1, 4, 9)
    assert [len(step) for step in whole] == [4] * 9
    # 2 ranks x 1 clip x 2 accumulated; then something else; then 1 rank x 1 clip x 4
    two, other = tmp_path / "two.ckpt", tmp_path / "other.ckpt"
    assert global_steps(pristine_shards, 2, 1, 3, save=two) == whole[:3]
    assert global_steps(pristine_shards, data_size, batch_size, 6, checkpoint=two, save=other) == whole[3:6]
    assert global_steps(pristine_shards, 1, 1, 9, checkpoint=other) == whole[6:]


def test_a_checkpoint_from_the_middle_of_an_accumulation_continues_where_the_step_began(
    pristine_shards: Path, tmp_path: Path
) -> None:
    """The gradients of the step's first batches are lost; counted as consumed, no step ever trains on them."""

    class SaveAfter(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.fit_loop.epoch_loop.batch_progress.current.processed == 8:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    def data() -> VideoDataModule:
        return VideoDataModule(pristine_shards, **(SETTINGS | {"batch_size": 1, "global_batch_size": 3}))

    whole = train(data(), 6, callbacks=[SaveAfter()]).steps
    assert train(data(), 6, checkpoint=tmp_path / "middle.ckpt").steps == whole[2:]


def test_the_accumulation_may_change_without_a_declared_global_batch(pristine_shards: Path, tmp_path: Path) -> None:
    def data() -> VideoDataModule:
        return VideoDataModule(pristine_shards, **(SETTINGS | {"batch_size": 1}))

    order = [*epoch_order(11, 5, 0), *epoch_order(11, 5, 1)]
    first = train(data(), 3, save=tmp_path / "3.ckpt", accumulate_grad_batches=2).steps
    rest = train(data(), 6, checkpoint=tmp_path / "3.ckpt", accumulate_grad_batches=4).steps
    assert [len(step) for step in (*first, *rest)] == [2, 2, 2, 4, 4, 4]
    assert list(chain(*first, *rest)) == order[:18]


def test_the_global_batch_is_said_at_the_start(pristine_shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = SETTINGS | {"global_batch_size": 24}
    data = OneOfManyRanks(pristine_shards, data_rank=0, data_size=3, **settings)
    with caplog.at_level(logging.INFO, logger="longlive"):
        train(data, 2)
    assert data.trainer.accumulate_grad_batches == 4
    assert [record.getMessage() for record in caplog.records if record.name.startswith("longlive")] == [
        "global batch 24 = 3 data ranks x 2 clips x 4 accumulated"
    ]


def test_a_global_batch_that_the_ranks_do_not_divide_is_refused(pristine_shards: Path) -> None:
    data = OneOfManyRanks(pristine_shards, data_rank=0, data_size=3, **SETTINGS, global_batch_size=8)
    message = "global_batch_size=8 is no multiple of 6 = batch_size=2 x 3 data ranks; use global_batch_size=6 or 12$"
    with pytest.raises(ValueError, match=message):
        train(data, 1)


@pytest.mark.parametrize(("global_batch_size", "accumulate"), [(8, 2), (2, 4)])
def test_an_accumulation_that_contradicts_the_global_batch_is_refused(
    global_batch_size: int, accumulate: int, pristine_shards: Path
) -> None:
    data = VideoDataModule(pristine_shards, **SETTINGS, global_batch_size=global_batch_size)
    message = (
        f"accumulate_grad_batches={accumulate} contradicts the declared global batch {global_batch_size} = 1 data rank"
    )
    with pytest.raises(ValueError, match=message):
        train(data, 1, accumulate_grad_batches=accumulate)


def test_both_may_be_set_where_they_agree(pristine_shards: Path) -> None:
    data = VideoDataModule(pristine_shards, **SETTINGS, global_batch_size=8)
    assert [len(step) for step in train(data, 2, accumulate_grad_batches=4).steps] == [8, 8]


def test_a_module_that_steps_by_hand_cannot_be_given_an_accumulation(pristine_shards: Path) -> None:
    """Lightning refuses `accumulate_grad_batches` there; set later, it would be ignored."""
    model = Recorder()
    model.automatic_optimization = False
    data = VideoDataModule(pristine_shards, **SETTINGS, global_batch_size=8)
    with pytest.raises(ValueError, match=r"Recorder steps its optimizers by hand.*use global_batch_size=2,"):
        trainer_of(1).fit(model, datamodule=data)


class OneOfTwoPeers(Recorder):
    """A sequence rank without its peer: clips of 3 frames, the first of which is the first rank's."""

    def __init__(self, sequence_rank: int) -> None:
        super().__init__()
        self.sequence_rank = sequence_rank
        self.batches: list[VideoBatch] = []

    def clip_window(self, num_frames: int) -> ClipWindow:
        assert num_frames == 3
        return (ClipWindow(0, 1, 0), ClipWindow(1, 9, 1))[self.sequence_rank]

    def training_step(self, batch: VideoBatch, batch_index: int) -> torch.Tensor:
        self.batches.append(batch)
        return super().training_step(batch, batch_index)

    def validation_step(self, batch: VideoBatch, batch_index: int) -> None:
        self.batches.append(batch)


@pytest.mark.parametrize("reader", ["indexed", "streamed"])
@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_sequence_peers_read_their_windows_of_the_same_clips(stage: str, reader: str, pristine_shards: Path) -> None:
    def batches(model: LightningModule) -> list[VideoBatch]:
        data = VideoDataModule(pristine_shards, pristine_shards, **(SETTINGS | {"reader": reader, "num_workers": 1}))
        getattr(trainer_of(6, limit_val_batches=0 if stage == "fit" else 6), stage)(model, datamodule=data)
        return model.batches

    class Alone(OneOfTwoPeers):
        def clip_window(self, num_frames: int) -> None:
            return None

    for first, second, whole in zip(*map(batches, (OneOfTwoPeers(0), OneOfTwoPeers(1), Alone(0))), strict=True):
        assert torch.equal(torch.cat([first.raw_frames, second.raw_frames], 1), whole.raw_frames)
        assert (first.frame_offset, second.frame_offset, whole.frame_offset) == (0, 1, 0)
        for part in (first, second):
            assert part.prompts == whole.prompts
            assert torch.equal(part.sample_ids, whole.sample_ids)
            assert torch.equal(part.shot_index, whole.shot_index)
            assert torch.equal(part.num_valid_frames, whole.num_valid_frames)


def test_data_that_served_one_trainer_reads_the_window_of_the_next(pristine_shards: Path) -> None:
    data = VideoDataModule(pristine_shards, **SETTINGS)
    for model, num_raw_frames in ((OneOfTwoPeers(0), 1), (OneOfTwoPeers(1), 8)):
        trainer_of(1).fit(model, datamodule=data)
        assert model.batches[0].raw_frames.shape[1] == num_raw_frames
    train(data, 1)
    assert data.window_spec() == data.spec


def test_a_window_outside_the_clip_is_refused_before_training(pristine_shards: Path) -> None:
    class Beyond(OneOfTwoPeers):
        def clip_window(self, num_frames: int) -> ClipWindow:
            return ClipWindow(1, 10, 1)

    with pytest.raises(ValueError, match="reaches beyond the clip's 9 raw frames"):
        trainer_of(1).fit(Beyond(0), datamodule=VideoDataModule(pristine_shards, **SETTINGS))


def test_data_ranks_come_from_the_strategy(pristine_shards: Path) -> None:
    data = VideoDataModule(pristine_shards, **SETTINGS)
    assert data.data_parallel() == (0, 1)
    data.trainer = trainer_of(1)
    assert data.data_parallel() == (0, 1)
    data.trainer = trainer_of(1, strategy="ddp", devices=2)
    assert data.data_parallel() == (0, 2)


def test_validation_sees_every_clip_once_and_pads_the_last_batches(pristine_shards: Path) -> None:
    for reader in ("indexed", "streamed"):
        seen: list[tuple[int, int]] = []
        for data_rank in range(2):
            data = OneOfManyRanks(
                pristine_shards, pristine_shards, data_rank=data_rank, data_size=2, **(SETTINGS | {"reader": reader})
            )
            model = Recorder()
            trainer_of(1).validate(model, datamodule=data, verbose=False)
            assert len(model.validated) == 6
            seen += model.validated
        assert sorted(sample for sample, num_valid in seen if num_valid) == list(range(11))
        assert [sample for sample, num_valid in seen if not num_valid] == [0]


def test_a_batch_carries_what_the_contract_says(pristine_shards: Path) -> None:
    data = VideoDataModule(pristine_shards, **SETTINGS)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch.raw_frames.shape == (2, 9, 3, 16, 32)
    assert batch.raw_frames.dtype == torch.uint8
    assert batch.sample_ids.dtype == torch.int64
    assert batch.shot_index.shape == (2, 3)
    assert [len(prompts) for prompts in batch.prompts] == [3, 3]
    assert batch.frame_offset == 0


def test_unreadable_samples_are_counted_for_the_user(shards: Path) -> None:
    (shards / "shard-000003.tar").write_bytes(b"")
    data = VideoDataModule(shards, **SETTINGS)
    train(data, 6)
    assert data.num_unreadable == 2


def test_a_remote_set_is_streamed_without_being_told(pristine_shards: Path) -> None:
    remote = VideoDataModule(f"pipe:cat {pristine_shards}/{{}}", **SETTINGS)
    local = VideoDataModule(pristine_shards, **(SETTINGS | {"reader": "streamed"}))
    assert train(remote, 4).seen == train(local, 4).seen


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_frames": 4, "chunk_frames": 3}, "num_frames=4 is no multiple of chunk_frames=3; use 3 or 6"),
        ({"height": 0}, "height=0 must be positive"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"global_batch_size": 5}, "global_batch_size=5 is no multiple of 2 = .*use global_batch_size=4 or 6"),
        ({"num_workers": -1}, "num_workers=-1 must be at least 0"),
        ({"reader": "fast"}, "reader='fast' is unknown; use 'auto', 'indexed' or 'streamed'"),
        (
            {"reader": "indexed", "train": "https://host/shards"},
            "reader='indexed' needs local directories, https://host",
        ),
        ({"train": None}, "neither train nor val is given"),
        ({"train": []}, "neither train nor val is given"),
        ({"decoder": "ffmpeg"}, "decoder='ffmpeg' is unknown"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_any_work(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VideoDataModule(**({"train": "somewhere"} | SETTINGS | changes))


def test_a_missing_directory_is_named_before_training(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere is no directory; `longlive shards` writes one"):
        train(VideoDataModule(tmp_path / "nowhere", **SETTINGS), 1)


def test_training_without_training_data_is_an_error(pristine_shards: Path) -> None:
    with pytest.raises(ValueError, match="train is not given"):
        train(VideoDataModule(val=pristine_shards, **SETTINGS), 1)


def test_lightnings_own_sampler_is_refused_where_it_would_replace_ours(pristine_shards: Path) -> None:
    """It shuffles by itself, whatever sampler the loader has."""
    data = OneOfManyRanks(pristine_shards, data_rank=0, data_size=2, **SETTINGS)
    with pytest.raises(ValueError, match="set use_distributed_sampler=False"):
        train(data, 1, use_distributed_sampler=True)
