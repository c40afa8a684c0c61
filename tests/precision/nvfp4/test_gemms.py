"""FPROP, DGRAD and WGRAD against their formulas in float64, operand by operand."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from longlive.precision.nvfp4 import gemms
from longlive.precision.nvfp4.backends.emulated import EmulatedBackend
from longlive.precision.nvfp4.format import quantise
from longlive.precision.nvfp4.gemms import LinearPlan, quantised_linear
from longlive.precision.nvfp4.hadamard import hadamard, rotation_matrix
from longlive.precision.nvfp4.recipe import NVFP4Recipe, StepClock

HIGH = NVFP4Recipe(None, None, None)


def gaussian(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plan_of(recipe, **clock):
    return LinearPlan(recipe, StepClock(**clock), "layer", EmulatedBackend.matmul)


def tensors(num_tokens, features, out, dtype=torch.float32):
    x = gaussian(num_tokens, features, seed=1).to(dtype).requires_grad_()
    w, b = gaussian(out, features, seed=2).requires_grad_(), gaussian(out, seed=3).requires_grad_()
    return x, w, b, gaussian(num_tokens, out, seed=4).to(dtype)


def gradients(x, w, b, dy, plan):
    y = quantised_linear(x, w, b, plan)
    return (y.detach(), *torch.autograd.grad(y, (x, w, b), dy))


def exact(x, rule, **options):
    """In float64 what the codes of x stand for; without a rule, x."""
    return x.detach().double() if rule is None else quantise(x, rule, **options).dequantise().double()


def relative(actual, expected):
    return float((actual.double() - expected).norm() / expected.norm())


def along_tokens(x, rule, recipe):
    """RHT(x^T), 64 tokens long; in float64 if x stays in high precision."""
    columns = torch.nn.functional.pad(x.detach(), (0, 0, 0, 64 - len(x))).t()
    if not recipe.hadamard:
        return exact(columns, rule)
    if rule is None:
        return (columns.double().unflatten(-1, (-1, 16)) @ rotation_matrix().double()).flatten(-2)
    return exact(hadamard(columns), rule)


@pytest.mark.parametrize(("hadamard_on", "weight_tiles"), [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("rules", list(product([None, "static_6"], [None, "mse"], [None, "static_4"])))
def test_every_gemm_is_its_formula_whichever_operands_are_quantised(rules, hadamard_on, weight_tiles):
    """An operand that is quantised twice, from the wrong copy, along the wrong dim, or transformed alone."""
    recipe = NVFP4Recipe(*rules, weight_tiles, stochastic_gradients=False, hadamard=hadamard_on)
    x, w, b, dy = tensors(50, 64, 96)
    y, dx, dw, db = gradients(x, w, b, dy, plan_of(recipe))
    w64 = exact(w, recipe.weights, tiles=weight_tiles) if recipe.weights else w.detach().double()
    assert relative(y, exact(x, recipe.activations) @ w64.t() + b.detach()) < 1e-6
    assert relative(dx, exact(dy, recipe.gradients) @ w64) < 1e-6
    expected = along_tokens(dy, recipe.gradients, recipe) @ along_tokens(x, recipe.activations, recipe).t()
    assert relative(dw, expected) < 1e-6
    assert relative(db, dy.double().sum(0)) < 1e-6


def test_without_quantisation_it_is_a_linear_layer():
    x, w, b, dy = tensors(50, 64, 96)
    expected = torch.nn.functional.linear(x.double(), w.double(), b.double())
    reference = (expected.detach(), *torch.autograd.grad(expected, (x, w, b), dy.double()))
    for actual, wanted in zip(gradients(x, w, b, dy, plan_of(HIGH)), reference, strict=True):
        assert relative(actual, wanted.double()) < 1e-6


@pytest.mark.parametrize(("weights", "activations", "band"), [("static_6", "mse", 0.1415), (None, "mse", 0.00756**0.5)])
def test_the_error_of_fprop_is_the_format_s(weights, activations, band):
    x, w, b, dy = tensors(256, 512, 256)
    y = gradients(x, w, b, dy, plan_of(NVFP4Recipe(weights, activations)))[0]
    assert relative(y - b.detach(), x.detach().double() @ w.detach().double().t()) == pytest.approx(band, rel=0.05)


def test_the_errors_of_the_gradients_are_the_format_s():
    """Each operand adds its own relative squared error: stochastic dY .0188, W in tiles .0124, X by mse .00756."""
    x, w, b, dy = tensors(512, 256, 512)
    _, dx, dw, db = gradients(x, w, b, dy, plan_of(NVFP4Recipe(weights="static_6")))
    assert relative(dx, dy.double() @ w.detach().double()) == pytest.approx((0.0188 + 0.0124) ** 0.5, rel=0.05)
    assert relative(dw, dy.double().t() @ x.detach().double()) == pytest.approx((0.0188 + 0.00756) ** 0.5, rel=0.05)
    assert relative(db, dy.double().sum(0)) < 1e-6


def clamped(x):
    """What stochastic rounding is right about on average: x, cut off at 6 s g, the block's largest number."""
    codes = quantise(x, "static_6")
    largest = 6 * codes.scales.double().repeat_interleave(16, dim=-1) * codes.global_scale().double()
    return x.double().clamp(-largest, largest)


