"""The door to Transformer Engine: what is missing, what it computes, how a layer's weight gets in. Its own kernels need
Blackwell; a stand-in with its interface shows what it is called with."""

import sys
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import nn

from longlive.precision.nvfp4.backends import base, transformer_engine
from longlive.precision.nvfp4.backends.transformer_engine import (
    TransformerEngineBackend,
    block_scaling_settings,
    refusal,
)
from longlive.precision.nvfp4.linear import NVFP4Linear
from longlive.precision.nvfp4.recipe import NVFP4Recipe

STATIC = NVFP4Recipe(weights="static_6", activations="static_6", mean_tokens=None)


class StandIn:
    """Modules with the names of Transformer Engine's, which record how they are used."""

    def __init__(self, available=True):
        self.calls, self.frozen_inits = [], []
        engine = self

        class Linear(nn.Linear):
            def __init__(self, in_features, out_features, *, bias, params_dtype, device):
                super().__init__(in_features, out_features, bias, device, params_dtype)

            def forward(self, x):
                assert torch.get_autocast_dtype("cpu") == torch.bfloat16
                engine.calls.append((x.shape, x.dtype, self.weight))
                return super().forward(x)

        @contextmanager
        def context(log, enabled, recipe):
            log.append((enabled, recipe))
            yield

        self.autocasts = []
        self.pytorch = ModuleType("transformer_engine.pytorch")
        self.pytorch.Linear = Linear
        self.pytorch.autocast = lambda enabled, recipe: context(self.autocasts, enabled, recipe)
        self.pytorch.quantized_model_init = lambda enabled, recipe: context(self.frozen_inits, enabled, recipe)
        self.pytorch.is_nvfp4_available = lambda return_reason: (available, "" if available else "cuBLAS is too old")
        self.recipe = ModuleType("transformer_engine.common.recipe")
        self.recipe.NVFP4BlockScaling = lambda **settings: settings

    def install(self, monkeypatch):
        package, common = ModuleType("transformer_engine"), ModuleType("transformer_engine.common")
        modules = {"": package, ".common": common, ".common.recipe": self.recipe, ".pytorch": self.pytorch}
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, f"transformer_engine{name}", module)
        pretend_blackwell(monkeypatch)
        return self


def pretend_blackwell(monkeypatch, capability=(10, 0)):
    monkeypatch.setattr(base.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(base.torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(base.torch.cuda, "get_device_name", lambda device=None: "GPU")


def layer_of(backend, **options):
    return NVFP4Linear.from_linear(nn.Linear(64, 96, **options), STATIC, backend)


def test_everything_that_is_missing_is_named_at_once(monkeypatch):
    monkeypatch.setattr(base.torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", None)
    with pytest.raises(
        RuntimeError, match=r"cannot run here: there is no CUDA device; importing transformer_engine fails"
    ):
        TransformerEngineBackend()


def test_an_import_that_raises_something_else_is_a_reason_too(monkeypatch):
    """Without CUDA libraries Transformer Engine raises RuntimeError, which `except ImportError` lets through."""

    def broken(name):
        raise RuntimeError("Could not find shared object file for Transformer Engine torch lib.\nmore lines")

    pretend_blackwell(monkeypatch)
    monkeypatch.setattr(transformer_engine.importlib, "import_module", broken)
    assert transformer_engine.missing() == (
        "importing transformer_engine fails (RuntimeError: Could not find shared object file for Transformer Engine "
        "torch lib.)"
    )


def test_an_old_version_or_an_old_device_is_named(monkeypatch):
    engine = StandIn(available=False).install(monkeypatch)
    assert transformer_engine.missing() == "transformer_engine says: cuBLAS is too old"
    del engine.recipe.NVFP4BlockScaling
    assert transformer_engine.missing() == "transformer_engine has no NVFP4BlockScaling: update it"
    StandIn().install(monkeypatch)
    pretend_blackwell(monkeypatch, (9, 0))
    assert "GPU (compute capability 9.0) has no FP4 GEMMs" in transformer_engine.missing()


@pytest.mark.parametrize(
    ("recipe", "named"),
    [
        (NVFP4Recipe(), "weights=mse, activations=mse"),
        (replace(STATIC, weights=None), "weights=null"),
        (replace(STATIC, gradients="static_4"), "gradients=static_4"),
        (replace(STATIC, reduce_amax=True), "reduce_amax=true"),
        (replace(STATIC, weight_tiles=False), "weight_tiles=false"),
    ],
)
def test_settings_that_it_does_not_have_are_refused_by_name(recipe, named):
    """Computing static_6 where mse was asked for would be a silent swap."""
    assert refusal(recipe).startswith(f"it does not compute {named}; it takes weights=static_6 weight_tiles=true")


def test_the_recipe_is_passed_on_in_full():
    assert refusal(STATIC) is None
    assert block_scaling_settings(replace(STATIC, hadamard=False)) == {
        "disable_rht": True,
        "disable_stochastic_rounding": False,
        "disable_2d_quantization": False,
    }


def test_a_layer_lends_its_weight_at_every_call_and_stays_what_it_was(monkeypatch):
    """Sharding puts another Parameter in place at every call; a twin with its own would train a copy."""
    engine = StandIn().install(monkeypatch)
    layer = layer_of(TransformerEngineBackend())
    x = torch.randn(5, 64)
    y = layer(x)
    assert engine.calls[0][:2] == ((32, 64), torch.bfloat16)
    assert engine.autocasts == [(True, block_scaling_settings(STATIC))]
    assert (y.shape, y.dtype) == ((5, 96), torch.float32)
    exact = nn.functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(y, exact, rtol=0.05, atol=0.05)
    layer.clock.over = True
    assert torch.equal(layer(x), exact), "the last steps are in high precision"
    assert len(engine.calls) == 1
    layer.clock.over = False
    y.sum().backward()
    assert layer.weight.grad is not None
    layer.weight = nn.Parameter(layer.weight.detach().clone())
    layer(x)
    assert engine.calls[1][2] is layer.weight
    assert engine.autocasts[0][1] is engine.autocasts[1][1], "another object has everything set up anew"
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert dict(layer.named_modules()) == {"": layer}
    assert not engine.frozen_inits


def test_a_packed_layer_has_a_resident_weight(monkeypatch):
    engine = StandIn().install(monkeypatch)
    layer = layer_of(TransformerEngineBackend(), bias=False).requires_grad_(False)
    layer.materialize()
    for _ in range(2):
        y = layer(torch.ones(32, 64))
    assert engine.frozen_inits == [(True, block_scaling_settings(STATIC))]
    resident = engine.calls[0][2]
    assert torch.equal(resident, layer.codes.dequantise())
    assert engine.calls[1][2] is resident
    torch.testing.assert_close(y, torch.ones(32, 64) @ resident.t(), rtol=0.05, atol=0.05)
    assert layer.weight is None
