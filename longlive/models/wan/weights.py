"""Wan weights on disk: two naming schemes, several kinds of files, one tensor in memory at a time.

`original` is the naming of Wan's release and of `CausalWan`; `diffusers` that of `WanTransformer3DModel`. The tensors
are the same, shape by shape; only names differ, and the tables below are the whole difference. Written is a folder with
`config.json` and either `diffusion_pytorch_model.safetensors` or numbered shards with an index, as both projects
publish them. Read is also

- a whole download: of Wan's release, where the network lies beside codec and text encoder, or of diffusers', where it
  has the folder `transformer/`;
- what LongLive's trainers wrote (`model.pt`): a state under `generator_ema`, `generator` or `model`, whose names begin
  with `model.` and may carry FSDP's wrappers. The average is taken where there is one, as everywhere here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from longlive.data.weight_files import StoredTensor, TensorFiles, check_tensors, find_files
from longlive.models.wan.config import Naming, WanConfig
from longlive.models.wan.model import CausalWan
from longlive.typing import Tensor

FILE_NAME = "diffusion_pytorch_model"

PLACES = ("*.safetensors", "transformer/*.safetensors", "*.pt")
"""Where a folder keeps the network: Wan's release or diffusers' `transformer/` itself, a whole pipeline, LongLive's."""
ADAPTER_STATE = "generator_lora"
STATES = ("generator_ema", "generator", "model", ADAPTER_STATE)
"""What LongLive's files call it; the last is an adapter, to be refused by that name."""

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
    """Fill a network from files, in whichever naming they are.

    Parameters on the meta device are replaced by loaded ones; others are overwritten in place and keep their dtype and
    device. Beyond the network itself, memory holds one tensor at a time.

    Args:
        model: a `CausalWan`, freshly built.
        path: a `.safetensors` file, the index of shards, a `.pt` file, or a folder that holds them; see the module.
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
    files = open_weights(path)
    check_weights(model, files, path)
    return ((original_name(name), tensor) for name, tensor in files)


def open_weights(path: str | Path) -> TensorFiles:
    """The files of a network, in either naming.

    Args:
        path: as in `load_weights`.

    Raises:
        ValueError: if there are none, or they cannot be read.
    """
    return TensorFiles.open(find_files(path, PLACES, "Wan weights"), STATES)


def check_weights(model: nn.Module, files: TensorFiles, source: str | Path) -> None:
    """Compare names and shapes with a network's.

    Args:
        model: it may be on meta or sharded.
        files: in either naming.
        source: what to call them.

    Raises:
        ValueError: if they differ, or are those of an adapter.
    """
    if any(".lora_A." in name for name in files.shapes):
        raise ValueError(
            f"{source} holds a LoRA, not a network: give the network that it was trained on, and add it by "
            "longlive.adapters.longlive_lora.load_longlive_adapter"
        )
    stored = {original_name(name): shape for name, shape in files.shapes.items()}
    check_tensors(stored, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}, source)


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
    check_tensors({name: tuple(tensor.shape) for name, tensor in tensors.items()}, wanted, "the tensors to save")

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
