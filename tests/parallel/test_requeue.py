"""What a job does whose requeueing is refused: it has saved, and ends as it would have."""

import logging
from pathlib import Path

import pytest

from longlive.parallel.requeue import requeue


def test_a_refusal_is_logged_with_what_slurm_says_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    program = tmp_path / "scontrol"
    program.write_text("#!/bin/sh\necho Requeue is disabled for the job >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with caplog.at_level(logging.ERROR, logger="longlive"):
        assert not requeue(17)
    assert caplog.messages == ["job 17 is not requeued: scontrol ended with 1: Requeue is disabled for the job"]


def test_a_machine_without_slurm_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with caplog.at_level(logging.ERROR, logger="longlive"):
        assert not requeue(17)
    assert "job 17 is not requeued" in caplog.messages[0]
