"""A signal ends a run after the optimizer step that it arrives in, with a checkpoint: schedulers and clouds send one
some time before they kill.

A signal may arrive anywhere, also in the middle of a collective or of a save. So its handler does nothing but take
note; at the end of every optimizer step the ranks agree on what any of them has received, and stop together.
`RunCheckpoint` then saves at the moment at which it always saves, so a run that was stopped and started again equals
one that was not. More signals only repeat the note.

Lightning's own handling is not used: it talks to other ranks, or saves, inside the handler, in the middle of whatever
they do there. Its handlers are replaced when training starts, and what it restores at the end are ours.

In a SLURM job, the signals of `requeue_signals` also put the job back into the queue once the checkpoint is complete.
SIGTERM is not one of them: `scancel` sends it.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from longlive.parallel.requeue import requeue

log = logging.getLogger(__name__)


class StopOnSignal(Callback):
    """See the module docstring. `longlive train` listens from its beginning (`listening`) and exits with
    `longlive.parallel.launcher.EXIT_STOPPED`; a script of your own finds in `stopped_by` whether its fit was stopped.

    Args:
        signals: names of those that end the run.
        requeue_signals: those of them that put a SLURM job back into the queue.

    Raises:
        ValueError: for a signal that does not exist, or cannot be caught, or a `requeue_signals` that is none of
            `signals`.
    """

    def __init__(
        self,
        signals: Sequence[str] = ("SIGTERM", "SIGUSR1", "SIGUSR2"),
        requeue_signals: Sequence[str] = ("SIGUSR1", "SIGUSR2"),
    ) -> None:
        unknown = [name for name in signals if name not in signal.Signals.__members__ or name in ("SIGKILL", "SIGSTOP")]
        if unknown:
            raise ValueError(f"signals={unknown} are none that a process can catch; use SIGTERM, SIGUSR1 or SIGUSR2")
        others = [name for name in requeue_signals if name not in signals]
        if others:
            raise ValueError(f"requeue_signals={others} are not among signals={list(signals)}; add them there")
        self.signals = tuple(signals)
        self.requeue_signals = tuple(requeue_signals)
        self.stopped_by: str | None = None
        """The signal that ended the run, on all ranks."""
        self._received = torch.zeros(len(signals), dtype=torch.int32)
        self._group: dist.ProcessGroup | None = None
        self._last_step = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, signals are noted. Outside of the main thread, which alone may catch signals, nothing happens."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = self._listen()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _listen(self) -> dict[int, Any]:
        return {number: signal.signal(number, self._note) for number in map(signal.Signals.__getitem__, self.signals)}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received[self.signals.index(signal.Signals(number).name)] = 1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.stopped_by = None
        self._last_step = trainer.global_step
        if threading.current_thread() is threading.main_thread():
            self._listen()
        if trainer.received_sigterm and "SIGTERM" in self.signals:
            # Lightning's handler came before ours. Left to it, the run would end by an exception after the first step.
            self._received[self.signals.index("SIGTERM")] = 1
            trainer._signal_connector.received_sigterm = False
        if trainer.world_size > 1 and dist.is_initialized():
            # On the CPU: training's own device is not waited for.
            self._group = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        is_over = 0 < trainer.max_steps <= trainer.global_step
        if trainer.global_step == self._last_step or is_over:
            return
        self._last_step = trainer.global_step
        received = self._agreed()
        if not received:
            return
        self.stopped_by = received[0]
        rank_zero_only(log.warning)("%s: the run stops after step %d", ", ".join(received), trainer.global_step)
        loop = trainer.fit_loop
        assert loop._data_fetcher is not None
        if not loop.epoch_loop._should_check_val_fx(loop._data_fetcher):
            trainer.limit_val_batches = 0  # Lightning would validate once more before it stops
        trainer.should_stop = True

    def _agreed(self) -> list[str]:
        """What any rank has received until now."""
        received = self._received.clone()
        if self._group is not None:
            dist.all_reduce(received, dist.ReduceOp.MAX, group=self._group)
        self._received |= received
        return [name for name, flag in zip(self.signals, received.tolist(), strict=True) if flag]

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # By now the checkpoint is complete, also if it was written in the background.
        received = {name for name, flag in zip(self.signals, self._received.tolist(), strict=True) if flag}
        if self.stopped_by is None or not trainer.is_global_zero or not SLURMEnvironment.detect():
            return
        if received & set(self.requeue_signals):
            requeue(SLURMEnvironment.job_id())
