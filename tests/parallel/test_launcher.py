"""Whole commands on two ranks that are killed or fail: nothing is left running, the exit code tells, and the next start
goes on."""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.multiprocessing as multiprocessing
from lightning.fabric.plugins.environments import LightningEnvironment

from helpers.distributed import run_on_ranks
from helpers.interrupted import Command, Fail, Kill, override
from helpers.runs import Pause, assert_same, curves, run, write_toyworld
from longlive.parallel import launcher
from longlive.parallel.checkpoint import load_checkpoint, newest_checkpoint

STEPS = 12
SECONDS_TO_END = 60
"""From a kill or an error to the end of the command."""

TWO_RANKS = ("strategy=balanced_sp", "trainer.devices=2", "data.num_workers=1")


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return write_toyworld(tmp_path_factory.mktemp("shards"))


@pytest.fixture
def start(tmp_path: Path, shards: Path) -> Iterator[Callable[..., Command]]:
    """Starts a command in a directory of a name; what is left of it does not outlive the test."""
    commands: list[Command] = []

    def begin(name: str, *more: str) -> Command:
        commands.append(Command(tmp_path / name, shards, *TWO_RANKS, *more))
        return commands[-1]

    yield begin
    for command in commands:
        command.kill()


def assert_ended(command: Command, since: float) -> None:
    """It ended in time and in failure, and so did all its processes."""
    code = command.end(timeout=SECONDS_TO_END)
    assert code != 0, command.output
    assert command.orphans() == []
    assert time.monotonic() - since < SECONDS_TO_END


def run_here(directory: Path, shards: Path) -> None:
    """A rank of the same run, without a launcher and without a kill."""
    run(directory, shards, *TWO_RANKS, "data.num_workers=0")  # a forked rank has no workers


def final_state(directory: Path) -> dict[str, Any]:
    saved = load_checkpoint(directory / "checkpoints" / f"step-{STEPS:07d}.ckpt")
    names = ("state_dict", "optimizer_states", "lr_schedulers", "VideoDataModule", "global_step")
    return {name: saved[name] for name in names} | {"average": saved["callbacks"]["EMA"]}


def test_a_command_whose_ranks_are_killed_ends_and_the_next_start_goes_on(start, shards, tmp_path):
    """The launcher, a rank that it started, and a rank during a save: killed in turn, each in the run of the one
    before. Ranks that go on without their launcher write into the directory of the run that was started again."""
    pause = override("pause", Pause, seconds=0.1)
    for number, rank in enumerate((0, 1)):
        command = start("run", pause)
        command.until_saved(step=4 * (number + 1))
        os.kill(command.rank(rank), signal.SIGKILL)
        assert_ended(command, time.monotonic())
    reached = newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert reached is not None

    killed = start("run", override("kill", Kill, rank=0, kind="written", step=STEPS, calls=200, directory=tmp_path))
    assert_ended(killed, time.monotonic() + 240)
    assert f"continuing from {reached}" in killed.output
    assert "partial" in (tmp_path / "killed").read_text()
    assert list((tmp_path / "run" / "checkpoints").glob(".*.partial"))

    last = start("run")
    assert last.end() == 0, last.output
    assert f"continuing from {reached}" in last.output
    assert last.orphans() == []
    run_on_ranks(partial(run_here, tmp_path / "whole", shards), 2, init_process_group=False)
    assert_same(final_state(tmp_path / "run"), final_state(tmp_path / "whole"))
    losses = [curves(tmp_path / name)["train/loss"] for name in ("run", "whole")]
    assert losses[0] == losses[1]
    assert sorted(losses[0]) == list(range(STEPS))
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_on_one_rank_ends_a_command_whose_other_ranks_wait_for_ever(start, rank):
    """An error that is caught and printed ends with exit code 0; peers that wait in a collective hold their GPUs."""
    command = start("run", override("fail", Fail, rank=rank, step=1))
    while "this rank fails" not in command.output:
        assert command.process.poll() is None, command.output
        time.sleep(0.05)
    assert_ended(command, time.monotonic())


def in_a_process(function: Callable[[], None], timeout: float = 60) -> int | None:
    """The exit code of a forked process that calls the function."""
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    process.join(timeout)
    if process.is_alive():
        process.kill()
    process.join()
    return process.exitcode


