"""A checkpoint is complete or absent, safe to open, and the newest one is the one of the most steps."""

import os
import pickle
from pathlib import Path
from typing import BinaryIO

import pytest
import torch

from helpers.runs import assert_same
from longlive.parallel.checkpoint import (
    AtomicCheckpointIO,
    check_same_shapes,
    find_checkpoint,
    load_checkpoint,
    load_weights_and_config,
    newest_checkpoint,
    with_frozen,
)

CONTENT = {"state_dict": {"weight": torch.arange(6.0).view(2, 3)}, "global_step": 7, "config": {"seed": 0}}


def save(path: Path, **changes: object) -> Path:
    AtomicCheckpointIO().save_checkpoint(CONTENT | changes, path)
    return path


def touch(directory: Path, *names: str) -> None:
    """Empty files, each one newer than the one before."""
    directory.mkdir(parents=True, exist_ok=True)
    for seconds, name in enumerate(names):
        (directory / name).touch()
        os.utime(directory / name, (seconds, seconds))


def test_a_checkpoint_comes_back_as_it_was_and_its_folder_is_made(tmp_path):
    path = save(tmp_path / "run" / "checkpoints" / "step-0000007.ckpt")
    assert_same(load_checkpoint(path), CONTENT)
    assert_same(AtomicCheckpointIO().load_checkpoint(path), CONTENT)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_save_that_fails_midway_leaves_the_old_file_and_no_new_name(tmp_path, monkeypatch, error):
    """Written in place, the old checkpoint is already gone when the new one fails."""
    old = save(tmp_path / "step-0000007.ckpt")
    before = old.read_bytes()

    def torn(content: object, file: BinaryIO) -> None:
        file.write(b"half")
        raise error

    monkeypatch.setattr(torch, "save", torn)
    for path in (old, tmp_path / "step-0000008.ckpt"):
        with pytest.raises(type(error)):
            save(path, global_step=8)
    assert old.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [old.name]


def test_a_reader_sees_the_new_checkpoint_only_when_it_is_complete(tmp_path, monkeypatch):
    seen = []
    write = torch.save

    def watched(content: object, path: Path) -> None:
        write(content, path)
        seen.append(newest_checkpoint(tmp_path))

    monkeypatch.setattr(torch, "save", watched)
    path = save(tmp_path / "step-0000007.ckpt")
    assert seen == [None]
    assert newest_checkpoint(tmp_path) == path


def test_saving_again_replaces_the_file_and_the_leftovers_of_a_kill(tmp_path):
    path = save(tmp_path / "step-0000007.ckpt")
    (tmp_path / ".step-0000007.ckpt.partial").write_bytes(b"left by a kill")
    save(path, global_step=8)
    assert load_checkpoint(path)["global_step"] == 8
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


class Malicious:
    def __reduce__(self):
        return os.system, ("touch stolen",)


def test_loading_never_runs_code_from_the_file(tmp_path, monkeypatch):
    """A checkpoint from elsewhere is a program, if it is unpickled as Python does."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "step-0000001.ckpt"
    torch.save(CONTENT | {"extra": Malicious()}, path)
    with pytest.raises(ValueError, match=r"step-0000001\.ckpt cannot be read as a checkpoint"):
        load_checkpoint(path)
    path.write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(ValueError, match="cannot be read"):
        AtomicCheckpointIO().load_checkpoint(path, weights_only=False)
    assert not (tmp_path / "stolen").exists()


@pytest.mark.parametrize("size", [0, 10, 600, -1])
def test_a_torn_or_foreign_file_is_named(tmp_path, size):
    path = save(tmp_path / "step-0000007.ckpt")
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"step-0000007\.ckpt cannot be read as a checkpoint"):
        load_checkpoint(path)


@pytest.mark.parametrize("content", [{"weight": torch.zeros(1)}, [1, 2], torch.zeros(1)])
def test_a_file_without_a_training_state_is_named(tmp_path, content):
    torch.save(content, tmp_path / "weights.ckpt")
    with pytest.raises(ValueError, match=r"weights\.ckpt is no training checkpoint: it holds no state_dict"):
        load_checkpoint(tmp_path / "weights.ckpt")


def test_weights_are_read_without_the_optimizers(tmp_path):
    """Twice the weights' bytes, or more, which nobody who rolls out looks at."""
    path = save(tmp_path / "step-0000007.ckpt", optimizer_states=[{"state": {0: torch.zeros(2)}}])
    assert_same(load_weights_and_config(path), CONTENT)


