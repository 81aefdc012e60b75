"""Tables in the terminal: nothing of them is cut, however narrow it is."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from bench.network.tables import sections
from bench.network.terminal import fitting, show
from tests.bench.documents import report


@pytest.mark.parametrize("width", [60, 80, 200])
def test_every_figure_is_there_whole(width: int) -> None:
    document = report()
    out = io.StringIO()
    show(document, Console(file=out, width=width))
    text = out.getvalue()
    assert "…" not in text
    for section in sections(document):
        assert section.title in text
        for row in section.rows:
            for cell in row:
                assert cell in text
    assert max(map(len, text.splitlines())) <= width


def test_a_wide_table_goes_on_below_with_its_names() -> None:
    wide = max(sections(report()), key=lambda section: len(section.columns))
    parts = fitting(wide, 45)
    assert len(parts) > 1
    for number, row in enumerate(wide.rows):
        assert [part.rows[number][0] for part in parts] == [row[0]] * len(parts)
        assert [cell for part in parts for cell in part.rows[number][1:]] == row[1:]
    assert len(fitting(wide, 500)) == 1
