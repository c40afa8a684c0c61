"""Files of named tensors as others publish them: safetensors, whole or in shards, and PyTorch's own.

Opening reads names, shapes and dtypes alone. A tensor is read when it is asked for, and only the part that is asked
for: a slice of safetensors, or a slice of a PyTorch file that is mapped into memory. So a rank that owns an eighth of a
weight reads an eighth, from either kind.

PyTorch's files are pickles, and a pickle can run code. They are opened with `weights_only=True`, which builds tensors
and plain containers and refuses everything else: a file of unknown origin can be wrong, but not harmful. Trainers put
more than one state into a file, by name; which one is meant is the caller's list, the first that is there.

What a trainer has wrapped a network in is no part of a tensor's name: `plain_names` takes it off.
"""

from __future__ import annotations

import json
import logging
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from longlive.typing import Tensor

log = logging.getLogger(__name__)

SAFETENSORS, INDEX = ".safetensors", ".safetensors.index.json"
NUM_LISTED = 4
"""Names in an error."""

_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
_OUTER = "model."
"""Before every name, where a trainer keeps its network as the attribute `model`."""
_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "U8": "uint8",
}


class StoredTensor(Protocol):
    """A tensor in a file. Indexing it by slices reads that part of it, by `()` the whole."""

    def __getitem__(self, where: tuple[slice, ...]) -> Tensor: ...


