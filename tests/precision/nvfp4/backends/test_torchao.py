"""Weights stored as torchao's NVFP4Tensor, made from our codes."""

import re
import sys

import pytest
import torch
from torch import nn
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor
from torchao.prototype.mx_formats.utils import to_blocked

from longlive.precision.nvfp4.backends import base, torchao
from longlive.precision.nvfp4.backends.emulated import EmulatedBackend
from longlive.precision.nvfp4.backends.torchao import MODULE, TorchAOBackend
from longlive.precision.nvfp4.linear import NVFP4Linear
from longlive.precision.nvfp4.recipe import NVFP4Recipe

WEIGHTS_ONLY = NVFP4Recipe(activations=None)


def layer_of(backend, recipe=WEIGHTS_ONLY, **options):
    torch.manual_seed(0)
    linear = nn.Linear(96, 160, **options).requires_grad_(False)
    linear.weight *= torch.logspace(0, -2, 160)[:, None]  # so that scales differ
    return NVFP4Linear.from_linear(linear, recipe, backend)


@pytest.mark.parametrize("rule", ["static_6", "static_4", "mse"])
@pytest.mark.parametrize("packed", [False, True])
def test_stored_weights_compute_what_the_emulation_does(rule, packed):
    """torchao has no scale rules: a global scale of the wrong rule is off by 448 / 256, or 6 / 4."""
    recipe, x = NVFP4Recipe(rule, activations=None), torch.randn(3, 5, 96)
    ours, theirs = layer_of(TorchAOBackend(), recipe), layer_of(EmulatedBackend(), recipe)
    if packed:
        ours.materialize()
        theirs.materialize()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x).dtype == torch.bfloat16
        torch.testing.assert_close(ours(x).float(), theirs(x).float(), rtol=0.02, atol=0.02)


def test_inputs_get_gradients_through_a_packed_weight():
    """LoRA below this layer trains through it."""
    x = torch.randn(5, 96, requires_grad=True)
    layer = layer_of(TorchAOBackend(), bias=False)
    layer.materialize()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.codes.dequantise().sum(0).expand(5, -1))


def test_a_packed_weight_is_wrapped_once_and_a_master_read_anew():
    layer = layer_of(TorchAOBackend())
    x, dtype = torch.randn(5, 96), torch.float32
    before = layer(x)
    layer.weight.mul_(2)
    torch.testing.assert_close(layer(x) - layer.bias, 2 * (before - layer.bias))
    layer.materialize()
    layer(x)
    wrapped = layer.backend_state[f"weight {dtype}"]
    assert isinstance(wrapped, NVFP4Tensor)
    assert wrapped.qdata is layer.weight_packed
    layer(x)
    assert layer.backend_state[f"weight {dtype}"] is wrapped
    assert list(layer.state_dict()) == ["bias", "weight_packed", "weight_scale", "weight_amax"]


def test_for_fp4_gemms_scales_are_in_the_gemm_s_order():
    """The order is only seen by a GPU: to_blocked is torchao's own."""
    recipe = NVFP4Recipe(activations="static_6")
    backend = TorchAOBackend()
    codes = layer_of(EmulatedBackend(), recipe)
    codes.materialize()
    wrapped = backend._wrap(codes.codes, recipe, torch.bfloat16)
    assert wrapped.is_swizzled_scales
    assert wrapped.act_quant_kwargs.use_dynamic_per_tensor_scale
    reference = to_blocked(codes.codes.scales)
    assert torch.equal(wrapped.scale.flatten().view(torch.uint8), reference.view(torch.uint8).flatten())
    torch.testing.assert_close(wrapped.dequantize(torch.float32), codes.codes.dequantise(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        (NVFP4Recipe(weights=None, activations=None), "it does not compute weights=null; name a scale rule"),
        (NVFP4Recipe(), "it does not compute activations=mse; it takes activations=null .* or activations=static_6 .*"),
        (NVFP4Recipe(activations="static_6"), "activations=static_6 needs compute capability 10.0, not cpu; use null"),
    ],
)
def test_what_it_does_not_compute_is_refused_by_name(monkeypatch, recipe, reason):
    monkeypatch.setattr(base.torch.cuda, "is_available", lambda: False)
    refused = TorchAOBackend().refusal(recipe)
    assert refused is not None
    assert re.fullmatch(reason, refused)


def test_weights_alone_are_stored_anywhere():
    assert TorchAOBackend().refusal(WEIGHTS_ONLY) is None
    assert not TorchAOBackend.trains


def test_a_torchao_without_the_prototype_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, MODULE, None)
    assert torchao.missing().startswith(f"importing {MODULE} fails (ModuleNotFoundError")
    with pytest.raises(RuntimeError, match="torchao's NVFP4 cannot run here: importing"):
        TorchAOBackend()
