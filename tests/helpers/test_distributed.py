import multiprocessing
import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from helpers.distributed import RankError, run_on_ranks


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_every_rank_takes_part_and_results_come_back_in_rank_order(start_method):
    weight = torch.tensor(2.0)

    def sum_of_ranks(start: int) -> tuple[int, torch.Tensor]:
        total = weight * (start + dist.get_rank())
        dist.all_reduce(total)
        return dist.get_rank(), total

    results = run_on_ranks(sum_of_ranks, 2, 10, start_method=start_method)
    assert [rank for rank, _ in results] == [0, 1]
    assert [total.item() for _, total in results] == [42.0, 42.0]


def test_a_backward_pass_runs_on_a_rank_after_one_in_the_parent():
    """Autograd's threads would hang or refuse after a fork; most tests ran a backward pass before ranks start."""

    def gradient() -> torch.Tensor:
        weight = torch.ones(3, requires_grad=True)
        (weight * 2).sum().backward()
        return weight.grad

    expected = gradient()
    for result in run_on_ranks(gradient, 2):
        torch.testing.assert_close(result, expected)


def test_a_rank_sees_the_environment_that_launchers_set_and_one_thread():
    names = ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR")
    before = dict(os.environ)

    def environment() -> tuple[list[str], int, bool]:
        return [os.environ[name] for name in names], torch.get_num_threads(), dist.is_initialized()

    results = run_on_ranks(environment, 2, init_process_group=False, start_method="fork")
    assert results == [(["0", "0", "0", "2", "127.0.0.1"], 1, False), (["1", "1", "0", "2", "127.0.0.1"], 1, False)]
    assert dict(os.environ) == before
    assert not dist.is_initialized()


def test_a_process_group_starts_from_the_environment_alone():
    """Lightning's strategies start it so."""

    def world_size() -> int:
        dist.init_process_group("gloo")
        dist.barrier()
        return dist.get_world_size()

    assert run_on_ranks(world_size, 2, init_process_group=False, start_method="fork") == [2, 2]


def test_an_exception_comes_back_with_its_rank_and_its_traceback_and_ends_waiting_peers():
    """A peer that waits in a collective for a rank that raised would wait for gloo's half hour."""

    def second_rank_raises() -> None:
        if dist.get_rank() == 1:
            raise ValueError("no seventh frame")
        dist.barrier()

    begin = time.monotonic()
    with pytest.raises(
        RankError, match=r"(?s)rank 1 failed.*in second_rank_raises.*ValueError: no seventh frame"
    ) as error:
        run_on_ranks(second_rank_raises, 2, start_method="fork")
    assert error.value.rank == 1
    assert time.monotonic() - begin < 20


def test_a_rank_that_dies_is_named():
    def second_rank_dies() -> None:
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)

    with pytest.raises(RankError, match=r"rank 1 failed\s+the process died without a word, exit code -9"):
        run_on_ranks(second_rank_dies, 2, start_method="fork")


def test_a_rank_that_hangs_is_named_with_the_place_and_no_process_is_left():
    def first_rank_hangs() -> None:
        if dist.get_rank() == 0:
            time.sleep(600)

    with pytest.raises(TimeoutError, match=r"(?s)ranks \[0\] of 2 did not finish in 3 s.*in first_rank_hangs"):
        run_on_ranks(first_rank_hangs, 2, timeout=3, start_method="fork")
    assert multiprocessing.active_children() == []
