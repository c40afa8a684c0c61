"""NVFP4 by Transformer Engine: its fused quantisers and FP4 GEMMs, on Blackwell.

Transformer Engine computes whole layers. Each `NVFP4Linear` gets a twin, a `te.Linear` that is no part of the network
and borrows the layer's weight at every call, so that parameters, their sharding and the checkpoint stay the network's
own; nothing of Transformer Engine's `_extra_state` is ever saved. A packed layer has a twin whose weight is
FP4-resident. It is quantised from the codes' values, which gives the same codes again: under `static_6` a block's
largest element is 6.

Its `NVFP4BlockScaling` is our recipe with `static_6` everywhere. Two differences cannot be configured away: random bits
come from the device's generator, so a resumed run and another number of ranks draw others, and amax is each rank's own.

Where the last steps' forward products are in high precision (`StepClock.over`), backward's are too: a layer is
Transformer Engine's or it is not.

The transform wants bfloat16, so inputs and outputs are bfloat16 inside.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

from longlive.precision.nvfp4.backends.base import Backend, describe_device, has_fp4_gemms
from longlive.precision.nvfp4.gemms import high_precision, output_dtype, pad_tokens, weight_of
from longlive.precision.nvfp4.linear import NVFP4Linear
from longlive.precision.nvfp4.recipe import NVFP4Recipe
from longlive.typing import Float, Tensor


def missing(device: torch.device | str | None = None) -> str | None:
    """What this machine lacks for Transformer Engine's NVFP4; None: nothing."""
    lacks = []
    if not torch.cuda.is_available():
        lacks.append("there is no CUDA device")
    elif not has_fp4_gemms(device):
        lacks.append(f"{describe_device(device)} has no FP4 GEMMs, which come with compute capability 10.0")
    try:
        te = importlib.import_module("transformer_engine.pytorch")
        recipes = importlib.import_module("transformer_engine.common.recipe")
    except Exception as error:  # without CUDA libraries it raises RuntimeError, OSError, ...
        first_line = next(iter(str(error).splitlines()), "")
        lacks.append(f"importing transformer_engine fails ({type(error).__name__}: {first_line})")
    else:
        wanted = ((recipes, "NVFP4BlockScaling"), (te, "autocast"), (te, "quantized_model_init"))
        lacks += [
            f"transformer_engine has no {name}: update it" for module, name in wanted if not hasattr(module, name)
        ]
        if not lacks and hasattr(te, "is_nvfp4_available"):
            available, reason = te.is_nvfp4_available(return_reason=True)
            lacks += [] if available else [f"transformer_engine says: {reason}"]
    return "; ".join(lacks) or None


class TransformerEngineBackend(Backend):
    """Needs what `missing` looks for.

    Raises:
        RuntimeError: naming what is missing.
    """

    name = "transformer_engine"
    trains = True

    def __init__(self, device: torch.device | str | None = None) -> None:
        lacks = missing(device)
        if lacks is not None:
            raise RuntimeError(f"Transformer Engine's NVFP4 cannot run here: {lacks}")
        self._te = importlib.import_module("transformer_engine.pytorch")
        self._recipes = importlib.import_module("transformer_engine.common.recipe")
        self._scalings: dict[NVFP4Recipe, Any] = {}

    def refusal(self, recipe: NVFP4Recipe) -> str | None:
        return refusal(recipe)

    def linear(self, layer: NVFP4Linear, x: Float[Tensor, "tokens features"]) -> Float[Tensor, "tokens out"]:
        if layer.clock.over:
            return high_precision(x, weight_of(layer.weight, layer.codes), layer.bias)
        out_dtype = output_dtype(x)
        recipe = self._block_scaling(layer.recipe)
        if "twin" not in layer.backend_state:
            layer.backend_state["twin"] = self._twin(layer, recipe)
        twin = layer.backend_state["twin"]
        if layer.codes is None:
            twin.weight = layer.weight  # anew at every call: sharding swaps the Parameter
        rows = pad_tokens(x.to(torch.bfloat16))
        with torch.autocast(x.device.type, torch.bfloat16), self._te.autocast(enabled=True, recipe=recipe):
            y = twin(rows)[: len(x)]
        bias = layer._parameters["bias"]
        return (y if bias is None else y + bias.float()).to(out_dtype)

    def _block_scaling(self, recipe: NVFP4Recipe) -> Any:
        """One object per recipe: Transformer Engine looks at it at every call, and sets up anew for another one."""
        if recipe not in self._scalings:
            self._scalings[recipe] = self._recipes.NVFP4BlockScaling(**block_scaling_settings(recipe))
        return self._scalings[recipe]

    def _twin(self, layer: NVFP4Linear, recipe: Any) -> nn.Module:
        codes, sizes = layer.codes, (layer.in_features, layer.out_features)
        if codes is None:
            return self._te.Linear(*sizes, bias=False, params_dtype=layer.weight.dtype, device="meta")
        with self._te.quantized_model_init(enabled=True, recipe=recipe):
            twin = self._te.Linear(*sizes, bias=False, params_dtype=torch.float32, device=codes.packed.device)
        with torch.no_grad():
            twin.weight.copy_(codes.dequantise())
        return twin.requires_grad_(False)


def refusal(recipe: NVFP4Recipe) -> str | None:
    """Which settings `NVFP4BlockScaling` does not have; None: it can be configured to be this recipe."""
    wrong = [
        f"{operand}={rule or 'null'}"
        for operand, rule in (
            ("weights", recipe.weights), ("activations", recipe.activations), ("gradients", recipe.gradients)
        )
        if rule != "static_6"
    ]  # fmt: skip
    if not recipe.weight_tiles:
        wrong.append("weight_tiles=false")
    if recipe.reduce_amax:
        wrong.append("reduce_amax=true")
    if not wrong:
        return None
    return (
        f"it does not compute {', '.join(wrong)}; it takes weights=static_6 weight_tiles=true activations=static_6 "
        "gradients=static_6 reduce_amax=false (precision=nvfp4_static)"
    )


def block_scaling_settings(recipe: NVFP4Recipe) -> dict[str, bool]:
    """Arguments of `NVFP4BlockScaling`, all named: its own defaults read environment variables."""
    return {
        "disable_rht": not recipe.hadamard,
        "disable_stochastic_rounding": not recipe.stochastic_gradients,
        "disable_2d_quantization": False,
    }
