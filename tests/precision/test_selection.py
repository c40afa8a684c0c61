"""Which layers are wrapped: literal names in, literal reasons out."""

from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from longlive.config import config_directory
from longlive.models.wan.config import WanConfig
from longlive.models.wan.model import CausalWan
from longlive.precision.selection import BLOCK_LINEARS, LayerGroup, LayerSelection, grouped


def network(**changes: int) -> CausalWan:
    with torch.device("meta"):
        return CausalWan(WanConfig.tiny(**changes))


def wrapped(module: nn.Module, **settings: object) -> list[str]:
    selection = LayerSelection(**{"multiple": 32} | settings)
    return [layer.name for layer in selection.of(module) if layer.reason is None]


def test_the_defaults_are_the_300_linear_layers_of_the_5b_models_blocks():
    with torch.device("meta"):
        names = wrapped(CausalWan(WanConfig.ti2v_5b()))
    assert len(names) == 300
    assert names[:10] == [
        *(f"blocks.0.{attention}.{part}" for attention in ("self_attn", "cross_attn") for part in "qkvo"),
        "blocks.0.ffn.0",
        "blocks.0.ffn.2",
    ]


@pytest.mark.parametrize("name", ["nvfp4", "fp8"])
def test_the_configs_name_the_defaults(name):
    """They are written out, so that a recipe can be read; two lists could differ."""
    assert OmegaConf.load(config_directory() / "precision" / f"{name}.yaml").layers == list(BLOCK_LINEARS)


def test_names_are_found_below_a_module_and_behind_an_adapter():
    """Lightning converts the module that holds the network, and peft moves a layer it adapts."""
    holder = nn.Module()
    holder.network = network(num_layers=1)
    adapter = nn.Module()
    adapter.base_layer, adapter.lora_A = holder.network.blocks[0].ffn[0], nn.Linear(128, 32)
    holder.network.blocks[0].ffn[0] = adapter
    assert wrapped(holder, layers=("blocks.*.ffn.0",)) == ["network.blocks.0.ffn.0.base_layer"]


@pytest.mark.parametrize(
    ("share", "num_layers", "kept"), [(0.0, 4, 0), (0.15, 4, 1), (0.5, 4, 2), (0.1, 30, 3), (0.15, 30, 5), (0.9, 1, 1)]
)
def test_the_last_blocks_are_kept(share, num_layers, kept):
    """0.1 * 30 is above 3 in floating point: rounded up, it would keep a fourth block."""
    selection = LayerSelection(32, ("blocks.*.ffn.0",), share)
    reasons = {
        layer.name: layer.reason for layer in selection.of(network(num_layers=num_layers)) if "ffn.0" in layer.name
    }
    first = num_layers - kept
    assert [name for name, reason in reasons.items() if reason] == [
        f"blocks.{i}.ffn.0" for i in range(first, num_layers)
    ]
    assert {reason for reason in reasons.values() if reason} <= {
        f"in the last blocks (keep_last_blocks_bf16={share:g})"
    }


def test_every_layer_that_stays_has_its_reason():
    layers = LayerSelection(32, (*BLOCK_LINEARS, "time_embedding.0")).of(network(dim=48, ffn_dim=64, num_heads=2))
    reasons = {layer.name: layer.reason for layer in layers}
    assert reasons["blocks.0.self_attn.q"] == "in_features=48 is no multiple of 32"
    assert reasons["blocks.3.ffn.2"] == "out_features=48 is no multiple of 32"
    assert reasons["patch_embedding"] == reasons["head.head"] == "not among `layers`"
    # Its arithmetic is float32 whatever its weights are in; replaced by a plain linear layer, it would not be.
    assert reasons["time_embedding.0"] == "a Float32Linear multiplies in its own way"
    assert not any(name.endswith(("norm3", "modulation")) for name in reasons)


def test_a_pattern_that_names_no_layer_is_refused_with_the_names_there_are():
    """A misspelt pattern would train in bfloat16, and nothing would say so."""
    message = r"no layer is named 'blocks\.\*\.attn\.q'; there are blocks\.\*\.cross_attn\.k, "
    with pytest.raises(ValueError, match=message):
        wrapped(network(), layers=("blocks.*.attn.q",))


@pytest.mark.parametrize(
    "settings", [{"keep_last_blocks_bf16": 1.0}, {"keep_last_blocks_bf16": -0.1}, {"layers": ()}, {"layers": "ffn.*"}]
)
def test_settings_are_checked(settings):
    (name,) = settings
    with pytest.raises(ValueError, match=f"{name}="):
        LayerSelection(32, **settings)


def test_equal_layers_of_several_blocks_are_one_row():
    rows = grouped(LayerSelection(32, ("blocks.[02].ffn.0", "blocks.3.ffn.0")).of(network()))
    assert rows[0] == LayerGroup("blocks.0,2-3.ffn.0", 3, 128, 512, None)
    assert LayerGroup("blocks.1.ffn.0", 1, 128, 512, "not among `layers`") in rows
    assert LayerGroup("blocks.0-3.ffn.2", 4, 512, 128, "not among `layers`") in rows
    assert sum(row.number for row in rows) == 47
