"""Wan weights on disk: two naming schemes, sharded safetensors, one tensor in memory at a time.

`original` is the naming of Wan's release and of `CausalWan`; `diffusers` that of `WanTransformer3DModel`. The tensors
are the same, shape by shape; only names differ, and the tables below are the whole difference. A folder holds
`config.json` and either `diffusion_pytorch_model.safetensors` or numbered shards with an index, as both projects
publish them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from longlive.models.wan.config import Naming, WanConfig
from longlive.models.wan.model import CausalWan
from longlive.typing import Tensor

FILE_NAME = "diffusion_pytorch_model"


class StoredTensor(Protocol):
    """A tensor in a file. Indexing it by slices reads that part of it, by `()` the whole."""

    def __getitem__(self, where: tuple[slice, ...]) -> Tensor: ...


_TOP_NAMES = {
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
_BLOCK_NAMES = {
    "norm3": "norm2",
    "modulation": "scale_shift_table",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
} | {
    f"{ours}.{part}": f"{theirs}.{their_part}"
    for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"))
    for part, their_part in (
        ("q", "to_q"),
        ("k", "to_k"),
        ("v", "to_v"),
        ("o", "to_out.0"),
        ("norm_q", "norm_q"),
        ("norm_k", "norm_k"),
    )
}
_TOP_NAMES_BACK = {theirs: ours for ours, theirs in _TOP_NAMES.items()}
_BLOCK_NAMES_BACK = {theirs: ours for ours, theirs in _BLOCK_NAMES.items()}
_PARTS = re.compile(r"(?P<block>blocks\.\d+\.)?(?P<module>.+?)(?P<parameter>\.weight|\.bias)?")


def _rename(name: str, top_names: Mapping[str, str], block_names: Mapping[str, str]) -> str:
    match = _PARTS.fullmatch(name)
    if match is None:
        return name
    block, module, parameter = (match[part] or "" for part in ("block", "module", "parameter"))
    return block + (block_names if block else top_names).get(module, module) + parameter


def diffusers_name(name: str) -> str:
    """diffusers' name of a tensor that `CausalWan` knows as `name`. Names that both share, or neither, stay."""
    return _rename(name, _TOP_NAMES, _BLOCK_NAMES)


def original_name(name: str) -> str:
    """`CausalWan`'s name of a tensor that diffusers knows as `name`. Names that both share, or neither, stay."""
    return _rename(name, _TOP_NAMES_BACK, _BLOCK_NAMES_BACK)


