"""LoRA on a causal network, by peft: several adapters over one base that is there once.

    y = W x + b + (alpha / rank) B A x          A starts random, B at zero: an adapter starts as nothing

(Hu et al. 2021.) peft wraps each chosen linear layer, whatever subclass of `nn.Linear` precision has made of it, in a
layer that holds it as `base_layer` beside `lora_A.<adapter>` and `lora_B.<adapter>`. So `student` and `critic` share
the base with the `teacher`, which is the network without adapter.

**Which adapter multiplies** is chosen by `use_adapter`, a context. Outside of any, none does: nothing is left switched
on by accident. Backward under activation checkpointing runs the forward again and must run in the same context; run
outside, torch finds other tensors than the first time and says so. (peft's own switches also decide who learns: they
would drop the gradients of an adapter that is switched off between forward and backward. `train_only` decides it here.)

**Names.** Parameters of the base are called `...q.base_layer.weight` once a layer is wrapped, but
`network.get_parameter("...q.weight")` still finds them: a wrapped layer passes `weight` and `bias` on. So what is
loaded by Wan's names (`materialise`) finds its place in a network with adapters; `base_name` translates a state dict.

Adapters as files: `lora_files.py`; in the weights of their base: `lora_merging.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from longlive import rng
from longlive.parallel.materialise import local_part
from longlive.precision.selection import BLOCK_LINEARS
from longlive.typing import Tensor

PREFIX = "base_model.model."
"""Before every name in a file of peft's."""
MATRICES = ("lora_A", "lora_B")
BASE = ".base_layer"


@dataclass(frozen=True)
class LoRASettings:
    """Size and place of an adapter.

    Attributes:
        rank: columns of A's output; the adapter has `rank (in + out)` parameters per layer.
        alpha: the product is scaled by `alpha / rank`.
        targets: shell patterns of the names of linear layers, compared from their end; by default all of the
            transformer blocks.

    Raises:
        ValueError: for a rank or alpha that is not positive, or no pattern.
    """

    rank: int = 128
    alpha: int = 128
    targets: Sequence[str] = BLOCK_LINEARS

    def __post_init__(self) -> None:
        for name in ("rank", "alpha"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if isinstance(self.targets, str) or not self.targets:
            raise ValueError(f"targets={self.targets!r} must be a list of name patterns, as {list(BLOCK_LINEARS)}")


def target_layers(network: nn.Module, targets: Sequence[str]) -> list[str]:
    """The names of the linear layers that patterns choose, as they are called without adapters.

    Raises:
        ValueError: for a pattern that names none.
    """
    linears = [
        name.removesuffix(BASE)
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and not any(f".{matrix}." in name for matrix in MATRICES)
    ]
    for pattern in targets:
        if not any(_matches(name, pattern) for name in linears):
            raise ValueError(f"targets: no linear layer is named {pattern!r}; there are {', '.join(linears[:12])}, ...")
    return [name for name in linears if any(_matches(name, pattern) for pattern in targets)]


def add_adapter(network: nn.Module, name: str, settings: LoRASettings, seed: int = 0) -> None:
    """Wrap the chosen layers, and start an adapter that does nothing yet. The base is frozen; the adapter learns.

    On a network that is on meta, the adapter is there too: `initialise_adapter` once it has memory. Before sharding.

    Args:
        network: with or without other adapters.
        name: of the adapter.
        settings: its size and place.
        seed: of the random A.

    Raises:
        ValueError: for a name that is taken, or a pattern that names no layer.
    """
    _inject(network, name, _config(network, settings))
    initialise_adapter(network, name, seed)


def _config(network: nn.Module, settings: LoRASettings) -> LoraConfig:
    return LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, target_modules=target_layers(network, settings.targets)
    )


