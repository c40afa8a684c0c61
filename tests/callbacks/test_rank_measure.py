"""What counts as communication, and which bytes are sent."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from helpers.distributed import run_on_ranks
from longlive.callbacks.rank_measure import CountBytes, communication_shares


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


def test_communication_is_when_a_collective_runs_and_nothing_is_computed() -> None:
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
    shares = communication_shares(events)
    assert shares["encode"] == pytest.approx((10 + 20 + 10) / 100)
    assert shares["forward"] == pytest.approx((10 + 20 + 10) / 100)
    assert shares["backward"] == 0


def test_on_a_gpu_kernels_compute_and_ranges_mirrored_there_do_not() -> None:
    events = [
        Event("phase:backward", 0, 100),
        Event("phase:backward", 0, 100, device="CUDA", annotation=True),
        Event("FSDP::all_gather", 0, 100, device="CUDA", annotation=True),
        Event("aten::mm", 0, 100),
        Event("ncclDevKernel_AllGather", 10, 50, device="CUDA"),
        Event("sm90_gemm", 30, 90, device="CUDA"),
    ]
    assert communication_shares(events)["backward"] == pytest.approx(0.2)


def test_bytes_to_others_are_counted_for_every_collective() -> None:
    """Four ranks: one of four parts stays here."""

    def run() -> dict[str, int]:
        with CountBytes(4) as count:
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


def test_a_collective_that_it_does_not_know_stops_it() -> None:
    def run() -> str:
        with CountBytes(2):
            try:
                dist.broadcast(torch.ones(2), 0)
            except ValueError as error:
                return str(error)
        return "no error"

    assert "broadcast_" in run_on_ranks(run, 2)[0]
