"""The figures of a run in the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .document import Report
from .matrix_tables import matrix_sections
from .suite import Step
from .tables import Section, sections

_HEADING_WIDTH = 9
"""Headings take several lines rather than more than this or the figures below them."""
_BORDER = 3
"""What a table takes for a column beside its text."""


@contextmanager
def progress(console: Console) -> Iterator[Callable[[Step], None]]:
    """A progress bar on a terminal, nothing elsewhere; it is gone in the end."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    # Twice a second: drawing takes a moment of the processors that are being measured.
    bar = Progress(*columns, console=console, transient=True, refresh_per_second=2, disable=not console.is_terminal)
    with bar:
        task = bar.add_task("", total=None)
        yield lambda step: bar.update(task, description=step.text, completed=step.number, total=step.of)


def show(report: Report, console: Console) -> None:
    """All tables of the run, and what was left out."""
    if not report.complete:
        console.print("[bold]The run was interrupted: these are the figures until then.[/bold]")
    for section in (*sections(report), *matrix_sections(report)):
        show_section(section, console)
    for finding in report.matrix.findings if report.matrix else ():
        console.print(finding, highlight=False, markup=False)
    for skipped in report.skipped:
        console.print(f"not measured: {skipped.subject}: {skipped.reason}", style="dim", highlight=False, markup=False)


def show_section(section: Section, console: Console) -> None:
    """Its title, its figures in as many tables as it takes, and what it is about."""
    console.print(section.title, style="italic", highlight=False, markup=False)
    for part in fitting(section, console.width):
        console.print(section_table(part))
    console.print(section.about, style="dim italic", highlight=False, markup=False)


def fitting(section: Section, width: int) -> list[Section]:
    """The section in as many parts as it takes to show all figures in so many columns of text, each with the names."""
    needed = [_width(section, number) + _BORDER for number in range(len(section.columns))]
    parts: list[list[int]] = [[]]
    for number in range(1, len(needed)):
        if parts[-1] and 1 + needed[0] + sum(needed[each] for each in (*parts[-1], number)) > width:
            parts.append([])
        parts[-1].append(number)
    return [
        replace(
            section,
            columns=[section.columns[number] for number in (0, *part)],
            rows=[[row[number] for number in (0, *part) if number < len(row)] for row in section.rows],
        )
        for part in parts
    ]


def _width(section: Section, number: int) -> int:
    """Of a column: its figures, and its heading in several lines."""
    widest = max((len(row[number]) for row in section.rows if number < len(row)), default=0)
    return max([widest, *map(len, _heading(section, number, widest).split("\n"))])


def _heading(section: Section, number: int, width: int) -> str:
    return "\n".join(textwrap.wrap(section.columns[number], max(width, _HEADING_WIDTH), break_long_words=False))


def section_table(section: Section) -> Table:
    """The figures of a section as a table of rich."""
    table = Table()
    for number in range(len(section.columns)):
        width = max((len(row[number]) for row in section.rows if number < len(row)), default=0)
        heading = _heading(section, number, width)
        table.add_column(heading, justify="right" if number else "left", no_wrap=True)
    for cells, baseline in zip(section.rows, section.baselines, strict=True):
        table.add_row(*cells, style="italic" if baseline else "")
    return table
