"""An adapter as a folder that peft or diffusers loads, and `longlive generate lora=`.

Its parameters' names are those of the network that it goes over:

- `original`: Wan's. `adapter_model.safetensors` and `adapter_config.json`, as `peft.PeftModel` has them.
- `diffusers`: those of its `WanTransformer3DModel`. `pytorch_lora_weights.safetensors`, which a pipeline's
  `load_lora_weights` and the model's `load_lora_adapter` take; rank, alpha and layers are in the file's metadata.

A file that `longlive export` wrote also describes its run (`exported.py`): how to roll out with it is part of that.
`longlive_lora.py` reads the files of LongLive's trainers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn

from longlive.adapters.export import NAMINGS, ExportSummary, stored_dtype, summarise
from longlive.adapters.exported import KEY, SUFFIX, ExportedFile, describe, read_description, read_metadata
from longlive.adapters.lora import PREFIX, adapted_layers, adapter_state, add_stored_adapter
from longlive.adapters.lora_truncation import Truncation
from longlive.models.wan.config import Naming
from longlive.models.wan.weights import diffusers_name, original_name
from longlive.typing import Tensor

WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
"""Of peft's folder."""
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
DIFFUSERS_PREFIX = "transformer."
"""Before every name in a file of diffusers', and in what its metadata says of the adapter."""
DIFFUSERS_KEY = "lora_adapter_metadata"
VARIANTS = ("use_dora", "use_rslora", "lora_bias", "bias", "rank_pattern", "alpha_pattern", "modules_to_save")
"""Settings of peft's that make something else than `W x + alpha / rank B A x`, or ranks that differ."""


class LoRAFormat:
    """A folder with the run's adapter alone, in one dtype.

    Args:
        dtype: `bf16` or `fp32`, in which an adapter trains.

    Raises:
        ValueError: for another dtype.
    """

    name = "lora"
    namings = NAMINGS

    def __init__(self, dtype: str = "fp32") -> None:
        self.dtype = stored_dtype("dtype", dtype)


