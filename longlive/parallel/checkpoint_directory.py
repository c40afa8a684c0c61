"""The checkpoint of a sharded run: a directory to which every rank writes its own part.

    step-0000004.ckpt/
        __0_0.distcp, __1_0.distcp, ...  the ranks' shards (torch.distributed.checkpoint, "DCP")
        .metadata                        which part of which tensor lies where in them
        state.pt                         everything else, one tree; sharded tensors are in it without their data
        _COMPLETE                        written last

A sharded tensor is named by its path in the tree (`optimizer_states/0/state/<parameter>/exp_avg`), so a reader learns
names, shapes and dtypes from `state.pt` alone, and reads of the shards what it wants in the layout that it wants.

A directory becomes visible by one rename, so a kill leaves what was there before or all of the new one. Renaming
cannot replace a directory: an older checkpoint of the same name first steps aside as `.<name>.replaced`, and counts
until the new one has the name.

No pickled code runs. `state.pt` and the shards are read with `weights_only`. DCP's own reader unpickles `.metadata` as
Python does; the one here lets only DCP's records through, and no entry that DCP would unpickle later.
"""

from __future__ import annotations

import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.tensor import DTensor

from longlive.typing import Tensor

SUFFIX = ".ckpt"
TREE = "state.pt"
MARKER = "_COMPLETE"

TreePath = tuple[str | int, ...]
Loaded = TypeVar("Loaded")


def is_complete(path: Path) -> bool:
    """Whether there is a checkpoint at a path: a file, or a directory with its marker."""
    return path.is_file() or (path / MARKER).is_file()


def partial_of(path: Path) -> Path:
    """Where a checkpoint is written before it gets its name."""
    return path.with_name(f".{path.name}.partial")


def replaced_of(path: Path) -> Path:
    """Where a checkpoint is while another one takes its name."""
    return path.with_name(f".{path.name}.replaced")


def name_of_replaced(path: Path) -> Path:
    """The name that was taken from it."""
    return path.with_name(path.name.removeprefix(".").removesuffix(".replaced"))


def standing(path: Path) -> Path:
    """Where the complete checkpoint of a name is: aside, if a kill came between the two renames."""
    return path if is_complete(path) or not is_complete(replaced_of(path)) else replaced_of(path)


def clean(path: Path) -> None:
    """Remove what killed saves left in the folder of a checkpoint. One run at a time writes to a folder."""
    for partial in {partial_of(path), *path.parent.glob(f".*{SUFFIX}.partial")}:
        _delete(partial)
    for replaced in {replaced_of(path), *path.parent.glob(f".*{SUFFIX}.replaced")}:
        if is_complete(replaced) and not is_complete(name_of_replaced(replaced)):
            os.replace(replaced, name_of_replaced(replaced))
        _delete(replaced)


def remove(path: Path) -> None:
    """Remove a checkpoint: it loses its name in one step, so no half of it is ever seen."""
    if path.is_dir() and not path.is_symlink():
        _delete(partial_of(path))
        os.replace(path, partial_of(path))
        path = partial_of(path)
    _delete(path)


def step_aside(path: Path) -> None:
    """Take its name from what is at `path`, if anything is."""
    if path.exists():
        os.replace(path, replaced_of(path))


def finish(tree: Any, temporary: Path, path: Path) -> None:
    """Complete a directory that holds all shards, and give it its name."""
    with (temporary / TREE).open("wb") as file:
        torch.save(tree, file)
        _sync(file.fileno())
    _sync_directory(temporary)
    with (temporary / MARKER).open("wb") as file:
        _sync(file.fileno())
    _sync_directory(temporary)
    step_aside(path)
    os.replace(temporary, path)
    _sync_directory(path.parent)
    _delete(replaced_of(path))


def _sync(descriptor: int) -> None:
    os.fsync(descriptor)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def map_tensors(function: Callable[[TreePath, Tensor], Any], tree: Any, path: TreePath = ()) -> Any:
    """A copy of a tree of dicts, lists and tuples, with `function(path, tensor)` for every tensor in it."""
    if isinstance(tree, torch.Tensor):
        return function(path, tree)
    if isinstance(tree, Mapping):
        return {key: map_tensors(function, value, (*path, key)) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)([map_tensors(function, value, (*path, index)) for index, value in enumerate(tree)])
    return tree


def name_of(path: TreePath) -> str:
    """The name of a sharded tensor in the shards."""
    return "/".join(str(part) for part in path)


