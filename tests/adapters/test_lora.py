"""Adapters over one base: what they compute, who learns, what is stored, and that peft reads it."""

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import CheckpointError, checkpoint

from helpers.adapters import CONFIG, adapted, base, fill_adapter, velocity
from longlive.adapters.lora import (
    LoRASettings,
    adapter_parameters,
    adapter_state,
    add_adapter,
    base_name,
    initialise_adapter,
    load_adapter_state,
    target_layers,
    train_only,
    use_adapter,
)
from longlive.adapters.lora_files import load_adapter, save_adapter
from longlive.adapters.lora_merging import merge_adapter
from longlive.models.wan.model import CausalWan
from longlive.models.wan.weights import save_weights
from longlive.parallel.materialise import materialise
from longlive.precision.nvfp4.linear import NVFP4Linear
from longlive.precision.nvfp4.plugin import NVFP4Precision

SETTINGS = LoRASettings(rank=4, alpha=8)
LINEARS = [f"{attention}.{which}" for attention in ("self_attn", "cross_attn") for which in "qkvo"] + ["ffn.0", "ffn.2"]


@pytest.fixture
def network() -> CausalWan:
    made = base()
    for seed, name in enumerate(("student", "critic"), start=1):
        add_adapter(made, name, SETTINGS, seed)
        fill_adapter(made, name, seed)
    return made


def test_an_adapter_adds_its_product_to_every_linear_layer_of_the_blocks(network: CausalWan) -> None:
    """Against plain networks whose weights have the product in them."""
    with torch.no_grad():
        plain = velocity(base())
    assert torch.equal(adapted(None, network), plain)
    seen = [plain]
    for name in ("student", "critic"):
        expected = base()
        with torch.no_grad():
            for block, layers in enumerate(expected.blocks):
                for layer in LINEARS:
                    key = f"base_model.model.blocks.{block}.{layer}"
                    state = adapter_state(network, name)
                    delta = state[f"{key}.lora_B.weight"] @ state[f"{key}.lora_A.weight"]
                    layers.get_submodule(layer).weight += 8 / 4 * delta
            torch.testing.assert_close(adapted(name, network), velocity(expected), atol=2e-5, rtol=1e-5)
        seen.append(velocity(expected).detach())
    assert min((seen[i] - seen[j]).abs().max() for i in range(3) for j in range(i)) > 1e-2


def test_an_adapter_starts_as_nothing_and_its_numbers_follow_from_seed_and_name() -> None:
    """Catches peft's own draw, which reads torch's global generator."""
    states = []
    for global_seed in (0, 1):
        torch.manual_seed(global_seed)
        made = base()
        before = torch.get_rng_state()
        add_adapter(made, "student", SETTINGS, seed=3)
        assert torch.equal(torch.get_rng_state(), before)
        states.append(adapter_state(made, "student"))
        with torch.no_grad():
            assert torch.equal(adapted("student", made), velocity(base()))
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    down = {key: value for key, value in states[0].items() if "lora_A" in key}
    assert len({float(value[0, 0]) for value in down.values()}) == len(down) == 20
    widest = states[0]["base_model.model.blocks.0.ffn.2.lora_A.weight"]
    assert widest.abs().max() < 1 / 8
    assert widest.std() == pytest.approx(1 / 8 / 3**0.5, rel=0.1)


def test_outside_of_use_adapter_none_multiplies_and_contexts_nest(network: CausalWan) -> None:
    by_name = {name: adapted(name, network) for name in (None, "student", "critic")}
    with torch.no_grad(), use_adapter(network, "student"):
        with use_adapter(network, None):
            assert torch.equal(velocity(network), by_name[None])
        with pytest.raises(KeyError), use_adapter(network, "critic"):
            raise KeyError
        assert torch.equal(velocity(network), by_name["student"])
    with torch.no_grad():
        assert torch.equal(velocity(network), by_name[None])
    with (
        pytest.raises(ValueError, match="no adapter 'teacher'; there are critic, student"),
        use_adapter(network, "teacher"),
    ):
        pass


def test_gradient_reaches_the_chosen_adapter_alone_and_survives_a_switch(network: CausalWan) -> None:
    """Switched by peft's own `set_adapter` between forward and backward, the gradients would be dropped silently."""
    train_only(network, ["student", "critic"])
    with use_adapter(network, "student"):
        out = velocity(network)
    adapted("critic", network)
    adapted(None, network)
    out.square().sum().backward()
    reached = {name for name, p in network.named_parameters() if p.grad is not None}
    assert reached == {name for name, _ in adapter_parameters(network, "student")}
    learning = {name for name, p in network.named_parameters() if p.requires_grad}
    assert learning == reached | {name for name, _ in adapter_parameters(network, "critic")}
    train_only(network, ["critic"])
    assert {n for n, p in network.named_parameters() if p.requires_grad} == learning - reached


def test_who_learns_does_not_change_when_an_adapter_is_added() -> None:
    made = base()
    add_adapter(made, "student", SETTINGS)
    train_only(made, [])
    add_adapter(made, "critic", SETTINGS)
    assert {n for n, p in made.named_parameters() if p.requires_grad} == {
        n for n, _ in adapter_parameters(made, "critic")
    }


