"""A sharded checkpoint is read by any number of ranks, under any strategy, and is complete or absent."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.optim import SGD

from helpers.distributed import RankError, run_on_ranks
from helpers.runs import assert_same
from helpers.sharded_runs import Stage, bare, checkpoint_of, flat_mesh, held, step, train, train_on, whole
from longlive.callbacks.ema import EMA, averaged_weights
from longlive.parallel import checkpoint_directory, sharded_checkpoint
from longlive.parallel.checkpoint import load_checkpoint, newest_checkpoint
from longlive.parallel.sharded_checkpoint import ShardedCheckpoints

STEPS, HALF = 6, 3


def assert_close(ours: Any, theirs: Any, where: str = "") -> None:
    """Two trees agree to 1e-6."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), where
        for key in theirs:
            assert_close(ours[key], theirs[key], f"{where}/{key}")
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs), where
        for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_close(one, other, f"{where}/{index}")
    elif isinstance(theirs, torch.Tensor | float):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6, msg=lambda text: f"{where}: {text}")
    else:
        assert ours == theirs, where


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, Any]:
    """Six steps of one process that was never saved."""
    return train(range(STEPS), sharded=False)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, Path]:
    """Checkpoints of the same run after three steps: of one process, of two ranks and of four."""
    directory = tmp_path_factory.mktemp("saved")
    paths = {name: directory / name / "step-0000003.ckpt" for name in ("one", "two", "four")}
    train(range(HALF), save=paths["one"], sharded=False)
    train_on(2, range(HALF), save=paths["two"])
    train_on(4, range(HALF), save=paths["four"])
    return paths


@pytest.mark.parametrize(
    ("writer", "readers"), [("four", 1), ("four", 2), ("four", 4), ("two", 4), ("one", 2), ("one", 1)]
)
def test_a_run_continues_on_another_number_of_ranks_as_if_it_had_not_stopped(saved, uninterrupted, writer, readers):
    """Loss, weights, both moments and the average: one of them starting over shows only after many steps."""
    resumed = train_on(readers, range(HALF, STEPS), checkpoint=saved[writer])
    assert len(resumed["losses"]) == STEPS - HALF
    assert_close(resumed | {"losses": []}, uninterrupted | {"losses": []})
    assert_close(resumed["losses"], uninterrupted["losses"][HALF:])


def test_a_sharded_run_continues_in_one_process(saved, uninterrupted):
    assert saved["four"].is_dir()
    resumed = train(range(HALF, STEPS), checkpoint=saved["four"], sharded=False)
    assert_close(resumed | {"losses": []}, uninterrupted | {"losses": []})
    assert_close(resumed["losses"], uninterrupted["losses"][HALF:])


def test_a_directory_read_whole_is_the_tree_of_the_file(saved):
    """Weights for generation, averages for a new run: who reads a checkpoint need not know who wrote it."""
    ours, theirs = load_checkpoint(saved["four"]), load_checkpoint(saved["one"])
    for key in ("state_dict", "optimizer_states", "global_step", "epoch", "lr_schedulers", "callbacks"):
        assert_close(whole(ours[key]), whole(theirs[key]), key)
    assert ours["loops"].keys() == theirs["loops"].keys()
    assert_close(averaged_weights(ours), whole(averaged_weights(theirs)))


def test_the_shards_hold_every_sharded_tensor_once_and_rank_0_writes_the_rest(saved):
    """The average in rank 0's file would be rank 0's shard of it, or all of it gathered."""
    tree = checkpoint_directory.read_tree(saved["four"])
    sizes = [file.stat().st_size for file in saved["four"].glob("*.distcp")]
    assert len(sizes) == 4
    weights = tree["state_dict"]
    assert all(weights[name].is_meta for name in weights if name != "network.scale")
    assert all(average.is_meta for average in tree["callbacks"]["EMA"]["average"].values())
    stored = checkpoint_directory.ShardReader(saved["four"]).metadata.state_dict_metadata
    for name, value in weights.items():
        chunks = stored[f"state_dict/{name}"].chunks if value.is_meta else []
        assert sum(torch.Size(chunk.sizes).numel() for chunk in chunks) == (value.numel() if value.is_meta else 0), name


