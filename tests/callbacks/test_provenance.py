"""What a run was is beside its curves, and finding it out never fails a run."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from helpers.runs import curves, events, fake_batches, fit, tiny_module
from longlive.callbacks.provenance import Provenance, commit, versions

CONFIG: dict[str, Any] = {
    "seed": 3,
    "optimizer": {"lr": 0.1, "fused": True, "name": "sgd"},
    "data": {"train": ["one", "two"], "val": None},
}
ORIGIN: dict[str, Any] = {"command": ["longlive", "train"], "versions": {"torch": "1"}, "commit": None}


def test_config_origin_and_hyper_parameters_are_in_tensorboard_and_no_curve_has_a_point_of_them(tmp_path):
    """Lightning's own way logs a metric at step 0, which is no loss."""
    logger = TensorBoardLogger(tmp_path, name="tensorboard", version="", default_hp_metric=False)
    fit(tiny_module(), fake_batches(1), [Provenance(CONFIG, ORIGIN)], logger)
    logger.finalize("success")
    found = {value.tag: value for _, value in events(tmp_path)}
    names = ("config", "origin", "samples")
    texts = {name: found[f"run/{name}/text_summary"].tensor.string_val[0].decode() for name in names}
    assert json.loads(texts["config"]) == CONFIG
    assert json.loads(texts["origin"]) == ORIGIN
    assert "epoch_order(N, seed, p // N)[p % N]" in texts["samples"]
    content = found["_hparams_/session_start_info"].metadata.plugin_data.content
    session = HParamsPluginData.FromString(content).session_start_info.hparams
    assert session["optimizer.lr"].number_value == 0.1
    assert session["optimizer.fused"].string_value == "True"
    assert session["seed"].number_value == 3
    assert session["data.train"].string_value == "['one', 'two']"
    assert "data.val" not in session
    assert "train/loss" not in curves(tmp_path)


def test_versions_are_those_of_what_runs():
    found = versions()
    assert found["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert found["python"].count(".") == 2


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "a")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "a@b")
    (tmp_path / "file").write_text("1")
    for command in (["init", "-q"], ["add", "file"], ["commit", "-q", "-m", "one"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    return tmp_path


def test_the_commit_is_the_users_and_says_whether_files_differ(checkout):
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True).stdout.strip()
    (checkout / "runs").mkdir()
    assert commit(checkout / "runs") == head
    (checkout / "file").write_text("2")
    assert commit(checkout) == f"{head}-dirty"


def test_no_checkout_no_git_and_no_answer_are_no_error(tmp_path, monkeypatch):
    assert commit(tmp_path) is None
    assert commit(tmp_path / "nowhere") is None
    program = tmp_path / "git"
    program.write_text("#!/bin/sh\nprintf '\\377'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/bin")
    assert commit(tmp_path) is None
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    assert commit(tmp_path, seconds=0.1) is None
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert commit(tmp_path) is None
