"""FP8 by torchao: what the wrapped layers compute, and what is refused. CPUs emulate it."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn

from longlive.precision import fp8
from longlive.precision.fp8 import FP8Precision


class Block(nn.Module):
    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"ffn": nn.Linear(32, width)})])


def fp8_linear(width: int = 48, **settings: object) -> tuple[nn.Linear, nn.Linear]:
    """A layer in FP8, and the same one without."""
    torch.manual_seed(0)
    block = Block(width)
    plain = copy.deepcopy(block)
    FP8Precision(layers=("blocks.*.ffn",), **{"backend": "emulated"} | settings).convert_module(block)
    return block.blocks[0]["ffn"], plain.blocks[0]["ffn"]


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    ours, theirs = ours.detach().float(), theirs.detach()
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("scaling", ["tensorwise", "rowwise"])
@pytest.mark.parametrize("tokens", [32, 21])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_and_gradients_are_those_of_the_layer_within_fp8s_error(scaling, tokens, dtype):
    """21 tokens are no multiple of 16, which the weight's gradient sums over. The errors are 0.036 and less: e4m3 has
    3 bits of mantissa, e5m2 of the gradients 2."""
    layer, plain = fp8_linear(scaling=scaling)
    x = torch.randn(2, tokens, 32, dtype=dtype, requires_grad=True)
    exact = x.detach().float().requires_grad_()
    upstream = torch.randn(2, tokens, 48)
    with FP8Precision().forward_context():
        y = layer(x)
    assert y.dtype == torch.bfloat16
    (y.float() * upstream).sum().backward()
    (plain(exact) * upstream).sum().backward()
    for ours, theirs, error in (
        (y, plain(exact), 0.045),
        (x.grad, exact.grad, 0.09),
        (layer.weight.grad, plain.weight.grad, 0.09),
        (layer.bias.grad, plain.bias.grad, 0.01),
    ):
        assert distance(ours, theirs) < error
    assert distance(y, plain(exact)) > 0.01, "a layer that was not replaced is nearer"
    assert layer.weight.grad.dtype == torch.float32


def test_a_size_that_is_no_multiple_of_16_is_named_and_nothing_else_is_left():
    with pytest.raises(
        ValueError, match=r"precision=fp8 would change no layer\. .*out_features=40 is no multiple of 16"
    ):
        fp8_linear(width=40)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scaling": "blockwise"}, "scaling='blockwise' is unknown; use tensorwise or rowwise"),
        ({"backend": "te"}, "backend='te' is unknown; use auto, torchao, emulated"),
    ],
)
def test_unknown_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        FP8Precision(**settings)


def test_a_backend_that_cannot_run_is_an_error_that_says_what_would_run(monkeypatch):
    monkeypatch.setattr(fp8.torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        ValueError, match=r"backend=torchao cannot run: .* no CUDA device; backend=auto would run emulated"
    ):
        FP8Precision(backend="torchao")


@pytest.mark.parametrize(("capability", "backend"), [((8, 0), "emulated"), ((8, 9), "torchao"), ((9, 0), "torchao")])
def test_matrix_units_are_used_where_they_are(monkeypatch, capability, backend):
    monkeypatch.setattr(fp8.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(fp8.torch.cuda, "get_device_capability", lambda: capability)
    assert FP8Precision().backend_name == backend
    assert FP8Precision(backend="emulated").backend_name == "emulated"


def test_emulation_is_said(monkeypatch, caplog):
    monkeypatch.setattr(fp8.torch.cuda, "is_available", lambda: False)
    with caplog.at_level(logging.INFO, logger="longlive.precision.fp8"):
        FP8Precision()
    assert "FP8 is emulated" in caplog.text
