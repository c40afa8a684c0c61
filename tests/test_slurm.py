"""A run under a real SLURM: stopped, queued again and continued, it ends as one that nobody stopped. The cluster is
started here (`helpers.slurm`); where SLURM is not installed, what needs it is skipped."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import hydra
import pytest
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.types import RunMode
from omegaconf import DictConfig

import longlive.train
from helpers.distributed import run_on_ranks
from helpers.interrupted import AwaitSignal, override
from helpers.runs import assert_same, config_of, curve_values, overrides, run, state_after, write_toyworld
from helpers.slurm import Slurm, local_slurm, program, wait_until
from longlive.callbacks.run_record import read_starts
from longlive.config import compose, config_directory

STEPS, HELD = 12, 5
"""Of a run, and the step in which it waits for a signal: no checkpoint is due after it."""

SECONDS = 400.0
"""What anything may take on a machine that does other things."""

pytestmark = pytest.mark.timeout(3 * SECONDS)

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "recipes" / "slurm" / "train.sbatch"
LOGGED_EVERY = "trainer.log_every_n_steps=3"
JOB = (LOGGED_EVERY, "data.num_workers=1", override("hold", AwaitSignal, step=HELD, directory="${directory}"))
"""A run that is interrupted: data workers get every signal, too."""

LONGLIVE = """\
#!{python}
import sys
from longlive.cli import main
sys.exit(main())
"""

STAND_IN = """\
#!{python} -IS
# `longlive` as the batch script sees it: it runs until a signal stops it; queued again, it runs to its end.
import os, signal, sys, time
stay, task = int(os.environ.get("SLURM_RESTART_COUNT", "0")), os.environ["SLURM_PROCID"]
received = []
for number in (signal.SIGTERM, signal.SIGUSR1) if "deaf" not in sys.argv else ():
    signal.signal(number, lambda number, frame: received.append(number))
print(f"stay {{stay}} task {{task}} {{sys.argv[1:]}}", flush=True)
while not (stay or received or "fails" in sys.argv):
    time.sleep(0.05)
sys.exit(3 if "fails" in sys.argv else 0 if stay else 75)
"""

TWO_TASKS = ("--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1")
TRAIN = "train trainer.num_nodes=1 trainer.devices=2"
"""What the batch script makes of them."""

needs_slurm = pytest.mark.skipif(program("slurmctld") is None, reason="SLURM (slurmctld) is not installed")


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    with local_slurm() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toyworld(tmp_path_factory.mktemp("shards"))


def command(folder: Path, source: str) -> str:
    """The path on which a job finds this `longlive`, before anything else."""
    folder.mkdir()
    file = folder / "longlive"
    file.write_text(source.format(python=sys.executable))
    file.chmod(0o755)
    return str(folder)


def launcher(*overrides: str) -> DictConfig:
    """What `launcher=slurm` gives to submitit."""
    with initialize_config_dir(str(config_directory()), version_base="1.3"):
        config = hydra.compose("train", ["launcher=slurm", *overrides], return_hydra_config=True).hydra
    assert config.mode is RunMode.MULTIRUN, "without -m, a run would train on the machine that submits"
    found: DictConfig = config.launcher
    return found


def train(config: DictConfig) -> None:
    longlive.train.train(config)


def assert_same_end(ours: Path, theirs: Path) -> None:
    """Weights, moments, average, place in the data and curves of two runs are equal bit for bit."""
    assert_same(state_after(ours, STEPS), state_after(theirs, STEPS))
    assert_same(curve_values(ours), curve_values(theirs))


def stays(directory: Path) -> list[tuple[str, str | None, int, int]]:
    """How each of a run's stays on the cluster ended, by what signal, and its first and last step."""
    return [(each["state"], each["signal"], each["first_step"], each["last_step"]) for each in read_starts(directory)]


def log_of(*files: Path) -> str:
    return "\n".join(file.read_text() for file in files if file.exists())


