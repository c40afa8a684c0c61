"""The benchmark of rollouts: what it counts is what runs, and it compares nothing but steps and guidance."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

import bench_rollout
from helpers.generating import train_visibly
from longlive.adapters.lora import LoRASettings, adapter_parameters, add_adapter, wrapped_layers
from longlive.adapters.lora_files import save_adapter
from longlive.rollout.settings import RolloutSettings
from longlive.trained import load_trained

STUDENT = ("rollout.num_steps=2", "rollout.guidance_scale=1.0")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_visibly(tmp_path_factory)


@pytest.fixture(scope="module")
def lora(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that does something."""
    network = load_trained(trained).module.trained_network
    add_adapter(network, "student", LoRASettings(rank=2, alpha=4))
    with torch.no_grad():
        for _, parameter in adapter_parameters(network, "student"):
            parameter.fill_(0.1)
    folder = tmp_path_factory.mktemp("loras") / "student"
    save_adapter(network, "student", folder)
    return folder


def settings(teacher: tuple[str, ...], *students: tuple[str, ...]) -> argparse.Namespace:
    words = [word for student in students for word in ("--student", *student)]
    sizes = ("--frames", "8", "--videos", "3", "--batch-size", "2", "--rounds", "2")
    return bench_rollout.command_line().parse_args(["--teacher", *teacher, *words, *sizes])


def test_calls_are_those_of_steps_and_of_the_cache() -> None:
    """32 frames are 8 chunks; nobody reads the last one from the cache."""
    teacher = bench_rollout.count_calls(RolloutSettings(4, num_steps=50, guidance_scale=3.0), 32, [16, 16, 8])
    assert teacher == bench_rollout.Calls(3 * (8 * 50 + 7), 2 * 40 * (8 * 50 + 7))
    for num_steps, ratio in ((4, 814 / 39), (2, 814 / 23)):
        student = bench_rollout.count_calls(RolloutSettings(4, num_steps=num_steps), 32, [16, 16, 8])
        assert teacher.rows / student.rows == pytest.approx(ratio)


def test_teacher_and_students_make_the_same_videos_in_the_counted_calls(
    trained: Path, lora: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`measure` raises where a network is called otherwise than counted."""
    base = f"checkpoint={trained}"
    given = settings((base, "rollout.num_steps=6"), (base, *STUDENT), (base, f"lora={lora}", *STUDENT))
    record = bench_rollout.measure(given)
    teacher, student, adapted = record["models"].values()
    assert teacher["counted"] == {"calls": 2 * 13, "rows": 3 * 13 * 2}
    assert student["counted"] == adapted["counted"] == {"calls": 2 * 5, "rows": 3 * 5}
    assert [row["adapter"] for row in (teacher, student, adapted)] == [None, None, "merged"]
    for row in record["models"].values():
        assert all(min(row["seconds_by_round"][phase]) > 0 for phase in bench_rollout.PHASES)
    for ratio in record["ratios"].values():
        assert ratio["counted"] == 26 / 5
        assert ratio["rollout"]["lowest"] <= ratio["rollout"]["median"] <= ratio["rollout"]["highest"]
        assert len(ratio["rollout"]["by_round"]) == 2
    bench_rollout.show(record)
    printed = capsys.readouterr().out
    assert "teacher: 6 steps, guidance 3" in printed
    assert "student 2: 2 steps, adapter merged" in printed
    assert "5.2x" in printed


def test_other_calls_than_counted_stop_it(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_rollout, "count_calls", lambda *_: bench_rollout.Calls(9, 9))
    base = f"checkpoint={trained}"
    with pytest.raises(RuntimeError, match="but counted were"):
        bench_rollout.measure(settings((base, "rollout.num_steps=1"), (base, *STUDENT)))


@pytest.mark.parametrize(("precision", "place"), [("bf16-mixed", "merged"), ("nvfp4", "beside the weights")])
def test_the_record_says_where_an_adapter_multiplies(trained: Path, lora: Path, precision: str, place: str) -> None:
    """Beside its base it costs time."""
    words = (f"checkpoint={trained}", f"lora={lora}", f"precision={precision}", *STUDENT)
    student = bench_rollout.load(words, "cpu", "student")
    assert student.record["adapter"] == place
    assert student.name == f"student: 2 steps, adapter {place}"
    assert bool(wrapped_layers(student.trained.module.trained_network)) == (place != "merged")


def test_ratios_are_of_the_same_round() -> None:
    """A machine that slows down for a while slows both down: a ratio of medians would mix the rounds."""

    def row(rollout: list[float], rows: int) -> dict[str, object]:
        seconds = {"text": [0.0, 0.0, 1.0], "rollout": rollout, "decode": [1.0] * 3, "write": [0.0] * 3}
        processor = [second / 2 for second in rollout]
        return {"counted": {"rows": rows}, "seconds_by_round": seconds, "processor_seconds_by_round": processor}

    ratio = bench_rollout.compare(row([20.0, 60.0, 40.0], 100), row([1.0, 2.0, 4.0], 5))
    assert ratio["counted"] == 20
    assert ratio["rollout"] == {"median": 20, "lowest": 10, "highest": 30, "by_round": [20, 30, 10]}
    assert ratio["measured_over_counted"] == 1
    assert ratio["processor"] == ratio["rollout"]
    assert ratio["whole"]["by_round"] == [21 / 2, 61 / 3, 42 / 6]


@pytest.mark.parametrize(
    ("teacher", "student", "message"),
    [
        (("rollout.guidance_scale=1.0",), STUDENT, "guidance_scale=1.0 of the teacher, 1.0 of checkpoint="),
        ((), ("rollout.num_steps=2",), "guidance_scale=3.0 of the teacher, 3.0 of checkpoint="),
        ((), (*STUDENT, "rollout.window=4"), "rolls out otherwise than the teacher does with rollout.window=8"),
    ],
    ids=["unguided teacher", "guided student", "other window"],
)
def test_what_does_not_compare_steps_is_refused(
    trained: Path, teacher: tuple[str, ...], student: tuple[str, ...], message: str
) -> None:
    base = f"checkpoint={trained}"
    with pytest.raises(ValueError, match=message):
        bench_rollout.measure(settings((base, *teacher), (base, *student)))
