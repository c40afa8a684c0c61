"""The recipe's settings, and random bits that depend on what they are for."""

import copy
import logging

import pytest
import torch

from longlive.precision.nvfp4.recipe import NVFP4Recipe, StepClock, hashed_bits, warn_of_bias

CPU = torch.device("cpu")


@pytest.mark.parametrize("operand", ["weights", "activations", "gradients"])
def test_a_rule_that_does_not_exist_is_refused_with_those_that_do(operand):
    with pytest.raises(ValueError, match=rf"{operand}='static_5' is no scale rule; use one of static_6, .*, or null"):
        NVFP4Recipe(**{operand: "static_5"})


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"mean_tokens": 1}, "mean_tokens=1 tokens have no mean to speak of; use 2 or more, or null"),
    ],
)
def test_means_that_change_nothing_are_refused(settings, reason):
    with pytest.raises(ValueError, match=reason):
        NVFP4Recipe(**settings)


def test_biased_gradients_are_allowed_and_said_once(caplog):
    warn_of_bias.cache_clear()
    with caplog.at_level(logging.WARNING):
        NVFP4Recipe(gradients="mae", stochastic_gradients=False)
        NVFP4Recipe()
        assert not caplog.messages
        for _ in range(3):
            NVFP4Recipe(gradients="mae")
    assert len(caplog.messages) == 1
    assert "biased" in caplog.messages[0]


def test_bits_repeat_in_another_run():
    """A resumed run starts with a fresh clock in the middle: what was drawn before must not matter."""
    first, resumed = StepClock(seed=3), StepClock(seed=3)
    first.bits("block.0", "dgrad", 32, 64, CPU)
    for clock in (first, resumed):
        clock.advance(7)
    drawn = [[clock.bits("block.0", "dgrad", 32, 64, CPU) for _ in range(2)] for clock in (first, resumed)]
    assert torch.equal(drawn[0][0], drawn[1][0])
    assert torch.equal(drawn[0][1], drawn[1][1])


def test_bits_of_two_purposes_are_independent():
    """Microbatches that share their bits add up their rounding errors instead of averaging them."""

    def draw(seed=0, stream=0, step=1, layer="a", operand="dgrad", draws=1):
        clock = StepClock(seed, stream=stream)
        clock.advance(step)
        return [clock.bits(layer, operand, 64, 64, CPU) for _ in range(draws)][-1].double()

    base = draw()
    others = [draw(seed=1), draw(stream=1), draw(step=2), draw(layer="b"), draw(operand="wgrad"), draw(draws=2)]
    for other in others:
        assert abs(torch.corrcoef(torch.stack((base.flatten(), other.flatten())))[0, 1]) < 5 / 64


def test_microbatches_of_one_step_draw_one_after_the_other():
    clock = StepClock()
    clock.advance(4)
    first = clock.bits("a", "dgrad", 32, 32, CPU)
    clock.advance(4)
    assert not torch.equal(first, clock.bits("a", "dgrad", 32, 32, CPU))


def test_bits_are_uniform_bytes():
    bits = hashed_bits(12345, torch.arange(512), 512)
    counts = bits.flatten().bincount(minlength=256).double()
    chi_square = ((counts - 1024) ** 2 / 1024).sum()
    assert 255 - 5 * 22.6 < chi_square < 255 + 5 * 22.6
    for dim in (0, 1):
        neighbours = torch.stack((bits.double().roll(1, dim).flatten(), bits.double().flatten()))
        assert abs(torch.corrcoef(neighbours)[0, 1]) < 5 / 512


def test_bits_belong_to_the_token_whoever_holds_it():
    """Ranks hold the tokens of a clip in runs of another order than one process does."""
    whole = StepClock(seed=5)
    everything = whole.bits("a", "wgrad", 96, 32, CPU)
    for positions in (torch.arange(32, 64), torch.tensor([*range(64, 96), *range(16)])):
        rank = StepClock(seed=5)
        rank.place_tokens(positions)
        assert torch.equal(rank.bits("a", "wgrad", len(positions), 32, CPU), everything[positions])
    rank = StepClock(seed=5)
    rank.place_tokens(64)
    assert torch.equal(rank.bits("a", "wgrad", 32, 32, CPU), everything[64:])


def test_other_numbers_of_tokens_have_positions_of_their_own():
    """Keys of the prompts pass through the same kind of layer; rows that pad must not share a token's bits."""
    clock = StepClock()
    clock.place_tokens(torch.arange(100, 140))
    padded = clock.bits("a", "dgrad", 64, 32, CPU)
    assert len(padded.unique(dim=0)) == 64
    assert torch.equal(clock.bits("prompt", "dgrad", 512, 32, CPU), StepClock().bits("prompt", "dgrad", 512, 32, CPU))


def test_positions_beyond_32_bits_are_told_apart():
    high = hashed_bits(1, torch.tensor([5, 5 + (1 << 32)]), 64)
    assert not torch.equal(high[0], high[1])


def test_a_copied_layer_keeps_its_clock():
    """A copy that nobody advances would round every step with the same bits."""
    clock = StepClock()
    assert copy.deepcopy({"clock": clock})["clock"] is clock
