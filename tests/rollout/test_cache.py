"""The test that training and inference agree: cached passes against the teacher-forcing forward of the same tokens."""

from itertools import pairwise

import pytest
import torch

from longlive.models.attention import ChunkedAttention, SelfAttention, dense_attention
from longlive.models.visibility import Role, Segment, VisibilityRule, teacher_forcing_segments, visible_history
from longlive.models.wan.model import CausalWan
from longlive.models.wan.rope import Rotation, rotation
from longlive.rollout.cache import KeyValueCache
from longlive.typing import Heads, Latents, Tensor

CHUNK_FRAMES, CHUNKS, HEIGHT, WIDTH = 2, 7, 4, 6
PATCHES = (HEIGHT // 2, WIDTH // 2)
TOKENS = CHUNK_FRAMES * PATCHES[0] * PATCHES[1]
SHOTS = torch.tensor([[0, 0, 1, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, 1]])

RULES = {
    "everything": VisibilityRule(),
    "window": VisibilityRule(window_chunks=3),
    "window and sink": VisibilityRule(window_chunks=4, sink_chunks=1),
    "window and shot sink": VisibilityRule(window_chunks=3, shot_sink=True),
    "window and both sinks": VisibilityRule(window_chunks=4, sink_chunks=1, shot_sink=True),
    "own chunk only": VisibilityRule(window_chunks=1),
}


class Clip:
    """Clean and noisy latents of two samples with different prompts and timesteps."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (2, CHUNKS * CHUNK_FRAMES, 4, HEIGHT, WIDTH)
        self.clean = torch.randn(shape, generator=generator)
        self.noisy = torch.randn(shape, generator=generator)
        self.timesteps = 1000 * torch.rand(2, CHUNKS, generator=generator).repeat_interleave(CHUNK_FRAMES, dim=1)
        self.prompts = torch.randn(3, 5, 8, generator=generator)
        self.prompt_index = torch.tensor([[0, 0, 1, 1, 1, 2, 2], [2, 1, 1, 1, 0, 0, 0]])

    def frames(self, chunk: int) -> slice:
        return slice(chunk * CHUNK_FRAMES, (chunk + 1) * CHUNK_FRAMES)


@pytest.fixture
def clip() -> Clip:
    return Clip()


def absolute_positions(shot_index: Tensor, offset: float) -> Tensor:
    return torch.arange(CHUNKS * CHUNK_FRAMES) + offset * shot_index.repeat_interleave(CHUNK_FRAMES, dim=1)


@torch.no_grad()
def forced(network: CausalWan, clip: Clip, attention: SelfAttention, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Velocities of the clean and of the noisy copy."""
    velocity = network(
        torch.cat([clip.clean, clip.noisy], dim=1),
        torch.cat([torch.zeros_like(clip.timesteps), clip.timesteps], dim=1),
        clip.prompts,
        clip.prompt_index.repeat(1, 2),
        positions.repeat(1, 2),
        attention,
    )
    clean, noisy = velocity.chunk(2, dim=1)
    return clean, noisy


def make_cache(network: CausalWan, rule: VisibilityRule, **settings: object) -> KeyValueCache:
    config = network.config
    defaults: dict[str, object] = {"batch_size": 2, "num_chunks": CHUNKS}
    return KeyValueCache(
        num_layers=config.num_layers,
        chunk_frames=CHUNK_FRAMES,
        patches=PATCHES,
        num_heads=config.num_heads,
        head_dim=config.head_dim,
        rule=rule,
        **(defaults | settings),
    )


@torch.no_grad()
def cached(network: CausalWan, clip: Clip, cache: KeyValueCache) -> tuple[Tensor, Tensor]:
    """The same velocities, chunk by chunk."""
    shots = SHOTS.tolist()

    def call(latents: Latents, timesteps: Tensor, chunk: int, write: bool) -> Tensor:
        return network(
            latents[:, clip.frames(chunk)],
            timesteps[:, clip.frames(chunk)],
            clip.prompts,
            clip.prompt_index[:, chunk : chunk + 1],
            view.frame_positions,
            view.attention(write=write),
        )

    clean, noisy = [], []
    for chunk in range(CHUNKS):
        view = cache.open(chunk, shots)
        call(clip.clean + 1, clip.timesteps, chunk, write=False)  # an earlier solver step, which must leave no trace
        noisy.append(call(clip.noisy, clip.timesteps, chunk, write=False))
        clean.append(call(clip.clean, torch.zeros_like(clip.timesteps), chunk, write=True))
        view.commit()
    return torch.cat(clean, dim=1), torch.cat(noisy, dim=1)


def assert_equal(ours: tuple[Tensor, Tensor], oracle: tuple[Tensor, Tensor], tolerance: float = 1e-5) -> None:
    for name, a, b in zip(("clean", "noisy"), ours, oracle, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=0, msg=lambda text, name=name: f"{name} copy: {text}")


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("offset", [0.0, 8.0])
def test_cached_passes_equal_the_teacher_forcing_forward(
    network: CausalWan, clip: Clip, rule: VisibilityRule, offset: float
) -> None:
    """Catches any disagreement of training and rollout: masks, sinks, positions, scratch in slots, swapped samples."""
    attention = ChunkedAttention(teacher_forcing_segments(CHUNKS, TOKENS), SHOTS, rule)
    oracle = forced(network, clip, attention, absolute_positions(SHOTS, offset))
    assert_equal(cached(network, clip, make_cache(network, rule, shot_rope_offset=offset)), oracle)


def test_every_rule_changes_the_output(network: CausalWan, clip: Clip) -> None:
    """The test above could not fail if the network did not care whom it sees."""
    outputs = [cached(network, clip, make_cache(network, rule))[1] for rule in RULES.values()]
    for i, a in enumerate(outputs):
        for b in outputs[:i]:
            assert (a - b).abs().max() > 1e-2


class ListPositionAttention:
    """Teacher forcing whose queries see every chunk at its place in their own visible list, written out per chunk."""

    def __init__(self, shot_index: Tensor, rule: VisibilityRule, offset: float) -> None:
        self.segments: tuple[Segment, ...] = teacher_forcing_segments(CHUNKS, TOKENS)
        self.shot_index = shot_index.tolist()
        self.rule = rule
        self.offset = offset

    def __call__(self, query: Heads, key: Heads, value: Heads, rotation: Rotation, layer: int) -> Heads:
        queries, keys, values = (x.split(TOKENS, dim=1) for x in (query, key, value))
        samples = []
        for b, shots in enumerate(self.shot_index):
            outputs = []
            for i, segment in enumerate(self.segments):
                visible = visible_history(segment.chunk, shots, self.rule)
                sources = [*visible, i]  # clean chunks come first in the sequence: their segment is their chunk
                cuts = [int(shots[a] != shots[c]) for a, c in pairwise([*visible, segment.chunk])]
                starts = torch.arange(len(sources)) * CHUNK_FRAMES + self.offset * torch.tensor([0, *cuts]).cumsum(0)
                turns = self.turns(starts, key.shape[-1])
                turned = turns.rotate(torch.cat([keys[s][b : b + 1] for s in sources], dim=1))
                own = self.turns(starts[-1:], key.shape[-1]).rotate(queries[i][b : b + 1])
                outputs.append(dense_attention(own, turned, torch.cat([values[s][b : b + 1] for s in sources], dim=1)))
            samples.append(torch.cat(outputs, dim=1))
        return torch.cat(samples)

    @staticmethod
    def turns(starts: Tensor, head_dim: int) -> Rotation:
        return rotation((starts[:, None] + torch.arange(CHUNK_FRAMES)).reshape(1, -1), *PATCHES, head_dim)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_relative_positions_equal_rotation_inside_the_visible_list(
    network: CausalWan, clip: Clip, rule: VisibilityRule, offset: float
) -> None:
    oracle = forced(network, clip, ListPositionAttention(SHOTS, rule, offset), absolute_positions(SHOTS, 0))
    cache = make_cache(network, rule, relative_rope=True, shot_rope_offset=offset)
    assert_equal(cached(network, clip, cache), oracle)


def test_relative_and_absolute_agree_until_something_is_evicted(network: CausalWan, clip: Clip) -> None:
    rule = VisibilityRule(window_chunks=4, sink_chunks=1)
    absolute = cached(network, clip, make_cache(network, rule))
    relative = cached(network, clip, make_cache(network, rule, relative_rope=True))
    whole = 4 * CHUNK_FRAMES
    for a, b in zip(absolute, relative, strict=True):
        torch.testing.assert_close(a[:, :whole], b[:, :whole], atol=1e-5, rtol=0)
        assert (a[:, whole:] - b[:, whole:]).abs().max() > 1e-3


def test_relative_positions_stay_bounded_and_absolute_ones_do_not(network: CausalWan) -> None:
    rule = VisibilityRule(window_chunks=3, sink_chunks=1)
    shots = [list(range(40))]  # a cut at every chunk

    def last(relative: bool) -> float:
        cache = make_cache(network, rule, batch_size=1, num_chunks=40, relative_rope=relative, shot_rope_offset=8.0)
        for chunk in range(40):
            view = cache.open(chunk, shots)
            view.commit()
        return view.frame_positions.max().item()

    assert last(relative=False) == 39 * (CHUNK_FRAMES + 8) + CHUNK_FRAMES - 1
    assert last(relative=True) == 2 * (CHUNK_FRAMES + 8) + CHUNK_FRAMES - 1


@pytest.mark.parametrize("relative", [False, True])
def test_a_bfloat16_cache_stays_close(network: CausalWan, clip: Clip, relative: bool) -> None:
    rule = RULES["window and both sinks"]
    exact = cached(network, clip, make_cache(network, rule, relative_rope=relative))
    cache = make_cache(network, rule, relative_rope=relative, dtype=torch.bfloat16)
    rounded = cached(network, clip, cache)
    for a, b in zip(rounded, exact, strict=True):
        assert a.dtype == torch.float32
        assert 0 < (a - b).abs().max() < 0.05 * b.abs().max()
    assert cache.num_bytes * 2 == make_cache(network, rule).num_bytes


def test_bytes_are_those_of_the_window_whatever_the_length(network: CausalWan) -> None:
    rule = VisibilityRule(window_chunks=3, sink_chunks=1)
    cache = make_cache(network, rule, num_chunks=1000)
    config = network.config
    assert cache.num_bytes == 2 * config.num_layers * 2 * 3 * TOKENS * config.dim * 4


def test_a_chunk_whose_context_pass_was_forgotten_is_missed(network: CausalWan) -> None:
    """Otherwise the next chunk would attend to the scratch of solver steps, silently."""
    cache = make_cache(network, VisibilityRule(window_chunks=3))
    cache.open(0, SHOTS.tolist())
    with pytest.raises(ValueError, match=r"chunk=1 sees chunks \[0\].*context pass"):
        cache.open(1, SHOTS.tolist())


def test_a_denoise_pass_leaves_the_chunk_out_of_the_tables(network: CausalWan) -> None:
    cache = make_cache(network, VisibilityRule(window_chunks=2))
    for chunk in range(3):
        cache.open(chunk, SHOTS.tolist()).commit()
    view = cache.open(3, SHOTS.tolist())
    assert cache.tables == [(2, None)] * 2
    view.commit()
    assert cache.tables == [(2, 3)] * 2


def test_reading_copies_nothing(network: CausalWan) -> None:
    """The visible keys of a chunk are a slice of the ring, also where the samples' shots and tables differ."""
    cache = make_cache(network, RULES["window and both sinks"])
    for chunk in range(CHUNKS):
        view = cache.open(chunk, SHOTS.tolist())
        view.commit()
    assert cache.tables[0] != cache.tables[1]
    keys, values = view.read(0, torch.float32)
    stored_keys, stored_values = cache.layers[0].read(4, torch.float32)
    assert keys.data_ptr() == stored_keys.data_ptr()
    assert values.data_ptr() == stored_values.data_ptr()


@pytest.mark.parametrize("relative", [False, True])
def test_a_gradient_is_that_of_what_the_pass_has_read(network: CausalWan, clip: Clip, relative: bool) -> None:
    """Catches a graph that holds the live ring: later chunks would overwrite what backward needs (known mistake 11)."""

    def gradient(continue_before_backward: bool) -> Tensor:
        cache = make_cache(network, VisibilityRule(window_chunks=2), relative_rope=relative)
        inputs = clip.noisy.clone().requires_grad_()
        shots = SHOTS.tolist()
        total = torch.zeros(())
        for chunk in range(CHUNKS):
            view = cache.open(chunk, shots)
            frames = clip.frames(chunk)
            arguments = (clip.prompts, clip.prompt_index[:, chunk : chunk + 1], view.frame_positions)
            if chunk == 2:
                velocity = network(
                    inputs[:, frames], clip.timesteps[:, frames], *arguments, view.attention(write=False)
                )
                total = velocity.square().sum()
                if not continue_before_backward:
                    break
            with torch.no_grad():
                network(clip.clean[:, frames], 0 * clip.timesteps[:, frames], *arguments, view.attention(write=True))
            view.commit()
        (result,) = torch.autograd.grad(total, inputs)
        return result

    expected = gradient(continue_before_backward=False)
    assert expected.abs().max() > 1e-3
    assert torch.equal(gradient(continue_before_backward=True), expected)


def test_clean_tokens_come_first() -> None:
    """`ListPositionAttention` relies on it."""
    segments = teacher_forcing_segments(2, 3)
    assert [s.role for s in segments] == [Role.CLEAN, Role.CLEAN, Role.NOISY, Role.NOISY]
