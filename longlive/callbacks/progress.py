"""A progress bar over the whole run: steps done of those to do, loss, tokens per second, time left.

On a terminal it is a live bar; where output goes to a file, one line per log interval, so that a job's log can be read.
"""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from longlive.callbacks.loss_breakdown import LossBreakdown
from longlive.callbacks.throughput import Throughput


class RunProgress(ProgressBar):
    """See the module docstring. Loss and tokens per second come from `LossBreakdown` and `Throughput`, where those run.

    Args:
        line_seconds: without a terminal, the shortest time between two lines.
    """

    def __init__(self, line_seconds: float = 15.0) -> None:
        super().__init__()
        self.line_seconds = line_seconds
        self._console = Console(stderr=True)
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._last_line = float("-inf")
        self._start = (0.0, 0)

    def disable(self) -> None:
        self._console.quiet = True

    def enable(self) -> None:
        self._console.quiet = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        total = trainer.max_steps if trainer.max_steps > 0 else None
        self._start = (time.perf_counter(), trainer.global_step)
        self._console.print(
            f"training from step {trainer.global_step} to {total or 'no limit'} on {trainer.world_size} "
            f"{trainer.strategy.root_device.type} device(s), precision {trainer.precision}",
            soft_wrap=True,
        )
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("train"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._progress.add_task("", total=total, completed=trainer.global_step)
            self._progress.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._progress is not None:
            self._progress.update(self._task, completed=trainer.global_step, description=self._numbers(trainer))
        elif time.perf_counter() - self._last_line >= self.line_seconds or trainer.global_step == trainer.max_steps:
            self._last_line = time.perf_counter()
            self._console.print(
                f"step {trainer.global_step}/{trainer.max_steps}  {self._numbers(trainer)}  {self._left(trainer)}",
                soft_wrap=True,
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop()

    def _numbers(self, trainer: Trainer) -> str:
        loss = speed = ""
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, LossBreakdown) and callback.last_loss == callback.last_loss:
                loss = f"loss {callback.last_loss:.4f}"
            if isinstance(callback, Throughput) and callback.tokens_per_second:
                speed = f"{callback.tokens_per_second:,.0f} tokens/s"
        return "  ".join(filter(None, (loss, speed)))

    def _left(self, trainer: Trainer) -> str:
        seconds, first = self._start
        done = trainer.global_step - first
        if done <= 0 or trainer.max_steps < 0:
            return ""
        left = (time.perf_counter() - seconds) / done * (trainer.max_steps - trainer.global_step)
        return f"{int(left // 60)} min {int(left % 60):02d} s left"

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
