"""Word embeddings that are the same everywhere, and that show which words a prompt has and in which order."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from longlive.text.toy import ToyTextEncoder, words

ROOT = Path(__file__).parents[2]


def test_case_and_punctuation_do_not_count() -> None:
    encoder = ToyTextEncoder()
    first, second = encoder.encode(["A red circle, moving right!", "a RED circle moving  right"])
    assert torch.equal(first, second)
    assert words("It's a well-lit ground.") == ["it's", "a", "well", "lit", "ground"]


def test_every_word_is_one_token_and_the_rest_is_zero() -> None:
    embeds = ToyTextEncoder(embed_dim=32, num_tokens=6).encode(["a red circle", "", "  ?!"])
    assert embeds.shape == (3, 6, 32)
    assert embeds[0, :3].abs().amin(dim=-1).max() > 0
    assert (embeds[0, 3:] == 0).all()
    assert (embeds[1:] == 0).all()


def test_words_beyond_the_last_token_are_cut() -> None:
    encoder = ToyTextEncoder(num_tokens=2)
    long, short = encoder.encode(["red circle moves right", "red circle"])
    assert torch.equal(long, short)


def test_a_word_has_about_unit_variance_and_differs_from_other_words() -> None:
    vocabulary = ["red", "green", "blue", "circle", "square", "triangle", "left", "right", "up", "down"]
    encoder = ToyTextEncoder(embed_dim=64, position_weight=0.0)
    vectors = encoder.encode(vocabulary)[:, 0]
    assert vectors.var(dim=1).mean().item() == pytest.approx(1.0, abs=0.1)
    cosine = torch.nn.functional.cosine_similarity(vectors[:, None], vectors[None], dim=-1)
    assert (cosine - torch.eye(len(vocabulary))).abs().max() < 0.6


def test_word_order_is_visible_to_a_network_that_pools_tokens() -> None:
    """Without the position code, attention over the tokens is blind to their order."""
    first, second = ToyTextEncoder().encode(["red over blue", "blue over red"])
    assert torch.equal(first[1], second[1]), "the same word in the same place"
    assert not torch.equal(first[0], second[2]), "the same word in another place"
    similarity = torch.nn.functional.cosine_similarity(first[0], second[2], dim=0)
    assert similarity > 0.8, "it must still be recognisable as the same word"


def test_embeddings_are_equal_in_another_process_with_another_hash_seed() -> None:
    """Python's hash() of strings is salted per process: prompts would mean something else after a resume."""
    code = (
        "from longlive.text.toy import ToyTextEncoder;"
        "print(ToyTextEncoder().encode(['a red circle']).double().sum().item().hex())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert outputs == {ToyTextEncoder().encode(["a red circle"]).double().sum().item().hex()}


def test_fingerprint_names_every_setting() -> None:
    encoders = [
        ToyTextEncoder(),
        ToyTextEncoder(embed_dim=32),
        ToyTextEncoder(num_tokens=8),
        ToyTextEncoder(position_weight=0.5),
        ToyTextEncoder(seed=1),
    ]
    assert len({encoder.fingerprint for encoder in encoders}) == len(encoders)
    assert ToyTextEncoder().fingerprint == ToyTextEncoder().fingerprint
    assert not torch.equal(ToyTextEncoder(seed=1).encode(["red"]), ToyTextEncoder(seed=0).encode(["red"]))


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"embed_dim=63 is not a positive even number.*use 64"):
        ToyTextEncoder(embed_dim=63)
    with pytest.raises(ValueError, match="num_tokens=0 leaves no room"):
        ToyTextEncoder(num_tokens=0)
