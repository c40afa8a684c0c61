"""Wan's own file of the codec: its names, written down from the network's structure, and what loads from it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

from longlive import rng
from longlive.codecs.halo import MeasuredHalo
from longlive.codecs.wan import TI2V_5B, WanVideoCodec, autoencoder_config, autoencoder_folder
from longlive.codecs.wan_weights import diffusers_name

TINY: dict[str, Any] = dict(WanVideoCodec.tiny().autoencoder.config)
SIZES = {
    key: TINY[key] for key in ("base_dim", "decoder_base_dim", "z_dim", "num_res_blocks", "latents_mean", "latents_std")
}


def names(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Wan's name and diffusers' of every tensor, in the order of computation."""

    def both(wans: str, theirs: str, *parameters: str) -> Iterator[tuple[str, str]]:
        yield from ((f"{wans}.{parameter}", f"{theirs}.{parameter}") for parameter in parameters or ("weight", "bias"))

    def residual(wans: str, theirs: str, changes_width: bool = False) -> Iterator[tuple[str, str]]:
        sequence = ["norm1", None, "conv1", "norm2", None, None, "conv2"]
        for index, part in enumerate(sequence):
            if part is not None:
                parameters = ("gamma",) if part.startswith("norm") else ()
                yield from both(f"{wans}.residual.{index}", f"{theirs}.{part}", *parameters)
        if changes_width:
            yield from both(f"{wans}.shortcut", f"{theirs}.conv_shortcut")

    def middle(coder: str) -> Iterator[tuple[str, str]]:
        yield from residual(f"{coder}.middle.0", f"{coder}.mid_block.resnets.0")
        attention = (f"{coder}.middle.1", f"{coder}.mid_block.attentions.0")
        yield from both(*(f"{name}.norm" for name in attention), "gamma")
        for part in ("to_qkv", "proj"):
            yield from both(*(f"{name}.{part}" for name in attention))
        yield from residual(f"{coder}.middle.2", f"{coder}.mid_block.resnets.1")

    def levels(coder: str, direction: str, widths: list[int], blocks: int, temporal: list[bool]):
        for level, (before, after) in enumerate(pairwise(widths)):
            wans = f"{coder}.{direction}samples.{level}.{direction}samples"
            theirs = f"{coder}.{direction}_blocks.{level}"
            for block in range(blocks):
                yield from residual(f"{wans}.{block}", f"{theirs}.resnets.{block}", block == 0 and before != after)
            if level < len(temporal):
                resampler = (f"{wans}.{blocks}", f"{theirs}.{direction}sampler")
                yield from both(*(f"{name}.resample.1" for name in resampler))
                if temporal[level]:
                    yield from both(*(f"{name}.time_conv" for name in resampler))

    mult, temporal, blocks = config["dim_mult"], config["temperal_downsample"], config["num_res_blocks"]
    for coder in ("encoder", "decoder"):
        yield from both(f"{coder}.conv1", f"{coder}.conv_in")
        yield from both(f"{coder}.head.0", f"{coder}.norm_out", "gamma")
        yield from both(f"{coder}.head.2", f"{coder}.conv_out")
        yield from middle(coder)
    yield from levels("encoder", "down", [1, *mult], blocks, temporal)
    yield from levels("decoder", "up", [mult[-1], *reversed(mult)], blocks + 1, temporal[::-1])
    yield from both("conv1", "quant_conv")
    yield from both("conv2", "post_quant_conv")


@pytest.fixture(scope="module")
def codec() -> WanVideoCodec:
    return WanVideoCodec.tiny(seed=1)


@pytest.fixture
def wans_folder(codec: WanVideoCodec, tmp_path: Path) -> Path:
    """As Wan's release lays it out: the network's config beside the codec's file."""
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "WanModel", "dim": 3072}))
    torch.save(wans_weights(codec), tmp_path / "Wan2.2_VAE.pth")
    return tmp_path


