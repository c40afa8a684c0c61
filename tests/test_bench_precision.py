"""The benchmark of low precision: what it compares is the same computation, and what it counts is what is kept."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

import bench_precision
import bench_record


def settings(*arguments: str) -> argparse.Namespace:
    return bench_precision.command_line().parse_args(list(arguments))


def test_the_naive_quantiser_encodes_the_same() -> None:
    """A baseline that computes less, or something else, makes any speed-up."""
    record = bench_precision.measure(
        settings("--sections", "quantiser", "--rows", "256", "--columns", "256", "--repeats", "1")
    )
    section = record["sections"]["quantiser"]
    assert section["differing_blocks"]["static_6"] == 0
    assert section["differing_blocks"]["mse"] <= 2
    assert all(row["median_ms"] > 0 for row in section["versions"].values())
    bench_precision.show(record)


def test_what_is_saved_for_backward_is_what_the_formats_hold(capsys: pytest.CaptureFixture[str]) -> None:
    """Autocast keeps bfloat16 copies of input and weight, FP8 the input and the parameter itself, NVFP4 the codes of
    both, half a byte, and a scale per 16, and amax, and of the input the means of 880 tokens. What was no multiple of
    the tokens would be counted as weights."""
    sizes = ("--sizes", "64x32", "32x40")
    record = bench_precision.measure(settings("--sections", "linear", *sizes, "--tokens", "32", "--repeats", "1"))
    rows = record["sections"]["linear"]["64x32"]
    per_input = {name: row["saved_bytes_per_input_element"] for name, row in rows.items()}
    assert per_input == {"bf16": 2, "fp8": 2, "nvfp4": pytest.approx(0.5625 + 2 / 880, abs=1e-4)}
    per_weight = {name: row["saved_bytes_per_weight"] for name, row in rows.items()}
    assert per_weight == {"bf16": 2, "fp8": 0, "nvfp4": pytest.approx(0.5625, abs=0.01)}
    assert all(row["forward_ms"] > 0 and row["backward_ms"] > 0 for row in rows.values())
    refused = record["sections"]["linear"]["32x40"]["nvfp4"]
    assert refused.keys() == {"reason"}
    bench_precision.show(record)
    printed = capsys.readouterr().out
    assert "nvfp4 cannot run here: ValueError: precision=nvfp4 would change no layer" in printed
    assert "emulated: accuracy and what is saved" in printed


def test_the_steps_of_all_precisions_train_the_same_network_on_the_same_clips() -> None:
    record = bench_precision.measure(
        settings("--sections", "step", "--layers", "1", "--frames", "4", "--rounds", "1", "--steps", "1")
    )
    rows = record["sections"]["step"]
    assert {name: row["backend"] for name, row in rows.items() if name != "bf16"} == dict.fromkeys(
        ("fp8", "nvfp4"), "emulated"
    )
    for row in rows.values():
        assert row["loss"] == pytest.approx(rows["bf16"]["loss"], rel=0.02)
        assert row["step_ms"] >= row["forward_ms"] + row["backward_ms"] > 0
        assert row["peak_memory_bytes"] > 0
    bench_precision.show(record)


def test_a_command_keeps_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "runs" / "bench.json"
    monkeypatch.setattr("sys.argv", ["bench", "--json", str(file), "--commit", "abc"])
    bench_record.main(bench_record.make_parser("bench", __doc__), bench_record.header, bench_record.summary)
    written = file.read_text()
    assert '"commit": "abc"' in written
    assert '"threads": 1' in written
