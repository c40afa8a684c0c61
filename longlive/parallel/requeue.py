"""A SLURM job that goes back into the queue: the same job, from its beginning, which is a resumed run."""

from __future__ import annotations

import logging
import subprocess

log = logging.getLogger(__name__)


def requeue(job: int | None) -> bool:
    """Ask SLURM to queue a job again; it then ends the job's processes.

    Args:
        job: its number; of an array's task, the task's own.

    Returns:
        whether SLURM agreed. The run has saved by now, so a refusal is logged and no error.
    """
    try:
        asked = subprocess.run(["scontrol", "requeue", str(job)], capture_output=True, text=True)
    except OSError as error:
        log.error("job %s is not requeued: %s", job, error)
        return False
    if asked.returncode:
        log.error("job %s is not requeued: scontrol ended with %d: %s", job, asked.returncode, asked.stderr.strip())
        return False
    log.info("job %s is requeued", job)
    return True