def _inject(network: nn.Module, name: str, config: LoraConfig) -> None:
    taken = adapter_names(network)
    if name in taken:
        raise ValueError(f"the network has an adapter {name!r} already; there are {', '.join(taken)}")
    if not name.isidentifier() or hasattr(nn.ModuleDict, name):
        raise ValueError(
            f"adapter name {name!r} must be an identifier that torch's modules have not taken, as 'student': it is "
            "part of parameters' names"
        )
    learns = {id(parameter): parameter.requires_grad for parameter in network.parameters()}
    # On meta first: peft would draw A from torch's global generator.
    with _stand_ins(network):
        inject_adapter_in_model(config, network, adapter_name=name, low_cpu_mem_usage=True)
    # peft's record of its configs, which it warns of at the next adapter; nothing here reads it.
    del network.peft_config
    for layer in wrapped_layers(network).values():
        if name in layer.lora_A:
            for matrix in MATRICES:
                getattr(layer, matrix)[name].to_empty(device=_device(layer)).to(_dtype(layer))
    _activate(network, None)
    for parameter in network.parameters():
        if taken and id(parameter) in learns:
            parameter.requires_grad_(learns[id(parameter)])


@contextmanager
def _stand_ins(network: nn.Module) -> Iterator[None]:
    """Inside, every linear layer has a `weight`, which peft asks for its device; packed ones have none."""
    packed = [
        layer for layer in network.modules() if isinstance(layer, nn.Linear) and layer._parameters["weight"] is None
    ]
    for layer in packed:
        layer.weight = nn.Parameter(torch.empty(0, device="meta"), requires_grad=False)
    try:
        yield
    finally:
        for layer in packed:
            layer.weight = None  # type: ignore[assignment]


@torch.no_grad()
def initialise_adapter(network: nn.Module, name: str, seed: int = 0) -> None:
    """A Kaiming-uniform as peft has it, B zero: the numbers depend on the seed and the layer's name alone, sharded or
    whole. Nothing happens on meta.

    Raises:
        ValueError: if there is no such adapter.
    """
    for layer_name, layer in adapted_layers(network, name).items():
        down, up = matrices(layer, name)
        if down.is_meta:
            continue
        bound = 1 / math.sqrt(down.shape[1])
        drawn = torch.empty(down.shape, device="cpu", dtype=torch.float32)
        drawn.uniform_(-bound, bound, generator=rng.generator(seed, f"lora/{name}/{layer_name}"))
        part, where = local_part(down)
        part.copy_(drawn[where])
        local_part(up)[0].zero_()


def adapter_names(network: nn.Module) -> list[str]:
    """All adapters of a network, in alphabetical order."""
    return sorted({name for layer in wrapped_layers(network).values() for name in layer.lora_A})


@contextmanager
def use_adapter(network: nn.Module, name: str | None) -> Iterator[None]:
    """Inside, the network is its base with one adapter, or with none; afterwards what it was before.

    Raises:
        ValueError: if there is no such adapter.
    """
    if name is not None:
        adapted_layers(network, name)
    before = _activate(network, name)
    try:
        yield
    finally:
        for layer, active in before:
            layer._active_adapter = active


def _activate(network: nn.Module, name: str | None) -> list[tuple[LoraLayer, list[str]]]:
    """Returns what was active."""
    before = []
    for layer in wrapped_layers(network).values():
        before.append((layer, list(layer.active_adapters)))
        # Not `set_adapter`, which also decides whose gradients are dropped.
        layer._active_adapter = [] if name is None else [name]
    return before


def train_only(network: nn.Module, names: Sequence[str]) -> None:
    """The parameters of these adapters learn; the base and all other adapters are frozen.

    Raises:
        ValueError: if there is no such adapter.
    """
    network.requires_grad_(False)
    for name in names:
        for _, parameter in adapter_parameters(network, name):
            parameter.requires_grad_(True)


def adapter_parameters(network: nn.Module, name: str) -> Iterator[tuple[str, nn.Parameter]]:
    """An adapter's parameters, under the names that `network.named_parameters` gives them.

    Raises:
        ValueError: if there is no such adapter.
    """
    for layer_name, layer in adapted_layers(network, name).items():
        for matrix, parameter in zip(MATRICES, matrices(layer, name), strict=True):
            yield f"{layer_name}.{matrix}.{name}.weight", parameter


def adapter_state(network: nn.Module, name: str) -> dict[str, Tensor]:
    """An adapter's parameters under peft's names, which say nothing of the adapter's own. Of a sharded network, shards.

    Raises:
        ValueError: if there is no such adapter.
    """
    return {
        PREFIX + parameter_name.replace(f".{name}.weight", ".weight"): parameter.detach()
        for parameter_name, parameter in adapter_parameters(network, name)
    }


