"""Reading a directory runs no code from it, names the file that is damaged, and sees only what is complete."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from helpers.distributed import run_on_ranks
from helpers.runs import assert_same
from helpers.sharded_runs import bare, checkpoint_of, flat_mesh
from longlive.parallel.checkpoint import (
    AtomicCheckpointIO,
    find_checkpoint,
    load_checkpoint,
    load_weights_and_config,
    newest_checkpoint,
)
from longlive.parallel.checkpoint_directory import (
    ShardReader,
    ShardWriter,
    clean,
    map_tensors,
    read_whole,
    remove,
    split,
)
from longlive.parallel.sharded_checkpoint import ShardedCheckpoints


def _save(path: Path) -> None:
    strategy = bare(flat_mesh())
    ShardedCheckpoints().save(strategy, checkpoint_of(strategy), path)


@pytest.fixture
def directory(tmp_path) -> Path:
    """Of two ranks."""
    path = tmp_path / "step-0000004.ckpt"
    run_on_ranks(_save, 2, path)
    return path


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-50])


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("__0_0.distcp", Path.unlink, r"__0_0\.distcp is missing"),
        ("__1_0.distcp", cut, r"__1_0\.distcp is torn: it has \d+ bytes, and \d+ were written"),
        ("state.pt", cut, r"state\.pt cannot be read as a checkpoint"),
        ("state.pt", Path.unlink, r"state\.pt cannot be read as a checkpoint"),
        (".metadata", cut, r"\.metadata cannot be read as a checkpoint"),
        (".metadata", Path.unlink, r"\.metadata cannot be read as a checkpoint"),
    ],
)
def test_the_file_that_is_damaged_is_named(directory, name, damage, message):
    damage(directory / name)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(directory)


class Malicious:
    def __reduce__(self):
        return os.system, ("touch stolen",)


def _bytes_of(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (".metadata", pickle.dumps(Malicious())),
        ("state.pt", _bytes_of({"state_dict": Malicious()})),
        ("state.pt", pickle.dumps(Malicious())),
    ],
)
def test_loading_never_runs_code_from_the_directory(directory, monkeypatch, name, content):
    """torch's own reader unpickles `.metadata` as Python does: whoever writes it, runs code where it is read."""
    monkeypatch.chdir(directory.parent)
    (directory / name).write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        read_whole(directory)
    assert not (directory.parent / "stolen").exists()


def test_an_entry_that_would_be_unpickled_later_is_refused(directory, monkeypatch):
    """Where the metadata promise an object that is no tensor, torch unpickles it without a question."""
    monkeypatch.chdir(directory.parent)
    dcp.save({"state_dict/extra": Malicious()}, storage_writer=ShardWriter(directory, overwrite=True), no_dist=True)
    with pytest.raises(ValueError, match=r"\.metadata holds state_dict/extra, which is no tensor"):
        read_whole(directory)
    with pytest.raises(ValueError, match="holds state_dict/extra"):
        ShardReader(directory)
    assert not (directory.parent / "stolen").exists()


def test_only_complete_directories_are_found(directory):
    assert newest_checkpoint(directory.parent) == find_checkpoint(directory) == directory
    (directory / "_COMPLETE").unlink()
    assert newest_checkpoint(directory.parent) is None
    for location in (directory, directory.parent):
        with pytest.raises(FileNotFoundError, match="no checkpoint at"):
            find_checkpoint(location)
    with pytest.raises(FileNotFoundError, match="has no _COMPLETE, so it was not written to its end"):
        load_checkpoint(directory)


def test_weights_are_read_without_the_optimizers(directory, monkeypatch):
    """They are most of a checkpoint's bytes."""
    content = load_checkpoint(directory)
    asked: list[str] = []
    real = dcp.load
    monkeypatch.setattr(dcp, "load", lambda shards, **settings: (asked.extend(shards), real(shards, **settings)))
    found = load_weights_and_config(directory)
    del content["optimizer_states"]
    assert_same(found, content)
    assert asked
    assert not any(name.startswith("optimizer_states") for name in asked)


def test_a_checkpoint_that_stepped_aside_counts_until_the_new_one_has_the_name(directory):
    """A kill between the two renames would otherwise lose both."""
    aside = directory.with_name(f".{directory.name}.replaced")
    content = load_checkpoint(directory)
    os.replace(directory, aside)
    assert newest_checkpoint(directory.parent) == find_checkpoint(directory) == aside
    assert_same(load_checkpoint(directory), content)
    clean(directory)
    assert [path.name for path in directory.parent.iterdir()] == [directory.name]


def test_a_removed_directory_is_gone_in_one_step(directory, monkeypatch):
    """Deleted file by file under its name, a kill leaves a directory with a marker and without shards."""

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            remove(directory)
    assert newest_checkpoint(directory.parent) is None
    clean(directory)
    assert list(directory.parent.iterdir()) == []
    AtomicCheckpointIO().remove_checkpoint(directory)


def test_the_place_of_writing_is_not_in_the_checkpoint(directory):
    """A path of another machine, pickled as a class that other versions of Python do not have."""
    content = (directory / ".metadata").read_bytes()
    assert b"pathlib" not in content
    assert str(directory.parent).encode() not in content


def test_a_tree_is_copied_with_its_paths():
    tree = {"a": [torch.zeros(1), 2, ("x", torch.ones(1))], 3: {"b": None}}
    seen = []

    def note(path, tensor):
        seen.append((path, float(tensor)))
        return tensor + 1

    copy = map_tensors(note, tree)
    assert seen == [(("a", 0), 0.0), (("a", 2, 1), 1.0)]
    assert_same(copy, {"a": [torch.ones(1), 2, ("x", torch.full((1,), 2.0))], 3: {"b": None}})
    assert float(tree["a"][0]) == 0
    assert split(tree)[1] == {}
