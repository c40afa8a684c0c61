"""The benchmark of the splits: what it counts, and that its variants are the same training."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from helpers.distributed import run_on_ranks


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


@dataclass
class Event:
    """As the profiler's."""

    label: str
    start: int
    end: int
    thread: int = 1
    device: str = "CPU"
    annotation: bool = False

    def name(self) -> str:
        return self.label

    def start_ns(self) -> int:
        return self.start

    def end_ns(self) -> int:
        return self.end

    def start_thread_id(self) -> int:
        return self.thread

    def device_type(self) -> SimpleNamespace:
        return SimpleNamespace(name=self.device)

    def is_user_annotation(self) -> bool:
        return self.annotation


def test_communication_is_when_a_collective_runs_and_nothing_is_computed(bench: ModuleType) -> None:
    events = [
        Event("phase:encode", 0, 100),
        Event("phase:forward", 100, 200),
        Event("gloo:recv", 10, 60),
        Event("aten::conv3d", 20, 40),
        Event("gloo:all_gather", 90, 150, thread=2),
        Event("aten::copy_", 90, 150, thread=2),  # gloo's own, not ours
        Event("aten::mul", 110, 140),
        Event("_c10d_functional::wait_tensor", 115, 135),  # asked for inside the operator
    ]
    shares = bench.communication_shares(events)
    assert shares["encode"] == pytest.approx((10 + 20 + 10) / 100)
    assert shares["forward"] == pytest.approx((10 + 20 + 10) / 100)
    assert shares["backward"] == 0


def test_on_a_gpu_kernels_compute_and_ranges_mirrored_there_do_not(bench: ModuleType) -> None:
    events = [
        Event("phase:backward", 0, 100),
        Event("phase:backward", 0, 100, device="CUDA", annotation=True),
        Event("FSDP::all_gather", 0, 100, device="CUDA", annotation=True),
        Event("aten::mm", 0, 100),
        Event("ncclDevKernel_AllGather", 10, 50, device="CUDA"),
        Event("sm90_gemm", 30, 90, device="CUDA"),
    ]
    assert bench.communication_shares(events)["backward"] == pytest.approx(0.2)


def test_bytes_to_others_are_counted_for_every_collective(bench: ModuleType) -> None:
    """Four ranks: one of four parts stays here."""

    def run() -> dict[str, int]:
        with bench.CountBytes(4) as count:
            dist.all_to_all_single(torch.empty(16), torch.ones(16))
            dist.all_reduce(torch.ones(4))
            dist.all_gather([torch.empty(2) for _ in range(4)], torch.ones(2))
            if dist.get_rank() == 0:
                dist.send(torch.ones(5), 1)
            elif dist.get_rank() == 1:
                dist.recv(torch.empty(5), 0)
        return dict(count.sent)

    ranks = run_on_ranks(run, 4)
    assert ranks[0] == {"attention": 48, "numbers": 24 + 24, "codec": 20}
    assert ranks[1] == {"attention": 48, "numbers": 24 + 24}


def test_a_collective_that_it_does_not_know_stops_it(bench: ModuleType) -> None:
    def run() -> str:
        with bench.CountBytes(2):
            try:
                dist.broadcast(torch.ones(2), 0)
            except ValueError as error:
                return str(error)
        return "no error"

    assert "broadcast_" in run_on_ranks(run, 2)[0]


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
