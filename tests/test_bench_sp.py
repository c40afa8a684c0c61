"""The benchmark of the splits: what it counts, and that its variants are the same training."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    path = Path(__file__).parents[1] / "tools/bench_sp.py"
    spec = importlib.util.spec_from_file_location("bench_sp", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("read", [True, False])
def test_all_variants_do_the_counted_work_and_train_the_same(bench: ModuleType, read: bool) -> None:
    """`measure` raises where a rank's work is not the plan's, or the variants' losses differ."""
    settings = argparse.Namespace(
        ranks=2,
        frames=[8],
        rounds=1,
        steps=1,
        threads=1,
        device="cpu",
        read=read,
        json=None,
        overrides=["model.num_layers=1", "model.dim=32", "model.ffn_dim=32", "data.height=32", "data.width=32"],
    )
    record = bench.measure(settings)
    variants = record["clips"]["8"]["variants"]
    loss_tokens = {name: [rank["loss_tokens"] for rank in variant["ranks"]] for name, variant in variants.items()}
    assert loss_tokens == {"no SP": [8, 8], "contiguous": [0, 16], "balanced, halo": [8, 8], "balanced": [8, 8]}
    raw_frames = {name: [rank["raw_frames"] for rank in variant["ranks"]] for name, variant in variants.items()}
    if read:
        assert raw_frames["contiguous"] == [2 * 29, 2 * 29]
        assert raw_frames["balanced"] == [2 * 13, 2 * 16]
    for variant in variants.values():
        for rank in variant["ranks"]:
            assert min(rank["seconds"].values()) >= 0
            assert rank["peak_memory_bytes"] > 0
    bench.show(record)
