"""Rollouts on torchao's `NVFP4Tensor`, made from our own codes, so that every scale rule and tiles are kept.

With `activations=null` weights are *stored* in NVFP4 and multiplied in the activations' dtype: on any device, for
memory. With `activations=static_6` activations are quantised too, at every call, and multiplied by FP4 GEMMs; that
needs compute capability 10.0. torchao quantises activations with scales of at least 2^-6 and rounds the product of both
global scales to the output's dtype, so its outputs differ from the emulation's by up to 1 % of their size.

`NVFP4Tensor` is a prototype of torchao's, imported when it is used first.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch.nn import functional as F

from longlive.precision.nvfp4.backends.base import Backend, describe_device, has_fp4_gemms
from longlive.precision.nvfp4.format import BLOCK, QuantisedTensor, quantise, swizzle
from longlive.precision.nvfp4.gemms import output_dtype
from longlive.precision.nvfp4.linear import NVFP4Linear
from longlive.precision.nvfp4.recipe import NVFP4Recipe
from longlive.typing import Float, Tensor

MODULE = "torchao.prototype.mx_formats.nvfp4_tensor"


def missing() -> str | None:
    """What this machine lacks for torchao's `NVFP4Tensor`; None: nothing."""
    try:
        module = importlib.import_module(MODULE)
    except Exception as error:  # a prototype: anything may be wrong with it
        return f"importing {MODULE} fails ({type(error).__name__}: {next(iter(str(error).splitlines()), '')})"
    wanted = ("NVFP4Tensor", "QuantizeTensorToNVFP4Kwargs")
    return next((f"{MODULE} has no {name}: update torchao" for name in wanted if not hasattr(module, name)), None)


class TorchAOBackend(Backend):
    """For weights that do not learn.

    Args:
        device: where layers run; by default the current CUDA device, or the CPU.

    Raises:
        RuntimeError: naming what is missing.
    """

    name = "torchao"
    trains = False

    def __init__(self, device: torch.device | str | None = None) -> None:
        lacks = missing()
        if lacks is not None:
            raise RuntimeError(f"torchao's NVFP4 cannot run here: {lacks}")
        self._module = importlib.import_module(MODULE)
        self._device = device

    def refusal(self, recipe: NVFP4Recipe) -> str | None:
        if recipe.weights is None:
            return "it does not compute weights=null; name a scale rule"
        if recipe.activations not in (None, "static_6"):
            return (
                f"it does not compute activations={recipe.activations}; it takes activations=null (weights only, "
                "anywhere) or activations=static_6 (compute capability 10.0)"
            )
        if recipe.activations is not None and not has_fp4_gemms(self._device):
            return f"activations=static_6 needs compute capability 10.0, not {describe_device(self._device)}; use null"
        return None

    def linear(self, layer: NVFP4Linear, x: Float[Tensor, "tokens features"]) -> Float[Tensor, "tokens out"]:
        dtype = output_dtype(x)
        weight = self._weight(layer, dtype)
        bias = layer._parameters["bias"]
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(dtype), weight, None if bias is None else bias.to(dtype))

    def _weight(self, layer: NVFP4Linear, dtype: torch.dtype) -> Any:
        """Of a packed layer it is kept; a master weight may change between calls."""
        if layer.codes is None:
            assert layer.recipe.weights is not None
            return self._wrap(
                quantise(layer.weight, layer.recipe.weights, tiles=layer.recipe.weight_tiles), layer.recipe, dtype
            )
        key = f"weight {dtype}"
        if key not in layer.backend_state:
            layer.backend_state[key] = self._wrap(layer.codes, layer.recipe, dtype)
        return layer.backend_state[key]

    def _wrap(self, codes: QuantisedTensor, recipe: NVFP4Recipe, dtype: torch.dtype) -> Any:
        scales, activations = codes.scales, None
        if recipe.activations is not None:
            rows, columns = codes.shape[0], codes.shape[1] // BLOCK
            scales = swizzle(scales).view(-(-rows // 128) * 32, -(-columns // 4) * 16)
            activations = self._module.QuantizeTensorToNVFP4Kwargs(
                is_swizzled_scales=True, use_triton_kernel=False, use_dynamic_per_tensor_scale=True
            )
        return self._module.NVFP4Tensor(
            codes.packed,
            scales,
            BLOCK,
            dtype,
            per_tensor_scale=codes.global_scale(),
            is_swizzled_scales=activations is not None,
            act_quant_kwargs=activations,
        )
