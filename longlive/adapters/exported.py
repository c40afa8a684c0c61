"""Files that `export.py` wrote: what one says of itself, and the network in it.

What is not packed becomes float32: a rollout then has one dtype, whatever the file has. The network is built on meta,
so that memory never holds more than what it is made of in the end; packed layers never have a weight.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from longlive import __version__
from longlive.models.wan.config import Naming, WanConfig
from longlive.models.wan.model import CausalWan
from longlive.models.wan.weights import original_name
from longlive.parallel.checkpoint import check_same_shapes
from longlive.precision.nvfp4.backends.emulated import EmulatedBackend
from longlive.precision.nvfp4.format import BLOCK, RULES
from longlive.precision.nvfp4.linear import RULE_KEY, TILES_KEY, NVFP4Linear
from longlive.precision.nvfp4.recipe import NVFP4Recipe
from longlive.typing import Tensor

SUFFIX = ".safetensors"
KEY = "longlive"
"""Of the file's metadata."""
LAYOUT = 1
"""Of what is under that key; another number is another layout."""

PACKED_DTYPES = {"packed": torch.uint8, "scale": torch.float8_e4m3fn, "amax": torch.float32}
"""Of the three tensors `<layer>.weight_...`."""


@dataclass(frozen=True)
class Packing:
    """How the packed layers of a file are packed.

    Attributes:
        rule: the scale rule, and so what amax means.
        tiles: whether scales are shared by 16 x 16 elements.
        layers, keep_last_blocks_bf16: which layers were chosen, see `LayerSelection`.
        scale_layout: `plain`: row by row.
    """

    rule: str
    tiles: bool
    layers: Sequence[str]
    keep_last_blocks_bf16: float
    scale_layout: str = "plain"


@dataclass(frozen=True)
class ExportedFile:
    """What a file says of itself.

    Attributes:
        path: where it is.
        format, naming: see `ExportFormat`.
        version: of the library that wrote it.
        config: the run's, resolved.
        step: of the checkpoint.
        packing: of its packed layers; None: it has none.
    """

    path: Path
    format: str
    naming: Naming
    version: str
    config: dict[str, Any]
    step: int
    packing: Packing | None


def read_metadata(path: Path) -> dict[str, str]:
    """A safetensors file's metadata; its tensors are not read.

    Raises:
        ValueError: if it is torn or no such file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from error


def describe(format: str, naming: Naming, config: Mapping[str, Any], step: int, **more: Any) -> dict[str, str]:
    """Metadata by which a file says what it is; `more` is what only this format has."""
    about = {"layout": LAYOUT, "version": __version__, "format": format, "naming": naming, "step": step}
    # Other programs look for `format`: whose tensors they are.
    return {"format": "pt", KEY: json.dumps(about | {"config": config} | more)}


def read_description(path: Path) -> ExportedFile:
    """What a file says of itself; its tensors are not read.

    Raises:
        ValueError: if it is torn or no such file, or of a layout that this version does not know.
    """
    metadata = read_metadata(path)
    if KEY not in metadata:
        raise ValueError(
            f"{path} holds no config, so it does not say what network it is; it was not written by `longlive export`. "
            "A run starts from plain weights with module.weights=..."
        )
    about = json.loads(metadata[KEY])
    if about["layout"] != LAYOUT:
        raise ValueError(f"{path} has layout {about['layout']}, and this version reads {LAYOUT}; export it again")
    packing = None if about.get("nvfp4") is None else Packing(**about["nvfp4"])
    if packing is not None and (packing.rule not in RULES or packing.scale_layout != "plain"):
        raise ValueError(
            f"{path} is packed with rule={packing.rule!r}, scale_layout={packing.scale_layout!r}; this version reads "
            f"the rules {', '.join(RULES)} in plain layout"
        )
    return ExportedFile(
        path, about["format"], about["naming"], about["version"], about["config"], about["step"], packing
    )


def load_network(exported: ExportedFile, config: WanConfig) -> CausalWan:
    """The network of a file on the CPU, without gradients; packed layers are `NVFP4Linear`s, computed by emulation
    until a precision plugin takes them over.

    Args:
        config: its sizes, which the file's config describes.

    Raises:
        ValueError: if names, shapes or dtypes are not those of such a network; the first that differ are named.
    """
    with torch.device("meta"):
        network = CausalWan(config).requires_grad_(False)
    with safe_open(exported.path, framework="pt") as file:
        stored = {original_name(name): name for name in file.keys()}  # noqa: SIM118 - a safe_open is no dict
        packed = [name.removesuffix(".weight_packed") for name in stored if name.endswith(".weight_packed")]
        shapes = {name: torch.empty(file.get_slice(key).get_shape(), device="meta") for name, key in stored.items()}
        try:
            check_same_shapes(_expected(network, packed), shapes)
        except ValueError as error:
            raise ValueError(f"{exported.path} does not fit its config: {error}") from error
        state = _State()
        if packed:
            packing = exported.packing
            if packing is None:
                raise ValueError(f"{exported.path} packs {packed[0]} and does not say how; export it again")
            recipe, backend = NVFP4Recipe(weights=packing.rule, weight_tiles=packing.tiles), EmulatedBackend()
            for name in packed:
                parent, _, child = name.rpartition(".")
                linear = network.get_submodule(name)
                assert isinstance(linear, nn.Linear)
                setattr(network.get_submodule(parent), child, NVFP4Linear.from_linear(linear, recipe, backend, name))
                state._metadata[name] = {RULE_KEY: packing.rule, TILES_KEY: packing.tiles}
        for name, key in stored.items():
            tensor = file.get_tensor(key)
            layer, _, part = name.rpartition(".weight_")
            if layer in packed and tensor.dtype != PACKED_DTYPES[part]:
                raise ValueError(f"{exported.path}: {key} is {tensor.dtype}, not {PACKED_DTYPES[part]}")
            state[name] = tensor if layer in packed else tensor.float()
    network.load_state_dict(state, assign=True)
    return network.eval()


class _State(dict[str, Tensor]):
    """A state dict with what layers note beside their tensors, where torch looks for it."""

    def __init__(self) -> None:
        super().__init__()
        self._metadata: dict[str, dict[str, Any]] = {}


def _expected(network: nn.Module, packed: Sequence[str]) -> dict[str, Tensor]:
    """Names and shapes of a file in which these layers are packed, on meta."""
    expected = dict(network.state_dict())
    for layer in packed:
        weight = expected.pop(f"{layer}.weight", None)
        if weight is not None and weight.dim() == 2:
            n, k = weight.shape
            for part, shape in zip(PACKED_DTYPES, ((n, k // 2), (n, k // BLOCK), ()), strict=True):
                expected[f"{layer}.weight_{part}"] = torch.empty(shape, device="meta")
    return expected
