"""The benchmark of low precision: what it compares is the same computation."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    path = Path(__file__).parents[1] / "tools/bench_precision.py"
    spec = importlib.util.spec_from_file_location("bench_precision", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_naive_quantiser_encodes_the_same(bench: ModuleType) -> None:
    """A baseline that computes less, or something else, makes any speed-up."""
    settings = argparse.Namespace(
        sections=["quantiser"],
        rows=256,
        columns=256,
        repeats=1,
        threads=1,
        device="cpu",
        dtype="float32",
        json=None,
    )
    record = bench.measure(settings)
    section = record["sections"]["quantiser"]
    assert section["differing_blocks"]["static_6"] == 0
    assert section["differing_blocks"]["mse"] <= 2
    assert all(row["median_ms"] > 0 for row in section["versions"].values())
    bench.show(record)
