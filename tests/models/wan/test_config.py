"""Sizes and the two styles of `config.json`."""

import json

import pytest
import torch

from longlive.models.wan.config import WanConfig
from longlive.models.wan.model import CausalWan

# Wan-AI/Wan2.2-TI2V-5B, config.json as released.
ORIGINAL_5B = {
    "_class_name": "WanModel",
    "_diffusers_version": "0.33.0",
    "dim": 3072,
    "eps": 1e-06,
    "ffn_dim": 14336,
    "freq_dim": 256,
    "in_dim": 48,
    "model_type": "ti2v",
    "num_heads": 24,
    "num_layers": 30,
    "out_dim": 48,
    "text_len": 512,
}
# Wan-AI/Wan2.2-TI2V-5B-Diffusers, transformer/config.json.
DIFFUSERS_5B = {
    "_class_name": "WanTransformer3DModel",
    "_diffusers_version": "0.35.0.dev0",
    "added_kv_proj_dim": None,
    "attention_head_dim": 128,
    "cross_attn_norm": True,
    "eps": 1e-06,
    "ffn_dim": 14336,
    "freq_dim": 256,
    "image_dim": None,
    "in_channels": 48,
    "num_attention_heads": 24,
    "num_layers": 30,
    "out_channels": 48,
    "patch_size": [1, 2, 2],
    "pos_embed_seq_len": None,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
    "text_dim": 4096,
}


def test_the_5b_has_exactly_wans_parameters():
    with torch.device("meta"):
        model = CausalWan(WanConfig.ti2v_5b())
    assert len(model.state_dict()) == 825
    assert sum(parameter.numel() for parameter in model.parameters()) == 4_999_787_712
    assert not list(model.buffers())


@pytest.mark.parametrize("content", [ORIGINAL_5B, DIFFUSERS_5B], ids=["original", "diffusers"])
def test_both_published_configs_are_the_5b(content, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert WanConfig.from_json(tmp_path / "config.json") == WanConfig.ti2v_5b()


@pytest.mark.parametrize("naming", ["original", "diffusers"])
def test_a_written_config_is_read_back(naming, tmp_path):
    config = WanConfig.tiny(num_layers=3, out_channels=8, patch_size=(1, 4, 2), cross_attn_norm=False, eps=1e-5)
    config.to_json(tmp_path / "config.json", naming)
    assert WanConfig.from_json(tmp_path / "config.json") == config


def test_tokens_are_counted_in_patches():
    assert WanConfig.ti2v_5b().tokens_per_frame(44, 80) == 880
    assert WanConfig.tiny().patches(8, 6) == (4, 3)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_heads": 5}, r"num_heads=5 does not divide dim=128; use one of \[1, 2, 4, 8, 16, 32, 64\]"),
        ({"num_heads": 32}, "gives heads of 4 features"),
        ({"num_layers": 0}, "num_layers=0 must be at least 1"),
        ({"freq_dim": 255}, "freq_dim=255 must be even"),
        ({"patch_size": (2, 2, 2)}, r"patch_size=\(2, 2, 2\) must be \(1, rows, columns\)"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        WanConfig.tiny(**overrides)


def test_frames_that_patches_do_not_tile_are_refused():
    with pytest.raises(ValueError, match="height=7, width=8 are no multiples"):
        WanConfig.tiny().tokens_per_frame(7, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": None}, "has no num_layers"),
        ({"added_kv_proj_dim": 1024}, "added_kv_proj_dim=1024 belongs to a network with image keys"),
        ({"qk_norm": None}, "qk_norm=None is not Wan's"),
    ],
)
def test_a_config_of_another_network_is_refused(change, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(DIFFUSERS_5B | change))
    with pytest.raises(ValueError, match=message):
        WanConfig.from_json(tmp_path / "config.json")
