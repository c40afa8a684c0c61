"""The measured halo's file: written in one step, read back, refused if it is something else."""

from pathlib import Path

import pytest

from longlive.codecs.halo import FILE_NAME, MeasuredHalo

MEASURED = MeasuredHalo(15, 0.0012, 2**-8, {"dtype": "float32", "clip": {"height": 32}})


def test_what_was_written_is_read(tmp_path: Path) -> None:
    assert MeasuredHalo.read(tmp_path) is None
    assert MEASURED.write(tmp_path) == tmp_path / FILE_NAME
    assert MeasuredHalo.read(tmp_path) == MEASURED
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


@pytest.mark.parametrize("content", ["", "15", '{"halo_frames": 15}', '{"halo_frames": "many", "max_error": 0}'])
def test_another_file_of_that_name_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE_NAME).write_text(content)
    with pytest.raises(ValueError, match=r"halo\.json is no measured halo .* remove it, and measure again"):
        MeasuredHalo.read(tmp_path)


def test_a_halo_outside_the_receptive_field_is_refused() -> None:
    MEASURED.check(15)
    with pytest.raises(ValueError, match=r"halo_frames=15 in halo\.json is outside 0 \.\. 14"):
        MEASURED.check(14)
    with pytest.raises(ValueError, match="halo_frames=-1"):
        MeasuredHalo(-1, 0.0, 1.0, {}).check(27)
