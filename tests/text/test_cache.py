"""Embeddings are computed once, survive anything that happens to their files, and are equal to the encoder's own."""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from longlive.text.base import TextEncoder, TextEncoderFactory
from longlive.text.cache import CachedTextEncoder, unique_prompts
from longlive.text.toy import ToyTextEncoder
from longlive.typing import PromptEmbeds


class CountingEncoder(ToyTextEncoder):
    """The toy encoder, with a log of what it was asked for."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(embed_dim=8, num_tokens=5, seed=seed)
        self.dtype = dtype
        self.batches: list[list[str]] = []

    def encode(self, prompts: Sequence[str]) -> PromptEmbeds:
        self.batches.append(list(prompts))
        return super().encode(prompts).to(self.dtype)


class CountingFactory(TextEncoderFactory):
    embed_dim = 8
    num_tokens = 5

    def __init__(self) -> None:
        self.num_builds = 0

    @property
    def fingerprint(self) -> str:
        return CountingEncoder().fingerprint

    def build(self) -> TextEncoder:
        self.num_builds += 1
        return CountingEncoder()


def entries(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


PROMPTS = ["a red circle", "", "a blue square moves right over a dark ground", "a red circle"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cached_embeddings_equal_the_encoders_from_every_layer(tmp_path: Path, dtype: torch.dtype) -> None:
    expected = CountingEncoder(dtype=dtype).encode(PROMPTS)
    encoder = CountingEncoder(dtype=dtype)
    cached = CachedTextEncoder(encoder, tmp_path)
    computed, from_memory = cached.encode(PROMPTS), cached.encode(PROMPTS)
    from_disk = CachedTextEncoder(encoder, tmp_path).encode(PROMPTS)
    for result in (computed, from_memory, from_disk):
        assert result.dtype == dtype
        assert torch.equal(result, expected)
    assert encoder.batches == [PROMPTS[:3]]


def test_only_missing_prompts_reach_the_encoder_once_each_in_one_batch(tmp_path: Path) -> None:
    CachedTextEncoder(CountingEncoder(), tmp_path).encode(["known"])
    encoder = CountingEncoder()
    CachedTextEncoder(encoder, tmp_path).encode(["new", "known", "newer", "new"])
    assert encoder.batches == [["new", "newer"]]


def test_a_fully_cached_run_never_builds_the_encoder(tmp_path: Path) -> None:
    """Loading it would cost 11 GB on every rank."""
    factory = CountingFactory()
    first = CachedTextEncoder(factory, tmp_path).encode(PROMPTS)
    assert factory.num_builds == 1
    cached = CachedTextEncoder(factory, tmp_path)
    assert torch.equal(cached.encode(PROMPTS), first)
    assert factory.num_builds == 1
    cached.encode(["new"])
    cached.encode(["newer"])
    assert factory.num_builds == 2


def test_it_is_a_text_encoder_without_weights_of_its_own(tmp_path: Path) -> None:
    """As a submodule, the wrapped encoder would be copied into every checkpoint."""
    encoder = CountingEncoder()
    encoder.weight = torch.nn.Parameter(torch.zeros(3))
    cached = CachedTextEncoder(encoder, tmp_path)
    assert isinstance(cached, TextEncoder)
    assert (cached.embed_dim, cached.num_tokens, cached.fingerprint) == (8, 5, encoder.fingerprint)
    assert not cached.state_dict()
    assert cached.encode([]).shape == (0, 5, 8)


def test_encoders_with_other_fingerprints_share_a_folder(tmp_path: Path) -> None:
    """An entry found under another encoder's name would train on that encoder's embeddings."""
    first = CachedTextEncoder(CountingEncoder(seed=1), tmp_path).encode(PROMPTS)
    second = CachedTextEncoder(CountingEncoder(seed=2), tmp_path).encode(PROMPTS)
    assert not torch.equal(first, second)
    assert torch.equal(second, CountingEncoder(seed=2).encode(PROMPTS))


def test_entries_are_small_files_in_two_levels_of_folders_and_nothing_else(tmp_path: Path) -> None:
    CachedTextEncoder(CountingEncoder(), tmp_path).encode(PROMPTS)
    files = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 3
    for path in files:
        assert path.suffix == ".safetensors"
        assert path.parts[:2] == (path.stem[:2], path.stem[2:4])


def damage_truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def damage_one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def damage_empty(path: Path) -> None:
    path.write_bytes(b"")


def damage_other_format(path: Path) -> None:
    path.write_text("{}")


@pytest.mark.parametrize("damage", [damage_truncate, damage_one_bit, damage_empty, damage_other_format])
def test_a_damaged_entry_is_computed_again_with_one_log_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], object]
) -> None:
    expected = CachedTextEncoder(CountingEncoder(), tmp_path).encode(["a red circle"])
    damage(entries(tmp_path)[0])
    encoder = CountingEncoder()
    with caplog.at_level(logging.WARNING):
        assert torch.equal(CachedTextEncoder(encoder, tmp_path).encode(["a red circle"]), expected)
    assert encoder.batches == [["a red circle"]]
    assert len(caplog.records) == 1
    assert str(entries(tmp_path)[0]) in caplog.text

    caplog.clear()
    assert torch.equal(CachedTextEncoder(encoder, tmp_path).encode(["a red circle"]), expected)
    assert len(encoder.batches) == 1, "the entry was not repaired"
    assert not caplog.records


def test_an_entry_of_another_shape_is_not_used(tmp_path: Path) -> None:
    class Renamed(ToyTextEncoder):
        fingerprint = CountingEncoder().fingerprint

    CachedTextEncoder(Renamed(embed_dim=16), tmp_path).encode(["red"])
    assert torch.equal(
        CachedTextEncoder(CountingEncoder(), tmp_path).encode(["red"]), CountingEncoder().encode(["red"])
    )


def test_a_cache_that_cannot_be_written_still_answers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A full disk must not end a training run that only wanted to save time."""
    cached = CachedTextEncoder(CountingEncoder(), tmp_path / "cache")
    (tmp_path / "cache").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        assert torch.equal(cached.encode(["red"]), CountingEncoder().encode(["red"]))
    assert "could not be cached" in caplog.text


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("longlive.text.cache.os.replace", fail)
    CachedTextEncoder(CountingEncoder(), tmp_path).encode(["red"])
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_memory_keeps_the_most_recent_and_stays_in_its_budget(tmp_path: Path) -> None:
    one_token = 8 * 4
    cached = CachedTextEncoder(CountingEncoder(), tmp_path, memory_bytes=2 * one_token)
    cached.encode(["red", "blue"])
    cached.encode(["red"])
    cached.encode(["green"])  # puts blue out, the least recently used
    for path in entries(tmp_path):
        path.unlink()
    encoder = CountingEncoder()
    cached._encoder[0] = encoder
    cached.encode(["red", "green"])
    assert encoder.batches == []
    cached.encode(["blue"])
    assert encoder.batches == [["blue"]]