def test_recomputing_with_another_adapter_is_noticed(network: CausalWan) -> None:
    """Activation checkpointing runs the blocks again in backward: outside of the context that would be other blocks."""
    train_only(network, ["student"])
    with use_adapter(network, "student"):
        velocity(network).square().sum().backward()
    expected = {n: p.grad for n, p in network.named_parameters() if p.grad is not None}
    network.zero_grad()
    for block in network.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    with use_adapter(network, "student"):
        out = velocity(network)
        out.square().sum().backward()
    for name, parameter in network.named_parameters():
        if name in expected:
            assert torch.equal(parameter.grad, expected[name])
    with use_adapter(network, "student"):
        out = velocity(network)
    with pytest.raises(CheckpointError):
        out.square().sum().backward()


def test_weights_load_by_their_own_names_with_adapters_in_place(network: CausalWan, tmp_path: Path) -> None:
    """From a file and from a seed, on meta, as training builds networks. Other names would draw other weights."""
    plain = base(seed=7)
    save_weights(plain.state_dict(), CONFIG, tmp_path / "wan", naming="diffusers")
    for weights, seed, expected in ((tmp_path / "wan", 0, plain), (None, 4, None)):
        with torch.device("meta"):
            made = CausalWan(CONFIG)
            add_adapter(made, "student", SETTINGS)
        assert all(parameter.is_meta for parameter in made.parameters())
        materialise(made, "cpu", weights, seed)
        initialise_adapter(made, "student", seed=1)
        if expected is None:
            expected = CausalWan(CONFIG)
            expected.init_weights(4)
        with torch.no_grad():
            assert torch.equal(adapted("student", made), velocity(expected))
        names = {base_name(name): value for name, value in made.state_dict().items()}
        names.pop(None)
        assert names.keys() == expected.state_dict().keys()
        assert all(torch.equal(value, names[name]) for name, value in expected.state_dict().items())


@pytest.mark.parametrize("order", ["adapter first", "precision first"])
def test_adapters_stay_in_high_precision_beside_a_packed_base(order: str, tmp_path: Path) -> None:
    """A frozen base in NVFP4 keeps no master weight; the adapter is what it was, learns, and is stored."""
    made, plugin = base(), NVFP4Precision(backend="emulated")
    if order == "precision first":
        plugin.convert_module(made)
    add_adapter(made, "student", SETTINGS)
    fill_adapter(made, "student", 5)
    plugin.convert_module(made)
    train_only(made, ["student"])
    with plugin.forward_context():
        before = adapted("student", made)
        plugin.freeze(made)
        torch.testing.assert_close(adapted("student", made), before, atol=0, rtol=0)
        with use_adapter(made, "student"):
            velocity(made).float().square().sum().backward()
    packed = [layer for layer in made.modules() if isinstance(layer, NVFP4Linear)]
    assert len(packed) == 20
    assert all(layer.weight is None for layer in packed)
    state = adapter_state(made, "student")
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert all(parameter.grad.norm() > 0 for _, parameter in adapter_parameters(made, "student"))
    save_adapter(made, "student", tmp_path / "student")
    load_adapter(made, "again", tmp_path / "student")
    with plugin.forward_context():
        assert torch.equal(adapted("again", made), before)
    with pytest.raises(ValueError, match=r"blocks\.0\.self_attn\.q has no master weight"):
        merge_adapter(made, "student")


def test_what_does_not_fit_is_refused_and_named(network: CausalWan) -> None:
    with pytest.raises(ValueError, match="rank=0"):
        LoRASettings(rank=0)
    with pytest.raises(ValueError, match="list of name patterns"):
        LoRASettings(targets="blocks.*")
    with pytest.raises(ValueError, match="'student' already; there are critic, student"):
        add_adapter(network, "student", SETTINGS)
    with pytest.raises(ValueError, match="must be an identifier"):
        add_adapter(network, "my.adapter", SETTINGS)
    with pytest.raises(ValueError, match=r"no linear layer is named 'blocks\.\*\.mlp'"):
        add_adapter(base(), "student", LoRASettings(targets=["ffn.0", "blocks.*.mlp"]))
    assert target_layers(base(), ["blocks.1.ffn.0", "cross_attn.q"]) == [
        "blocks.0.cross_attn.q", "blocks.1.cross_attn.q", "blocks.1.ffn.0",
    ]  # fmt: skip
    assert target_layers(network, LoRASettings().targets) == target_layers(base(), LoRASettings().targets)

    state = adapter_state(network, "student")
    before = copy.deepcopy(state)
    key = next(iter(state))
    for wrong in ({**state, key: state[key][:2]}, {k: v for k, v in state.items() if k != key}):
        with pytest.raises(ValueError, match="does not fit 'student'"):
            load_adapter_state(network, "student", wrong)
    assert all(torch.equal(value, before[name]) for name, value in adapter_state(network, "student").items())
