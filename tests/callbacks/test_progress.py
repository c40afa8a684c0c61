"""What a person sees of a run: a bar on a terminal, a few lines in a job's log."""

from __future__ import annotations

import re

import pytest

from helpers.runs import MemoryLogger, fake_batches, fit, tiny_module
from longlive.callbacks.loss_breakdown import LossBreakdown
from longlive.callbacks.progress import RunProgress
from longlive.callbacks.throughput import Throughput


def train(number: int, *callbacks: object, logger: MemoryLogger | None = None, **settings: object) -> None:
    settings = {"enable_progress_bar": True, "max_steps": number} | settings
    fit(tiny_module(), fake_batches(number), callbacks, logger, **settings)


def test_a_log_gets_lines_with_step_loss_and_tokens_per_second(capsys):
    logger, throughput = MemoryLogger(), Throughput(1)
    train(3, throughput, LossBreakdown(1), RunProgress(line_seconds=0.0), logger=logger)
    first, *lines = capsys.readouterr().err.splitlines()
    assert first == "training from step 0 to 3 on 1 cpu device(s), precision 32-true"
    assert len(lines) == 3
    losses = logger.of("train/loss")
    speeds = logger.of("throughput/tokens_per_second")
    for step, line in enumerate(lines):
        assert line.startswith(f"step {step + 1}/3  ")
        assert f"loss {losses[step]:.4f}" in line
        assert f"{speeds[step]:,.0f} tokens/s" in line
        assert re.search(r"\d+ min \d\d s left$", line)


def test_a_fast_run_does_not_flood_the_log(capsys):
    """A line per step of a long run buries everything else in a job's log."""
    train(30, Throughput(5), LossBreakdown(5), RunProgress(line_seconds=1000.0))
    lines = [line.split("  ")[0] for line in capsys.readouterr().err.splitlines()[1:]]
    assert lines == ["step 1/30", "step 30/30"]


def test_accumulated_batches_print_no_line_of_their_own(capsys):
    train(6, RunProgress(line_seconds=1000.0), max_steps=2, accumulate_grad_batches=3)
    assert len(capsys.readouterr().err.splitlines()) <= 3


def test_without_the_callbacks_that_measure_the_lines_are_shorter(capsys):
    train(2, RunProgress(line_seconds=0.0))
    for line in capsys.readouterr().err.splitlines()[1:]:
        assert re.fullmatch(r"step \d/2 +\d+ min \d\d s left", line)


def test_lines_are_not_folded(capsys, monkeypatch):
    """Away from a terminal, rich folds at 80 columns, and a search in the log misses what was folded."""
    monkeypatch.setenv("COLUMNS", "20")
    train(1, Throughput(1), LossBreakdown(1), RunProgress(line_seconds=0.0))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in lines] == ["training", "step"]


def test_a_resumed_run_says_where_it_continues(capsys, tmp_path):
    batches = fake_batches(4)
    fit(tiny_module(), batches[:2]).save_checkpoint(tmp_path / "2.ckpt")
    fit(
        tiny_module(),
        batches[2:],
        [RunProgress(line_seconds=1000.0)],
        checkpoint=tmp_path / "2.ckpt",
        max_steps=4,
        enable_progress_bar=True,
    )
    assert "training from step 2 to 4 " in capsys.readouterr().err


def test_on_a_terminal_there_is_one_live_bar_that_ends(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "160")
    progress = RunProgress()
    train(4, Throughput(1), LossBreakdown(1), progress)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err)
    assert "4/4" in shown
    assert re.search(r"loss \d\.\d{4} .*tokens/s", shown)
    assert "step 4/4" not in shown
    assert progress._progress is None


def test_an_error_stops_the_bar_and_is_not_hidden(capsys, monkeypatch):
    """A live bar that goes on eats the traceback."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    progress, module = RunProgress(), tiny_module()

    def fail(*arguments: object) -> None:
        raise RuntimeError("the loss is infinite")

    monkeypatch.setattr(module, "frame_losses", fail)
    with pytest.raises(RuntimeError, match="the loss is infinite"):
        fit(module, fake_batches(2), [progress], enable_progress_bar=True)
    assert progress._progress is None


def test_a_disabled_progress_is_silent(capsys):
    progress = RunProgress(line_seconds=0.0)
    progress.disable()
    train(2, progress)
    assert capsys.readouterr().err == ""
    progress.enable()
    train(2, progress)
    assert "step 2/2" in capsys.readouterr().err
