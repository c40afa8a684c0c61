"""The layer in its surroundings: Parameters, autocast, checkpointing, sharding, LoRA, packed weights."""

import copy
from functools import partial

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from helpers.distributed import run_on_ranks
from longlive.precision.nvfp4.backends.emulated import EmulatedBackend
from longlive.precision.nvfp4.format import quantise
from longlive.precision.nvfp4.linear import NVFP4Linear, reason_against
from longlive.precision.nvfp4.recipe import NVFP4Recipe, StepClock, largest_over

PACKED = ["weight_packed", "weight_scale", "weight_amax"]


def linear(features=64, out=96, seed=0, **options):
    layer = nn.Linear(features, out, **options)
    numbers = torch.Generator().manual_seed(seed)
    for parameter in layer.parameters():
        parameter.data.normal_(generator=numbers)
    return layer


WHOLE = NVFP4Recipe(mean_tokens=None)
"""Tokens have nothing to do with each other."""


def nvfp4(layer, recipe=None, name="layer", clock=None):
    return NVFP4Linear.from_linear(layer, recipe or NVFP4Recipe(), EmulatedBackend(), name, clock)


def gaussian(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def block(clock=None, recipe=None):
    """Two layers with something between them."""
    clock = clock or StepClock()
    first, second = linear(64, 96, seed=0), linear(96, 64, seed=1)
    return nn.Sequential(nvfp4(first, recipe, "first", clock), nn.GELU(), nvfp4(second, recipe, "second", clock))


def gradients(network, x, dy, call=None):
    network.zero_grad()
    output = (call or network)(x)
    output.backward(dy.to(output.dtype))
    return [parameter.grad.clone() for parameter in network.parameters()]


def assert_same(actual, expected):
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_it_keeps_the_parameters_of_the_layer_it_replaces():
    """An optimizer or an average that holds the old Parameters would train nothing."""
    layer = linear().eval()
    replaced = nvfp4(layer)
    assert replaced.weight is layer.weight
    assert replaced.bias is layer.bias
    assert list(replaced.state_dict()) == ["weight", "bias"]
    assert isinstance(replaced, nn.Linear)
    assert not replaced.training
    assert nvfp4(linear(bias=False)).bias is None


class Special(nn.Linear):
    """Has another forward than nn.Linear, maybe."""


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (linear(48, 64), "in_features=48 is no multiple of 32"),
        (linear(64, 80), "out_features=80 is no multiple of 32"),
        (linear(dtype=torch.float64), "weight is torch.float64, not float32 or bfloat16"),
        (Special(64, 64), "is Special, not nn.Linear"),
        (nvfp4(linear()), "is NVFP4 already"),
    ],
)
def test_a_layer_that_does_not_fit_is_refused_with_the_reason(layer, reason):
    assert reason_against(layer) == reason
    with pytest.raises(ValueError, match=f"layer {reason}"):
        nvfp4(layer)


def test_a_layer_can_be_replaced_on_meta_and_filled_later():
    with torch.device("meta"):
        layer = nvfp4(nn.Linear(64, 32))
    layer.to_empty(device="cpu")
    layer.load_state_dict(linear(64, 32).state_dict())
    x = gaussian(5, 64)
    assert torch.equal(layer(x), nvfp4(linear(64, 32))(x))


def test_any_dims_before_the_features_are_tokens():
    layer, x = nvfp4(linear(), WHOLE), gaussian(2, 3, 7, 64)
    assert torch.equal(layer(x), layer(x.flatten(0, 2)).view(2, 3, 7, 96))
    assert layer(x[0, 0, 0]).shape == (96,)
    assert layer(x.transpose(1, 2)).shape == (2, 7, 3, 96)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_gives_the_output_its_dtype_and_every_gradient_its_tensor_s(dtype):
    """Inside, autocast would round fp32 sums to bfloat16 between the GEMM and the bias."""
    layer = nvfp4(linear(), WHOLE)
    x = gaussian(40, 64).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert layer(x).dtype == dtype
    assert torch.equal(y, layer(x.float()).to(torch.bfloat16))
    y.sum().backward()
    assert (x.grad.dtype, layer.weight.grad.dtype, layer.bias.grad.dtype) == (dtype, torch.float32, torch.float32)


def test_a_backward_inside_autocast_computes_the_same():
    """Recomputed activations run it there: its GEMMs would be rounded to bfloat16."""
    layer, x = nvfp4(linear(), NVFP4Recipe(stochastic_gradients=False)), gaussian(40, 64).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        inside = torch.autograd.grad(y.sum(), (x, layer.weight, layer.bias), retain_graph=True)
    assert_same(inside, torch.autograd.grad(y.sum(), (x, layer.weight, layer.bias)))


