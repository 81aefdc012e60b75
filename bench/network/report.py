"""The HTML report of a run: one file that needs nothing else, neither network nor scripts."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from .document import Report, from_dict
from .drawing import Plot, svg
from .figures import MIB
from .matrix_tables import matrix_sections
from .plots import HINT, need_matplotlib, plots
from .processes import MeasuringError
from .style import CSS
from .summary import findings
from .tables import Section, sections
from .wording import bandwidth_text

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""The browser itself sees to it that nothing is fetched and nothing runs."""


def render(report: dict[str, Any]) -> str:
    """The whole HTML document of a run (`document.to_dict`); the matrix of a live cluster has its part when there is one."""
    document = from_dict(report)
    body = "\n".join(
        part
        for part in (
            _head(document),
            _findings(document),
            _plots(document),
            *(_table(section) for section in sections(document, all_sizes=True)),
            *(_table(section) for section in matrix_sections(document)),
            _machine(document),
            _skipped(document),
            _method(document),
        )
        if part
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{escape(document.title)}</title>\n<link rel="icon" href="data:,">\n<style>{CSS}</style>\n</head>\n'
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _head(report: Report) -> str:
    machine = report.machine
    parts = [str(machine.get("processor", "")), _processors(machine), str(machine.get("kernel", ""))]
    line = " · ".join(part for part in parts if part)
    count = {0: "", 1: "1 round in "}.get(report.rounds, f"{report.rounds} rounds in ")
    rounds = f"{count}{report.seconds:.0f} s"
    when = report.started.replace("T", " ").replace("+00:00", " UTC")
    notice = (
        "" if report.complete else '<p class="notice">The run was interrupted: these are the figures until then.</p>'
    )
    return (
        f'<header><h1>{escape(report.title)}</h1><p class="soft">{escape(line)}</p>'
        f'<p class="soft">{escape(when)} · {rounds} · <code>{escape(report.command)}</code></p>{notice}</header>'
    )


def _processors(machine: Mapping[str, Any]) -> str:
    count = machine.get("processors")
    return "" if count is None else f"{count} processors"


def _findings(report: Report) -> str:
    said = findings(report)
    if not said:
        return ""
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in said)
    return f'<section><h2>What stands out</h2><ul class="findings">{items}</ul></section>'


def _plots(report: Report) -> str:
    wanted = plots(report)
    if not wanted:
        return ""
    try:
        need_matplotlib()
    except MeasuringError:
        return f'<p class="notice">{escape(HINT)}</p>'
    return f'<section><h2>Plots</h2><div class="plots">{"".join(_plot(plot) for plot in wanted)}</div></section>'


def _plot(plot: Plot) -> str:
    caption = f'<figcaption><h3>{escape(plot.title)}</h3><p class="soft">{escape(plot.about)}</p></figcaption>'
    try:
        drawing = svg(plot)
    except Exception as exc:  # minutes of measuring stand in the tables below, whatever is wrong with a drawing
        drawing = f'<p class="notice">It could not be drawn: {escape(f"{type(exc).__name__}: {exc}")}</p>'
    return f"<figure>{caption}{drawing}</figure>"


def _table(section: Section) -> str:
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in section.columns)
    rows = []
    for (name, *cells), baseline in zip(section.rows, section.baselines, strict=True):
        kind = ' class="baseline"' if baseline else ""
        figures = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        rows.append(f'<tr{kind}><th scope="row">{escape(name)}</th>{figures}</tr>')
    # The box scrolls, not the page; with a keyboard too.
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return (
        f'<section class="card"><h3>{escape(section.title)}</h3><p class="soft">{escape(section.about)}</p>'
        f'<div class="scroll" tabindex="0">{table}</div></section>'
    )


def _machine(report: Report) -> str:
    rows = []
    for name, value in report.machine.items():
        text = _fact(name, value)
        if text:
            rows.append(f'<tr><th scope="row">{escape(_fact_name(name))}</th><td>{escape(text)}</td></tr>')
    if not rows:
        return ""
    body = "".join(rows)
    return f'<section class="card"><h3>The machine</h3><table class="facts"><tbody>{body}</tbody></table></section>'


def _fact_name(name: str) -> str:
    return name.removesuffix("_bytes").replace("_", " ")


def _fact(name: str, value: Any) -> str:
    if name.endswith("_bytes") and isinstance(value, int):
        return f"{value / 1024 / MIB:.1f} GiB"
    if name == "interfaces" and isinstance(value, dict):
        return ", ".join(f"{key} (MTU {each.get('mtu')}{_speed(each)})" for key, each in value.items())
    if isinstance(value, dict):
        return ", ".join(f"{key} {each}" for key, each in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _speed(interface: Mapping[str, Any]) -> str:
    mbit_per_s = interface.get("mbit_per_s")
    return f", {bandwidth_text(mbit_per_s * 125_000)}" if mbit_per_s else ""


def _skipped(report: Report) -> str:
    if not report.skipped:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{escape(each.subject)}</th><td>{escape(each.reason)}</td></tr>' for each in report.skipped
    )
    return f'<section class="card"><h3>Not measured</h3><table class="facts"><tbody>{rows}</tbody></table></section>'


def _method(report: Report) -> str:
    if not report.subjects:
        return ""
    return (
        '<section><h2>How it is measured</h2><p class="soft">Each subject in processes of its own, one after the other, '
        "round after round, every second round backwards; figures are medians over the rounds. A round trip is one message "
        "there and back. Bandwidth is one way, up to the answer to the last message of a burst. Baselines send messages "
        "of the same sizes for the same time, by the simplest means: raw sockets take one system call for each message and "
        "receive into one warm buffer; raw pyzmq has a new link for each size. All rounds are in the JSON document, and "
        "<code>zmqtasks bench compare</code> takes their spread for the noise.</p></section>"
    )
