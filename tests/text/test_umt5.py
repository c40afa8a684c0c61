"""The UMT5 encoder at tiny random size, with a tokenizer made here: nothing is downloaded."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from longlive import rng
from longlive.text.base import TextEncoder
from longlive.text.umt5 import UMT5Factory, UMT5TextEncoder, clean

VOCABULARY = ["<pad>", "</s>", "<unk>", "a", "red", "blue", "circle", "square", "moves", "right"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder as diffusers lays it out, with a random encoder of 2 layers and 16 dims."""
    folder = tmp_path_factory.mktemp("wan")
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder / "tokenizer")
    config = UMT5Config(
        vocab_size=len(VOCABULARY), d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, tie_word_embeddings=False
    )
    model = UMT5EncoderModel(config)
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.copy_(0.3 * rng.normal(parameter.shape, 0, "test_umt5", sample=index))
        model.set_input_embeddings(model.shared)
    model.save_pretrained(folder / "text_encoder")
    return folder


@pytest.fixture(scope="module")
def encoder(folder: Path) -> UMT5TextEncoder:
    return UMT5TextEncoder.from_pretrained(folder, num_tokens=12, dtype=torch.float32)


def copied(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target / "copy"))


def test_embeddings_are_the_models_and_zero_beyond_the_end(encoder: UMT5TextEncoder) -> None:
    embeds = encoder.encode(["a red circle moves right", "blue square", ""])
    assert isinstance(encoder, TextEncoder)
    assert embeds.shape == (3, 12, encoder.embed_dim)
    for row, ids in zip(embeds, ([3, 4, 6, 8, 9, 1], [5, 7, 1], [1]), strict=True):
        expected = encoder.model(torch.tensor([ids])).last_hidden_state[0]
        torch.testing.assert_close(row[: len(ids)], expected, rtol=0, atol=1e-5)
        assert (row[len(ids) :] == 0).all()


def test_a_prompt_does_not_feel_its_neighbours_in_the_batch(encoder: UMT5TextEncoder) -> None:
    """Padding that is not masked would mix into every token."""
    together = encoder.encode(["red", "a blue square moves right", "a circle"])
    alone = torch.cat([encoder.encode([prompt]) for prompt in ("red", "a blue square moves right", "a circle")])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)


def test_long_prompts_are_cut_and_keep_their_end_token(folder: Path, encoder: UMT5TextEncoder) -> None:
    short = UMT5TextEncoder.from_pretrained(folder, num_tokens=3, dtype=torch.float32)
    torch.testing.assert_close(short.encode(["a red circle moves"]), encoder.encode(["a red"])[:, :3])
    assert encoder.encode([]).shape == (0, 12, 16)


@pytest.mark.parametrize(
    "prompt",
    [
        "  a\n red\t circle ",
        "a &amp;lt;red&amp;gt; circle",
        "schÃ¶n",
        "\u201cquoted\u201d \u3000 wide",
        "&quot;x&quot;",
        "",
    ],
)
def test_cleaning_equals_wans(prompt: str) -> None:
    assert clean(prompt) == prompt_clean(prompt)


def test_cleaning_happens_before_the_tokenizer(encoder: UMT5TextEncoder) -> None:
    assert torch.equal(encoder.encode([" a&#32;red\n\ncircle "]), encoder.encode(["a red circle"]))


