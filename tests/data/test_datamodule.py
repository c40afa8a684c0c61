"""What Lightning trains on, step by step, and after every kind of interruption."""

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

from helpers.data_runs import SETTINGS, OneOfManyRanks, Recorder, train, trainer_of
from longlive.data.batch import VideoBatch
from longlive.data.datamodule import VideoDataModule
from longlive.data.order import epoch_order
from longlive.data.sample import ClipWindow


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
