"""The processes of one command live and end together.

Lightning's launcher starts ranks 1.. of a machine as children of the command, and every five seconds looks whether one
of them has failed; then it kills the others and itself. Three things are missing, each of which leaves processes that
hold their GPUs until somebody finds them, or a failure that looks like success:

- A command that is killed leaves its children waiting in a collective. Here the kernel kills them with it (on Linux).
- A command that fails leaves them too, if it ends at all: closing its process group may wait for them. Here it kills
  them when it exits, and exits within `EXIT_SECONDS`.
- A child that fails after the command's own last step is not seen. Here the command waits for its children, and its
  exit code speaks for all of them.
"""

from __future__ import annotations

import atexit
import ctypes
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

EXIT_SECONDS = 20.0
"""What a process whose run has failed may take to exit, from the moment that Python begins to."""

EXIT_STOPPED = 75
"""What a process whose run a signal has stopped exits with (EX_TEMPFAIL of <sysexits.h>): the checkpoint is complete,
and the same command goes on from it."""

_LAUNCHER = "LONGLIVE_LAUNCHER"
"""Tells a child which process started it; by the time it can ask the system, that one may be gone."""

_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>

log = logging.getLogger(__name__)


class JointLauncher(_SubprocessScriptLauncher):
    """Starts the other ranks of this machine; ends with them, and they with it."""

    failed = False

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        try:
            return super().launch(function, *args, trainer=trainer, **kwargs)
        except BaseException:
            self.failed = True
            raise

    def _call_children_scripts(self) -> None:
        # The kernel's parent is the thread that forks; only the main one lives as long as the process.
        if threading.current_thread() is threading.main_thread():
            os.environ[_LAUNCHER] = str(os.getpid())
        try:
            super()._call_children_scripts()
        finally:
            os.environ.pop(_LAUNCHER, None)
        atexit.register(self.join)

    def join(self) -> None:
        """Wait for the children, or kill them if the run has failed. A child's failure is this process's."""
        for process in self.procs:
            if self.failed:
                process.kill()
            process.wait()
        codes = [process.returncode for process in self.procs]
        # A run that is stopped is stopped on all ranks.
        if not self.failed and set(codes) - {0, EXIT_STOPPED}:
            log.error("ranks 1 to %d ended with exit codes %s", len(codes), codes)
            _leave()


def end_with_launcher() -> None:
    """Called by a process that `JointLauncher` started: it is killed when the launcher ends. Others are left alone.

    Raises:
        RuntimeError: if the launcher has ended already.
    """
    launcher = os.environ.pop(_LAUNCHER, None)
    if launcher is None:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(launcher):
        raise RuntimeError(f"process {launcher}, which started this rank, has ended")


def exit_soon() -> None:
    """Called when a run has failed: this process will not wait for its peers for more than `EXIT_SECONDS` at exit."""
    atexit.register(_start_timer)


def _start_timer() -> None:
    timer = threading.Timer(EXIT_SECONDS, _leave)
    timer.daemon = True
    timer.start()


def _leave() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
