"""Tables in the terminal: nothing of them is cut, however narrow it is."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from bench.network.pairs import Link
from bench.network.suite import Step
from bench.network.tables import sections
from bench.network.terminal import fitting, progress, show
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


def test_addresses_can_be_told_apart_however_narrow_it_is() -> None:
    document = report(matrix=True)
    assert document.matrix is not None
    document.matrix.workers = [f"tcp://127.0.0.1:4000{number}" for number in range(4)]
    document.matrix.links = [
        Link(source=source, target=3 - source, bandwidth=1.25e9, latency_us=60.0) for source in range(4)
    ]
    document.subjects.clear()
    for width in (40, 60):
        out = io.StringIO()
        show(document, Console(file=out, width=width))
        tables = [line for line in out.getvalue().splitlines() if line.startswith("│")]
        for number in range(4):
            named = [line for line in tables if f":4000{number} │" in line]
            assert len(named) >= 3, "a row in each table of workers"
        assert not any("… " in line for line in tables), "nothing is cut at its end"
        assert max(map(len, tables)) <= width
    out = io.StringIO()
    show(document, Console(file=out, width=120))
    assert "tcp://127.0.0.1:40003" in out.getvalue()


def test_a_pipe_sees_how_far_it_is_and_how_long_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    with progress(Console(file=io.StringIO()), clock=lambda: now) as on_step:
        for number in range(10):
            on_step(Step(f"round {number}", number, 10))
            on_step(Step("soon after", number, 10))
            now += 60
        on_step(Step("done", 10, 10))
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["0 of 10, round 0", "1 of 10, round 1"]
    assert lines[4] == "4 of 10, round 4, about 6 min left"
    assert lines[9:] == ["9 of 10, round 9, about 60 s left", "10 of 10, done"]


def test_a_terminal_has_a_bar() -> None:
    out = io.StringIO()
    now = 0.0
    console = Console(file=out, width=100, force_terminal=True, legacy_windows=False)
    with progress(console, clock=lambda: now) as on_step:
        now = 600.0
        on_step(Step("round 1 of 3: tcp", 5, 20))
    assert "5/20" in out.getvalue()
    assert "about 30 min left" in out.getvalue()


def test_a_wide_table_goes_on_below_with_its_names() -> None:
    wide = max(sections(report()), key=lambda section: len(section.columns))
    parts = fitting(wide, 45)
    assert len(parts) > 1
    for number, row in enumerate(wide.rows):
        assert [part.rows[number][0] for part in parts] == [row[0]] * len(parts)
        assert [cell for part in parts for cell in part.rows[number][1:]] == row[1:]
    assert len(fitting(wide, 500)) == 1