@needs_slurm
def test_a_run_on_two_nodes_that_is_warned_and_queued_again_equals_one_that_was_not(slurm, shards, tmp_path):
    """The warning before the end of a job's time reaches ranks and data workers alike. Lightning's own answer to it, a
    checkpoint inside the handler that `ckpt_path="last"` does not find, is nowhere to be seen. Meanwhile, SLURM itself
    warns a job whose time is less than what the script's `--signal` asks for."""
    whole, directory, output = tmp_path / "whole", tmp_path / "run", tmp_path / "output.txt"
    short, path = tmp_path / "short.txt", command(tmp_path / "stand-in", STAND_IN)
    short_job = slurm.submit(*TWO_TASKS, "--time=2", f"--output={short}", SCRIPT, path=path)
    config = config_of(whole, shards, LOGGED_EVERY, "strategy=fsdp", "trainer.devices=2")
    run_on_ranks(train, 2, config, init_process_group=False, timeout=SECONDS)

    job = slurm.submit(
        *("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1", f"--output={output}"),
        SCRIPT,
        *overrides(directory, shards, *JOB, "strategy=fsdp"),
        path=command(tmp_path / "bin", LONGLIVE),
    )
    slurm.wait_while(job, lambda: not all((directory / f"waits-{rank}").exists() for rank in range(2)), output, SECONDS)
    slurm.run("scancel", "--signal=USR1", str(job))
    assert slurm.end_of(job, output, SECONDS) == ("COMPLETED", 1, "0:0"), log_of(output)
    assert stays(directory) == [("stopped", "SIGUSR1", 0, HELD + 1), ("finished", None, HELD + 1, STEPS)]
    assert f"continuing from {directory}/checkpoints/step-{HELD + 1:07d}.ckpt" in log_of(output)
    assert not list(tmp_path.rglob("hpc_ckpt*"))
    assert slurm.end_of(short_job, short, SECONDS) == ("COMPLETED", 1, "0:0"), log_of(short)
    assert_same_end(directory, whole)


@needs_slurm
def test_the_jobs_of_a_sweep_continue_from_their_own_checkpoints_when_they_are_queued_again(slurm, shards, tmp_path):
    """submitit listens to the warning first, and Lightning then does not: jobs came back without a checkpoint. A plain
    requeue, as after the failure of a node, sends SIGTERM alone."""
    directory, log = tmp_path / "sweep", tmp_path / "launcher.log"
    folder = command(tmp_path / "bin", LONGLIVE)
    resources = [f"hydra.launcher.{resource}" for resource in ("gpus_per_node=null", "cpus_per_task=1")]
    sweep = overrides(directory, shards, *JOB, "launcher=slurm", "trainer.devices=1", "seed=0,1", *resources)
    jobs = [directory / f"seed-{seed}" for seed in (0, 1)]
    with log.open("w") as file:
        sender = subprocess.Popen(
            [f"{folder}/longlive", "train", *sweep],
            env=slurm.environment,
            cwd=tmp_path,
            stdout=file,
            stderr=subprocess.STDOUT,
        )

    def waiting() -> bool:
        return all((job / "waits-0").exists() for job in jobs)

    def report() -> str:
        return log_of(log, *directory.rglob("*_log.out")) + slurm.report()

    try:
        wait_until(lambda: waiting() or sender.poll() is not None, SECONDS, report)
        assert waiting(), report()
        (array,) = set(slurm.run("squeue", "--noheader", "--array", "--name=train", "--format=%F").split())
        slurm.run("scancel", "--signal=USR2", f"{array}_0")
        slurm.run("scontrol", "requeue", f"{array}_1")
        for seed in (0, 1):
            run(tmp_path / f"whole-{seed}", shards, LOGGED_EVERY, f"seed={seed}")
        assert sender.wait(SECONDS) == 0, report()
    finally:
        sender.kill()
        sender.wait()
    for seed, (job, signal) in enumerate(zip(jobs, ("SIGUSR2", "SIGTERM"), strict=True)):
        assert stays(job) == [("stopped", signal, 0, HELD + 1), ("finished", None, HELD + 1, STEPS)], report()
        assert_same_end(job, tmp_path / f"whole-{seed}")