def split(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """Take the sharded tensors out of a tree; tensors without data mark their places.

    Raises:
        ValueError: if two of them would have one name.
    """
    shards: dict[str, Tensor] = {}

    def take(path: TreePath, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            return tensor
        name = name_of(path)
        if name in shards:
            raise ValueError(f"two sharded tensors of the checkpoint are named {name}; rename one of their keys")
        shards[name] = tensor.detach()
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    return map_tensors(take, tree), shards


def read_tree(path: Path) -> dict[str, Any]:
    """The tree of a directory, its sharded tensors without data, or of a file, its tensors mapped into memory.

    Raises:
        ValueError: if it cannot be read, or is no checkpoint of a training.
    """
    file = path / TREE if path.is_dir() else path
    try:
        tree = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise ValueError(f"{file} cannot be read as a checkpoint: {error}") from error
    if not isinstance(tree, Mapping) or "state_dict" not in tree:
        raise ValueError(f"{file} is no training checkpoint: it holds no state_dict")
    return dict(tree)


def read_whole(path: Path, without: Collection[str] = ()) -> dict[str, Any]:
    """A directory as one tree of whole tensors on the CPU, by this process alone, whatever wrote it.

    Args:
        without: top-level keys that are left out, and not read.

    Raises:
        ValueError: naming the file that is missing or torn.
    """
    reader = ShardReader(path)
    shards: dict[str, Any] = {}

    def allocate(path: TreePath, tensor: Tensor) -> Tensor:
        if not tensor.is_meta:
            return tensor.clone()
        return shards.setdefault(name_of(path), torch.empty_like(tensor, device="cpu"))

    tree = map_tensors(allocate, {key: value for key, value in read_tree(path).items() if key not in without})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        reader.read(lambda: dcp.load(shards, storage_reader=reader, no_dist=True))
    if "optimizer_states" in tree:
        tree["optimizer_states"] = [numbered(state) for state in tree["optimizer_states"]]
    return tree


def numbered(optimizer_state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's state that is keyed by parameter names, keyed as torch's optimizers number their parameters."""
    names = [name for group in optimizer_state["param_groups"] for name in group["params"]]
    number = {name: index for index, name in enumerate(names)}
    return {
        "state": {number[name]: values for name, values in optimizer_state["state"].items()},
        "param_groups": [
            group | {"params": [number[name] for name in group["params"]]} for group in optimizer_state["param_groups"]
        ],
    }


class ShardWriter(dcp.FileSystemWriter):
    """DCP's writer; the place of writing, a temporary one, does not go into the metadata."""

    def storage_meta(self) -> StorageMeta | None:
        return StorageMeta(save_id=self.save_id)


class ShardReader(dcp.FileSystemReader):
    """DCP's reader over metadata that have been checked.

    Args:
        path: a complete directory.

    Raises:
        ValueError: naming the file that is missing, torn or not what it should be.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.directory = path
        self.metadata = _read_metadata(path)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.metadata

    def read(self, load: Callable[[], Loaded]) -> Loaded:
        """Call DCP; what goes wrong in it comes out as a ValueError that names the checkpoint."""
        try:
            return load()
        except dcp.CheckpointException as error:
            rank, (cause, _) = next(iter(error.failures.items()))
            raise ValueError(f"{self.directory} cannot be read as a checkpoint: rank {rank}: {cause}") from error


_RECORDS = {
    (kind.__module__, kind.__qualname__): kind
    for kind in (
        Metadata,
        TensorStorageMetadata,
        StorageMeta,
        metadata.BytesStorageMetadata,
        metadata.ChunkStorageMetadata,
        metadata.MetadataIndex,
        metadata.TensorProperties,
        metadata._MEM_FORMAT_ENCODING,
        filesystem._StorageInfo,
        torch.Size,
    )
}


class _MetadataUnpickler(pickle.Unpickler):
    """Knows DCP's records, and torch's dtypes and layouts; nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _RECORDS:
            return _RECORDS[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ("torch.serialization", "_get_layout"):
            return {str(layout): layout for layout in (torch.strided,)}.__getitem__
        raise pickle.UnpicklingError(f"{module}.{name} does not belong in it")


def _read_metadata(path: Path) -> Metadata:
    file = path / ".metadata"
    try:
        with file.open("rb") as stream:
            found = _MetadataUnpickler(stream).load()
    except Exception as error:
        raise ValueError(f"{file} cannot be read as a checkpoint: {error}") from error
    if not isinstance(found, Metadata) or not isinstance(found.storage_data, dict):
        raise ValueError(f"{file} is no metadata of a checkpoint")
    for name, entry in found.state_dict_metadata.items():
        # Of other entries DCP unpickles the content.
        if not isinstance(entry, TensorStorageMetadata):
            raise ValueError(f"{file} holds {name}, which is no tensor")
    ends: dict[str, int] = {}
    for place in found.storage_data.values():
        ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    for name, end in sorted(ends.items()):
        shard = path / name
        if Path(name).name != name:
            raise ValueError(f"{file} names {name}, which is no file of the checkpoint")
        if not shard.is_file():
            raise ValueError(f"{shard} is missing: the checkpoint cannot be read without it")
        if shard.stat().st_size < end:
            raise ValueError(f"{shard} is torn: it has {shard.stat().st_size} bytes, and {end} were written")
    if found.storage_meta is None:
        found.storage_meta = StorageMeta()
    return found