class _MappedTensor:
    """A tensor in a mapped file; what it hands out is in memory of its own."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def __getitem__(self, where: tuple[slice, ...]) -> Tensor:
        return self._tensor[where].clone()


@dataclass(frozen=True)
class TensorFiles:
    """Named tensors in one or several files, none of them read yet. Iterating hands out one after the other.

    Attributes:
        files: where they are.
        state: under which name a PyTorch file holds them; None: under none, or it is safetensors.
        shapes, dtypes: by plain name; a dtype as torch calls it, without `torch.`.
    """

    files: tuple[Path, ...]
    state: str | None
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    _plain: Mapping[str, str]
    _mapped: Mapping[str, Tensor] | None

    @classmethod
    def open(cls, files: Sequence[Path], states: Sequence[str] = ()) -> TensorFiles:
        """Read what the files hold, not the tensors.

        Args:
            files: safetensors, one or several; or one of PyTorch's.
            states: names under which a PyTorch file may hold the state that is meant, the preferred one first. A file
                that is nothing but tensors by name needs none.

        Raises:
            ValueError: if a file is damaged, of no known kind, holds code or no such state, or a name is there twice.
        """
        if all(file.suffix == SAFETENSORS for file in files):
            headers = [entry for file in files for entry in _header(file)]
            plain = plain_names([name for name, _, _ in headers])
            shapes = {plain[name]: shape for name, shape, _ in headers}
            dtypes = {plain[name]: dtype for name, _, dtype in headers}
            return cls(tuple(files), None, shapes, dtypes, plain, None)
        (file,) = files
        key, state = _choose(file, read_torch(file), states)
        if key is not None:
            log.info("%s: taking %s", file, key)
        plain = plain_names(list(state))
        return cls(
            (file,),
            key,
            {plain[name]: tuple(tensor.shape) for name, tensor in state.items()},
            {plain[name]: str(tensor.dtype).removeprefix("torch.") for name, tensor in state.items()},
            plain,
            state,
        )

    def __iter__(self) -> Iterator[tuple[str, StoredTensor]]:
        if self._mapped is not None:
            for name, tensor in self._mapped.items():
                yield self._plain[name], _MappedTensor(tensor)
            return
        for file in self.files:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - a safe_open is no dict
                    yield self._plain[name], tensors.get_slice(name)


def find_files(path: str | Path, places: Sequence[str], what: str) -> list[Path]:
    """The files of one set of tensors.

    Args:
        path: a file, the index of shards, or a folder.
        places: where in a folder to look, the first place that has something: shell patterns. `*.safetensors` is one
            file, or shards with an index beside them.
        what: is looked for, for the message.

    Raises:
        ValueError: if nothing is there, shards are missing, or a place has several files and no index.
    """
    path = Path(path)
    if path.name.endswith(INDEX) and path.is_file():
        return _shards(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"{path} does not exist; give a folder or a file with {what}")
    for place in places:
        found = sorted(path.glob(place))
        indices = sorted(path.glob(f"{place}.index.json")) if place.endswith(SAFETENSORS) else []
        if len(indices) == 1:
            return _shards(indices[0])
        if len(found) == 1:
            return found
        if found or indices:
            raise ValueError(
                f"{path} holds {len(found)} files {place} and {len(indices)} indices of them: "
                f"{_listed([file.name for file in [*found, *indices]])}; give one of the files, or a folder with one "
                "index"
            )
    raise ValueError(f"{path} holds no {what}: looked for {', '.join(places)}; give the folder or the file itself")


def plain_names(names: Sequence[str]) -> dict[str, str]:
    """What tensors are called in the network itself, by the name that a trainer stored them under: without the wrappers
    of FSDP, activation checkpointing and `torch.compile`, and without a `model.` that all names begin with.

    Raises:
        ValueError: if two names become one.
    """
    plain = {name: _WRAPPERS.sub("", name) for name in names}
    while plain and all(name.startswith(_OUTER) for name in plain.values()):
        plain = {stored: name.removeprefix(_OUTER) for stored, name in plain.items()}
    if len(set(plain.values())) < len(names):
        seen: set[str] = set()
        twice = [name for name in (plain[name] for name in names) if name in seen or seen.add(name)]  # type: ignore[func-returns-value]
        raise ValueError(f"{_listed(twice)} is there twice; the files are no single network's")
    return plain


def check_tensors(
    stored: Mapping[str, Sequence[int]],
    wanted: Mapping[str, Sequence[int]],
    source: object,
    advice: str = "Use the config that belongs to it",
) -> None:
    """Compare names and shapes.

    Raises:
        ValueError: if they differ; the message lists the first differences, both ways.
    """
    differences = {
        "missing": [name for name in wanted if name not in stored],
        "unexpected": [name for name in stored if name not in wanted],
        "of another shape": [
            f"{name} {list(stored[name])} instead of {list(wanted[name])}"
            for name in wanted
            if name in stored and tuple(stored[name]) != tuple(wanted[name])
        ],
    }
    found = [f"{len(names)} {kind}: {_listed(names)}" for kind, names in differences.items() if names]
    if found:
        raise ValueError(f"{source} does not fit the network. {'; '.join(found)}. {advice}")


def read_torch(file: Path) -> Any:
    """What a PyTorch file holds, its tensors mapped and not read. (Files older than PyTorch 1.6 cannot be mapped.)

    Raises:
        ValueError: if the file is damaged, or holds more than tensors and plain containers.
    """
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} is no file of tensors and plain containers, and nothing else is read, because it could run code "
            f"({_first_line(error)}); download it again, or save its tensors alone"
        ) from error
    except (RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"{file} cannot be read ({_first_line(error)}); download it again") from error


def _choose(file: Path, content: Any, states: Sequence[str]) -> tuple[str | None, Mapping[str, Tensor]]:
    if not isinstance(content, Mapping):
        raise ValueError(f"{file} holds a {type(content).__name__}, not tensors by name")
    for key in states:
        if isinstance(content.get(key), Mapping):
            break
    else:
        if not content or not all(isinstance(value, Tensor) for value in content.values()):
            looked_for = f"looked for {', '.join(states)}, or tensors by name" if states else "looked for tensors"
            raise ValueError(f"{file} holds {_listed([str(key) for key in content]) or 'nothing'}; {looked_for}")
        return None, content
    state: Mapping[str, Any] = content[key]
    others = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(f"{file}: {key} holds more than tensors: {_listed(others)}; save its tensors alone")
    return key, state


def _header(file: Path) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Names, shapes and dtypes."""
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - a safe_open is no dict
                stored = tensors.get_slice(name)
                yield name, tuple(stored.get_shape()), _DTYPES.get(stored.get_dtype(), stored.get_dtype())
    except SafetensorError as error:
        raise ValueError(f"{file} is no whole safetensors file ({_first_line(error)}); download it again") from error


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is no index of safetensors ({_first_line(error)}); download it again") from error
    files = [index.parent / name for name in names]
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise ValueError(f"{index.parent} lacks {_listed(missing)}, which {index.name} names; complete the download")
    return files


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:NUM_LISTED]) + (", ..." if len(names) > NUM_LISTED else "")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
