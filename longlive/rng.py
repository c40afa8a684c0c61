"""Counter-based randomness: every random decision is a function of what it is for, never of what was drawn before.

A draw is named by `(seed, purpose, step, sample, chunk)`. The name is hashed into the seed of a fresh CPU generator,
so one rank and many draw the same numbers, a resumed run repeats them, and no generator state has to be saved. Draws
happen on the CPU on every machine, so a GPU run and a CPU run see the same noise.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def generator(seed: int, purpose: str, *, step: int = 0, sample: int = 0, chunk: int = 0) -> torch.Generator:
    """A CPU generator for one decision.

    Args:
        seed: the run's seed. Zero is a seed like any other.
        purpose: what the numbers are for, e.g. `"noise"` or `"timestep"`. Two purposes never share numbers.
        step: optimizer step (for rollouts, 0).
        sample: global sample id.
        chunk: chunk index inside the sample.
    """
    name = f"{seed}/{purpose}/{step}/{sample}/{chunk}".encode()
    digest = hashlib.blake2b(name, digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def normal(shape: Sequence[int], seed: int, purpose: str, *, step: int = 0, sample: int = 0, chunk: int = 0) -> Tensor:
    """Standard normal float32 numbers on the CPU."""
    # The dtype is named, because Lightning's true half precision changes torch's default during a step.
    numbers = generator(seed, purpose, step=step, sample=sample, chunk=chunk)
    return torch.randn(*shape, generator=numbers, dtype=torch.float32)


def uniform(seed: int, purpose: str, *, step: int = 0, sample: int = 0, chunk: int = 0) -> float:
    """One number in [0, 1)."""
    numbers = generator(seed, purpose, step=step, sample=sample, chunk=chunk)
    return float(torch.rand((), generator=numbers, dtype=torch.float32))


def integer(high: int, seed: int, purpose: str, *, step: int = 0, sample: int = 0, chunk: int = 0) -> int:
    """One integer in [0, high)."""
    return int(torch.randint(high, (), generator=generator(seed, purpose, step=step, sample=sample, chunk=chunk)))


def permutation(length: int, seed: int, purpose: str, *, step: int = 0) -> Tensor:
    """A permutation of `range(length)`, int64; `step` is the epoch."""
    return torch.randperm(length, generator=generator(seed, purpose, step=step))
