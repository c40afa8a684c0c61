"""What a slot keeps: against quantisation written out by hand, its bytes, and its error on keys with large channels."""

from collections.abc import Iterator

import pytest
import torch

from longlive.models.attention import dense_attention
from longlive.models.visibility import VisibilityRule
from longlive.models.wan.config import WanConfig
from longlive.precision.nvfp4.format import quantise
from longlive.rollout.cache import KeyValueCache
from longlive.rollout.slots import CacheDtype, DenseStorage, NVFP4Storage, SlotIndex, SlotStorage, make_storage
from longlive.typing import Heads, Tensor

BATCH, SLOTS, TOKENS, HEADS, HEAD_DIM = 2, 3, 12, 2, 32


def make(dtype: CacheDtype = "nvfp4", batch: int = BATCH, heads: int = HEADS, head_dim: int = HEAD_DIM) -> SlotStorage:
    return make_storage(batch, SLOTS, TOKENS, heads, head_dim, dtype, "cpu")


def chunk(seed: int, head_dim: int = HEAD_DIM) -> tuple[Heads, Heads]:
    """Keys, with large channels, and values."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, BATCH, TOKENS, HEADS, head_dim, generator=generator)
    return keys + 3 * torch.randn(BATCH, 1, HEADS, head_dim, generator=generator), values


def rounded(keys: Heads, values: Heads) -> tuple[Heads, Heads]:
    """By hand, one matrix after the other."""
    rounded_keys, rounded_values = torch.empty_like(keys), torch.empty_like(values)
    for sample in range(keys.shape[0]):
        for head in range(keys.shape[2]):
            mean = keys[sample, :, head].mean(0).bfloat16().float()
            centred = quantise(keys[sample, :, head] - mean, "mse").dequantise()
            rounded_keys[sample, :, head] = centred + mean
            rounded_values[sample, :, head] = quantise(values[sample, :, head], "mse").dequantise()
    return rounded_keys, rounded_values


def tensors_of(thing: object) -> Iterator[Tensor]:
    if isinstance(thing, Tensor):
        yield thing
    elif hasattr(thing, "__dict__"):
        for value in vars(thing).values():
            yield from tensors_of(value)


@pytest.mark.parametrize("indices", [(0, 2), (torch.tensor([0, 1]), torch.tensor([1, 0]))], ids=["same", "own"])
def test_what_is_read_is_what_quantising_by_hand_gives(indices: tuple[SlotIndex, ...]) -> None:
    """Catches samples, heads or slots that share an amax or a mean, or end up in each other's place."""
    storage = make()
    for seed, index in enumerate(indices):
        storage.write(index, *chunk(seed))
    keys, values = storage.read(SLOTS, torch.float32)
    assert keys.shape == values.shape == (BATCH, SLOTS, TOKENS, HEADS, HEAD_DIM)
    for seed, index in enumerate(indices):
        slots = [index] * BATCH if isinstance(index, int) else index.tolist()
        for ours, expected in zip((keys, values), rounded(*chunk(seed)), strict=True):
            assert torch.equal(torch.stack([ours[sample, slot] for sample, slot in enumerate(slots)]), expected)


def test_a_slot_does_not_depend_on_the_rest_of_the_batch_or_on_the_split_of_the_heads() -> None:
    """Public code keeps sample 0 alone in NVFP4 (known mistake 14). A sequence-parallel rank holds some heads."""
    together = make()
    together.write(1, *chunk(0))
    part = make(batch=1, heads=1)
    part.write(1, *(x[1:, :, 1:] for x in chunk(0)))
    for whole, alone in zip(together.read(SLOTS, torch.float32), part.read(SLOTS, torch.float32), strict=True):
        assert torch.equal(whole[1:, :, :, 1:], alone)


