"""The committed table of plans is what the tool makes of the code as it is."""

from __future__ import annotations

from dataclasses import replace

import pytest

import plan_table


@pytest.mark.parametrize(("section", "clip", "precision"), [(0, "32s", "bf16"), (2, "16s", "nvfp4")])
def test_the_committed_table_is_that_of_the_code(section: int, clip: str, precision: str) -> None:
    """Whoever changes an experiment or the plan, and not the table: tools/plan_table.py --write. Two lines stand for
    all, which take half a minute."""
    chosen = plan_table.SECTIONS[section]
    (row,) = plan_table.rows_of(replace(chosen, clips=(clip,), precisions=(precision,)))
    line = plan_table.table_of(chosen, [row]).splitlines()[-1]
    assert line in plan_table.FILE.read_text().splitlines()


def test_the_file_has_every_section_and_every_line() -> None:
    text = plan_table.FILE.read_text()
    for section in plan_table.SECTIONS:
        _, _, table = text.partition(f"## {section.title}\n")
        lines = [line for line in table.partition("\n## ")[0].splitlines() if line.startswith("| ")]
        expected = [f"| {clip} |" for clip in section.clips for _ in section.precisions]
        assert [line[: len(start)] for line, start in zip(lines[1:], expected, strict=True)] == expected