def check_lora_export(folder: Path, naming: str, rank: object = None) -> None:
    """What can be known before a network is read.

    Raises:
        ValueError: if the folder exists or has the name of a file, or there are no such names; or the rank is none.
    """
    if rank is not None and (not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank={rank} must be a whole number of at least 1, or null: as trained")
    if naming not in NAMINGS:
        raise ValueError(f"naming={naming!r}: format=lora has the names of {' or '.join(NAMINGS)}")
    if folder.suffix == SUFFIX:
        raise ValueError(f"output={folder} must not end in {SUFFIX}: format=lora writes a folder")
    if folder.exists():
        raise ValueError(f"output={folder} exists, and nothing is overwritten; give another name, or remove it")


def write_lora(
    folder: Path,
    network: nn.Module,
    name: str,
    format: LoRAFormat,
    *,
    config: Mapping[str, Any],
    step: int,
    naming: Naming = "original",
    truncation: Truncation | None = None,
) -> ExportSummary:
    """Write a run's adapter, with what its run was.

    Args:
        folder: to create.
        network, name: the adapter's.
        config: plain containers; a rollout takes its settings from it.
        step: of the checkpoint.
        naming: whose names tensors get.
        truncation: what it lacks of the adapter that the run trained; None: nothing.

    Raises:
        ValueError: as `check_lora_export`; or if there is no such adapter.
    """
    check_lora_export(folder, naming)
    lacks = {} if truncation is None else {"truncation": asdict(truncation)}
    about = describe(format.name, naming, config, step, **lacks)
    save_adapter(network, name, folder, format.dtype, naming=naming, metadata=about)
    file = find_adapter(folder)
    stored = load_file(file)
    return summarise(stored, sum(tensor.numel() for tensor in stored.values()), file)


def save_adapter(
    network: nn.Module,
    name: str,
    folder: str | Path,
    dtype: torch.dtype | None = None,
    state: Mapping[str, Tensor] | None = None,
    naming: Naming = "original",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a folder that peft or diffusers loads. It appears complete or not at all.

    Args:
        network: with the adapter.
        name: of the adapter.
        folder: to create; it must not exist.
        dtype: to store; None: as the adapter is.
        state: what to store instead of the adapter's parameters, under peft's names: their average, or whole tensors of
            a sharded network.
        naming: whose names tensors get, and so who loads it.
        metadata: more for the file's.

    Raises:
        ValueError: if there is no such adapter, or the folder exists.
    """
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"{folder} exists, and adapters never overwrite; choose another folder or remove it")
    layers = adapted_layers(network, name)
    layer = next(iter(layers.values()))
    config = LoraConfig(
        r=layer.r[name],
        lora_alpha=layer.lora_alpha[name],
        target_modules=[diffusers_name(key) for key in layers] if naming == "diffusers" else list(layers),
        inference_mode=True,
    )
    tensors = {
        key: tensor.detach().to(device="cpu", dtype=dtype).contiguous()
        for key, tensor in (adapter_state(network, name) if state is None else state).items()
    }
    about = {"format": "pt"} | dict(metadata or {})
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if naming == "diffusers":
        about[DIFFUSERS_KEY] = json.dumps(
            {
                f"{DIFFUSERS_PREFIX}{setting}": value
                for setting, value in config.to_dict().items()
                if setting in ("r", "lora_alpha")
            }
            | {f"{DIFFUSERS_PREFIX}target_modules": sorted(cast(set[str], config.target_modules))}
        )
        _save({_diffusers_key(key): tensor for key, tensor in tensors.items()}, partial / DIFFUSERS_FILE, about)
    else:
        _save(tensors, partial / WEIGHTS_FILE, about)
        config.save_pretrained(str(partial))
    partial.rename(folder)


def _save(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, metadata=dict(metadata))
    # safetensors makes files that nobody else may read.
    path.chmod(mode)


def find_adapter(location: str | Path) -> Path:
    """The file with the tensors of an adapter: itself, or in a folder of peft's or diffusers'.

    Raises:
        ValueError: if there is none.
    """
    location = Path(location)
    for path in (location, location / WEIGHTS_FILE, location / DIFFUSERS_FILE):
        if path.is_file():
            return path
    raise ValueError(
        f"{location} has no {WEIGHTS_FILE} and no {DIFFUSERS_FILE}; give a folder with one of them, or the file"
    )


def load_adapter(network: nn.Module, name: str, location: str | Path) -> None:
    """Add an adapter as `save_adapter`, peft or diffusers wrote it.

    A file of diffusers' without metadata says no alpha: it is the rank then, as diffusers takes it.

    Args:
        network: the base that it was trained on.
        name: of the adapter here.
        location: a folder, or the file in it.

    Raises:
        ValueError: if that holds no plain LoRA, or one of another network; the network is untouched then.
    """
    file = find_adapter(location)
    metadata = read_metadata(file)
    tensors = load_file(file)
    if all(key.startswith(DIFFUSERS_PREFIX) for key in tensors):
        source = file
        stored = {
            key.removeprefix(DIFFUSERS_PREFIX): value
            for key, value in json.loads(metadata.get(DIFFUSERS_KEY, "{}")).items()
        }
        tensors = {_peft_key(key): tensor for key, tensor in tensors.items()}
    else:
        source = file.with_name(CONFIG_FILE)
        if not source.exists():
            raise ValueError(f"{file.parent} has no {CONFIG_FILE}; it says the alpha of {file.name}")
        stored = LoraConfig.from_pretrained(str(file.parent)).to_dict()
    unknown = [setting for setting in VARIANTS if stored.get(setting) not in (None, False, {}, "none")]
    if unknown:
        raise ValueError(f"{source} sets {', '.join(unknown)}; only plain LoRA of one rank is supported")
    rank = stored.get("r") or next((len(tensor) for key, tensor in tensors.items() if "lora_A" in key), 0)
    add_stored_adapter(network, name, tensors, rank, stored.get("lora_alpha") or rank, str(location))


def run_of_adapter(location: str | Path) -> ExportedFile | None:
    """What the file of an adapter says of its run; None: another program wrote it.

    Raises:
        ValueError: as `find_adapter` and `read_description`.
    """
    file = find_adapter(location)
    return read_description(file) if KEY in read_metadata(file) else None


def _diffusers_key(key: str) -> str:
    layer, _, matrix = key.removeprefix(PREFIX).rpartition(".lora_")
    return f"{DIFFUSERS_PREFIX}{diffusers_name(layer)}.lora_{matrix}"


def _peft_key(key: str) -> str:
    layer, _, matrix = key.removeprefix(DIFFUSERS_PREFIX).rpartition(".lora_")
    return f"{PREFIX}{original_name(layer)}.lora_{matrix}"