def test_a_checkpoint_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*nowhere\.ckpt; give a \.ckpt file"):
        load_checkpoint(tmp_path / "nowhere.ckpt")


@pytest.mark.parametrize(
    ("names", "newest"),
    [
        (["step-0000100.ckpt", "step-0000020.ckpt"], "step-0000100.ckpt"),
        (["step-20.ckpt", "step-100.ckpt", "step-9.ckpt"], "step-100.ckpt"),
        (["step-0000004.ckpt", ".step-0000008.ckpt.partial", "step-0000009.txt"], "step-0000004.ckpt"),
        (["epoch=1-step=30.ckpt", "epoch=2-step=4.ckpt"], "epoch=1-step=30.ckpt"),
        (["last.ckpt", "step-0000004.ckpt"], "step-0000004.ckpt"),
    ],
)
def test_the_newest_checkpoint_is_that_of_the_most_steps(tmp_path, names, newest):
    """By time of writing, a copied directory resumes anywhere; by name, step 20 comes after step 100."""
    for order in (names, names[::-1]):
        touch(tmp_path, *order)
        assert newest_checkpoint(tmp_path) == tmp_path / newest


def test_where_nothing_was_saved_there_is_no_newest(tmp_path):
    assert newest_checkpoint(tmp_path / "nowhere") is None
    touch(tmp_path, ".step-0000008.ckpt.partial", "config.yaml")
    assert newest_checkpoint(tmp_path) is None


def test_a_checkpoint_is_found_by_file_folder_or_run(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    touch(folder, "step-0000020.ckpt", "step-0000003.ckpt")
    newest = folder / "step-0000020.ckpt"
    assert find_checkpoint(tmp_path / "run") == newest
    assert find_checkpoint(str(folder)) == newest
    assert find_checkpoint(folder / "step-0000003.ckpt") == folder / "step-0000003.ckpt"
    for nothing in (tmp_path, tmp_path / "nowhere", folder / "step-0000004.ckpt"):
        with pytest.raises(
            FileNotFoundError, match=f"no checkpoint at {nothing}: give a .ckpt file, a run's directory"
        ):
            find_checkpoint(nothing)


def test_checkpoints_of_another_shape_are_told_by_the_first_keys_that_differ():
    ours = {"same": torch.zeros(2), "wide": torch.zeros(3, 4), "new": torch.zeros(1)}
    theirs = {"same": torch.ones(2), "wide": torch.zeros(3, 5), "old": torch.zeros(1)}
    check_same_shapes(ours, {name: tensor + 1 for name, tensor in ours.items()})
    with pytest.raises(ValueError, match="the checkpoint is of another model") as error:
        check_same_shapes(ours, theirs)
    message = str(error.value)
    assert "new: missing in the checkpoint; old: not in this model; " in message
    assert "wide: (3, 5) in the checkpoint, (3, 4) in this model" in message
    assert "same" not in message.split("Use the model settings")[0]
    assert "more" not in message


def test_of_many_differences_five_are_named_and_the_others_counted():
    ours = {f"layer_{number}": torch.zeros(1) for number in range(8)}
    with pytest.raises(ValueError, match=r"layer_4: missing in the checkpoint; and 3 more\. Use the model settings"):
        check_same_shapes(ours, {})


def test_frozen_weights_that_a_checkpoint_lacks_are_the_modules_own():
    """Trainable ones that it lacks still count as missing: they would train on from the initialisation."""
    module = torch.nn.Linear(2, 3)
    module.bias.requires_grad_(False)
    found = with_frozen(module, {"weight": torch.ones(3, 2)})
    assert_same(found, {"bias": module.bias.detach(), "weight": torch.ones(3, 2)})
    assert_same(with_frozen(module, {"bias": torch.ones(3)}), {"bias": torch.ones(3)})
