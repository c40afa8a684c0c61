"""A record that does not say where it came from cannot be repeated."""

from pathlib import Path

from longlive.doctor.machine import commit, processor_name


def test_a_file_outside_of_a_checkout_has_no_commit(tmp_path: Path) -> None:
    (tmp_path / "file.py").touch()
    assert commit(tmp_path / "file.py") == "unknown"


def test_the_processor_has_a_name() -> None:
    assert processor_name().strip()
