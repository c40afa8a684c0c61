"""A SLURM cluster on this machine: munge, a controller and two nodes, started for a test and gone after it.

Nothing of it is shared: its configuration, key, sockets and state lie in a directory of its own, its ports are free
ones, and programs find it by SLURM_CONF. So another one, of this machine or of another test, is not touched, and it
needs no root: its jobs run as whoever started it.

The nodes are two `slurmd` on this machine. They have no cgroups, no accounting and no GPUs.
"""

from __future__ import annotations

import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

CPUS = 32
"""Of a node. SLURM counts them, and nobody else: jobs share the machine's real ones."""

POLL_SECONDS = 0.25
START_SECONDS = 120.0
"""What the daemons may take to start, on a machine that does other things."""

TESTS = Path(__file__).resolve().parents[1]

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "OUT_OF_MEMORY")

CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket,cred_expire=5
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=1
# Time for all on a machine that does other things: connections, answers, jobs that start, and that save when they end.
TCPTimeout=60
MessageTimeout=60
BatchStartTimeout=120
KillWait=300
UnkillableStepTimeout=600
# Ports of jobs follow from their numbers: those of another cluster of this machine have others.
FirstJobId={first_job}
# Partition `low` gives way to `high`: the signal, the time until the end, the queue.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first_port} CPUs={cpus}
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second_port} CPUs={cpus}
PartitionName=low Nodes=n1,n2 Default=YES PriorityTier=1 GraceTime=120
PartitionName=high Nodes=n1,n2 PriorityTier=2
"""


def program(name: str) -> str | None:
    """Where a daemon is; users who are not root have no `sbin` on their path."""
    return shutil.which(name, path=os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin")))


class Slurm:
    """A running cluster.

    Attributes:
        environment: of programs that talk to it, and of the jobs that they submit.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        outside = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        self.environment = outside | {
            "SLURM_CONF": str(directory / "slurm.conf"),
            "MASTER_ADDR": "127.0.0.1",  # no resolver knows the names of the nodes
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}",
        }

    def run(self, *command: str, **settings: str) -> str:
        """The output of a program that talks to the cluster."""
        done = subprocess.run(
            command, env=self.environment | settings, capture_output=True, text=True, timeout=START_SECONDS
        )
        assert done.returncode == 0, f"{command}: {done.stderr}\n{self.report()}"
        return done.stdout

    def submit(self, *arguments: str | Path, path: str | None = None) -> int:
        """`sbatch`; the number of the job. Its programs are looked for in the folder `path` first."""
        settings = {} if path is None else {"PATH": os.pathsep.join((path, self.environment["PATH"]))}
        return int(self.run("sbatch", "--parsable", *map(str, arguments), **settings))

    def job(self, job: int) -> dict[str, str]:
        """What the controller knows of a job."""
        shown = self.run("scontrol", "--oneliner", "show", "job", str(job))
        return dict(field.split("=", 1) for field in shown.split() if "=" in field)

    def wait_while(self, job: int, condition: Callable[[], bool], output: Path, seconds: float) -> None:
        """Until the condition no longer holds, or the job has ended.

        Raises:
            TimeoutError: with the job's output, if neither happens.
        """
        wait_until(lambda: not condition() or self.job(job)["JobState"] in ENDED, seconds, lambda: self.report(output))

    def end_of(self, job: int, output: Path, seconds: float) -> tuple[str, int, str]:
        """Wait for a job's end: its state, how often it was queued again, and its exit code."""
        self.wait_while(job, lambda: True, output, seconds)
        found = self.job(job)
        return found["JobState"], int(found["Restarts"]), found["ExitCode"]

    def report(self, *outputs: Path) -> str:
        """The last words of the daemons, and of jobs."""
        files = [file for file in outputs if file.exists()]
        files += sorted([*self.directory.glob("*.log"), *self.directory.glob("*.out")])
        return "\n".join(f"{file.name}:\n{file.read_text(errors='replace')[-2000:]}" for file in files)


def wait_until(condition: Callable[[], object], seconds: float, report: Callable[[], str]) -> None:
    """Until it holds.

    Raises:
        TimeoutError: with the report, if it never does.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(report())
        time.sleep(POLL_SECONDS)


@contextmanager
def local_slurm() -> Iterator[Slurm]:
    """A cluster for the time of the context; whatever happens in it, none of its processes is left."""
    # Not in pytest's directories: munge wants one that others may pass, and names of sockets are short.
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True)))
        directory.chmod(0o755)
        slurm = Slurm(directory)
        _configure(directory)
        stack.callback(_kill_all, slurm)
        key, sock = directory / "munge.key", directory / "munge.socket"
        munge = [f"--key-file={key}", f"--socket={sock}", f"--pid-file={directory}/munge.pid"]
        munge += [f"--seed-file={directory}/munge.seed", f"--log-file={directory}/munge.log"]
        stack.enter_context(_daemon(slurm, "munged", "--foreground", "--force", *munge))
        wait_until(sock.exists, START_SECONDS, slurm.report)
        stack.enter_context(_daemon(slurm, "slurmctld", "-D", "-i"))
        for node in ("n1", "n2"):
            stack.enter_context(_daemon(slurm, "slurmd", "-D", "-N", node))
        wait_until(lambda: _idle_nodes(slurm) == ["n1", "n2"], START_SECONDS, slurm.report)
        yield slurm


def _configure(directory: Path) -> None:
    for name in ("state", "spool-n1", "spool-n2"):
        (directory / name).mkdir(mode=0o755)
    key = directory / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(128))
    controller_port, first_port, second_port = _free_ports(3)
    text = CONFIGURATION.format(
        directory=directory,
        host=socket.gethostname().partition(".")[0],
        user=getpass.getuser(),
        controller_port=controller_port,
        first_port=first_port,
        second_port=second_port,
        first_job=1000 + secrets.randbelow(8) * 1000,
        cpus=CPUS,
    )
    (directory / "slurm.conf").write_text(text)


def _free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextmanager
def _daemon(slurm: Slurm, name: str, *arguments: str) -> Iterator[None]:
    """A daemon that ends with the context, and by the kernel with this process."""
    path = program(name)
    assert path is not None
    with (slurm.directory / f"{name}.out").open("a") as file:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", path, *arguments],
            env=slurm.environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield
    finally:
        process.kill()
        process.wait()


def _idle_nodes(slurm: Slurm) -> list[str]:
    done = subprocess.run(
        ["sinfo", "--noheader", "--Node", "--states=idle", "--partition=low", "--format=%N"],
        env=slurm.environment,
        capture_output=True,
        text=True,
    )
    return sorted(done.stdout.split())


def processes_of(slurm: Slurm) -> list[int]:
    """All that run in the cluster's environment: daemons, jobs, and what these have started."""
    mark = f"SLURM_CONF={slurm.directory}/slurm.conf".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:  # it has ended, or is another user's
                continue
    return found


def _kill_all(slurm: Slurm) -> None:
    deadline = time.monotonic() + START_SECONDS
    while found := processes_of(slurm):
        assert time.monotonic() < deadline, f"processes {found} of the cluster cannot be killed"
        for process in found:
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(POLL_SECONDS)