def test_the_encoder_is_frozen_in_evaluation_mode_and_blind_to_autocast(encoder: UMT5TextEncoder) -> None:
    owner = torch.nn.ModuleDict({"text": encoder}).train()
    assert not any(module.training for module in owner["text"].modules())
    assert not any(parameter.requires_grad for parameter in owner.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = encoder.encode(["a red circle"])
    assert torch.equal(mixed, encoder.encode(["a red circle"]))


def test_bfloat16_weights_give_bfloat16_embeddings_close_to_float32(folder: Path, encoder: UMT5TextEncoder) -> None:
    embeds = UMT5TextEncoder.from_pretrained(folder, num_tokens=12).encode(["a red circle"])
    assert embeds.dtype == torch.bfloat16
    expected = encoder.encode(["a red circle"])
    assert 0 < (embeds.float() - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("kept", ["shared.weight", "encoder.embed_tokens.weight"])
def test_either_name_of_the_token_embedding_is_enough(
    folder: Path, encoder: UMT5TextEncoder, tmp_path: Path, kept: str
) -> None:
    """transformers fills the name that a file lacks with random numbers and says so only in a log."""
    copy = copied(folder, tmp_path)
    path = copy / "text_encoder" / "model.safetensors"
    weights = load_file(path)
    embedding = next(weights.pop(name) for name in ("shared.weight", "encoder.embed_tokens.weight") if name in weights)
    weights.pop("encoder.embed_tokens.weight", None)
    save_file({**weights, kept: embedding}, path, {"format": "pt"})
    loaded = UMT5TextEncoder.from_pretrained(copy, num_tokens=12, dtype=torch.float32)
    assert torch.equal(loaded.encode(["a red circle"]), encoder.encode(["a red circle"]))


def test_missing_weights_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    copy = copied(folder, tmp_path)
    path = copy / "text_encoder" / "model.safetensors"
    weights = load_file(path)
    del weights["encoder.final_layer_norm.weight"]
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"missing \['encoder\.final_layer_norm\.weight'\]"):
        UMT5Factory(copy).build()


def test_a_folder_that_lacks_a_part_is_refused_before_any_work(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lacks text_encoder/config\.json, text_encoder/\*\.safetensors, tokenizer/"):
        UMT5Factory(tmp_path)
    copy = copied(folder, tmp_path)
    (copy / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"lacks tokenizer/tokenizer\.json; point it at"):
        UMT5TextEncoder.from_pretrained(copy)
    with pytest.raises(ValueError, match="num_tokens=0"):
        UMT5Factory(folder, num_tokens=0)


def test_the_factory_knows_what_the_encoder_says(folder: Path) -> None:
    factory = UMT5Factory(str(folder), num_tokens=12, dtype=torch.float32)
    encoder = factory.build()
    assert (factory.embed_dim, factory.num_tokens) == (encoder.embed_dim, encoder.num_tokens)
    assert factory.fingerprint == encoder.fingerprint


def test_fingerprint_follows_content_and_settings_and_not_the_path(folder: Path, tmp_path: Path) -> None:
    """A fingerprint that misses a change serves another model's embeddings from the cache, without a sign."""
    copy = copied(folder, tmp_path)
    original = UMT5Factory(folder).fingerprint
    assert UMT5Factory(copy).fingerprint == original

    fingerprints = [original, UMT5Factory(copy, num_tokens=256).fingerprint]
    fingerprints.append(UMT5Factory(copy, dtype=torch.float32).fingerprint)
    weights_path = copy / "text_encoder" / "model.safetensors"
    weights = load_file(weights_path)
    weights["encoder.block.1.layer.0.SelfAttention.q.weight"][0, 0] += 0.01
    save_file(weights, weights_path, {"format": "pt"})
    fingerprints.append(UMT5Factory(copy).fingerprint)
    for path in (copy / "text_encoder" / "config.json", copy / "tokenizer" / "tokenizer_config.json"):
        settings = json.loads(path.read_text())
        path.write_text(json.dumps(settings | {"added": 1}))
        fingerprints.append(UMT5Factory(copy).fingerprint)
    assert len(set(fingerprints)) == len(fingerprints)


@pytest.fixture
def wans_folder(folder: Path, tmp_path: Path) -> Path:
    """The same encoder as Wan's release lays it out, beside what else is there."""
    wans = tmp_path / "Wan2.2-TI2V-5B"
    shutil.copytree(folder / "tokenizer", wans / "google" / "umt5-xxl")
    (wans / "config.json").write_text('{"_class_name": "WanModel", "dim": 3072}')
    theirs = load_file(folder / "text_encoder" / "model.safetensors")
    parts = {
        "layer.0.SelfAttention.relative_attention_bias": "pos_embedding.embedding",
        "layer.0.SelfAttention": "attn",
        "layer.0.layer_norm": "norm1",
        "layer.1.layer_norm": "norm2",
        "layer.1.DenseReluDense.wi_0": "ffn.gate.0",
        "layer.1.DenseReluDense.wi_1": "ffn.fc1",
        "layer.1.DenseReluDense.wo": "ffn.fc2",
        "encoder.final_layer_norm": "norm",
        "encoder.block": "blocks",
        "shared": "token_embedding",
    }
    weights = {}
    for name, tensor in theirs.items():
        for part, wans_part in parts.items():
            name = name.replace(part, wans_part)
        weights[name] = tensor
    weights.pop("encoder.embed_tokens.weight", None)
    torch.save(weights, wans / "models_t5_umt5-xxl-enc-bf16.pth")
    return wans


def test_wans_own_folder_gives_the_same_embeddings(folder: Path, encoder: UMT5TextEncoder, wans_folder: Path) -> None:
    factory = UMT5Factory(wans_folder, num_tokens=12, dtype=torch.float32)
    assert factory.embed_dim == encoder.embed_dim
    prompts = ["a red circle moves right", "blue square"]
    assert torch.equal(factory.build().encode(prompts), encoder.encode(prompts))
    assert UMT5Factory(wans_folder).build().model.dtype == torch.bfloat16


def test_a_fingerprint_follows_the_content_of_wans_file(wans_folder: Path) -> None:
    path = wans_folder / "models_t5_umt5-xxl-enc-bf16.pth"
    original = UMT5Factory(wans_folder).fingerprint
    path = path.rename(wans_folder / "models_t5_of_another_name.pth")
    assert UMT5Factory(wans_folder).fingerprint == original
    weights = torch.load(path, weights_only=True)
    fingerprints = {original}
    for old_format in (False, True):
        weights["blocks.1.attn.q.weight"][0, 0] += 0.01
        torch.save(weights, path, _use_new_zipfile_serialization=not old_format)
        fingerprints.add(UMT5Factory(wans_folder).fingerprint)
    assert len(fingerprints) == 3


def test_a_folder_of_wans_that_is_not_whole_is_refused_before_any_work(wans_folder: Path) -> None:
    path = wans_folder / "models_t5_umt5-xxl-enc-bf16.pth"
    weights = torch.load(path, weights_only=True)
    del weights["blocks.1.ffn.gate.0.weight"]
    torch.save(weights, path)
    with pytest.raises(ValueError, match=r"1 missing: encoder\.block\.1\.layer\.1\.DenseReluDense\.wi_0\.weight"):
        UMT5Factory(wans_folder)
    torch.save({"generator": weights}, path)
    with pytest.raises(ValueError, match="holds generator; looked for"):
        UMT5Factory(wans_folder)
    (wans_folder / "models_t5_second.pth").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds 2 files models_t5_\*\.pth; leave one"):
        UMT5Factory(wans_folder)
    (wans_folder / "google" / "umt5-xxl" / "tokenizer.json").unlink()
    for file in wans_folder.glob("*.pth"):
        file.unlink()
    with pytest.raises(
        ValueError, match=r"lacks text_encoder/config\.json.*with models_t5_\*\.pth and google/umt5-xxl/"
    ):
        UMT5Factory(wans_folder)