@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_bytes_are_less_than_a_third_of_bfloat16_with_all_bookkeeping(head_dim: int) -> None:
    tokens = 64  # a chunk of the toy world
    packed = NVFP4Storage(BATCH, SLOTS, tokens, HEADS, head_dim, "cpu")
    dense = DenseStorage(BATCH, SLOTS, tokens, HEADS, head_dim, torch.bfloat16, "cpu")
    for storage in (packed, dense):
        assert storage.num_bytes == sum(tensor.nbytes for tensor in tensors_of(storage))
    ratio = packed.num_bytes / dense.num_bytes
    assert ratio == 0.28125 + (8 + 2 * head_dim) / (4 * tokens * head_dim)
    assert ratio <= 0.30


def test_the_published_network_needs_2_72_gib_in_place_of_9_67() -> None:
    """Window of 32 frames, 704 x 1280; LongLive-2.0's setting."""
    config = WanConfig.ti2v_5b()

    def gib(dtype: CacheDtype) -> float:
        cache = KeyValueCache(
            num_layers=config.num_layers,
            batch_size=1,
            num_chunks=100,
            chunk_frames=8,
            patches=config.patches(44, 80),
            num_heads=config.num_heads,
            head_dim=config.head_dim,
            rule=VisibilityRule(window_chunks=4, sink_chunks=1),
            dtype=dtype,
            device="meta",
        )
        return cache.num_bytes / 2**30

    assert gib(torch.bfloat16) == pytest.approx(9.67, abs=0.005)
    assert gib("nvfp4") == pytest.approx(2.72, abs=0.005)


def test_keys_with_large_channels_keep_their_attention() -> None:
    """Channels offset by 2.7 standard deviations, exact values: the error of what attention gives, from the design."""
    generator = torch.Generator().manual_seed(0)
    query, keys, values = torch.randn(3, 2, 512, 4, 128, generator=generator)
    keys = keys + 2.7 * torch.randn(2, 1, 4, 128, generator=generator)
    storage = NVFP4Storage(2, 1, 512, 4, 128, "cpu")
    storage.write(0, keys, values)
    read_keys, read_values = (x[:, 0] for x in storage.read(1, torch.float32))
    plain_keys = quantise(keys.transpose(1, 2), "mse").dequantise().transpose(1, 2)
    exact = dense_attention(query, keys, values)

    def error(keys: Heads, values: Heads) -> float:
        return ((dense_attention(query, keys, values) - exact).norm() / exact.norm()).item()

    assert error(read_keys, values) == pytest.approx(0.087, rel=0.05)
    assert error(plain_keys, values) == pytest.approx(0.253, rel=0.05)
    assert error(read_keys, read_values) == pytest.approx(0.123, rel=0.05)


def test_bfloat16_reads_are_the_float32_ones_rounded() -> None:
    storage = make()
    storage.write(0, *chunk(0))
    for half, full in zip(storage.read(1, torch.bfloat16), storage.read(1, torch.float32), strict=True):
        assert half.dtype == torch.bfloat16
        assert (half - full).abs().max() <= full.abs().max() * 2**-8


def test_overwriting_what_was_read_changes_nothing_stored() -> None:
    """The pass puts its own keys there."""
    storage = make()
    storage.write(0, *chunk(0))
    before = [x.clone() for x in storage.read(SLOTS, torch.float32)]
    for x in storage.read(SLOTS, torch.float32):
        x.fill_(7)
    for old, new in zip(before, storage.read(SLOTS, torch.float32), strict=True):
        assert torch.equal(old, new)


def test_slots_that_nobody_wrote_and_chunks_of_zeros_are_zero() -> None:
    """Uninitialised scales can be NaN, and NaN times a hidden slot is still NaN."""
    storage = make()
    zeros = torch.zeros(BATCH, TOKENS, HEADS, HEAD_DIM)
    storage.write(0, zeros, zeros)
    assert all((x == 0).all() for x in storage.read(SLOTS, torch.float32))


def test_joining_slots_and_tokens_copies_nothing() -> None:
    """Otherwise every pass would hold the unpacked keys twice."""
    keys, _ = make().read(SLOTS, torch.float32)
    assert keys.flatten(1, 2).data_ptr() == keys.data_ptr()


def test_heads_that_are_no_whole_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"head_dim=24 is no multiple of it; use cache_dtype=bfloat16"):
        make(head_dim=24)
    assert isinstance(make(torch.bfloat16, head_dim=24), DenseStorage)
