"""Runs against runs: the ratios are those of the steps that are named, and what is no pair is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from torch.utils.tensorboard import SummaryWriter

import compare_runs
from compare_runs import compare, differing, last_losses, table

STEPS, INTERVAL = 100, 10


def write_run(directory: Path, losses: list[float], precision: str = "bf16", **accuracies: float) -> Path:
    """A run of 100 steps that logged these means of ten steps each, and perhaps measured videos."""
    with SummaryWriter(str(directory / "tensorboard")) as writer:
        for interval, loss in enumerate(losses, 1):
            writer.add_scalar("train/loss", loss, interval * INTERVAL - 1, new_style=True)
    config = {
        "directory": str(directory),
        "name": directory.name,
        "precision": {"kind": precision},
        "callbacks": {"checkpoint": {"dirpath": f"{directory}/checkpoints"}},
        "trainer": {"max_steps": STEPS, "log_every_n_steps": INTERVAL},
    }
    OmegaConf.save(OmegaConf.create(config), directory / "config.yaml")
    if accuracies:
        metrics = {"colour": 1.0, "shape": 1.0, "direction": 1.0, "ground": 1.0} | accuracies
        (directory / "videos").mkdir()
        (directory / "videos" / "generation.json").write_text(json.dumps({"metrics": metrics}))
    return directory


@pytest.fixture
def pairs(tmp_path: Path) -> tuple[list[Path], list[Path]]:
    """Two pairs: the first run ends 10 % above, the second 5 % below; a shape is lost in the first."""
    falling = [10.0, 9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]
    against = [write_run(tmp_path / f"bf16_{seed}", falling, shape=0.5) for seed in range(2)]
    worse = write_run(tmp_path / "nvfp4_0", [*falling[:8], 2.2, 1.1], "nvfp4", shape=0.4)
    better = write_run(tmp_path / "nvfp4_1", [*falling[:8], 1.9, 0.95], "nvfp4", shape=0.5)
    return [worse, better], against


def test_losses_are_of_the_last_steps(pairs: tuple[list[Path], list[Path]]) -> None:
    assert last_losses(pairs[1][0], [10, 20, 100]) == pytest.approx([1.0, 1.5, 5.5])


def test_steps_after_the_last_log_are_no_reason_to_wait(pairs: tuple[list[Path], list[Path]]) -> None:
    config = OmegaConf.load(pairs[1][0] / "config.yaml")
    config.trainer.max_steps = STEPS + INTERVAL - 1
    OmegaConf.save(config, pairs[1][0] / "config.yaml")
    assert last_losses(pairs[1][0], [20]) == pytest.approx([1.5])


def test_ratios_and_differences_are_pair_by_pair(pairs: tuple[list[Path], list[Path]]) -> None:
    found = compare(*pairs, [10, 20], "videos")
    assert found["ratios"] == [pytest.approx([1.1, 1.1]), pytest.approx([0.95, 0.95])]
    assert found["differences"] == [pytest.approx([0.0, -0.1, 0.0, 0.0]), pytest.approx([0.0] * 4)]
    assert found["settings"] == ["precision.kind"]
    lines = table(pairs[0], [10, 20], found).splitlines()
    assert lines[0] == "| run | last 10 | last 20 | colour | shape | direction | ground |"
    assert lines[2] == f"| {pairs[0][0]} | 1.100 | 1.100 | +0.000 | -0.100 | +0.000 | +0.000 |"
    assert lines[4] == "| mean | 1.0250 | 1.0250 | +0.0000 | -0.0500 | +0.0000 | +0.0000 |"
    assert lines[5].startswith("| standard deviation | 0.1061 | 0.1061 | 0.0000 | 0.0707 |")
    assert lines[6].startswith("| standard error | 0.0750 | 0.0750 | 0.0000 | 0.0500 |")
    found["differences"][1] = None
    lines = table(pairs[0], [10, 20], found).splitlines()
    assert lines[5] == "| standard deviation | 0.1061 | 0.1061 |  |  |  |  |", "of one video folder there is no spread"


def test_of_another_class_only_what_it_is_made_for_is_named() -> None:
    own = {"precision._target_": "NVFP4", "precision.recipe._target_": "Recipe", "seed": 1, "optimizer.lr": 1e-3}
    other = {"precision._target_": "Mixed", "precision.dtype": "bf16", "seed": 1, "optimizer.lr": 2e-3}
    assert differing(own, other) == {"precision", "optimizer.lr"}


def test_one_pair_without_videos_is_a_line(pairs: tuple[list[Path], list[Path]], tmp_path: Path) -> None:
    run = write_run(tmp_path / "other", [2.0] * 10)
    found = compare([run], pairs[1][:1], [100], "videos")
    assert table([run], [100], found).splitlines() == ["| run | last 100 |", "|---|---|", f"| {run} | 0.364 |"]


def test_what_is_no_pair_is_refused(pairs: tuple[list[Path], list[Path]], tmp_path: Path) -> None:
    runs, against = pairs
    with pytest.raises(ValueError, match="2 runs against 1"):
        compare(runs, against[:1], [10], "videos")
    with pytest.raises(ValueError, match="multiple of 10"):
        compare(runs, against, [15], "videos")
    with pytest.raises(ValueError, match="logged 80 of 100 steps"):
        compare([write_run(tmp_path / "cut", [1.0] * 8)], against[:1], [10], "videos")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="bf16_0 has no student/loss"):
        compare(against[:1], against[:1], [10], "videos", "student/loss")
    with pytest.raises(FileNotFoundError, match="no train/loss"):
        compare([tmp_path / "empty"], against[:1], [10], "videos")


def test_the_command_prints_the_table_and_the_settings(
    pairs: tuple[list[Path], list[Path]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments: list[Any] = ["compare_runs", *pairs[0], "--against", *pairs[1], "--last", "20"]
    monkeypatch.setattr("sys.argv", [str(argument) for argument in arguments])
    compare_runs.main()
    printed = capsys.readouterr().out
    assert f"| {pairs[0][1]} | 0.950 |" in printed
    assert printed.splitlines()[-1] == "settings that differ within pairs: precision.kind"
    monkeypatch.setattr("sys.argv", [str(argument) for argument in [*arguments, "15"]])
    with pytest.raises(SystemExit, match="compare_runs: --last 15"):
        compare_runs.main()
