"""A disk that fills up during a save, whoever writes: the old checkpoint stays, and the message helps. /dev/full is
such a disk, so what the system and torch really say is what is tested."""

from __future__ import annotations

import errno
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from helpers.distributed import run_on_ranks
from helpers.sharded_runs import bare, checkpoint_of, flat_mesh
from longlive.parallel import checkpoint_directory, sharded_checkpoint
from longlive.parallel.checkpoint import AtomicCheckpointIO, load_checkpoint, newest_checkpoint
from longlive.parallel.checkpoint_directory import partial_of
from longlive.parallel.full_disk import is_full, num_bytes
from longlive.parallel.sharded_checkpoint import ShardedCheckpoints

FULL_DISK = Path("/dev/full")
pytestmark = pytest.mark.skipif(not FULL_DISK.exists(), reason="only Linux has /dev/full")

MESSAGE = r"the disk is full: a checkpoint needs about ([\d,]+) bytes, and ([\d,]+) are free in (\S+) .*: '(.*)'"
SHARDED_BYTES = 3 * 4 * 178 + 8 * 4 + 4
"""The network of 178 numbers and two moments of each, the step of its 8 parameters, and a buffer."""


def assert_helps(error: str, path: Path, needed: int) -> None:
    match = re.search(MESSAGE, error, re.DOTALL)
    assert match is not None, error
    assert int(match[1].replace(",", "")) == needed
    assert 0 < int(match[2].replace(",", "")) <= shutil.disk_usage(path.parent).total
    assert (match[3], match[4]) == (str(path.parent), str(path))


def test_a_file_that_does_not_fit_leaves_the_old_one(tmp_path, monkeypatch):
    """Given a name, torch says "unexpected pos" of a full disk; and a save in place has lost the old file by then."""
    old, new = tmp_path / "step-0000007.ckpt", tmp_path / "step-0000008.ckpt"
    content = {"state_dict": {"weight": torch.zeros(10_000)}, "global_step": 7}
    AtomicCheckpointIO().save_checkpoint(content, old)
    before = old.read_bytes()
    for path in (new, old):
        monkeypatch.setattr(checkpoint_directory, "clean", lambda path: partial_of(path).symlink_to(FULL_DISK))
        with pytest.raises(OSError, match="the disk is full") as error:
            AtomicCheckpointIO().save_checkpoint(content, path)
        assert error.value.errno == errno.ENOSPC
        assert_helps(str(error.value), path, needed=40_000)
        assert old.read_bytes() == before
        assert [file.name for file in tmp_path.iterdir()] == [old.name]


def _fill(directory: Path, place: str) -> list[str]:
    strategy, checkpoints = bare(flat_mesh()), ShardedCheckpoints()
    checkpoints.save(strategy, checkpoint_of(strategy, global_step=1), directory / "step-0000001.ckpt")
    begin, write = sharded_checkpoint._begin, sharded_checkpoint.ShardWriter.write_data

    def with_full_tree(path: Path) -> None:
        begin(path)
        (partial_of(path) / checkpoint_directory.TREE).symlink_to(FULL_DISK)

    def with_full_shard(writer: Any, *args: Any) -> Any:
        (Path(writer.path) / "__1_0.distcp").symlink_to(FULL_DISK)
        return write(writer, *args)

    if place == "tree":
        sharded_checkpoint._begin = with_full_tree
    elif dist.get_rank() == 1:
        sharded_checkpoint.ShardWriter.write_data = with_full_shard  # type: ignore[method-assign]
    errors = []
    for number in (1, 2):  # also the one that would take the old one's name
        with pytest.raises(OSError, match="the disk is full") as error:
            checkpoints.save(strategy, checkpoint_of(strategy, global_step=2), directory / f"step-{number:07d}.ckpt")
        errors.append(str(error.value))
        dist.barrier()
    return errors


@pytest.mark.parametrize("place", ["tree", "shard"])
def test_a_directory_of_which_a_part_does_not_fit_leaves_the_old_one_on_every_rank(tmp_path, place):
    """The ranks whose own part fits would wait for the others, or give the directory its name."""
    for errors in run_on_ranks(_fill, 2, tmp_path, place):
        for number, error in enumerate(errors, start=1):
            assert_helps(error, tmp_path / f"step-{number:07d}.ckpt", SHARDED_BYTES)
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000001.ckpt"]
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert load_checkpoint(newest)["global_step"] == 1


def test_a_full_disk_is_known_through_what_was_raised_from_it():
    def raised(error: BaseException, cause: BaseException | None) -> BaseException:
        error.__cause__ = cause
        return error

    assert is_full(OSError(errno.ENOSPC, "full"))
    assert is_full(raised(RuntimeError("not written"), OSError(errno.EDQUOT, "over quota")))
    assert not is_full(raised(RuntimeError("not written"), OSError(errno.EIO, "broken")))
    assert not is_full(None)


def test_the_bytes_of_a_checkpoint_are_those_of_its_tensors():
    placeholder = torch.empty(100, device="meta")
    tree = {"a": [torch.zeros(3, dtype=torch.bfloat16), {"b": torch.zeros(2, 2)}], "c": placeholder, "d": "text"}
    assert num_bytes(tree) == 6 + 16
