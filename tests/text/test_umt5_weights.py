"""Wan's names of UMT5: against the encoder's maths in Wan's names, and at full size on meta."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu

from longlive.text.umt5_weights import config_of, load_original, transformers_name

BLOCK = {
    "norm1": ("d",),
    "attn.q": ("a", "d"),
    "attn.k": ("a", "d"),
    "attn.v": ("a", "d"),
    "attn.o": ("d", "a"),
    "norm2": ("d",),
    "ffn.gate.0": ("f", "d"),
    "ffn.fc1": ("f", "d"),
    "ffn.fc2": ("d", "f"),
    "pos_embedding.embedding": ("buckets", "heads"),
}


def wans_shapes(num_layers: int, **sizes: int) -> dict[str, tuple[int, ...]]:
    names = {"token_embedding": ("vocabulary", "d"), "norm": ("d",)}
    for block in range(num_layers):
        names |= {f"blocks.{block}.{name}": dims for name, dims in BLOCK.items()}
    return {f"{name}.weight": tuple(sizes[dim] for dim in dims) for name, dims in names.items()}


TINY = wans_shapes(2, vocabulary=20, d=16, a=24, f=40, heads=4, buckets=32)
XXL = wans_shapes(24, vocabulary=256_384, d=4096, a=4096, f=10_240, heads=64, buckets=32)


def random_weights() -> dict[str, Tensor]:
    numbers = torch.Generator().manual_seed(0)
    return {name: 0.4 * torch.randn(shape, generator=numbers) for name, shape in TINY.items()}


def normalised(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def bucket(distance: int) -> int:
    """Of 32: 16 for either direction; single distances below 8, from there logarithmic up to 128."""
    size = abs(distance)
    if size >= 8:
        size = min(8 + int(math.log(size / 8) / math.log(128 / 8) * 8), 15)
    return size + 16 * (distance > 0)


def encoded(weights: dict[str, Tensor], ids: list[int]) -> Tensor:
    """T5's encoder (Raffel et al. 2020; position biases per layer as in UMT5), float64, one prompt, by Wan's names."""
    w = {name.removesuffix(".weight"): tensor.double() for name, tensor in weights.items()}
    x = w["token_embedding"][ids]
    buckets = torch.tensor([[bucket(key - query) for key in range(len(ids))] for query in range(len(ids))])
    for block in ("blocks.0.", "blocks.1."):
        y = normalised(x, w[f"{block}norm1"])
        query, key, value = ((y @ w[f"{block}attn.{part}"].T).unflatten(1, (4, -1)).transpose(0, 1) for part in "qkv")
        bias = w[f"{block}pos_embedding.embedding"][buckets].permute(2, 0, 1)
        attended = (query @ key.mT + bias).softmax(-1) @ value
        x = x + attended.transpose(0, 1).flatten(1) @ w[f"{block}attn.o"].T
        y = normalised(x, w[f"{block}norm2"])
        gate = gelu(y @ w[f"{block}ffn.gate.0"].T, approximate="tanh")
        x = x + (gate * (y @ w[f"{block}ffn.fc1"].T)) @ w[f"{block}ffn.fc2"].T
    return normalised(x, w["norm"])


def test_a_file_in_wans_names_computes_what_wans_encoder_computes(tmp_path: Path) -> None:
    """Catches the two projections of the feed-forward swapped, or distances counted the other way round."""
    weights = random_weights()
    torch.save(weights, tmp_path / "models_t5.pth")
    ids = torch.randint(20, (24,), generator=torch.Generator().manual_seed(1)).tolist()
    model = load_original(tmp_path / "models_t5.pth", torch.float64)
    wanted = encoded(weights, ids)
    torch.testing.assert_close(model(torch.tensor([ids])).last_hidden_state[0], wanted, rtol=0, atol=1e-5)
    assert wanted.std() > 0.1


def test_the_242_names_of_umt5_xxl_map_one_to_one() -> None:
    from transformers import UMT5EncoderModel

    config = config_of(XXL, "the file")
    with torch.device("meta"):
        model = UMT5EncoderModel(config)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    wanted.pop("encoder.embed_tokens.weight", None)
    assert {transformers_name(name): shape for name, shape in XXL.items()} == wanted
    assert len(XXL) == len(wanted) == 242
    assert sum(math.prod(shape) for shape in XXL.values()) == 5_680_910_336
    sizes = ("d_model", "d_kv", "d_ff", "num_layers", "num_heads", "vocab_size", "relative_attention_num_buckets")
    assert [getattr(config, size) for size in sizes] == [4096, 64, 10_240, 24, 64, 256_384, 32]


def test_something_else_is_refused_with_what_was_looked_for() -> None:
    with pytest.raises(ValueError, match=r"no matrix blocks\.0\.attn\.q\.weight, blocks\.0\.ffn\.fc1\.weight"):
        config_of({"token_embedding.weight": (4, 2), "blocks.0.pos_embedding.embedding.weight": (32, 2)}, "a file")
    assert transformers_name("encoder.conv1.weight") == "encoder.conv1.weight"
    assert transformers_name("blocks.3.self_attn.q.weight") == "blocks.3.self_attn.q.weight"