class Layouts(Callback):
    """Whether the average is laid out as the parameters when training starts."""

    def __init__(self, ema: EMA) -> None:
        self.ema = ema
        self.differing: list[str] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for name, parameter in pl_module.named_parameters():
            average = self.ema.average[name]
            assert isinstance(parameter, DTensor)
            if not isinstance(average, DTensor) or average.placements != parameter.placements:
                self.differing.append(name)


def _layouts(path: Path) -> list[str]:
    ema = EMA(decay=0.9)
    layouts = Layouts(ema)
    train(range(HALF, HALF + 1), checkpoint=path, callbacks=[ema, layouts])
    return layouts.differing


def test_the_average_comes_back_as_shards(saved):
    """Whole on every rank, it is as large as the network that was sharded because it does not fit."""
    for path in (saved["two"], saved["one"]):
        assert run_on_ranks(partial(_layouts, path), 2, init_process_group=False) == [[], []]


def _across_meshes(directory: Path) -> list[bool]:
    hybrid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    same = []
    for number, (writes, reads) in enumerate([(hybrid, flat_mesh()), (flat_mesh(), hybrid)]):
        writer, reader = bare(writes), bare(reads)
        step(reader, 5)
        elsewhere = distribute_tensor(torch.arange(10.0).view(5, 2), flat_mesh(), [Shard(0)])
        ShardedCheckpoints().save(writer, checkpoint_of(writer, buffer=[elsewhere]), directory / f"{number}.ckpt")
        expected = held(writer)
        rest = ShardedCheckpoints().load(reader, directory / f"{number}.ckpt")
        assert_same(held(reader), expected)
        assert isinstance(rest["buffer"][0], DTensor)
        assert Shard(0) in rest["buffer"][0].placements
        same.append(torch.equal(rest["buffer"][0].full_tensor(), torch.arange(10.0).view(5, 2)))
    return same


def test_replicas_and_shards_are_exchanged_and_any_sharded_tensor_is_kept(tmp_path):
    """Replicas written twice would be read twice; a buffer of shards in rank 0's file would be a quarter of itself."""
    assert run_on_ranks(_across_meshes, 4, tmp_path) == [[True, True]] * 4


# --- complete or absent -----------------------------------------------------------------------------------------------