@pytest.mark.parametrize("gemm", ["dgrad", "wgrad"])
def test_stochastic_gradients_are_right_on_average(gemm):
    """256 draws: rounding to nearest, or bits that several elements share, leave a mean that is off. 32 draws at once
    are copies of the tokens (every row of dX is a draw) or of the outputs (every row of dW is one)."""
    x, w, _, dy = tensors(32, 32, 64)
    copies = {"dgrad": (32, 1), "wgrad": (1, 32)}[gemm]
    inputs = x.detach().repeat(copies[0], 1).requires_grad_(), w.detach().repeat(copies[1], 1).requires_grad_()
    y = quantised_linear(*inputs, None, plan_of(NVFP4Recipe()))
    with_respect_to, many = inputs[gemm == "wgrad"], dy.repeat(copies)
    draws = [
        torch.autograd.grad(y, with_respect_to, many, retain_graph=True)[0].unflatten(0, (32, -1)) for _ in range(8)
    ]
    if gemm == "dgrad":
        mean = clamped(dy) @ exact(w, "mse", tiles=True)
    else:
        mean = clamped(hadamard(dy.t())) @ exact(hadamard(x.detach().t()), "mse").t()
    sample = torch.cat(draws).double()
    z = (sample.mean(0) - mean) / (sample.std(0) / 16)
    assert len(sample) == 256
    assert z.abs().max() < 5
    assert abs(z.mean()) < 5 / z.numel() ** 0.5
    assert 0.8 < z.square().mean() < 1.25


def saved_tensors(x, w, b, plan):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        quantised_linear(x, w, b, plan)
    return saved


