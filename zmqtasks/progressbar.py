"""A bar that shows how many futures have ended: in terminals by rich, in notebooks by IPython's display."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from typing import Any

from zmqtasks.future import Future
from zmqtasks.nodes.client.state import FINISHED, PENDING
from zmqtasks.waiting import futures_of

INTERVAL_S = 0.1


def progress(
    *futures: Any,
    notebook: bool | None = None,
    multi: bool = True,
    complete: bool = True,
    group_by: str = "prefix",
    **_: Any,
) -> Any:
    """Shows how the tasks get on: a bar for each function (`multi=False`: one for all).

    In a terminal it returns when all have ended; in a notebook at once, and the bar goes on. Ctrl-C ends the bar, not the tasks.

    >>> futures = client.map(slow, range(100))
    >>> progress(futures)
    """
    given = futures_of(list(futures))
    if not given:
        return None
    groups: dict[str, list[Future[Any]]] = {}
    for future in given:
        groups.setdefault((future._state.name or "data") if multi else "all", []).append(future)
    if notebook is None:
        notebook = _in_notebook()
    if notebook:
        return _show_in_notebook(groups)
    _show_in_terminal(groups, complete)
    return None


def _in_notebook() -> bool:
    shell = sys.modules.get("IPython")
    if shell is None:
        return False
    running = shell.get_ipython()
    return running is not None and hasattr(running, "kernel")


def counts(futures: list[Future[Any]]) -> tuple[int, int]:
    """How many have ended, and how many of these not well."""
    statuses = Counter(future._state.status for future in futures)
    ended = len(futures) - statuses[PENDING]
    return ended, ended - statuses[FINISHED]


def _show_in_terminal(groups: dict[str, list[Future[Any]]], complete: bool) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("[red]{task.fields[failed]}"),
    )
    with Progress(*columns, transient=not complete, refresh_per_second=1 / INTERVAL_S) as bars:
        numbers = {name: bars.add_task(name, total=len(futures), failed="") for name, futures in groups.items()}
        while True:
            left = 0
            for name, futures in groups.items():
                ended, failed = counts(futures)
                left += len(futures) - ended
                bars.update(numbers[name], completed=ended, failed=f"{failed} failed" if failed else "")
            if not left:
                return
            time.sleep(INTERVAL_S)


def _bars_html(groups: dict[str, list[Future[Any]]]) -> str:
    import html

    rows = []
    for name, futures in groups.items():
        ended, failed = counts(futures)
        note = f", {failed} failed" if failed else ""
        rows.append(
            f"<div>{html.escape(name)}: <progress value='{ended}' max='{len(futures)}'></progress> "
            f"{ended} / {len(futures)}{note}</div>"
        )
    return "".join(rows)


class _Bars:
    """What a notebook displays; without IPython it is only returned."""

    def __init__(self, groups: dict[str, list[Future[Any]]]) -> None:
        self.groups = groups

    def _repr_html_(self) -> str:
        return _bars_html(self.groups)


def _show_in_notebook(groups: dict[str, list[Future[Any]]]) -> Any:
    bars = _Bars(groups)
    try:
        from IPython.display import display
    except ImportError:
        return bars
    handle = display(bars, display_id=True)
    if handle is not None:
        threading.Thread(target=_keep_updating, args=(handle, bars), name="zmqtasks-progress", daemon=True).start()
    return None


def _keep_updating(handle: Any, bars: _Bars) -> None:
    while True:
        handle.update(bars)
        if all(counts(futures)[0] == len(futures) for futures in bars.groups.values()):
            return
        time.sleep(INTERVAL_S)
