"""Run a function on N ranks: processes of this machine that talk over gloo.

Ranks are forked where that is safe, so a rank starts in milliseconds with everything imported. On a machine with CUDA
they are spawned: neither a CUDA context nor autograd's device threads survive a fork. Any function will do in both.
A rank that raises, dies or hangs ends the whole call: the others are killed, and the caller sees which rank it was.
"""

import faulthandler
import gc
import os
import pickle
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import cloudpickle
import torch
import torch.distributed as dist
from torch import multiprocessing

_GRACE_SECONDS = 0.3
"""After a first failure: long enough for the rank that caused it to report, if its peers noticed sooner."""


class RankError(RuntimeError):
    """A rank raised or died. The message holds its traceback."""

    def __init__(self, rank: int, report: str) -> None:
        super().__init__(f"rank {rank} failed\n\n{report}")
        self.rank = rank


@dataclass(frozen=True)
class _Outcome:
    time: float
    result: Any = None
    error: str | None = None


def run_on_ranks(
    function: Callable[..., Any],
    num_ranks: int,
    *args: Any,
    timeout: float = 120.0,
    init_process_group: bool = True,
    start_method: str | None = None,
) -> list[Any]:
    """Call `function(*args)` on every rank and return what each returned, in rank order.

    Args:
        function: asks `torch.distributed` for its rank; its result is pickled (tensors by value).
        num_ranks: processes; each has one thread and sees RANK, LOCAL_RANK, NODE_RANK, WORLD_SIZE, MASTER_ADDR and
            MASTER_PORT.
        timeout: seconds for all ranks together.
        init_process_group: set False if the function does it, as Lightning's strategies do.
        start_method: `"fork"` or `"spawn"`; default: fork without CUDA, spawn with it.

    Raises:
        RankError: naming the rank that failed first, with its traceback.
        TimeoutError: naming the ranks that did not finish, and where each of them hangs.
    """
    context = multiprocessing.get_context(start_method or ("spawn" if torch.cuda.is_available() else "fork"))
    with tempfile.TemporaryDirectory() as directory:
        processes: list[BaseProcess] = []
        pipes: list[Connection] = []
        port = _free_port()
        call = cloudpickle.dumps((function, args))
        try:
            for rank in range(num_ranks):
                receiver, sender = context.Pipe(duplex=False)
                rank_args = (call, rank, num_ranks, port, directory, init_process_group, sender)
                process = context.Process(target=_run_rank, args=rank_args, daemon=True)
                process.start()
                sender.close()
                processes.append(process)
                pipes.append(receiver)
            outcomes = _collect(processes, pipes, directory, timeout)
            for process in processes:
                process.join(timeout=10)
            return [outcome.result for outcome in outcomes]
        finally:
            for process in processes:
                process.kill()
                process.join()
            for pipe in pipes:
                pipe.close()


def _collect(processes: list[BaseProcess], pipes: list[Connection], directory: str, timeout: float) -> list[_Outcome]:
    outcomes: dict[int, _Outcome] = {}
    deadline = time.monotonic() + timeout
    failed = False
    while len(outcomes) < len(pipes):
        waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in outcomes}
        ready = wait(list(waiting), timeout=max(deadline - time.monotonic(), 0))
        if not ready:
            break
        for pipe in ready:
            rank = waiting[pipe]
            outcomes[rank] = _receive(pipe, processes[rank])
        if not failed and any(outcome.error for outcome in outcomes.values()):
            failed = True
            deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
    errors = {rank: outcome for rank, outcome in outcomes.items() if outcome.error}
    if errors:
        rank = min(errors, key=lambda rank: errors[rank].time)
        raise RankError(rank, errors[rank].error or "")
    if len(outcomes) < len(pipes):
        hanging = [rank for rank in range(len(pipes)) if rank not in outcomes]
        stacks = "\n".join(_stack(rank, processes[rank], directory) for rank in hanging)
        raise TimeoutError(f"ranks {hanging} of {len(pipes)} did not finish in {timeout:g} s\n\n{stacks}")
    return [outcomes[rank] for rank in range(len(pipes))]


def _receive(pipe: Connection, process: BaseProcess) -> _Outcome:
    try:
        return pickle.loads(pipe.recv_bytes())
    except EOFError:
        process.join(timeout=5)
        return _Outcome(time.monotonic(), error=f"the process died without a word, exit code {process.exitcode}")


def _stack(rank: int, process: BaseProcess, directory: str) -> str:
    """Where a rank hangs: it writes its stack when it gets the signal that `_run_rank` registered."""
    if process.pid is not None and process.is_alive():
        os.kill(process.pid, signal.SIGUSR1)
        time.sleep(_GRACE_SECONDS)
    file = Path(directory, f"stack_{rank}")
    return f"rank {rank}:\n{file.read_text() if file.exists() else ''}"


def _run_rank(
    call: bytes,
    rank: int,
    num_ranks: int,
    port: int,
    directory: str,
    init_process_group: bool,
    sender: Connection,
) -> None:
    # What a fork inherits is no garbage of its own, and to look through it would cost more than most tests.
    gc.freeze()
    with open(Path(directory, f"stack_{rank}"), "w") as stack_file:
        faulthandler.register(signal.SIGUSR1, file=stack_file, all_threads=False)
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            NODE_RANK="0",
            WORLD_SIZE=str(num_ranks),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            OMP_NUM_THREADS="1",
        )
        if Path("/sys/class/net/lo").exists():
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # else gloo looks the host's name up, which containers may not have
        torch.set_num_threads(1)
        try:
            if init_process_group:
                # A file, not the port: another process may have taken that since it was found free.
                dist.init_process_group(
                    "gloo", init_method=f"file://{directory}/store", rank=rank, world_size=num_ranks
                )
                # A function without collectives may be done, and its rank gone, while others still connect.
                dist.barrier()
            function, args = pickle.loads(call)
            outcome = pickle.dumps(_Outcome(time.monotonic(), result=function(*args)))
        except BaseException:  # pytest's own failures are no Exceptions
            outcome = pickle.dumps(_Outcome(time.monotonic(), error=traceback.format_exc()))
        sender.send_bytes(outcome)
        gc.collect()  # asynchronous gloo work that outlives its process group aborts the process
        if dist.is_initialized():
            dist.destroy_process_group()
        faulthandler.unregister(signal.SIGUSR1)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
