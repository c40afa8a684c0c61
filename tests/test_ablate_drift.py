"""The ablation of drift: what is left to run, and what the tables and the plot make of the records."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, cast

import pytest
from omegaconf import OmegaConf
from PIL import Image

import ablate_drift
from ablate_drift import BOTH, CELLS, MEAN, NEITHER, Ablation, Cell, Job
from longlive.config import compose
from longlive.metrics.toyworld import ATTRIBUTES
from longlive.models.visibility import VisibilityRule, visible_history

FALLS = [1.0, 0.75, 0.5, 0.25]
STAYS = [0.75, 0.75, 0.75, 0.75]


def write_record(ablation: Ablation, cell: Cell, seed: int, quarters: list[float] | None, **other: Any) -> None:
    """A rollout's generation.json, of the same quarters for all attributes but the ground; None: not measured yet."""
    names = {f"quarter_{number}": value for number, value in enumerate(quarters or [], 1)}
    metrics = {
        f"{attribute}/{name}": 1.0 if attribute == "ground" else value
        for attribute in ATTRIBUTES
        for name, value in names.items()
    }
    settings = {"step": 10, "num_frames": 128, "fps": 24.0, "rollout": ablate_drift.SINKS[cell.sinks]} | other
    directory = ablation.videos(cell, seed)
    directory.mkdir(parents=True, exist_ok=True)
    record = {"settings": settings} | ({"metrics": metrics} if quarters else {})
    (directory / "generation.json").write_text(json.dumps(record))


@pytest.fixture
def ablation(tmp_path: Path) -> Ablation:
    """Two seeds: with both everything stays, in the other cells it falls; the second seed is worse by 0.25."""
    made = Ablation(tmp_path, seeds=[3, 5], num_steps=10, num_clips=2)
    for cell in CELLS:
        quarters = STAYS if cell == BOTH else FALLS
        write_record(made, cell, 3, quarters)
        write_record(made, cell, 5, [value - 0.25 for value in quarters])
    return made


def test_tables_have_every_cell_by_seed_and_by_attribute(ablation: Ablation) -> None:
    text = ablate_drift.tables(ablation.results())
    mean_of_four, last, drift = (part.splitlines() for part in text.split(":\n\n")[1:])
    assert mean_of_four[0] == "| error recycling | sinks | seed 3 | seed 5 | all seeds | drift, all seeds |"
    assert mean_of_four[2] == "| off | off | 0.438 | 0.250 | 0.344 ± 0.133 | -0.562 ± 0.000 |"
    assert mean_of_four[6] == "| on | on | 0.812 | 0.625 | 0.719 ± 0.133 | +0.000 ± 0.000 |"
    assert [tuple(line.split(" | ")[:2]) for line in mean_of_four[2:8]] == [(f"| {a}", b) for a, b in CELLS]
    assert last[2] == "| off | off | 0.12 (0.25, 0.00) | 0.12 (0.25, 0.00) | 0.12 (0.25, 0.00) | 1.00 (1.00, 1.00) |"
    falls, still = "-0.75 (-0.75, -0.75)", "+0.00 (+0.00, +0.00)"
    assert drift[2] == f"| off | off | {falls} | {falls} | {falls} | {still} |"
    assert drift[6] == f"| on | on | {still} | {still} | {still} | {still} |"


def test_the_margin_is_between_the_nearest_seeds(ablation: Ablation) -> None:
    """Of means, it would be positive where the seeds' ranges overlap."""
    assert ablate_drift.margin(ablation.results()) == pytest.approx(0.625 - 0.4375)
    write_record(ablation, BOTH, 5, FALLS)
    assert ablate_drift.margin(ablation.results()) == 0
    assert "best seed with neither: +0.000\n" in ablate_drift.tables(ablation.results())


def test_a_curve_lies_at_the_middles_of_the_quarters_between_the_worst_and_the_best_seed(ablation: Ablation) -> None:
    curve = ablate_drift.curve(ablation.results(), NEITHER, "colour")
    assert curve.seconds == pytest.approx([509 / 24 * share for share in (1 / 8, 3 / 8, 5 / 8, 7 / 8)])
    assert curve.high == FALLS
    assert curve.low == [0.75, 0.5, 0.25, 0.0]
    assert curve.mean == [0.875, 0.625, 0.375, 0.125]
    assert ablate_drift.curve(ablation.results(), NEITHER, MEAN).high == pytest.approx([1.0, 0.8125, 0.625, 0.4375])


