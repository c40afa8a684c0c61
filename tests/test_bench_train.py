"""The benchmark of training steps: what it runs is the experiment, and beside it stands the plan of that very run."""

from __future__ import annotations

import argparse

import pytest

import bench_train
from longlive.config import compose

SMALL = (
    *("model.num_layers=2", "model.dim=64", "model.ffn_dim=128", "model.num_heads=2"),
    *("data.height=32", "data.width=32"),
)


def settings(*arguments: str) -> argparse.Namespace:
    return bench_train.command_line().parse_args([*arguments, *SMALL])


def test_it_trains_with_what_the_experiment_trains_with() -> None:
    """A benchmark of another optimizer, or without the average or checkpointing, finds clips that no run can train."""
    experiment = compose("train", ["experiment=wan5b_teacher_forcing", *SMALL, "data.num_frames=24"])
    config = compose("train", bench_train.overrides(settings(), "bf16-mixed", 24))
    for part in ("model", "optimizer", "schedule", "precision", "module"):
        assert config[part] == experiment[part], part
    assert config.strategy.sharding == experiment.strategy.sharding
    assert config.trainer.gradient_clip_val == experiment.trainer.gradient_clip_val
    assert config.callbacks.ema.decay == experiment.callbacks.ema.decay


def test_steps_are_measured_beside_their_plan(capsys: pytest.CaptureFixture[str]) -> None:
    given = settings("--precisions", "bf16", "--frames", "16", "--steps", "1")
    record = bench_train.measure(given)
    (run,) = record["runs"]
    tokens = 2 * 16 * 2 * 2 // 4  # copies x frames x patches of 32 x 32 pixels at a ratio of 16
    assert run["tokens"] == tokens
    assert run["step_seconds"] == pytest.approx(sum(run["phase_seconds"].values()))
    assert run["tokens_per_second"] == pytest.approx(tokens / run["step_seconds"])
    assert run["hardware_tflops"] == pytest.approx(run["planned"]["flops"] / run["step_seconds"] / 1e12)
    # Both are three passes over the blocks, of which hardware makes the first one twice.
    assert 1 < run["hardware_tflops"] / run["model_tflops"] < 4 / 3
    assert run["peak_bytes"] > 0
    assert run["planned"]["peak_bytes"] == max(run["planned"]["phase_bytes"].values())
    assert record["failures"] == []
    bench_train.show(record)
    printed = capsys.readouterr().out
    assert "bf16, 16 frames, 32 tokens: " in printed
    assert "planned (GiB)" in printed


@pytest.mark.parametrize(
    ("first", "most", "may_grow", "found", "tried"),
    [
        (3, 5, True, 5, [3, 4, 5, 6]),
        (5, 5, True, 5, [5, 6]),
        (7, 5, True, 5, [7, 6, 5]),
        (3, 5, False, 3, [3]),
        (6, 5, False, 5, [6, 5]),
        (2, 0, True, 0, [2, 1]),
    ],
)
def test_the_longest_clip_is_found_from_any_first_try(
    first: int, most: int, may_grow: bool, found: int, tried: list[int]
) -> None:
    asked = []

    def fits(num_chunks: int) -> bool:
        asked.append(num_chunks)
        return num_chunks <= most

    assert bench_train.longest(first, fits, may_grow) == found
    assert asked == tried


def test_the_first_try_is_the_longest_clip_of_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a run out of memory is no failure: the next one is shorter, also in the other precisions."""
    runs = []

    def out_of_memory(overrides: list[str], given: argparse.Namespace) -> dict[str, str]:
        config = compose("train", overrides)
        runs.append((config.precision._target_.rpartition(".")[2], config.data.num_frames))
        return {"out_of_memory": "CUDA out of memory"} if config.data.num_frames > 16 else {}

    given = settings("--longest", "--memory", "0.03", "--precisions", "bf16,fp8")
    monkeypatch.setattr(bench_train, "run_alone", out_of_memory)
    monkeypatch.setattr(bench_train, "describe", lambda found: "")
    record = bench_train.measure(given)
    peaks = [run["planned"]["peak_bytes"] for run in record["runs"]]
    assert peaks[1] < peaks[0] < given.memory * 2**30 < 2 * peaks[0] - peaks[1]
    assert runs == [("choose_precision", 32), ("choose_precision", 24), ("choose_precision", 16), ("FP8Precision", 16)]
    assert [run["frames"] for run in record["runs"]] == [32, 24, 16, 16]
    with pytest.raises(ValueError, match="--longest needs --memory"):
        bench_train.measure(settings("--longest"))


def test_a_precision_that_cannot_run_costs_the_others_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_alone(overrides: list[str], given: argparse.Namespace) -> dict[str, str]:
        if "precision=fp8" in overrides:
            raise RuntimeError("no kernel\nat all")
        return {}

    monkeypatch.setattr(bench_train, "run_alone", run_alone)
    monkeypatch.setattr(bench_train, "describe", lambda found: "")
    record = bench_train.measure(settings("--precisions", "fp8,bf16", "--frames", "16"))
    assert [run["precision"] for run in record["runs"]] == ["bf16"]
    assert record["failures"] == ["RuntimeError: no kernel"]
