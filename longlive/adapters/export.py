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
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors.torch import save_file
from torch import nn

from longlive.adapters.exported import PACKED_DTYPES, SUFFIX, Packing, describe
from longlive.data.atomic import write_aside
from longlive.models.wan.config import Naming, WanConfig
from longlive.models.wan.model import CausalWan
from longlive.models.wan.weights import diffusers_name
from longlive.parallel.checkpoint import check_same_shapes
from longlive.precision.nvfp4.format import RULES, QuantisedTensor, quantise
from longlive.precision.nvfp4.linear import MULTIPLE, NVFP4Linear
from longlive.precision.selection import BLOCK_LINEARS, LayerSelection
from longlive.typing import Tensor

NAMINGS: tuple[Naming, ...] = get_args(Naming)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

Weights = Mapping[str, Tensor | QuantisedTensor]
"""By `CausalWan`'s names. A linear layer's may be packed already (`nvfp4_files.py`)."""


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
            network: whose weights they are; on meta.
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
        self.dtype = stored_dtype("dtype", dtype)
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
        tiles: whether 16x16 weights share a scale, as in training; without, 1x16 do, which is more exact.
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
        rule: str = "mse",
        tiles: bool = True,
        layers: Sequence[str] = BLOCK_LINEARS,
        keep_last_blocks_bf16: float = 0.0,
        others: str = "bf16",
    ) -> None:
        if rule not in RULES:
            raise ValueError(f"rule={rule!r} is no scale rule; use one of {', '.join(RULES)}")
        self.selection = LayerSelection(MULTIPLE, tuple(layers), keep_last_blocks_bf16)
        self.rule = rule
        self.others = stored_dtype("others", others)
        self.tiles = tiles

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
        if given:
            self.tiles = all(codes.tiles for codes in given.values())
        for name, weight in weights.items():
            layer = name.removesuffix(".weight")
            if layer == name or layer not in chosen:
                assert isinstance(weight, Tensor)
                yield {name: weight.detach().to(self.others)}
                continue
            codes = weight if isinstance(weight, QuantisedTensor) else quantise(weight, self.rule, tiles=self.tiles)
            parts = (codes.packed, codes.scales, codes.amax)
            yield {f"{name}_{part}": tensor for part, tensor in zip(PACKED_DTYPES, parts, strict=True)}

    def description(self) -> dict[str, Any]:
        packing = Packing(
            self.rule, self.tiles, list(self.selection.layers), float(self.selection.keep_last_blocks_bf16)
        )
        return {"nvfp4": asdict(packing)}


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
    tensors: Mapping[str, int]
    tensor_bytes: Mapping[str, int]

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
    model: WanConfig,
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
        model: the network's sizes.
        weights: of the network, all of them and no others.
        config: plain containers; a rollout from the file builds network, codec and text encoder from it.
        step: of the checkpoint.
        naming: whose names tensors get.
        on_weight: called whenever one of the weights is ready.

    Raises:
        ValueError: as `check_export`; or if weights, sizes and format do not fit.
    """
    check_export(path, format, naming)
    with torch.device("meta"):
        network = CausalWan(model)
    check_same_shapes(network.state_dict(), weights)  # type: ignore[arg-type]  # both kinds have shapes
    stored = {}
    for tensors in format.tensors(network, weights):
        for name, tensor in tensors.items():
            stored[diffusers_name(name) if naming == "diffusers" else name] = tensor.cpu().contiguous()
        on_weight()
    metadata = describe(format.name, naming, config, step, **format.description())
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_aside(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(stored, temporary, metadata=metadata)
        # safetensors makes files that nobody else may read.
        temporary.chmod(mode)
    return summarise(stored, sum(parameter.numel() for parameter in network.parameters()), path)


def summarise(stored: Mapping[str, Tensor], num_parameters: int, path: Path) -> ExportSummary:
    """Of a file that holds these tensors."""
    kinds = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in stored.items()}
    num_bytes: Counter[str] = Counter()
    for name, tensor in stored.items():
        num_bytes[kinds[name]] += tensor.nbytes
    return ExportSummary(num_parameters, path.stat().st_size, Counter(kinds.values()), num_bytes)


def stored_dtype(setting: str, name: str) -> torch.dtype:
    """The dtype that a setting names.

    Raises:
        ValueError: if it is none of `DTYPES`.
    """
    if name not in DTYPES:
        raise ValueError(f"{setting}={name!r} is unknown; use {' or '.join(DTYPES)}")
    return DTYPES[name]