def test_a_prompt_with_broken_unicode_is_cached_like_any_other(tmp_path: Path) -> None:
    cached = CachedTextEncoder(CountingEncoder(), tmp_path, memory_bytes=0)
    first = cached.encode(["red \ud83d circle"])
    assert torch.equal(cached.encode(["red \ud83d circle"]), first)
    assert len(entries(tmp_path)) == 1


def test_writers_and_readers_of_the_same_entries_agree(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An entry written in place would be read half-finished by another rank."""
    prompts = [f"prompt {index}" for index in range(20)]
    expected = CountingEncoder().encode(prompts)

    def encode_often(_: int) -> bool:
        agreed = True
        for _ in range(10):
            for path in entries(tmp_path)[::3]:
                path.unlink(missing_ok=True)
            agreed &= torch.equal(CachedTextEncoder(CountingEncoder(), tmp_path).encode(prompts), expected)
        return agreed

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(encode_often, range(4)))
    assert "unusable" not in caplog.text
    assert not list(tmp_path.rglob("*.tmp"))


def test_impossible_settings_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file; name a folder"):
        CachedTextEncoder(CountingEncoder(), tmp_path / "file")
    with pytest.raises(ValueError, match="memory_bytes=-1 is negative"):
        CachedTextEncoder(CountingEncoder(), tmp_path, memory_bytes=-1)


def test_unique_prompts_are_listed_once_and_indexed_by_place() -> None:
    prompts = (("a", "b", "a"), ("c", "a", ""))
    distinct, index = unique_prompts(prompts)
    assert distinct == ["a", "b", "c", ""]
    assert index.dtype == torch.int64
    assert index.tolist() == [[0, 1, 0], [2, 0, 3]]


def test_unique_prompts_refuses_ragged_and_empty_batches() -> None:
    with pytest.raises(ValueError, match=r"different numbers of prompts, \[1, 2\]; repeat prompts so that all have 2"):
        unique_prompts([["a"], ["a", "b"]])
    for empty in ([], [[]], [[], []]):
        with pytest.raises(ValueError, match="the batch has no prompt"):
            unique_prompts(empty)
