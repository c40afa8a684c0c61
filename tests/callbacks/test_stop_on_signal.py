"""A signal, whenever it comes, ends a run between two optimizer steps, and the run that goes on is the same."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer

from helpers.interrupted import Signal
from helpers.runs import assert_same, fake_batches, fit, tiny_module
from longlive.callbacks.checkpoint import RunCheckpoint
from longlive.callbacks.stop_on_signal import StopOnSignal

STEPS = 4


class Validations(Callback):
    """Steps after which it was validated."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.steps.append(trainer.global_step)


def run(directory: Path, *callbacks: Callback, accumulate: int = 1, first: int = 0, **settings: Any) -> Trainer:
    """Four steps, checkpoints after the last; from `first` on, continued."""
    name = {"filename": "step-{step:07d}", "auto_insert_metric_name": False, "monitor": "step", "mode": "max"}
    saving = RunCheckpoint(dirpath=directory, every_n_train_steps=100, save_top_k=2, **name)
    resumed = {"checkpoint": directory / f"step-{first:07d}.ckpt"} if first else {}
    return fit(
        tiny_module(),
        fake_batches(STEPS * accumulate)[first * accumulate :],
        [*callbacks, saving],
        enable_checkpointing=True,
        **{"max_steps": STEPS, "accumulate_grad_batches": accumulate} | resumed | settings,
    )


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize(("accumulate", "batches"), [(1, 0), (2, 0), (2, 1)])
def test_a_run_that_was_stopped_and_continued_equals_one_that_was_not(tmp_path, accumulate, batches):
    """In the middle of an accumulation, a checkpoint would lose the gradients so far. The signal comes again during
    the save, together with another one."""
    whole = run(tmp_path / "whole", accumulate=accumulate)
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
    listener = StopOnSignal()
    sender = Signal(rank=0, step=1, names=("SIGUSR1", "SIGTERM", "SIGUSR1"), batches=batches)
    stopped = run(tmp_path / "run", listener, sender, accumulate=accumulate)
    assert listener.stopped_by == "SIGTERM"
    assert stopped.global_step == 2
    assert names(tmp_path / "run") == ["step-0000002.ckpt"]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)) == before
    listener = StopOnSignal()
    continued = run(tmp_path / "run", listener, accumulate=accumulate, first=2)
    assert listener.stopped_by is None
    assert_same(continued.lightning_module.state_dict(), whole.lightning_module.state_dict())


def test_a_signal_before_training_stops_it_after_the_first_step(tmp_path):
    """While data are looked for and weights are loaded, there is nothing to save, and nobody to save it."""
    listener = StopOnSignal(signals=["SIGUSR1"], requeue_signals=[])
    before = signal.getsignal(signal.SIGUSR1)
    with listener.listening():
        os.kill(os.getpid(), signal.SIGUSR1)
        assert run(tmp_path, listener).global_step == 1
        os.kill(os.getpid(), signal.SIGUSR1)  # Lightning has given back what was there before the fit: still ours
    assert signal.getsignal(signal.SIGUSR1) == before
    assert listener.stopped_by == "SIGUSR1"


def test_a_signal_that_lightning_gets_before_training_stops_it_in_the_same_way(tmp_path):
    """Lightning listens first, and would raise after the first step: a run that has failed."""

    class Early(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    listener = StopOnSignal()
    assert run(tmp_path, Early(), listener).global_step == 1
    assert listener.stopped_by == "SIGTERM"
    assert names(tmp_path) == ["step-0000001.ckpt"]


def test_a_signal_in_the_last_step_lets_the_run_finish(tmp_path):
    """It has finished: a scheduler that starts it again would do so for ever."""
    listener = StopOnSignal()
    assert run(tmp_path, listener, Signal(rank=0, step=STEPS - 1)).global_step == STEPS
    assert listener.stopped_by is None
    assert names(tmp_path) == [f"step-{STEPS:07d}.ckpt"]


@pytest.mark.parametrize(("step", "validated"), [(0, []), (1, [2])])
def test_stopping_validates_only_where_it_was_due(tmp_path, step, validated):
    """Lightning validates whenever it stops: minutes of the time that is left, and a point that no other run has."""
    seen = Validations()
    settings: dict[str, Any] = {"validation": fake_batches(1), "val_check_interval": 2}
    run(tmp_path, StopOnSignal(), seen, Signal(rank=0, step=step), **settings)
    assert seen.steps == validated


@pytest.mark.parametrize(("name", "expected"), [("SIGUSR1", "requeue 17\n"), ("SIGTERM", "")])
def test_in_a_slurm_job_only_the_warning_puts_it_back_into_the_queue(tmp_path, monkeypatch, name, expected):
    """`scancel` sends SIGTERM: a job that is cancelled and comes back has to be found and cancelled again."""
    asked, program = tmp_path / "asked", tmp_path / "scontrol"
    asked.touch()
    program.write_text(f'#!/bin/sh\necho "$@" >> {asked}\nls {tmp_path}/run >> {tmp_path}/then\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    class InAJob(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            for key, value in (("SLURM_NTASKS", "1"), ("SLURM_JOB_ID", "17"), ("SLURM_JOB_NAME", "train")):
                monkeypatch.setenv(key, value)

    run(tmp_path / "run", StopOnSignal(), InAJob(), Signal(rank=0, step=0, names=(name,)))
    assert asked.read_text() == expected
    if expected:
        assert (tmp_path / "then").read_text() == "step-0000001.ckpt\n"  # not before the checkpoint


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"signals": ["SIGKILL"]}, r"signals=\['SIGKILL'\] are none that a process can catch; use SIGTERM"),
        ({"signals": ["SIGTREM"]}, "SIGTREM"),
        ({"signals": ["SIGTERM"]}, r"requeue_signals=\['SIGUSR1', 'SIGUSR2'\] are not among signals=\['SIGTERM'\]"),
    ],
)
def test_signals_that_cannot_be_caught_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        StopOnSignal(**settings)
