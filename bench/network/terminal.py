"""The figures of a run in the terminal."""

from __future__ import annotations

import contextlib
import math
import re
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .document import Report
from .matrix_tables import matrix_sections
from .suite import Step
from .tables import Section, sections

_ADDRESS = re.compile(r"[a-z]+://\S+")
_HEADING_WIDTH = 9
"""Headings take several lines rather than more than this or the figures below them."""
_BORDER = 3
"""What a table takes for a column beside its text."""


_SHORTEST_ADDRESS = 6
"""As much as the port, and a mark that there is more."""
_LINES_APART_S = 1.0
"""A large cluster takes many steps in a second."""
_FEW_STEPS = 3
"""From which nobody can tell how long the others take."""


@contextmanager
def progress(console: Console, clock: Callable[[], float] = time.monotonic) -> Iterator[Callable[[Step], None]]:
    """A progress bar on a terminal, gone in the end; elsewhere lines on standard error: a run takes up to 25 minutes."""
    began = clock()
    if not console.is_terminal:
        yield _lines(clock)
        return
    columns = (TextColumn("{task.description}"), BarColumn(10), MofNCompleteColumn(), TimeElapsedColumn())
    # Twice a second: drawing takes a moment of the processors that are being measured.
    bar = Progress(*columns, TextColumn("{task.fields[left]}"), console=console, transient=True, refresh_per_second=2)
    with bar:
        task = bar.add_task("", total=None, left="")

        def show_step(step: Step) -> None:
            left = time_left(step, clock() - began)
            bar.update(task, description=step.text, completed=step.number, total=step.of, left=left)

        yield show_step


def _lines(clock: Callable[[], float]) -> Callable[[Step], None]:
    began, last = clock(), -math.inf

    def print_step(step: Step) -> None:
        nonlocal last
        now = clock()
        if now - last >= _LINES_APART_S:
            last = now
            parts = (f"{step.number} of {step.of}", step.text, time_left(step, now - began))
            with contextlib.suppress(BrokenPipeError):  # who has left early gets the files all the same
                print(", ".join(part for part in parts if part), file=sys.stderr, flush=True)

    return print_step


def time_left(step: Step, elapsed_s: float) -> str:
    """A guess, as if all steps took as long; nothing after the first few."""
    if not _FEW_STEPS <= step.number < step.of:
        return ""
    left_s = elapsed_s / step.number * (step.of - step.number)
    return f"about {left_s / 60:.0f} min left" if left_s >= 90 else f"about {left_s:.0f} s left"


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
    for part in fitting(_with_short_addresses(section, console.width), console.width):
        console.print(section_table(part))
    console.print(section.about, style="dim italic", highlight=False, markup=False)


def _with_short_addresses(section: Section, width: int) -> Section:
    """Addresses lose their beginning, which most have in common, where a name and a figure else had no room."""
    room = (width - 1) // 2 - _BORDER
    columns = [_cut(column, room) for column in section.columns]
    rows = [[row[0], *(_cut(cell, room) for cell in row[1:])] for row in section.rows]
    shorter = replace(section, columns=columns, rows=rows)
    widest = max((_width(shorter, number) for number in range(1, len(columns))), default=0)
    for row in rows:
        row[0] = _cut(row[0], width - 1 - 2 * _BORDER - widest)
    return shorter


def _cut(text: str, most: int) -> str:
    too_many = len(text) - most
    if too_many <= 0:
        return text
    return _ADDRESS.sub(lambda found: "…" + found[0][min(too_many + 1, len(found[0]) - _SHORTEST_ADDRESS) :], text)


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