def load_wan(folder: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> CausalWan:
    """The network that a folder describes (`config.json`, either style) with its weights (either naming).

    Raises:
        ValueError: as `WanConfig.from_json` and `load_weights`.
    """
    config = WanConfig.from_json(Path(folder) / "config.json")
    with torch.device("meta"):
        model = CausalWan(config)
    load_weights(model, folder, dtype=dtype, device=device)
    return model


def load_weights(
    model: nn.Module,
    path: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> None:
    """Fill a network from safetensors, in whichever naming they are.

    Parameters on the meta device are replaced by loaded ones; others are overwritten in place and keep their dtype and
    device. Beyond the network itself, memory holds one tensor at a time.

    Args:
        model: a `CausalWan`, freshly built.
        path: a `.safetensors` file, or a folder with one such file or with shards and their index.
        dtype: of the parameters loaded onto meta; None: as stored.
        device: of the parameters loaded onto meta.

    Raises:
        ValueError: if there is no such file, or names or shapes are not the network's; the message lists the first that
            differ. The network is untouched then.
    """
    for name, stored in stored_weights(model, path):
        _assign(model, name, stored[()], dtype, device)


def stored_weights(model: nn.Module, path: str | Path) -> Iterator[tuple[str, StoredTensor]]:
    """The tensors of a file or folder under the network's names, one after the other, none of them read yet.

    Args:
        model: whose names and shapes the tensors must have; it may be on meta or sharded.
        path: as in `load_weights`.

    Raises:
        ValueError: as `load_weights`, before the first tensor.
    """
    files = _files(Path(path))
    stored = {name: shape for file in files for name, shape in _shapes(file)}
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    _check(stored, wanted, path)
    return _tensors(files)


def save_weights(
    tensors: Mapping[str, Tensor],
    config: WanConfig,
    folder: str | Path,
    naming: Naming = "original",
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write weights and `config.json` for Wan's code (`original`) or diffusers.

    The folder appears complete or not at all. Beyond the tensors themselves, memory holds one shard.

    Args:
        tensors: by `CausalWan`'s names, e.g. a `state_dict`.
        config: the sizes that belong to them.
        folder: to create; it must not exist.
        naming: whose names to write.
        dtype: to store; None: as they are.
        max_shard_bytes: more than this is split into numbered shards with an index.

    Raises:
        ValueError: if the folder exists, or the tensors are not those of the config.
    """
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"{folder} exists, and weights never overwrite; choose another folder or remove it")
    with torch.device("meta"):
        wanted = {name: tuple(tensor.shape) for name, tensor in CausalWan(config).state_dict().items()}
    _check({name: tuple(tensor.shape) for name, tensor in tensors.items()}, wanted, "the tensors to save")

    shards: list[list[str]] = [[]]
    shard_bytes = total_bytes = 0
    for name, tensor in tensors.items():
        num_bytes = tensor.numel() * (dtype or tensor.dtype).itemsize
        if shards[-1] and shard_bytes + num_bytes > max_shard_bytes:
            shards.append([])
            shard_bytes = 0
        shards[-1].append(name)
        shard_bytes += num_bytes
        total_bytes += num_bytes

    partial = folder.with_name(f"{folder.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    config.to_json(partial / "config.json", naming)
    weight_map = {}
    for index, names in enumerate(shards, start=1):
        suffix = "" if len(shards) == 1 else f"-{index:05d}-of-{len(shards):05d}"
        file_name = f"{FILE_NAME}{suffix}.safetensors"
        shard = {}
        for name in names:
            stored_name = diffusers_name(name) if naming == "diffusers" else name
            shard[stored_name] = tensors[name].detach().to(device="cpu", dtype=dtype).contiguous()
            weight_map[stored_name] = file_name
        save_file(shard, partial / file_name, metadata={"format": "pt"})
    if len(shards) > 1:
        index_of_shards = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (partial / f"{FILE_NAME}.safetensors.index.json").write_text(json.dumps(index_of_shards, indent=2) + "\n")
    partial.rename(folder)


def _files(path: Path) -> list[Path]:
    """The safetensors files of a path."""
    if path.is_file():
        return [path]
    indices = sorted(path.glob("*.safetensors.index.json"))
    files = sorted(path.glob("*.safetensors"))
    if len(indices) == 1:
        files = [path / name for name in sorted(set(json.loads(indices[0].read_text())["weight_map"].values()))]
        missing = [file.name for file in files if not file.exists()]
        if missing:
            raise ValueError(f"{path} lacks {', '.join(missing)}, which {indices[0].name} names; complete the download")
    elif len(files) != 1:
        raise ValueError(
            f"{path} holds {len(files)} safetensors files and {len(indices)} indices; give a folder with one file, or "
            "with shards and one index"
        )
    return files


def _tensors(files: Sequence[Path]) -> Iterator[tuple[str, StoredTensor]]:
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - a safe_open is no dict
                yield original_name(name), tensors.get_slice(name)


def _shapes(file: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Original names and shapes, from the file's header alone."""
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - a safe_open is no dict
            yield original_name(name), tuple(tensors.get_slice(name).get_shape())


def _check(
    stored: Mapping[str, tuple[int, ...]],
    wanted: Mapping[str, tuple[int, ...]],
    source: str | Path,
) -> None:
    """Raise the `ValueError` that lists the first differences."""
    num_listed = 4
    differences = {
        "missing": [name for name in wanted if name not in stored],
        "unexpected": [name for name in stored if name not in wanted],
        "of another shape": [
            f"{name} {list(stored[name])} instead of {list(wanted[name])}"
            for name in wanted
            if name in stored and stored[name] != wanted[name]
        ],
    }
    found = [
        f"{len(names)} {kind}: {', '.join(names[:num_listed])}{', ...' if len(names) > num_listed else ''}"
        for kind, names in differences.items()
        if names
    ]
    if found:
        raise ValueError(f"{source} does not fit the network. {'; '.join(found)}. Use the config that belongs to it")


def _assign(model: nn.Module, name: str, tensor: Tensor, dtype: torch.dtype | None, device: torch.device | str) -> None:
    module_name, _, parameter_name = name.rpartition(".")
    module = model.get_submodule(module_name)
    parameter = getattr(module, parameter_name)
    if parameter.is_meta:
        loaded = nn.Parameter(tensor.to(device=device, dtype=dtype), requires_grad=parameter.requires_grad)
        setattr(module, parameter_name, loaded)
    else:
        with torch.no_grad():
            parameter.copy_(tensor)