def base_parameters(network: nn.Module) -> Iterator[nn.Parameter]:
    """The network's own parameters, without those of its adapters."""
    return (parameter for name, parameter in network.named_parameters() if base_name(name) is not None)


@torch.no_grad()
def load_adapter_state(network: nn.Module, name: str, state: Mapping[str, Tensor]) -> None:
    """Fill an adapter, sharded or whole, from whole tensors under peft's names.

    Raises:
        ValueError: if there is no such adapter, or names or shapes are not its own; it is untouched then.
    """
    ours = adapter_state(network, name)
    _check_fit({key: parameter.shape for key, parameter in ours.items()}, state, repr(name))
    for key, parameter in ours.items():
        part, where = local_part(parameter)
        part.copy_(state[key][where])


def add_stored_adapter(
    network: nn.Module, name: str, state: Mapping[str, Tensor], rank: int, alpha: int, source: str
) -> None:
    """Add an adapter whose tensors, under peft's names, say which layers it wraps; `source` is what to call them.

    Raises:
        ValueError: if they are none of this network's; it is untouched then.
    """
    layers = sorted({key.removeprefix(PREFIX).rsplit(".lora_", 1)[0] for key in state})
    settings = LoRASettings(rank, alpha, target_layers(network, layers))
    shapes: dict[str, tuple[int, ...]] = {}
    for layer_name in settings.targets:
        layer = cast(nn.Linear, network.get_submodule(layer_name))
        shapes[f"{PREFIX}{layer_name}.lora_A.weight"] = (rank, layer.in_features)
        shapes[f"{PREFIX}{layer_name}.lora_B.weight"] = (layer.out_features, rank)
    _check_fit(shapes, state, source)
    _inject(network, name, _config(network, settings))
    load_adapter_state(network, name, state)


def _check_fit(shapes: Mapping[str, Sequence[int]], state: Mapping[str, Tensor], what: str) -> None:
    """Raise the `ValueError` for tensors that are not an adapter's."""
    differing = sorted(shapes.keys() ^ state.keys())
    differing += [key for key, shape in shapes.items() if key in state and tuple(state[key].shape) != tuple(shape)]
    if differing:
        raise ValueError(
            f"the stored adapter does not fit {what}: {', '.join(differing[:4])}{', ...' if differing[4:] else ''} "
            "is missing on one side or has another shape; use the rank and targets that it was made with"
        )


def base_name(name: str) -> str | None:
    """What a parameter is called in the network without adapters; None for an adapter's own."""
    if any(f".{matrix}." in name for matrix in MATRICES):
        return None
    return name.replace(f"{BASE}.", ".")


def matrices(layer: LoraLayer, name: str) -> tuple[nn.Parameter, nn.Parameter]:
    """A and B."""
    down, up = (getattr(layer, matrix)[name].weight for matrix in MATRICES)
    return down, up


def wrapped_layers(network: nn.Module) -> dict[str, LoraLayer]:
    """The layers that have any adapter, by name."""
    return {name: module for name, module in network.named_modules() if isinstance(module, LoraLayer)}


def adapted_layers(network: nn.Module, name: str) -> dict[str, LoraLayer]:
    """The layers that have this adapter, by name.

    Raises:
        ValueError: if there is none.
    """
    found = {layer_name: layer for layer_name, layer in wrapped_layers(network).items() if name in layer.lora_A}
    if not found:
        raise ValueError(
            f"the network has no adapter {name!r}; there are {', '.join(adapter_names(network)) or 'none'}"
        )
    return found


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(f".{name}", f"*.{pattern}")


def _reference(layer: LoraLayer) -> Tensor:
    """A tensor of the base that is there whatever its precision has made of it."""
    base = layer.get_base_layer()
    return next(tensor for tensor in (*base.parameters(), *base.buffers()))


def _device(layer: LoraLayer) -> torch.device:
    return _reference(layer).device


def _dtype(layer: LoraLayer) -> torch.dtype:
    """The base's where it has floating-point weights, else float32."""
    weight = getattr(layer.get_base_layer(), "weight", None)
    return weight.dtype if weight is not None else torch.float32