def _kill_during_save(path: Path, moment: str, rank: int) -> None:
    strategy = bare(flat_mesh())
    checkpoints = ShardedCheckpoints()
    checkpoints.save(strategy, checkpoint_of(strategy, global_step=1), path)
    step(strategy, 1)

    def die(*args: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if dist.get_rank() == rank:
        if moment == "in the shards":
            sharded_checkpoint.ShardWriter.write_data = die  # type: ignore[method-assign]
        elif moment == "after the shards":
            checkpoint_directory.torch.save = die  # type: ignore[assignment]
        elif moment == "before the marker":
            checkpoint_directory._sync_directory = die
        elif moment == "before the name":
            checkpoint_directory.step_aside = die
        elif moment == "between the names":
            aside = checkpoint_directory.step_aside
            checkpoint_directory.step_aside = lambda path: (aside(path), die())[1]
    checkpoints.save(strategy, checkpoint_of(strategy, global_step=2), path)


@pytest.mark.parametrize(
    ("moment", "rank"),
    [
        ("in the shards", 1),
        ("in the shards", 0),
        ("after the shards", 0),
        ("before the marker", 0),
        ("before the name", 0),
        ("between the names", 0),
    ],
)
def test_a_kill_during_a_save_leaves_the_checkpoint_of_before(tmp_path, moment, rank):
    """Also when it is the same name that is written again, and the old one has just stepped aside."""
    path = tmp_path / "step-0000004.ckpt"
    with pytest.raises(RankError):
        run_on_ranks(_kill_during_save, 2, path, moment, rank)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert load_checkpoint(found)["global_step"] == 1
    assert load_checkpoint(path)["global_step"] == 1
    run_on_ranks(_save_again, 2, path)
    assert load_checkpoint(path)["global_step"] == 3
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def _save_again(path: Path) -> None:
    strategy = bare(flat_mesh())
    ShardedCheckpoints().load(strategy, path)
    ShardedCheckpoints().save(strategy, checkpoint_of(strategy, global_step=3), path)


def _fail(directory: Path, place: str) -> tuple[str, list[str]]:
    strategy = bare(flat_mesh())
    checkpoints = ShardedCheckpoints()
    checkpoints.save(strategy, checkpoint_of(strategy), directory / "old.ckpt")

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    if dist.get_rank() == 1 and place == "shards":
        sharded_checkpoint.ShardWriter.write_data = full  # type: ignore[method-assign]
    if dist.get_rank() == 0 and place == "tree":
        checkpoint_directory.torch.save = full  # type: ignore[assignment]
    with pytest.raises((RuntimeError, OSError), match="disk full") as error:
        checkpoints.save(strategy, checkpoint_of(strategy), directory / "new.ckpt")
    dist.barrier()
    return str(error.value), sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize(("place", "message"), [("shards", r"new\.ckpt was not written: rank 1"), ("tree", "disk")])
def test_what_fails_on_one_rank_is_raised_on_all_and_leaves_nothing(tmp_path, place, message):
    """Otherwise the others wait for it until a time-out of half an hour."""
    for text, names in run_on_ranks(_fail, 2, tmp_path, place):
        assert re.search(message, text)
        assert names == ["old.ckpt"]


def _refused(path: Path, change: dict[str, Any]) -> tuple[str, bool]:
    strategy = bare(flat_mesh(), **change)
    step(strategy, 3)
    before = held(strategy)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        ShardedCheckpoints().load(strategy, path)
    assert_same(held(strategy), before)
    return str(error.value), isinstance(error.value, ValueError)


def _save_bare(path: Path, **change: Any) -> None:
    strategy = bare(flat_mesh(), **change)
    ShardedCheckpoints().save(strategy, checkpoint_of(strategy), path)


def _two_groups(parameters: Any) -> SGD:
    matrices, vectors = [], []
    for name, parameter in parameters:
        (matrices if parameter.ndim == 2 else vectors).append((name, parameter))
    return SGD([{"params": matrices}, {"params": vectors}], lr=0.1, momentum=0.9)


def _break(path: Path, damage: str) -> None:
    if damage == "missing":
        (path / "__1_0.distcp").unlink()
    elif damage == "torn":
        file = path / "__1_0.distcp"
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "incomplete":
        (path / "_COMPLETE").unlink()


@pytest.mark.parametrize(
    ("damage", "change", "message"),
    [
        ("", {"width": 8}, r"of another model: embedding\.weight: \(7, 5\) in the checkpoint, \(8, 5\) in this model"),
        ("", {"optimizer": _two_groups}, "of another optimizer"),
        ("missing", {}, r"__1_0\.distcp is missing"),
        ("torn", {}, r"__1_0\.distcp is torn: it has \d+ bytes, and \d+ were written"),
        ("incomplete", {}, "_COMPLETE"),
    ],
)
def test_what_does_not_fit_is_refused_on_every_rank_before_anything_is_overwritten(tmp_path, damage, change, message):
    path = tmp_path / "step-0000001.ckpt"
    run_on_ranks(_save_bare, 2, path)
    _break(path, damage)
    for text, is_value_error in run_on_ranks(_refused, 2, path, change):
        assert re.search(message, text), text
        assert is_value_error == (damage != "incomplete")


# --- options ----------------------------------------------------------------------------------------------------------


def _trainable_only(directory: Path) -> tuple[list[str], str]:
    trained = bare(flat_mesh(), frozen="embedding")
    step(trained, 1)
    ShardedCheckpoints(trainable_only=True).save(trained, checkpoint_of(trained), directory / "part.ckpt")
    expected = held(trained)
    fresh = bare(flat_mesh(), frozen="embedding")
    rest = ShardedCheckpoints().load(fresh, directory / "part.ckpt")
    assert_same(held(fresh), expected)
    assert rest["state_dict"].keys() == expected["state_dict"].keys()
    with pytest.raises(ValueError, match=r"embedding\.weight: missing in the checkpoint") as error:
        ShardedCheckpoints().load_weights(bare(flat_mesh()), directory / "part.ckpt")
    names = list(checkpoint_directory.read_tree(directory / "part.ckpt")["state_dict"])
    return names, str(error.value)


def test_frozen_weights_stay_out_and_missing_trainable_ones_are_told(tmp_path):
    for names, _ in run_on_ranks(_trainable_only, 2, tmp_path):
        assert "blocks.0.weight" in names
        assert "scale" in names
        assert not [name for name in names if name.startswith("embedding")]


def _asynchronous(directory: Path) -> list[Any]:
    strategy = bare(flat_mesh())
    checkpoints = ShardedCheckpoints(asynchronous=True)
    let_go = threading.Event()
    finish: Callable[..., None] = checkpoint_directory.finish

    def held_back(*args: Any) -> None:
        assert let_go.wait(30)
        finish(*args)

    checkpoint_directory.finish = held_back
    expected = held(strategy)
    checkpoints.save(strategy, checkpoint_of(strategy), directory / "step-1.ckpt")
    visible = newest_checkpoint(directory)
    checkpoints.remove(directory / "step-0.ckpt") if dist.get_rank() == 0 else None
    kept = (directory / "step-0.ckpt").exists()
    for seed in range(1, 4):
        step(strategy, seed)
    let_go.set()
    checkpoints.wait()
    dist.barrier()
    removed = not (directory / "step-0.ckpt").exists()
    fresh = bare(flat_mesh())
    checkpoints.load(fresh, directory / "step-1.ckpt")
    assert_same(held(fresh), expected)

    def full(*args: Any) -> None:
        raise OSError("disk full")

    checkpoint_directory.finish = full
    checkpoints.save(strategy, checkpoint_of(strategy), directory / "step-2.ckpt")
    checkpoints.remove(directory / "step-1.ckpt") if dist.get_rank() == 0 else None
    with pytest.raises(OSError, match="disk full"):
        checkpoints.wait()
    dist.barrier()
    return [visible, kept, removed, sorted(path.name for path in directory.iterdir())]


def test_a_save_in_the_background_holds_what_was_when_it_began(tmp_path):
    """Training changes the weights while they are written; the old checkpoint must outlive a write that fails."""
    (tmp_path / "step-0.ckpt").mkdir()
    assert run_on_ranks(_asynchronous, 2, tmp_path) == [[None, True, True, ["step-1.ckpt"]]] * 2


def test_the_end_of_a_fit_waits_for_a_save_in_the_background(tmp_path, uninterrupted):
    path = tmp_path / "step-0000003.ckpt"
    train_on(2, range(HALF), callbacks=[SaveAtEnd(path)], checkpoints=ShardedCheckpoints(asynchronous=True))
    resumed = train(range(HALF, STEPS), checkpoint=path, sharded=False)
    assert_close(resumed["losses"], uninterrupted["losses"][HALF:])


class SaveAtEnd(Callback):
    """Saves when the last batch has ended, after the average took it in."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.save_checkpoint(self.path)


def _weights_alone(path: Path) -> tuple[Any, Any]:
    strategy = bare(flat_mesh())
    step(strategy, 9)
    untouched = held(strategy)["optimizer_states"]
    stage = torch.nn.Module()
    stage.network = strategy.model
    strategy.model = stage
    ShardedCheckpoints().load_weights(strategy, path, averaged_weights)
    weights = whole(strategy.lightning_module_state_dict())
    strategy.model = stage.network
    assert_same(held(strategy)["optimizer_states"], untouched)
    return weights


@pytest.mark.parametrize("writer", ["four", "one"])
def test_the_weights_alone_are_read_with_the_average_where_there_is_one(saved, writer):
    """A run that starts from another's weights must not take its moments over."""
    expected = whole(averaged_weights(load_checkpoint(saved[writer])))
    for weights in run_on_ranks(_weights_alone, 2, saved[writer]):
        assert_close(weights, expected)


def test_a_stage_that_is_not_sharded_reads_and_writes_files(tmp_path):
    """A directory of the same name makes way for a file, and the other way round."""
    path = tmp_path / "step-0000001.ckpt"
    for _ in range(2):
        run_on_ranks(_save_bare, 2, path)
        assert path.is_dir()
        train(range(1), save=path, sharded=False, stage=Stage())
        assert path.is_file()
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