def test_recomputed_activations_give_the_same_gradients():
    x, dy = gaussian(48, 64).requires_grad_(), gaussian(48, 64, seed=2)
    plain, recomputed = block(), block()
    expected = gradients(plain, x, dy)
    assert_same(gradients(recomputed, x, dy, lambda x: checkpoint(recomputed, x, use_reentrant=False)), expected)
    with torch.autocast("cpu", torch.bfloat16):
        expected = gradients(plain, x, dy)
        actual = gradients(recomputed, x, dy, lambda x: checkpoint(recomputed, x, use_reentrant=False))
    assert_same(actual, expected)


def test_gradients_accumulate_and_a_resumed_step_repeats_them():
    clock = StepClock(seed=1)
    network = block(clock)
    x, dy = gaussian(48, 64), gaussian(48, 64, seed=2)
    clock.advance(1)
    one, two = gradients(network, x, dy), gradients(network, x, dy)
    assert not torch.equal(one[0], two[0]), "microbatches draw bits of their own"
    clock.advance(2)
    clock.advance(1)
    network.zero_grad()
    for _ in range(2):
        network(x).backward(dy)
    for parameter, first, second in zip(network.parameters(), one, two, strict=True):
        assert torch.equal(parameter.grad, first + second)


def test_a_compiled_block_computes_the_same():
    """Compiled division is approximate: codes would differ."""
    x, dy, compiled = gaussian(48, 64), gaussian(48, 64, seed=2), block()
    expected = gradients(block(), x, dy)
    actual = gradients(compiled, x, dy, torch.compile(compiled, backend="aot_eager"))
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_copy_draws_by_the_same_clock_with_weights_of_its_own():
    layer = nvfp4(linear())
    copied = copy.deepcopy(layer)
    assert copied.clock is layer.clock
    assert copied.backend is layer.backend
    assert copied.weight is not layer.weight


def test_lora_wraps_it_and_trains_its_matrices_alone():
    network = nn.Sequential()
    network.add_module("q", nvfp4(linear()))
    adapted = peft.get_peft_model(network, peft.LoraConfig(r=4, target_modules=["q"], init_lora_weights=False))
    base = adapted.base_model.model.q.base_layer
    assert isinstance(base, NVFP4Linear)
    saved, x = [], gaussian(1024, 64)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        before = adapted(x)
    assert all(tensor.dtype != torch.uint8 for tensor in saved), "a frozen layer keeps no codes of its input"
    before.square().sum().backward()
    trained = {name for name, parameter in adapted.named_parameters() if parameter.grad is not None}
    assert trained
    assert all("lora_" in name for name in trained)
    base.materialize()
    assert torch.equal(adapted(x), before)
    assert base.weight is None


def averaged(x, tokens=16):
    """Every token by the mean of its group; the last group of each sample may be shorter."""
    groups = [group.mean(-2, keepdim=True).expand_as(group) for group in x.split(tokens, dim=-2)]
    return torch.cat(groups, dim=-2)


@pytest.mark.parametrize("num_tokens", [40, 48])
@pytest.mark.parametrize("packed", [False, True])
def test_means_of_tokens_are_multiplied_in_high_precision(packed, num_tokens):
    """Against float64: a mean over padding or over two samples, a bias added twice, a gradient that skips the mean."""
    recipe = NVFP4Recipe(gradients=None, hadamard=False, mean_tokens=16)
    layer = nvfp4(linear(64, 96), recipe)
    weight = layer.weight.detach().double()
    codes = quantise(layer.weight, "mse", tiles=True).dequantise().double()
    if packed:
        layer.requires_grad_(False).materialize()
    x = (gaussian(2, num_tokens, 64) + 3 * gaussian(64, seed=5)).requires_grad_()
    dy = gaussian(2, num_tokens, 96, seed=2)
    y = layer(x)
    y.backward(dy)
    means, exact = averaged(x.detach().double()), codes if packed else weight
    rest = quantise((x.detach() - means.float()).flatten(0, 1), "mse").dequantise().double().view(2, num_tokens, 64)
    expected = rest @ codes.t() + means @ exact.t() + layer.bias
    torch.testing.assert_close(y.detach().double(), expected, rtol=0, atol=2e-4)
    dx = dy.double() @ codes
    expected = dx - averaged(dx) + averaged(dy.double()) @ exact
    torch.testing.assert_close(x.grad.double(), expected, rtol=0, atol=2e-4)
    if not packed:
        columns = quantise((x.detach() - means.float()).flatten(0, 1).t(), "mse").dequantise().double().t()
        dw = dy.flatten(0, 1).double().t() @ (columns + means.flatten(0, 1))
        torch.testing.assert_close(layer.weight.grad.double(), dw, rtol=0, atol=2e-3)
    assert layer(x[0, 0]).shape == (96,)
    assert layer(x[:, :0]).shape == (2, 0, 96)