def joining(failed: bool, *programs: str) -> launcher.JointLauncher:
    joint = launcher.JointLauncher(LightningEnvironment(), len(programs) + 1, 1)
    joint.procs = [subprocess.Popen([sys.executable, "-S", "-c", program]) for program in programs]
    joint.failed = failed
    return joint


def test_a_child_that_fails_at_its_very_end_is_the_commands_failure():
    """The command itself had no error, and would exit with 0."""
    assert in_a_process(lambda: joining(False, "pass", "raise SystemExit(3)").join()) == 1
    assert in_a_process(lambda: joining(False, "pass", "import time; time.sleep(0.2)").join()) == 0


def test_a_command_that_failed_does_not_wait_for_its_children():
    begin = time.monotonic()
    joint = joining(True, "import time; time.sleep(600)")
    joint.join()
    assert time.monotonic() - begin < 60
    assert joint.procs[0].returncode == -signal.SIGKILL


def test_only_the_ranks_are_told_who_started_them(monkeypatch):
    """A process that is started later, by a callback or a notebook, is none of them."""
    told: list[str | None] = []
    monkeypatch.setattr(
        launcher._SubprocessScriptLauncher, "_call_children_scripts", lambda self: told.append(os.environ.get(NAME))
    )
    registered: list[object] = []
    monkeypatch.setattr(atexit, "register", registered.append)
    joint = joining(False)
    joint._call_children_scripts()
    assert told == [str(os.getpid())]
    assert NAME not in os.environ
    assert registered == [joint.join]


def test_a_run_that_raises_is_known_to_have_failed(monkeypatch):
    monkeypatch.setattr(launcher.JointLauncher, "_call_children_scripts", lambda self: None)
    joint = joining(False)
    assert joint.launch(lambda: 7) == 7
    assert not joint.failed
    with pytest.raises(ZeroDivisionError):
        joint.launch(lambda: 1 / 0)
    assert joint.failed


NAME = launcher._LAUNCHER


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not kill children with their parent")
def test_a_rank_is_killed_with_its_launcher_even_if_it_is_busy(tmp_path):
    ready = tmp_path / "ready"

    def rank() -> None:
        launcher.end_with_launcher()
        ready.write_text(str(os.getpid()))
        time.sleep(600)

    def command() -> None:
        os.environ[NAME] = str(os.getpid())
        child = multiprocessing.get_context("fork").Process(target=rank)
        child.start()
        while not (ready.exists() and ready.read_text()):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_a_process(command) == -signal.SIGKILL
    status = Path("/proc", ready.read_text(), "status")
    deadline = time.monotonic() + 30
    while status.exists() and "\nState:\tZ" not in status.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_rank_whose_launcher_ended_before_it_could_look_does_not_begin(monkeypatch):
    """It would wait for the others for half an hour."""
    gone = subprocess.Popen([sys.executable, "-S", "-c", "pass"])
    gone.wait()
    monkeypatch.setenv(NAME, str(gone.pid))
    # The system is not asked to kill this process with its parent.
    monkeypatch.setattr(launcher.ctypes, "CDLL", lambda name: NoSystem())
    with pytest.raises(RuntimeError, match=rf"process {gone.pid}, which started this rank, has ended"):
        launcher.end_with_launcher()


class NoSystem:
    """A C library whose calls do nothing."""

    def prctl(self, option: int, value: int) -> int:
        return 0


def test_a_process_that_somebody_else_started_is_left_alone(monkeypatch):
    """A shell script or a scheduler may start the ranks and end before them."""
    monkeypatch.delenv(NAME, raising=False)
    monkeypatch.setattr(launcher.ctypes, "CDLL", lambda name: pytest.fail("no parent to end with"))
    launcher.end_with_launcher()


def test_a_process_whose_run_failed_exits_although_its_peers_never_answer(monkeypatch):
    """Closing a process group may wait for ranks that are gone."""

    def exiting() -> None:
        atexit._clear()
        atexit.register(time.sleep, 600)  # a process group being closed
        launcher.exit_soon()
        atexit._run_exitfuncs()

    monkeypatch.setattr(launcher, "EXIT_SECONDS", 0.2)
    assert in_a_process(exiting) == 1
