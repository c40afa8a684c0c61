"""A declared global batch: the same clips in every optimizer step, whatever the ranks and the accumulation."""

import logging
import warnings
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer

from helpers.data_runs import SETTINGS, OneOfManyRanks, Recorder, train, trainer_of
from longlive.data.datamodule import VideoDataModule
from longlive.data.order import epoch_order


@pytest.fixture(autouse=True)
def no_lightning_advice() -> None:
    """Lightning advises more workers and steps than a test wants."""
    warnings.filterwarnings("ignore", module="lightning")


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