def test_what_tokens_have_in_common_does_not_widen_their_scales():
    """The reason for means: of inputs far from zero, what tells tokens apart is rounded as coarsely as their mean."""
    x, layer = gaussian(4, 64, 256) + 4 * gaussian(256, seed=5), linear(256, 128).requires_grad_(False)
    recipes = [NVFP4Recipe(weights=None, mean_tokens=tokens) for tokens in (None, 64)]
    whole, split = (float((nvfp4(layer, recipe)(x) - layer(x)).norm()) for recipe in recipes)
    assert split < 0.3 * whole


def test_of_a_frame_s_mean_little_is_kept_for_backward():
    """0.5625 bytes per element of X, and the means of 880 tokens in bfloat16; of the weight the parameter and codes."""
    layer, saved = nvfp4(linear(256, 32), NVFP4Recipe(mean_tokens=880)), []
    x = gaussian(1, 4 * 880, 256).bfloat16()
    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        layer(x)
    assert not [tensor for tensor in saved if tensor.dtype == torch.bfloat16 and tensor.shape == layer.weight.shape]
    of_weight = {layer.weight.numel() // part for part in (1, 2, 16)}  # the parameter, or its codes and their scales
    kept = [tensor for tensor in saved if tensor.numel() not in of_weight]
    assert any(tensor.numel() == 4 * 256 for tensor in kept), "the means, for the weight's gradient"
    assert sum(tensor.nbytes for tensor in kept) <= 0.57 * x.numel()


@pytest.mark.parametrize("packed", [False, True])
def test_at_the_end_of_training_forward_is_exact_and_the_rest_stays(packed):
    """Layers that kept X itself for backward, as in bfloat16, would run out of memory after 80 % of a run."""
    layer = nvfp4(linear(256, 64), WHOLE)
    if packed:
        layer.requires_grad_(False).materialize()
    x, dy, weight = gaussian(1024, 256).requires_grad_(), gaussian(1024, 64, seed=2), layer.weight
    layer(x).backward(dy)
    expected, x.grad = [x.grad, *(parameter.grad for parameter in layer.parameters())], None
    layer.zero_grad()
    layer.clock.advance(1)
    layer.clock.advance(0)
    layer.clock.over, saved = True, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(x)
    assert torch.equal(y, nn.functional.linear(x, layer.codes.dequantise() if packed else weight, layer.bias))
    assert sum(tensor.nbytes for tensor in saved) <= 0.5626 * (x.numel() + 64 * 256)
    y.backward(dy)
    for ours, theirs in zip([x.grad, *(parameter.grad for parameter in layer.parameters())], expected, strict=True):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)


@pytest.mark.parametrize("tiles", [True, False])
def test_a_packed_layer_is_the_frozen_one_at_a_quarter_of_the_bytes(tiles):
    layer = nvfp4(linear(256, 512).requires_grad_(False), NVFP4Recipe(weight_tiles=tiles))
    x = gaussian(40, 256).requires_grad_()
    before = layer(x)
    (expected,) = torch.autograd.grad(before.sum(), x)
    weight = layer.weight
    layer.materialize()
    layer.materialize()
    assert torch.equal(layer(x), before)
    layer.clock.advance(1)
    layer.clock.advance(0)
    assert torch.equal(torch.autograd.grad(layer(x).sum(), x)[0], expected)
    assert list(layer.state_dict()) == ["bias", *PACKED]
    held = sum(tensor.nbytes for name, tensor in layer.state_dict().items() if name in PACKED)
    assert 0.5625 * weight.numel() <= held <= 0.5626 * weight.numel()
    assert torch.equal(layer.codes.dequantise(), quantise(weight, "mse", tiles=tiles).dequantise())


