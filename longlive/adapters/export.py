"""A trained network as one safetensors file that says what it is: for rollouts, for other programs, to publish.

The file holds tensors under Wan's (or diffusers') names, and under the key `longlive` of its metadata a JSON object:
which format this is, the resolved config of the run, its step, and for packed layers how they are packed. So an
exported file is enough to roll out, and its weights alone are an ordinary file of Wan weights.

A format turns named weights into named tensors of the file; whether a rollout needs to know more than a dtype is what
its `description` says. `bf16` and `fp32` cast. `nvfp4` packs the linear layers that the precision plugin would wrap,
three tensors in place of one:

    <layer>.weight_packed   uint8 [n k/2]           two codes per byte, the even element low
    <layer>.weight_scale    float8_e4m3fn [n k/16]  in plain order, not swizzled
    <layer>.weight_amax     float32 []              magnitude that scales are relative to, by the scale rule

and casts everything else. Weights are quantised from the masters, never from a rounded copy, by the same function that
a rollout with `precision=nvfp4` calls; so that rollout and one from the file multiply by the same bits.

What is read is read into float32 where it is not packed: a rollout then has one dtype, whatever the file has. The
network is built on meta, so that memory never holds more than what it is made of in the end.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from longlive import __version__
from longlive.data.atomic import write_aside
from longlive.models.wan.config import Naming, WanConfig
from longlive.models.wan.model import CausalWan
from longlive.models.wan.weights import diffusers_name, original_name
from longlive.parallel.checkpoint import check_same_shapes
from longlive.precision.nvfp4.backends.emulated import EmulatedBackend
from longlive.precision.nvfp4.format import BLOCK, RULES, QuantisedTensor, quantise
from longlive.precision.nvfp4.linear import MULTIPLE, RULE_KEY, TILES_KEY, NVFP4Linear
from longlive.precision.nvfp4.recipe import NVFP4Recipe
from longlive.precision.selection import BLOCK_LINEARS, LayerSelection
from longlive.typing import Tensor

SUFFIX = ".safetensors"
KEY = "longlive"
"""Of the file's metadata."""
LAYOUT = 1
"""Of what is under that key; another number is another layout."""

NAMINGS: tuple[Naming, ...] = get_args(Naming)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

Weights = Mapping[str, Tensor | QuantisedTensor]
"""By `CausalWan`'s names. A linear layer's may be packed already (`nvfp4_files.py`)."""

PACKED_DTYPES = {"packed": torch.uint8, "scale": torch.float8_e4m3fn, "amax": torch.float32}
"""Of the three tensors `<layer>.weight_...`."""


class ExportFormat(ABC):
    """Which tensors a file has.

    Attributes:
        name: as in `format=`.
        namings: whose names it can have.
    """

    name: str
    namings: Sequence[Naming] = NAMINGS

    @abstractmethod
    def tensors(self, network: nn.Module, weights: Weights) -> Iterator[dict[str, Tensor]]:
        """What is stored of each weight, one after the other.

        Args:
            network: whose weights they are; may be on meta.
            weights: all of the network's.

        Raises:
            ValueError: before the first one, if the format does not fit the network.
        """

    def description(self) -> dict[str, Any]:
        """What a reader must know besides names and dtypes; plain containers. Asked for after `tensors`."""
        return {}


class CastFormat(ExportFormat):
    """Every tensor in one dtype.

    Args:
        dtype: `bf16` or `fp32`.

    Raises:
        ValueError: for another dtype.
    """

    def __init__(self, dtype: str) -> None:
        self.dtype = _dtype("dtype", dtype)
        self.name = dtype

    def tensors(self, network: nn.Module, weights: Weights) -> Iterator[dict[str, Tensor]]:
        for name, weight in weights.items():
            if isinstance(weight, QuantisedTensor):
                raise ValueError(f"{name} is packed, and format={self.name} would lose that; use format=nvfp4")
            yield {name: weight.detach().to(self.dtype)}