def test_what_is_finished_is_kept_and_the_rest_is_run(ablation: Ablation) -> None:
    """A training is started again (and continues) for the rollouts that are missing, and for no other."""
    assert ablation.jobs() == []
    assert ablation.complete(at_once=1) == ablation.results()
    with pytest.raises(ValueError, match="at_once=0 must be at least 1"):
        ablation.complete(at_once=0)
    write_record(ablation, Cell("on", "relative"), 5, None)
    (job,) = ablation.jobs()
    assert [command[0] for command in job.commands] == ["train", "generate"]
    assert f"directory={ablation.directory / 'recycling_on' / 'seed_5'}" in job.commands[0]
    assert f"directory={ablation.directory / 'recycling_on' / 'seed_5' / 'sinks_relative'}" in job.commands[1]
    nothing = Ablation(ablation.directory / "new", [3, 5], 10, 2).jobs()
    assert [[command[0] for command in job.commands] for job in nothing] == [["train", *["generate"] * 3]] * 4


@pytest.mark.parametrize("other", [{"step": 20}, {"num_frames": 64}, {"rollout": ablate_drift.SINKS["on"]}])
def test_records_of_another_ablation_are_refused(ablation: Ablation, other: dict[str, Any]) -> None:
    """A table of two lengths of training, or of two cells that are one."""
    write_record(ablation, NEITHER, 3, FALLS, **other)
    with pytest.raises(ValueError, match=r"sinks_off/generation.json has \w+=.*; give another --directory"):
        ablation.results()


def test_the_cells_differ_in_what_they_are_named_after(tmp_path: Path) -> None:
    jobs = Ablation(tmp_path, [7], num_steps=10, num_clips=2).jobs()
    configs = [compose("train", job.commands[0][1:]) for job in jobs]
    module = configs[0].module
    off, on = (cast(dict[str, Any], OmegaConf.to_container(config)) for config in configs)
    assert off["module"].pop("error_recycling") is None
    assert "budget_mib" in on["module"].pop("error_recycling")
    assert [Path(config.pop("directory")) for config in (off, on)] == [job.log.with_suffix("") for job in jobs]
    assert off == on
    assert (off["seed"], off["trainer"]["max_steps"]) == (7, 10)
    rollouts = [compose("generate", command[1:]).rollout for command in jobs[1].commands[1:]]
    assert [(each.sink_frames, each.relative_rope) for each in rollouts] == [(0, False), (4, False), (4, True)]
    # One training serves rollouts with and without sinks.
    rule = VisibilityRule.from_frames(module.window, module.sink_frames, module.shot_sink, module.chunk_frames)
    assert [visible_history(chunk, [0] * 4, rule) for chunk in (2, 3)] == [[0, 1], [0, 2]]


def test_a_failure_ends_the_other_jobs_and_names_its_log(tmp_path: Path) -> None:
    """Otherwise hours of trainings run on whose table nobody will make, or a child outlives the command."""
    seen = tmp_path / "seen"
    good = Job(tmp_path / "good.log", [[f"echo one >> {seen}"], [f"echo two >> {seen}; echo told"]])
    ablate_drift.run_jobs([good], at_once=2, program=("sh", "-c"))
    assert seen.read_text() == "one\ntwo\n"
    assert good.log.read_text() == "told\n"
    endless = Job(tmp_path / "endless.log", [["exec sleep 60"], [f"echo three >> {seen}"]])
    bad = Job(tmp_path / "bad.log", [["echo why >&2; exit 3"], [f"echo four >> {seen}"]])
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"exit code 3: .*bad.log says why; the same command goes on from here"):
        ablate_drift.run_jobs([endless, bad, good], at_once=2, program=("sh", "-c"))
    assert time.monotonic() - start < 30
    assert seen.read_text() == "one\ntwo\n"
    assert bad.log.read_text() == "why\n"


def test_the_pictures_show_the_four_cells(ablation: Ablation, tmp_path: Path) -> None:
    ablate_drift.draw_plot(ablation.results(), tmp_path / "images" / "plot.png")
    with Image.open(tmp_path / "images" / "plot.png") as plot:
        assert plot.width > 800
        assert len(plot.convert("RGB").getcolors(1 << 24)) > 20, "lines, bands and letters"
    sheets = {}
    for cell, colour in zip(ablate_drift.PLOTTED, ("red", "lime", "blue", "yellow"), strict=True):
        sheets[cell] = tmp_path / f"{cell.recycling}-{cell.sinks}.png"
        Image.new("RGB", (60, 120), colour).save(sheets[cell])
    ablate_drift.draw_sheets(sheets, tmp_path / "sheets.png")
    with Image.open(tmp_path / "sheets.png") as image:
        picture = image.convert("RGB")
    assert picture.size == (2 * 60 + 16, 2 * (24 + 40))
    found = [picture.getpixel((x, y)) for y in (63, 127) for x in (30, 106)]
    assert found == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]
