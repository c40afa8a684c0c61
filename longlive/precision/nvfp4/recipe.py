"""Which tensor of a linear layer is quantised how, and the clock that names its random bits.

    FPROP   Y  = X W^T       X 1x16, nearest                  W 16x16, nearest
    DGRAD   dX = dY W        dY 1x16, stochastic              the same codes of W, transposed
    WGRAD   dW = dY^T X      RHT(dY^T) 1x16, stochastic       RHT(X^T) 1x16, nearest

The scheme is that of "Pretraining Large Language Models with NVFP4" (arXiv 2509.25149), with a scale rule per operand.
With `mean_tokens` X is first split into means and what differs from them, as in "The Curse and Blessing of Mean Bias in
FP4-Quantized LLM Training" (arXiv 2603.10444), which takes one mean over all tokens:

    Y = (X - M) W^T + M W^T     the first product as above, the second in high precision, one row per mean

Stochastic rounding reads eight bits per element. They are a hash of the seed, the step, the layer, the operand, how
often that was drawn in this step, and the *position of the token*, never a generator's state: a resumed run repeats
them, and with `StepClock.place_tokens` so do ranks that share a clip's tokens, however those are split.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.distributed import ProcessGroup, ReduceOp, all_reduce

from longlive import rng
from longlive.precision.nvfp4.format import HAS_TRITON, RULES
from longlive.typing import Int, Tensor, UInt8

log = logging.getLogger(__name__)

ADAPTIVE_RULES = ("mse", "mae", "abs_max")
"""Rules that look at the error of rounding."""

Reduce = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class NVFP4Recipe:
    """How the three GEMMs of a linear layer are quantised.

    Attributes:
        weights: scale rule of W. None: W stays in high precision, which only emulation can do; so for the other
            operands.
        weight_tiles: whether 16x16 weights share a scale, so that one quantisation serves FPROP and DGRAD. Without, as
            every other operand, 1x16 do, which is more exact (`mse`: a relative error of .0076 in place of .0124, in
            as many bytes), and DGRAD multiplies by the decoded weights in high precision: for weights that do not
            learn.
        activations: scale rule of X and RHT(X^T).
        gradients: scale rule of dY and RHT(dY^T). A rule that compares errors is biased together with stochastic
            rounding: it prefers what the draw happened to favour.
        stochastic_gradients: whether dY and RHT(dY^T) are rounded stochastically.
        hadamard: whether WGRAD's operands are transformed along the tokens.
        mean_tokens: X is quantised less the mean of every so many tokens, within a sample; the mean's product and its
            gradients are in high precision, for that share of the multiplications, and are kept for backward in X's
            dtype. What tokens have in common, a good part of their energy, then does not widen their scales. How many
            share a mean matters little (recipes/benchmarks.md); a divisor of a chunk's tokens, such as a frame's (880
            of the 5B model at 704 x 1280), gives every split over ranks the same means. None, or if X is not quantised:
            no means.
        reduce_amax: whether amax of activations and gradients is the largest over the sequence group, so that N ranks
            compute what one does, for two small reductions per layer. Without it each rank scales by its own.

    Raises:
        ValueError: for a rule that does not exist, or means of fewer than two tokens.
    """

    weights: str | None = "mse"
    activations: str | None = "mse"
    gradients: str | None = "static_6"
    weight_tiles: bool = True
    stochastic_gradients: bool = True
    hadamard: bool = True
    mean_tokens: int | None = 880
    reduce_amax: bool = False

    def __post_init__(self) -> None:
        for operand in ("weights", "activations", "gradients"):
            rule = getattr(self, operand)
            if rule is not None and rule not in RULES:
                raise ValueError(f"{operand}={rule!r} is no scale rule; use one of {', '.join(RULES)}, or null")
        if self.mean_tokens is not None and self.mean_tokens < 2:
            raise ValueError(f"mean_tokens={self.mean_tokens} tokens have no mean to speak of; use 2 or more, or null")
        if self.gradients in ADAPTIVE_RULES and self.stochastic_gradients:
            warn_of_bias(self.gradients)


@cache
def warn_of_bias(rule: str) -> None:
    """Said once per rule and process."""
    log.warning(
        "gradients=%s with stochastic_gradients=True gives biased gradients: the rule keeps the draw with the smaller "
        "error. Unbiased: gradients=static_6, or stochastic_gradients=False",
        rule,
    )


class StepClock:
    """What random bits depend on besides the layer, and whether it is still time for NVFP4. Shared by all layers of a
    run, and advanced by who trains.

    Args:
        seed: the run's seed.
        stream: tells ranks apart whose tokens have no common numbering: the data-parallel rank, or the global one.
        reduce: the elementwise largest of a float32 tensor over the ranks that share a clip (`largest_over`); read only
            with `NVFP4Recipe.reduce_amax`. None: this process is alone.

    Attributes:
        over: the steps whose forward products are NVFP4 are over. Backward's stay.
    """

    def __init__(self, seed: int = 0, *, stream: int = 0, reduce: Reduce | None = None) -> None:
        self.seed = seed
        self.stream = stream
        self.reduce = reduce
        self.step = 0
        self.over = False
        self._positions: Tensor | int = 0
        self._draws: Counter[str] = Counter()

    def __deepcopy__(self, memo: dict[int, Any]) -> StepClock:
        """A copied layer goes on with the same clock: one that nobody advances would repeat its bits for ever."""
        return self

    def advance(self, step: int) -> None:
        """The optimizer step that follows. Calls with the same step (gradient accumulation) change nothing, and the
        microbatches draw one after the other."""
        if step != self.step:
            self.step = step
            self._draws.clear()

    def place_tokens(self, positions: Int[Tensor, " tokens"] | int) -> None:
        """Where the tokens of this process stand in the global batch, in the order in which layers get them (batch dims
        flattened): an offset, or int64 positions. A list is of one length; layers with another number of tokens, such
        as those of the prompts, number theirs from zero."""
        self._positions = positions

    def bits(
        self, layer: str, operand: str, num_tokens: int, features: int, device: torch.device
    ) -> UInt8[Tensor, "tokens features"]:
        """Fresh random bytes for a layer's operand. Drawn again under the same name, they differ; after the same
        sequence of draws in another run, they are the same."""
        name = f"{layer}/{operand}"
        draw, self._draws[name] = self._draws[name], self._draws[name] + 1
        key = rng.generator(self.seed, f"nvfp4/{name}", step=self.step, sample=self.stream, chunk=draw).initial_seed()
        return hashed_bits(key, self._numbered(num_tokens, device), features)

    def _numbered(self, num_tokens: int, device: torch.device) -> Tensor:
        if isinstance(self._positions, int):
            return torch.arange(self._positions, self._positions + num_tokens, device=device)
        placed = len(self._positions)
        if num_tokens not in (placed, placed + -placed % PADDED_TO):
            return torch.arange(num_tokens, device=device)
        # Rows that only pad have positions that no token has.
        padding = -1 - torch.arange(num_tokens - placed, device=device)
        return torch.cat((self._positions.to(device), padding))


PADDED_TO = 32
"""Layers pad their tokens to a multiple of this."""


def largest_over(group: ProcessGroup) -> Reduce:
    """For `StepClock.reduce`: the largest over the ranks of a process group."""

    def reduce(values: Tensor) -> Tensor:
        values = values.clone()
        all_reduce(values, ReduceOp.MAX, group=group)
        return values

    return reduce


def hashed_bits(key: int, positions: Int[Tensor, " tokens"], features: int) -> UInt8[Tensor, "tokens features"]:
    """Random bytes that are a function of `(key, position, feature)` alone: a hash of 32 bits makes four of them.

    Args:
        key: 63 bits.
        positions: int64.
        features: a multiple of 4.
    """
    key_low, key_high, key_features = as_int32(key), as_int32(key >> 32), as_int32(key >> 16)
    if positions.is_cuda and HAS_TRITON:
        from longlive.precision.nvfp4 import kernels

        return kernels.hash_bits((key_low, key_high, key_features), positions, features)
    rows = mix(low_bits(positions) ^ key_low)
    rows = mix(rows ^ low_bits(positions >> 32) ^ key_high)
    columns = mix(torch.arange(features // 4, dtype=torch.int32, device=positions.device) ^ key_features)
    return mix(rows[:, None] + columns).view(torch.uint8)


def mix(x: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """A bijection of 32 bits in which every bit of the result depends on every bit of the argument (C. Wellons,
    "lowbias32"), on int32 that wraps around. Overwrites its argument."""
    x ^= (x >> 16) & 0xFFFF
    x *= as_int32(0x7FEB352D)
    x ^= (x >> 15) & 0x1FFFF
    x *= as_int32(0x846CA68B)
    x ^= (x >> 16) & 0xFFFF
    return x


def as_int32(number: int) -> int:
    """The lowest 32 bits as a signed number."""
    return (number + (1 << 31)) % (1 << 32) - (1 << 31)


def low_bits(numbers: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """The lowest 32 bits of int64 as int32."""
    return (numbers & 0xFFFFFFFF).sub(1 << 31).to(torch.int32).bitwise_xor(as_int32(1 << 31))
