"""`longlive doctor plan` as it is typed: what it prints, writes and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from longlive import doctor
from longlive.config import compose
from longlive.doctor.plan import make_plan
from longlive.doctor.plan_config import Machine
from longlive.doctor.plan_report import as_dict


def test_the_command_prints_the_plan(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    assert doctor.main(["plan", "experiment=quickstart", "num_gpus=1", "device=cpu", "gpu_memory=1"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for line in (
        "mesh (data x sequence) 1 x 1 = 1 processes on 1 node",
        "clip 8 frames in 2 chunks, 16 tokens per frame",
        "parameters 2,761,984",
        "tokens, clean and noisy 768",
        "loss tokens 512",
        "raw frames read per clip 29",
        "attention scores that are needed 44.4% of all",
    ):
        assert line in lines, line
    assert lines[-1].startswith("yes: ")


def test_json_is_printed_or_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    command = ["plan", "--json", f"json={path}", "experiment=quickstart", "num_gpus=2", "device=cpu"]
    assert doctor.main(command) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(path.read_text())
    assert printed["mesh"] == {"data_parallel": 2, "sequence_parallel": 1}
    assert printed["fits"] is None
    assert printed["bytes_sent_per_step"]["gradients averaged over replicas"] == 4 * printed["num_parameters"]


def test_the_command_refuses_in_one_line_and_says_what_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["plan", "experiment=quickstart"]) == 1
    assert "num_gpus=... must be given" in capsys.readouterr().err
    assert doctor.main(["plan", "num_gpus=two"]) == 1
    assert capsys.readouterr().err == "longlive doctor plan: num_gpus=two is no number\n"
    assert doctor.main(["plan", "num_gpus=1", "pre_encoded=maybe"]) == 1
    assert capsys.readouterr().err == "longlive doctor plan: pre_encoded=maybe is neither true nor false\n"
    assert doctor.main(["plan", "num_gpus=1", "data.num_framse=8"]) == 1
    assert "did you mean data.num_frames" in capsys.readouterr().err
    for setting in ("data.batch_size", "trainer.accumulate_grad_batches", "model.num_layers"):
        assert doctor.main(["plan", "num_gpus=1", f"{setting}=two"]) == 1
        assert capsys.readouterr().err == f"longlive doctor plan: {setting}='two' is no int\n"
    assert doctor.main(["plan", "num_gpus=1", "device=cpu", "gpu_memory=0.01", "experiment=quickstart"]) == 2
    assert "more than gpu_memory=0.01 GiB. Training takes most" in capsys.readouterr().out


def test_a_plan_as_json_has_no_objects_of_ours() -> None:
    config = compose(
        "train",
        [
            *("strategy=balanced_sp", "strategy.sequence_parallel_size=2", "data.num_frames=16"),
            "strategy.sharding.activation_checkpointing=2",
        ],
    )
    json.dumps(as_dict(make_plan(config, Machine(4, device="cpu"))))
