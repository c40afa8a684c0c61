"""Random numbers are a function of their name: pinned to literals, so that no release changes them unnoticed."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from longlive import rng

ROOT = Path(__file__).parents[1]
NAME: dict[str, Any] = {"seed": 7, "purpose": "noise", "step": 3, "sample": 5, "chunk": 2}


def test_the_first_numbers_of_a_name_are_these() -> None:
    """Another hash, byte order or separator would resume every run, and re-roll every video, with other noise."""
    assert rng.generator(0, "noise").initial_seed() == 2191246751797489402
    assert rng.generator(7, "timestep", step=3, sample=12345678901, chunk=2).initial_seed() == 5002377661855127833
    assert rng.generator(-1, "noise", step=-1).initial_seed() == 6020146501985675797
    expected = [[-1.4573382139, -0.9114948511], [0.1169576570, 0.0153687662]]
    torch.testing.assert_close(rng.normal((2, 2), **NAME), torch.tensor(expected), atol=1e-6, rtol=0)
    assert rng.uniform(0, "prompt_dropout", step=1, sample=2) == pytest.approx(0.442979097366333, abs=1e-7)
    assert [rng.integer(1000, 0, "timestep", chunk=chunk) for chunk in range(5)] == [297, 211, 429, 554, 282]
    assert rng.permutation(6, 0, "order", step=1).tolist() == [5, 3, 4, 1, 2, 0]


def test_the_same_name_gives_the_same_numbers_whatever_was_drawn_before() -> None:
    first = rng.normal((8,), **NAME)
    rng.normal((100,), 0, "something else")
    torch.rand(3)
    assert torch.equal(rng.normal((8,), **NAME), first)


@pytest.mark.parametrize(
    "change", [{"seed": 8}, {"purpose": "nois"}, {"step": 4}, {"sample": 6}, {"chunk": 3}], ids=str
)
def test_each_part_of_the_name_changes_the_numbers(change: dict[str, Any]) -> None:
    """A part that is left out of the hash makes e.g. all chunks of a clip share their noise."""
    difference = rng.normal((64,), **NAME) - rng.normal((64,), **(NAME | change))
    assert (difference.abs() > 0.05).float().mean() > 0.8


def test_the_parts_do_not_run_into_each_other() -> None:
    """Numbers written side by side without a separator would make step 1, sample 23 equal step 12, sample 3."""
    names = [
        {"seed": 1, "purpose": "a", "step": 1, "sample": 23, "chunk": 4},
        {"seed": 1, "purpose": "a", "step": 12, "sample": 3, "chunk": 4},
        {"seed": 1, "purpose": "a", "step": 1, "sample": 2, "chunk": 34},
        {"seed": 1, "purpose": "a1", "step": 1, "sample": 23, "chunk": 4},
        {"seed": 11, "purpose": "a", "step": 1, "sample": 23, "chunk": 4},
    ]
    assert len({rng.generator(**name).initial_seed() for name in names}) == len(names)


def test_no_two_chunks_of_a_run_share_a_generator() -> None:
    seeds = {
        rng.generator(0, "noise", step=step, sample=sample, chunk=chunk).initial_seed()
        for step in range(20)
        for sample in range(20)
        for chunk in range(20)
    }
    assert len(seeds) == 20**3


def test_the_global_generator_is_neither_read_nor_moved() -> None:
    """Catches numbers that change with `seed_everything`, and draws that shift somebody else's."""
    torch.manual_seed(0)
    first = _one_of_each()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert _one_of_each() == first
    assert torch.equal(torch.get_rng_state(), before)


def test_torchs_default_dtype_does_not_change_the_numbers() -> None:
    """Lightning's true half precision changes it during a step: noise and dropout would be drawn with 8 bits."""
    first = _one_of_each()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert _one_of_each() == first
        assert rng.normal((4,), **NAME).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def _one_of_each() -> list[Any]:
    return [
        rng.normal((4,), **NAME).tolist(),
        rng.uniform(**NAME),
        rng.integer(1000, **NAME),
        rng.permutation(8, 0, "order").tolist(),
    ]


def test_another_process_draws_the_same_numbers() -> None:
    """Python's own `hash` of a string differs between processes: every rank would have its own noise."""
    code = f"from longlive import rng; print(rng.generator(**{NAME!r}).initial_seed())"
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    output = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert int(output.stdout) == rng.generator(**NAME).initial_seed()


def test_numbers_are_distributed_over_names_as_they_should_be() -> None:
    """One number per name, so this tests the hash: a weak one correlates neighbouring steps, samples or chunks."""
    count = 3000
    normals = torch.cat([rng.normal((1,), 0, "noise", sample=sample) for sample in range(count)])
    uniforms = torch.tensor([rng.uniform(0, "dropout", step=step) for step in range(count)])
    integers = torch.tensor([rng.integer(10, 0, "timestep", chunk=chunk) for chunk in range(count)])
    assert abs(float(normals.mean())) < 4 / count**0.5
    assert abs(float(normals.std()) - 1) < 4 / (2 * count) ** 0.5
    assert abs(float((normals[1:] * normals[:-1]).mean())) < 4 / count**0.5
    assert abs(float(uniforms.mean()) - 0.5) < 4 * (1 / 12 / count) ** 0.5
    assert 0 <= float(uniforms.min()) < 0.01
    assert 0.99 < float(uniforms.max()) < 1
    counts = torch.bincount(integers, minlength=10)
    assert len(counts) == 10
    assert float(((counts - count / 10) ** 2 / (count / 10)).sum()) < 27.9, "chi-square, 9 degrees, p = 0.001"


def test_a_permutation_holds_every_index_once_and_changes_with_the_epoch() -> None:
    first, second = (rng.permutation(50, 0, "order", step=epoch) for epoch in (0, 1))
    assert first.dtype == torch.int64
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(50))
    assert not torch.equal(first, second)
    assert not torch.equal(first, torch.arange(50))