def num_bytes(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_an_input_only_fp4_codes_are_kept_for_backward(dtype):
    """Anything else (X itself, its row copy, bfloat16 values) is 2 bytes per element and more."""
    x, w, b, _ = tensors(1024, 256, 64, dtype)
    assert num_bytes(saved_tensors(x.detach(), w, b, plan_of(NVFP4Recipe()))) <= 0.57 * x.numel()


def test_of_a_weight_only_fp4_codes_are_kept_for_backward():
    """A gathered weight that is kept as it is cannot be dropped by the strategy that gathered it."""
    x, w, b, _ = tensors(32, 256, 512)
    saved = saved_tensors(x, w.detach(), b, plan_of(NVFP4Recipe()))
    assert num_bytes(saved) <= 0.57 * w.numel()
    saved = saved_tensors(x, w, b, plan_of(NVFP4Recipe()))
    assert not [tensor for tensor in saved if tensor.dtype in (torch.float32, torch.bfloat16) and tensor.numel() > 1]


def test_a_frozen_layer_keeps_nothing_of_its_input():
    x, w, b, dy = tensors(1024, 64, 32)
    plan = plan_of(NVFP4Recipe())
    assert num_bytes(saved_tensors(x, w.detach(), b.detach(), plan)) <= 0.57 * w.numel()
    assert not saved_tensors(x.detach(), w.detach(), b, plan)
    y = quantised_linear(x, w.detach(), b.detach(), plan)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert relative(dx, dy.double() @ w.detach().double()) < 0.2


def test_without_gradients_an_input_is_quantised_once(monkeypatch):
    """A rollout that prepares for a backward that never comes quantises everything twice."""
    shapes = []
    monkeypatch.setattr(
        gemms, "quantise", lambda x, *args, **options: shapes.append(x.shape) or quantise(x, *args, **options)
    )
    x, w, b, _ = tensors(64, 32, 96)
    with torch.no_grad():
        quantised_linear(x, w, b, plan_of(NVFP4Recipe()))
    assert sorted(shapes) == [(64, 32), (96, 32)]


def test_padding_tokens_are_no_tokens():
    """Rows of zeros change no amax, no output and no gradient."""
    x, w, b, dy = tensors(64, 32, 32)
    with torch.no_grad():
        x[41:], dy[41:] = 0, 0
    recipe = replace(NVFP4Recipe(), stochastic_gradients=False)
    whole = gradients(x, w, b, dy, plan_of(recipe))
    part = gradients(x.detach()[:41].requires_grad_(), w, b, dy[:41], plan_of(recipe))
    assert part[0].shape == (41, 32)
    assert torch.equal(part[0], whole[0][:41])
    assert torch.equal(part[1], whole[1][:41])
    assert torch.equal(part[2], whole[2])


def test_no_tokens_are_an_answer_too():
    x, w, b, dy = tensors(0, 32, 64)
    y, dx, dw, db = gradients(x, w, b, dy, plan_of(NVFP4Recipe()))
    assert (y.shape, dx.shape) == ((0, 64), (0, 32))
    assert not dw.any()
    assert not db.any()


def test_tokens_split_over_ranks_give_what_one_process_gives():
    """With amax over the ranks and every token's own bits, two halves are the whole."""
    recipe = NVFP4Recipe(reduce_amax=True)
    x, w, b, dy = tensors(128, 64, 32)
    with torch.no_grad():
        x[3] *= 5  # so that the halves differ in their largest elements
        dy[90] *= 5
    whole = gradients(x, w, b, dy, plan_of(recipe))

    order = torch.tensor([*range(16), *range(112, 128), *range(48, 80), *range(16, 48), *range(80, 112)])
    halves = order[:64], order[64:]

    def gradients_of(half, reduce):
        plan = plan_of(recipe, reduce=reduce)
        plan.clock.place_tokens(half)
        return gradients(x.detach()[half].requires_grad_(), w, b, dy[half], plan)

    asked = []  # forward and backward of the first half, then of the second
    alone = [gradients_of(half, lambda amax: asked.append(amax) or amax) for half in halves]
    agreed = [torch.maximum(first, second) for first, second in zip(asked[:2], asked[2:], strict=True)]
    together = []
    for half in halves:
        answers = iter(agreed)
        together.append(gradients_of(half, lambda amax, answers=answers: next(answers)))
    for half, (y, dx, _, _) in zip(halves, together, strict=True):
        assert relative(y, whole[0][half].double()) < 1e-6
        assert relative(dx, whole[1][half].double()) < 1e-6
    assert relative(together[0][2] + together[1][2], whole[2].double()) < 1e-5
    assert relative(alone[1][0], whole[0][halves[1]].double()) > 1e-3, "each by its own amax is something else"