@needs_slurm
def test_a_job_goes_back_into_the_queue_unless_it_is_cancelled_or_fails(slurm, tmp_path):
    """To SLURM, a job that is preempted and uses the time that it is given to end is done. One that is cancelled and
    comes back has to be found and cancelled again. All jobs at once, for they wait most of the time."""
    path = command(tmp_path / "bin", STAND_IN)
    of_a_sweep = tmp_path / "sweep.sh"
    setup = launcher("trainer.devices=2").setup
    of_a_sweep.write_text("\n".join(["#!/bin/bash", *setup, f'srun longlive {TRAIN} "$@"', ""]))

    def output(name: str) -> Path:
        return tmp_path / f"{name}.txt"

    def submit(name: str, *alone: str, script: Path = SCRIPT, arguments: Sequence[str] = ()) -> int:
        where = alone or ("--nodelist=n2",)
        options = (*TWO_TASKS, *where, f"--output={output(name)}", "--open-mode=append")
        return slurm.submit(*options, script, f"prompts=a {name} one", *arguments, path=path)

    jobs = {
        "preempted": submit("preempted", "--nodelist=n1", "--exclusive"),
        "warned at its start": submit("warned at its start", arguments=["deaf"]),
        "requeued": submit("requeued"),
        "cancelled": submit("cancelled"),
        "failed": submit("failed", arguments=["fails"]),
        "preempted in a sweep": submit("preempted in a sweep", script=of_a_sweep),
        "cancelled in a sweep": submit("cancelled in a sweep", script=of_a_sweep),
    }

    def began(name: str, stay: int) -> bool:
        given = str([*TRAIN.split(), f"prompts=a {name} one"]).removesuffix("]")
        return all(f"stay {stay} task {task} {given}" in log_of(output(name)) for task in range(2))

    def report() -> str:
        return log_of(*map(output, jobs)) + slurm.report()

    wait_until(lambda: all(began(name, stay=0) for name in jobs), SECONDS, report)
    slurm.submit("--partition=high", "--nodelist=n1", "--exclusive", "--output=/dev/null", "--wrap=true")
    slurm.run("scancel", "--signal=USR1", str(jobs["warned at its start"]))
    slurm.run("scontrol", "requeue", str(jobs["requeued"]))
    slurm.run("scancel", "--signal=TERM", str(jobs["preempted in a sweep"]))
    slurm.run("scancel", str(jobs["cancelled"]), str(jobs["cancelled in a sweep"]))
    came_back = dict.fromkeys(jobs, ("COMPLETED", 1, "0:0"))
    stayed_away = {name: ("CANCELLED", 0, "0:15") for name in jobs if name.startswith("cancelled")}
    ends = {name: slurm.end_of(job, output(name), SECONDS) for name, job in jobs.items()}
    assert ends == came_back | stayed_away | {"failed": ("FAILED", 0, "3:0")}, report()
    for name, (_, times, _) in ends.items():
        assert began(name, stay=1) is bool(times), report()


def test_what_a_job_asks_for_follows_from_the_trainers_settings():
    """A second copy of the number of devices: half of the ranks are never started, and the others wait for them."""
    with pytest.raises(ValueError, match=r"hydra\.launcher\.\w+: .*trainer\.devices.*'auto'"):
        compose("train", ["launcher=slurm"])
    with pytest.raises(
        ValueError, match=r"unknown key 'hydra\.launcher\.partion'.*did you mean hydra\.launcher\.partition"
    ):
        compose("train", ["launcher=slurm", "trainer.devices=1", "hydra.launcher.partion=gpu"])
    asked = launcher("trainer.devices=4", "trainer.num_nodes=3")
    assert (asked.nodes, asked.tasks_per_node, asked.gpus_per_node) == (3, 4, 4)


def test_a_launcher_that_is_not_installed_is_named_with_the_command_that_installs_it(monkeypatch):
    """Hydra says that there is `basic`."""
    asked = ["launcher=slurm", "trainer.devices=1"]
    compose("train", asked)
    monkeypatch.delitem(ConfigStore.instance().repo["hydra"]["launcher"], "submitit_slurm.yaml")
    with pytest.raises(ValueError, match=r"^launcher=slurm needs an extra: pip install 'longlive\[slurm\]'$"):
        compose("train", asked)