def wans_weights(codec: WanVideoCodec) -> dict[str, torch.Tensor]:
    state = codec.autoencoder.state_dict()
    return {wans: state[theirs] for wans, theirs in names(TINY)}


def test_the_196_names_of_the_ti2v_5b_codec_map_one_to_one() -> None:
    with torch.device("meta"):
        wanted = set(AutoencoderKLWan(**TI2V_5B).state_dict())
    pairs = list(names(TI2V_5B))
    assert len(pairs) == len(set(pairs)) == len(wanted) == 196
    assert {theirs for _, theirs in pairs} == wanted
    assert {diffusers_name(wans): wans for wans, _ in pairs} == {theirs: wans for wans, theirs in pairs}
    assert all(diffusers_name(theirs) == theirs for theirs in wanted)


@pytest.mark.parametrize("given", ["", "Wan2.2_VAE.pth"])
def test_wans_own_file_loads_to_the_same_codec(codec: WanVideoCodec, wans_folder: Path, given: str) -> None:
    loaded = WanVideoCodec.from_pretrained(wans_folder / given, config=SIZES)
    state = codec.autoencoder.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.autoencoder.state_dict().items())
    video = rng.normal((1, 5, 3, 16, 16), 0, "test_video").clamp(-1, 1)
    latents = codec.encode(video)
    assert torch.equal(loaded.encode(video), latents)
    assert torch.equal(loaded.decode(latents), codec.decode(latents))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_wans_own_file_brings_the_sizes_and_statistics_of_the_5b(wans_folder: Path) -> None:
    assert autoencoder_config(wans_folder) == TI2V_5B
    assert autoencoder_folder(wans_folder) == autoencoder_folder(wans_folder / "Wan2.2_VAE.pth") == wans_folder
    with pytest.raises(ValueError, match=r"Wan2\.2_VAE\.pth does not fit.*conv_in\.weight \[4, 12, 3, 3, 3\] instead"):
        WanVideoCodec.from_pretrained(wans_folder)


def test_a_measured_halo_lies_beside_wans_file(wans_folder: Path) -> None:
    MeasuredHalo(12, 0.003, 2**-8, {}).write(autoencoder_folder(wans_folder))
    loaded = WanVideoCodec.from_pretrained(wans_folder, dtype=torch.bfloat16, config=SIZES)
    assert (loaded.halo_frames, loaded.dtype) == (12, torch.bfloat16)


def test_another_file_is_refused_by_name(codec: WanVideoCodec, wans_folder: Path) -> None:
    """Wan2.1's codec has flat levels; diffusers' converter takes such names and makes a wrong codec of them."""
    weights = wans_weights(codec)
    weights["encoder.downsamples.0.residual.0.gamma"] = weights.pop(
        "encoder.downsamples.0.downsamples.0.residual.0.gamma"
    )
    torch.save(weights, wans_folder / "Wan2.2_VAE.pth")
    with pytest.raises(ValueError, match="does not fit") as raised:
        WanVideoCodec.from_pretrained(wans_folder, config=SIZES)
    assert "1 missing: encoder.down_blocks.0.resnets.0.norm1.gamma" in str(raised.value)
    assert "1 unexpected: encoder.downsamples.0.norm1.gamma" in str(raised.value)


def test_a_folder_with_the_network_alone_has_no_codec(wans_folder: Path) -> None:
    (wans_folder / "Wan2.2_VAE.pth").unlink()
    with pytest.raises(ValueError, match=r"holds no config\.json of an AutoencoderKLWan.* and no Wan2\.2_VAE\.pth"):
        WanVideoCodec.from_pretrained(wans_folder)


def test_sizes_are_given_only_where_a_file_says_nothing_of_them(codec: WanVideoCodec, tmp_path: Path) -> None:
    codec.autoencoder.save_pretrained(tmp_path / "vae")
    assert autoencoder_config(tmp_path)["z_dim"] == 4
    with pytest.raises(ValueError, match=r"has a config\.json of its own"):
        WanVideoCodec.from_pretrained(tmp_path, config=SIZES)
