"""The three attention functions agree, and see what visibility says."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from longlive.models.attention import ChunkedAttention, FlexAttention, MaskedAttention, block_mask
from longlive.models.visibility import (
    Role,
    Segment,
    VisibilityRule,
    segment_mask,
    segment_of_token,
    teacher_forcing_segments,
    token_mask,
)
from longlive.models.wan.rope import Rotation, rotation

CHUNKS, TOKENS, HEADS, HEAD_DIM = 5, 6, 2, 8
ORDERS = {
    "one_rank": teacher_forcing_segments(CHUNKS, TOKENS),
    "interleaved": tuple(Segment(role, chunk, TOKENS) for chunk in range(CHUNKS) for role in Role),
    "two_ranks": tuple(Segment(role, chunk, TOKENS) for part in ((0, 1, 2), (3, 4)) for role in Role for chunk in part),
    "noisy_first_and_uneven": tuple(
        Segment(role, chunk, 1 + 2 * chunk) for role in reversed(Role) for chunk in reversed(range(CHUNKS))
    ),
}
RULES = {
    "all": VisibilityRule(),
    "window": VisibilityRule(window_chunks=2),
    "sink": VisibilityRule(window_chunks=3, sink_chunks=1),
    "shot_sink": VisibilityRule(window_chunks=3, shot_sink=True),
    "both_sinks": VisibilityRule(window_chunks=4, sink_chunks=1, shot_sink=True),
}
SAME_SHOTS = torch.zeros(4, CHUNKS, dtype=torch.int64)
# Samples 0 and 3 share their cuts: grouping reorders the batch by a permutation that is not its own inverse.
OWN_SHOTS = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 2], [0, 0, 0, 0, 0], [0, 0, 1, 1, 1]])


def draw(segments, batch=4, dtype=torch.float64, seed=0):
    """Queries, keys, values that need gradients, and a rotation."""
    tokens = sum(segment.num_tokens for segment in segments)
    g = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(batch, tokens, HEADS, HEAD_DIM, generator=g, dtype=dtype, requires_grad=True) for _ in range(3)
    )
    turns = rotation(torch.randint(0, 50, (batch, tokens), generator=g), 1, 1, HEAD_DIM)
    return q, k, v, turns


def outputs_and_gradients(attention, q, k, v, turns):
    attended = attention(q, k, v, turns, layer=0)
    weights = torch.randn(attended.shape, generator=torch.Generator().manual_seed(9), dtype=attended.dtype)
    return attended, *torch.autograd.grad((attended * weights).sum(), (q, k, v))


@pytest.mark.parametrize("shots", [SAME_SHOTS, OWN_SHOTS], ids=["same_shots", "own_shots"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("segments", ORDERS.values(), ids=ORDERS)
def test_chunked_attention_equals_the_dense_mask(segments, rule, shots):
    """Outputs and gradients; samples with their own shots catch a mask made from the first sample's cuts."""
    inputs = draw(segments)
    chunked = outputs_and_gradients(ChunkedAttention(segments, shots, rule), *inputs)
    masked = outputs_and_gradients(MaskedAttention(segments, shots, rule), *inputs)
    for ours, oracle in zip(chunked, masked, strict=True):
        torch.testing.assert_close(ours, oracle, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("shots", [SAME_SHOTS, OWN_SHOTS], ids=["same_shots", "own_shots"])
@pytest.mark.parametrize("rule", [RULES["all"], RULES["both_sinks"]], ids=["all", "both_sinks"])
@pytest.mark.parametrize("order", ["one_rank", "noisy_first_and_uneven"])
@torch.no_grad()
def test_flex_attention_equals_the_dense_mask(order, rule, shots):
    segments = ORDERS[order]
    *inputs, turns = draw(segments, dtype=torch.float32)
    inputs = [*(x.detach() for x in inputs), turns]  # torch's CPU kernel refuses leaves that could get a gradient
    flex = FlexAttention(segments, shots, rule, compile=False)(*inputs, layer=0)
    oracle = MaskedAttention(segments, shots, rule)(*inputs, layer=0)
    torch.testing.assert_close(flex, oracle, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tokens", [7, 8, 13], ids=lambda tokens: f"{tokens}_tokens")
def test_flex_blocks_are_those_that_torch_finds_token_by_token(tokens):
    """Catches a block called full or empty that is not: eager FlexAttention ignores blocks, the kernel skips them."""
    segments = teacher_forcing_segments(CHUNKS, tokens)
    rule = RULES["both_sinks"]
    visible = torch.stack([segment_mask(segments, shots, rule) for shots in OWN_SHOTS.tolist()])
    dense = torch.stack([token_mask(segments, shots, rule) for shots in OWN_SHOTS.tolist()])
    length = dense.shape[-1]
    ours = block_mask(visible, segment_of_token(segments), block_size=8)
    oracle = create_block_mask(lambda b, h, q, k: dense[b, q, k], len(dense), 1, length, length, "cpu", BLOCK_SIZE=8)
    assert ours.seq_lengths == oracle.seq_lengths
    assert torch.equal(ours.to_dense(), oracle.to_dense())
    for ours_table, oracle_table in (
        (ours.kv_num_blocks, oracle.kv_num_blocks),
        (ours.full_kv_num_blocks, oracle.full_kv_num_blocks),
        (ours.q_num_blocks, oracle.q_num_blocks),
        (ours.full_q_num_blocks, oracle.full_q_num_blocks),
    ):
        assert torch.equal(ours_table, oracle_table)


def test_flex_attention_refuses_a_backward_on_the_cpu():
    segments = ORDERS["one_rank"]
    with pytest.raises(ValueError, match="no backward on device=cpu; train with ChunkedAttention"):
        FlexAttention(segments, SAME_SHOTS, RULES["all"], compile=False)(*draw(segments), layer=0)


@pytest.mark.parametrize("attention_class", [ChunkedAttention, MaskedAttention, FlexAttention])
def test_tokens_that_visibility_was_not_made_for_are_refused(attention_class):
    """Catches a mask of another batch or length that would broadcast or cut silently."""
    segments = ORDERS["one_rank"]
    attention = attention_class(segments, SAME_SHOTS, RULES["all"])
    with pytest.raises(ValueError, match="2 samples x 60 tokens arrive, but visibility was made for 4 x 60"):
        attention(*draw(segments, batch=2), layer=0)
    with pytest.raises(ValueError, match="4 samples x 60 tokens arrive, but visibility was made for 4 x 48"):
        attention_class(teacher_forcing_segments(4, TOKENS), SAME_SHOTS, RULES["all"])(*draw(segments), layer=0)


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_a_changed_chunk_changes_exactly_those_that_see_it(role, chunk):
    segments, rule = ORDERS["interleaved"], RULES["both_sinks"]
    attention = ChunkedAttention(segments, OWN_SHOTS, rule)
    q, k, v, turns = draw(segments)
    before = attention(q, k, v, turns, layer=0)
    changed = segments.index(Segment(role, chunk, TOKENS))
    where = segment_of_token(segments) == changed
    bump = torch.where(where[:, None, None], 1.0, 0.0).double()
    after = attention(q, k + bump, v + bump, turns, layer=0)
    moved = (after - before).abs().sum((2, 3)).unflatten(1, (-1, TOKENS)).sum(-1) > 0
    expected = torch.stack([segment_mask(segments, shots, rule)[:, changed] for shots in OWN_SHOTS.tolist()])
    assert torch.equal(moved, expected)


def test_queries_and_keys_are_turned_by_their_own_positions():
    """A common shift of all positions changes nothing; a shift of the history alone does."""
    segments = ORDERS["one_rank"]
    q, k, v, _ = draw(segments)
    attention = ChunkedAttention(segments, SAME_SHOTS, RULES["all"])
    positions = torch.arange(2 * CHUNKS * TOKENS).expand(4, -1)

    def attend(frame_positions):
        return attention(q, k, v, rotation(frame_positions, 1, 1, HEAD_DIM), layer=0)

    reference = attend(positions)
    torch.testing.assert_close(attend(positions + 1000), reference, rtol=1e-4, atol=1e-4)
    shifted = torch.where(positions < TOKENS, positions - 7, positions)
    assert (attend(shifted) - reference).abs().max() > 1e-2


def test_a_rotation_of_nothing_is_the_identity():
    q = draw(ORDERS["one_rank"])[0]
    zeros = torch.zeros(4, q.shape[1], HEAD_DIM // 2)
    assert torch.equal(Rotation(cos=zeros + 1, sin=zeros).rotate(q), q)
