"""The benchmark of the splits: what it counts, and that its variants are the same training."""

from __future__ import annotations

import pytest

import bench_sp


@pytest.mark.parametrize("read", [True, False])
def test_all_variants_do_the_counted_work_and_train_the_same(read: bool) -> None:
    """`measure` raises where a rank's work is not the plan's, or the variants' losses differ."""
    sizes = ["model.num_layers=1", "model.dim=32", "model.ffn_dim=32", "data.height=32", "data.width=32"]
    arguments = ["--frames", "8", "--rounds", "1", "--steps", "1", *([] if read else ["--no-read"]), "--", *sizes]
    record = bench_sp.measure(bench_sp.command_line().parse_args(arguments))
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
    bench_sp.show(record)