class NVFP4Format(ExportFormat):
    """Linear layers in NVFP4, everything else in one dtype.

    Args:
        rule: how scales are chosen, one of format.RULES.
        layers, keep_last_blocks_bf16: which layers are packed, as the precision plugin chooses (`LayerSelection`).
        others: `bf16` or `fp32`, the dtype of all other tensors. `fp32` keeps norms, modulation and the timestep's
            layers, which compute in float32, as they were trained.

    Raises:
        ValueError: for a rule, a share of blocks or a dtype that does not exist.
    """

    name = "nvfp4"
    namings = ("original",)

    def __init__(
        self,
        *,
        rule: str = "static_6",
        layers: Sequence[str] = BLOCK_LINEARS,
        keep_last_blocks_bf16: float = 0.0,
        others: str = "bf16",
    ) -> None:
        if rule not in RULES:
            raise ValueError(f"rule={rule!r} is no scale rule; use one of {', '.join(RULES)}")
        self.selection = LayerSelection(MULTIPLE, tuple(layers), keep_last_blocks_bf16)
        self.rule = rule
        self.others = _dtype("others", others)
        self.tiles = True

    def tensors(self, network: nn.Module, weights: Weights) -> Iterator[dict[str, Tensor]]:
        chosen = {layer.name for layer in self.selection.of(network, NVFP4Linear) if layer.reason is None}
        if not chosen:
            raise ValueError("format=nvfp4 would pack no layer; longlive doctor precision precision=nvfp4 shows why")
        given = {name.removesuffix(".weight"): w for name, w in weights.items() if isinstance(w, QuantisedTensor)}
        for layer, codes in given.items():
            if layer not in chosen or codes.rule != self.rule:
                raise ValueError(
                    f"{layer} is packed with rule={codes.rule}, and the file would have rule={self.rule} in the layers "
                    f"{', '.join(self.selection.layers)}; give the rule and the layers of what is packed"
                )
        self.tiles = all(codes.tiles for codes in given.values())
        for name, weight in weights.items():
            layer = name.removesuffix(".weight")
            if layer == name or layer not in chosen:
                assert isinstance(weight, Tensor)
                yield {name: weight.detach().to(self.others)}
                continue
            codes = weight if isinstance(weight, QuantisedTensor) else quantise(weight, self.rule, tiles=True)
            parts = (codes.packed, codes.scales, codes.amax)
            yield {f"{name}_{part}": tensor for part, tensor in zip(PACKED_DTYPES, parts, strict=True)}

    def description(self) -> dict[str, Any]:
        packing = Packing(self.rule, self.tiles, self.selection.layers, self.selection.keep_last_blocks_bf16)
        return {"nvfp4": asdict(packing)}


@dataclass(frozen=True)
class Packing:
    """How the packed layers of a file are packed.

    Attributes:
        rule: the scale rule, and so what amax means.
        tiles: whether scales are shared by 16 x 16 elements, as they are if this library chose them.
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


@dataclass(frozen=True)
class ExportSummary:
    """What was written.

    Attributes:
        num_parameters: of the network.
        num_bytes: of the file.
        tensors, tensor_bytes: by dtype, how many there are and their bytes.
    """

    num_parameters: int
    num_bytes: int
    tensors: Mapping[str, int] = field(default_factory=dict)
    tensor_bytes: Mapping[str, int] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """How many times smaller than two bytes per parameter."""
        return 2 * self.num_parameters / self.num_bytes


def check_export(path: Path, format: ExportFormat, naming: str) -> None:
    """What can be known before a network is read.

    Raises:
        ValueError: if the file exists or is no safetensors file by its name, or the format has no such names.
    """
    if naming not in format.namings:
        raise ValueError(f"naming={naming!r}: format={format.name} has the names of {' or '.join(format.namings)}")
    if path.suffix != SUFFIX:
        raise ValueError(f"output={path} must end in {SUFFIX}, the kind of file that is written")
    if path.exists():
        raise ValueError(f"output={path} exists, and nothing is overwritten; give another name, or remove it")


def write_export(
    path: Path,
    network: CausalWan,
    weights: Weights,
    format: ExportFormat,
    *,
    config: Mapping[str, Any],
    step: int,
    naming: Naming = "original",
    on_weight: Callable[[], None] = lambda: None,
) -> ExportSummary:
    """Write a file, which is complete or absent.

    Args:
        path: to write; it must not exist.
        network: its shapes; it may be on meta.
        weights: of the network, all of them.
        config: plain containers; a rollout from the file builds network, codec and text encoder from it.
        step: of the checkpoint.
        naming: whose names tensors get.
        on_weight: called whenever one of the weights is ready.

    Raises:
        ValueError: as `check_export`; or if weights, network and format do not fit.
    """
    check_export(path, format, naming)
    check_same_shapes(network.state_dict(), weights)  # type: ignore[arg-type]  # both kinds have shapes
    stored = {}
    for tensors in format.tensors(network, weights):
        for name, tensor in tensors.items():
            stored[diffusers_name(name) if naming == "diffusers" else name] = tensor.cpu().contiguous()
        on_weight()
    about = {
        "layout": LAYOUT,
        "version": __version__,
        "format": format.name,
        "naming": naming,
        "step": step,
        "config": config,
    } | format.description()
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_aside(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        # Other programs look for `format`: whose tensors they are.
        save_file(stored, temporary, metadata={"format": "pt", KEY: json.dumps(about)})
        # safetensors makes files that nobody else may read.
        temporary.chmod(mode)
    num_parameters = sum(parameter.numel() for parameter in network.parameters())
    kinds = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in stored.items()}
    num_bytes: Counter[str] = Counter()
    for name, tensor in stored.items():
        num_bytes[kinds[name]] += tensor.nbytes
    return ExportSummary(num_parameters, path.stat().st_size, Counter(kinds.values()), num_bytes)


def read_description(path: Path) -> ExportedFile:
    """What a file says of itself; its tensors are not read.

    Raises:
        ValueError: if it is torn or no such file, or of a layout that this version does not know.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from error
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
            recipe, backend = NVFP4Recipe(weights=packing.rule), EmulatedBackend()
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


def _dtype(setting: str, name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ValueError(f"{setting}={name!r} is unknown; use {' or '.join(DTYPES)}")
    return DTYPES[name]