@pytest.mark.parametrize("tiles", [True, False])
def test_packed_layers_load_where_masters_were(tmp_path, tiles):
    """The rule travels with the codes: another one would scale every weight by 256 / 448. Scales of rows that are taken
    for those of tiles give another gradient of the input."""
    recipe = NVFP4Recipe(weights="static_6", weight_tiles=tiles)
    stored = nvfp4(linear().requires_grad_(False), recipe)
    stored.materialize()
    x = gaussian(40, 64)
    fresh = nvfp4(linear(seed=9).requires_grad_(False))
    fresh.load_state_dict(stored.state_dict())
    assert torch.equal(fresh(x), stored(x))
    assert (fresh.rule, fresh.tiles, fresh.packing) == ("static_6", tiles, "static_6" if tiles else "static_6_1x16")

    save_file(stored.state_dict(), tmp_path / "layer.safetensors")
    for layer in (nvfp4(linear(seed=9).requires_grad_(False), recipe), stored):
        layer.load_state_dict(load_file(tmp_path / "layer.safetensors"))
        assert torch.equal(layer(x), fresh(x))
        assert layer.tiles == tiles


def test_what_transformer_engine_adds_to_a_state_is_no_obstacle():
    layer, state = nvfp4(linear()), linear(seed=3).state_dict()
    layer.load_state_dict({**state, "_extra_state": torch.zeros(7, dtype=torch.uint8)})
    assert torch.equal(layer.weight, state["weight"])


def test_packed_weights_are_not_loaded_into_a_layer_that_trains():
    stored = nvfp4(linear().requires_grad_(False))
    stored.materialize()
    with pytest.raises(RuntimeError, match="weight_packed has no master weight to train; freeze the layer first"):
        nvfp4(linear()).load_state_dict(stored.state_dict())
    state = stored.state_dict()
    state._metadata[""]["nvfp4_rule"] = "int4"
    with pytest.raises(RuntimeError, match="weight_packed has the scale rule 'int4'; known are static_6"):
        nvfp4(linear().requires_grad_(False)).load_state_dict(state)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nvfp4(linear()), "it learns from its master copy; freeze it"),
        (nvfp4(linear().requires_grad_(False), NVFP4Recipe(weights=None)), "weights=null keeps it in high precision"),
    ],
)
def test_what_cannot_be_packed_says_why(layer, reason):
    with pytest.raises(ValueError, match=f"layer: the weight cannot be packed: {reason}"):
        layer.materialize()


def test_casting_a_network_leaves_codes_and_scales_what_they_are():
    layer = nvfp4(linear().requires_grad_(False))
    layer.materialize()
    before = [layer.state_dict()[name].clone() for name in PACKED]
    layer.bfloat16()
    assert layer.bias.dtype == torch.bfloat16
    for name, theirs in zip(PACKED, before, strict=True):
        ours = layer.state_dict()[name]
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


def sharded_gradients(recipe):
    network, mesh = block(recipe=recipe), init_device_mesh("cpu", (2,))
    for layer in network:
        fully_shard(layer, mesh=mesh)
    fully_shard(network, mesh=mesh)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append((t.dtype, t.shape)) or t, lambda t: t):
        output = network(gaussian(48, 64))
    output.backward(gaussian(48, 64, seed=2))
    weights = [shape for dtype, shape in saved if dtype == torch.float32 and shape in {(96, 64), (64, 96)}]
    return [parameter.grad.full_tensor() for parameter in network.parameters()], weights


@pytest.mark.parametrize("recipe", [WHOLE, NVFP4Recipe()], ids=["whole", "means"])
def test_sharded_weights_give_the_gradients_of_whole_ones_and_are_not_held_back(recipe):
    """Means keep the gathered parameter itself, whose memory sharding frees and fills again."""
    expected = gradients(block(recipe=recipe), gaussian(48, 64), gaussian(48, 64, seed=2))
    for actual, weights in run_on_ranks(partial(sharded_gradients, recipe), 2):
        for ours, theirs in zip(actual, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
        assert recipe != WHOLE or not weights


TOGETHER = NVFP4Recipe(reduce_amax=True, mean_tokens=64)


def gradients_of_half():
    clock = StepClock(reduce=largest_over(dist.group.WORLD))
    half = slice(64 * dist.get_rank(), 64 * (dist.get_rank() + 1))
    clock.place_tokens(half.start)
    layer = nvfp4(linear(), TOGETHER, clock=clock)
    return gradients(layer, gaussian(128, 64)[half], gaussian(128, 96, seed=2)[half])


def test_two_ranks_of_a_sequence_group_compute_what_one_process_does():
    layer = nvfp4(linear(), TOGETHER)
    expected = gradients(layer, gaussian(128, 64), gaussian(128, 96, seed=2))
    of_ranks = run_on_ranks(gradients_of_half, 2)
    for first, second, whole in zip(*of_ranks, expected, strict=True):
        torch.testing.assert_close(first + second, whole, rtol=1e-5, atol=1e-4)
