"""The figures of a run in the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .document import Report
from .matrix_tables import matrix_sections
from .suite import Step
from .tables import Section, sections

_HEADING_WIDTH = 9
"""Headings take several lines rather than more than this or the figures below them."""


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
        console.print(section_table(section))
    for finding in report.matrix.findings if report.matrix else ():
        console.print(finding, highlight=False, markup=False)
    for skipped in report.skipped:
        console.print(f"not measured: {skipped.subject}: {skipped.reason}", style="dim", highlight=False, markup=False)


def section_table(section: Section) -> Table:
    """A section as a table of rich."""
    table = Table(title=section.title, caption=section.about, title_justify="left", caption_justify="left")
    for number, column in enumerate(section.columns):
        width = max((len(row[number]) for row in section.rows if number < len(row)), default=0)
        heading = "\n".join(textwrap.wrap(column, max(width, _HEADING_WIDTH), break_long_words=False))
        table.add_column(heading, justify="right" if number else "left", no_wrap=True)
    for cells, baseline in zip(section.rows, section.baselines, strict=True):
        table.add_row(*cells, style="italic" if baseline else "")
    return table
