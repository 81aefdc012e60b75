"""Writes the parts of the docs that follow from the code: `python -m docs.generate` (with `--check`: only compares).

A generated part stands between `<!-- generated: NAME -->` and `<!-- end of NAME -->`; all else is written by hand.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, get_args

import msgspec

from zmqtasks.protocol import ops

FOLDER = Path(__file__).parent
LINKS = {
    "ClientToScheduler": "client → scheduler",
    "SchedulerToClient": "scheduler → client",
    "SchedulerToWorker": "scheduler → worker",
    "WorkerToScheduler": "worker → scheduler",
    "NannyToScheduler": "nanny → scheduler",
    "SchedulerToNanny": "scheduler → nanny",
    "DataRequest": "anyone → worker (data link)",
    "DataReply": "worker → anyone (data link)",
}


@dataclass(frozen=True)
class FieldText:
    """What the source says about one field."""

    annotation: str
    default: str
    text: str


def struct_fields(source: ast.Module) -> dict[str, dict[str, FieldText]]:
    """For each class in a module: its annotated fields, with the strings that document them."""
    classes = {}
    for node in source.body:
        if isinstance(node, ast.ClassDef):
            fields = {}
            for statement, following in zip(node.body, [*node.body[1:], None], strict=True):
                if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                    fields[statement.target.id] = FieldText(
                        ast.unparse(statement.annotation),
                        ast.unparse(statement.value) if statement.value else "",
                        _string(following),
                    )
            classes[node.name] = fields
    return classes


def op_tables() -> str:
    """Every op with its tag, its directions and its fields."""
    source: dict[str, dict[str, FieldText]] = {}
    for module in Path(ops.__file__).parent.glob("*.py"):
        source |= struct_fields(ast.parse(module.read_text(encoding="utf-8")))
    directions: dict[type, list[str]] = {}
    for union, text in LINKS.items():
        for op in get_args(getattr(ops, union)):
            directions.setdefault(op, []).append(text)
    for introduction in get_args(ops.Introduction):
        directions[introduction] = ["in the introduction of the handshake"]
    parts = ["### Records inside ops\n"]
    parts += [
        _struct_section(record, source[record.__name__], "")
        for record in (ops.TaskOptions, ops.ErrorInfo, ops.LogRecord)
    ]
    parts.append("### Ops\n")
    for op in sorted(directions, key=_tag):
        parts.append(_struct_section(op, source[op.__name__], f"Tag {_tag(op)}; {', '.join(directions[op])}.\n\n"))
    return "\n".join(parts)


def _struct_section(struct: Any, fields: Mapping[str, FieldText], head: str) -> str:
    first = 1 if struct.__struct_config__.tag is not None else 0
    lines = [f"#### {struct.__name__}\n", head + _prose(struct.__doc__)]
    if fields:
        lines.append("\n| element | field | type | default | |\n|---|---|---|---|---|")
        for position, field in enumerate(msgspec.structs.fields(struct), start=first):
            text = fields[field.name]
            default = f"`{text.default}`" if text.default else ""
            kind, prose = (_cell(part) for part in (text.annotation, text.text))
            lines.append(f"| {position} | `{field.name}` | `{kind}` | {default} | {prose} |")
    return "\n".join(lines) + "\n"


def scheduler_transitions() -> str:
    """The life of a task in the scheduler."""
    from zmqtasks.nodes.scheduler.transitions import INITIAL, TRANSITIONS

    arrows: list[tuple[Enum | None, Enum, str]] = [(None, state, "") for state in INITIAL]
    arrows += [(start, finish, "") for start, finish in TRANSITIONS]
    rows = [("(new)", state.name, why) for state, why in INITIAL.items()]
    rows += [(start.name, finish.name, why) for (start, finish), why in TRANSITIONS.items()]
    table = "\n".join(f"| {start} | {finish} | {why} |" for start, finish, why in rows)
    return f"{_diagram(arrows)}\n\n| from | to | when |\n|---|---|---|\n{table}\n"


def client_transitions() -> str:
    """The life of a key that a client holds futures of."""
    from zmqtasks.nodes.client.state import PENDING, TRANSITIONS

    arrows: list[tuple[Enum | None, Enum, str]] = [(None, PENDING, "")]
    arrows += [(start, finish, "") for start, finish in TRANSITIONS]
    rows = "\n".join(f"| {start.name} | {finish.name} | {why} |" for (start, finish), why in TRANSITIONS.items())
    return f"{_diagram(arrows)}\n\n| from | to | when |\n|---|---|---|\n{rows}\n"


def worker_transitions() -> str:
    """The life of a run, and of an input, in a worker."""
    from zmqtasks.nodes.worker.transitions import INPUT_TRANSITIONS, RUN_TRANSITIONS

    parts = []
    for title, table in (("Runs (attempts at tasks)", RUN_TRANSITIONS), ("Inputs", INPUT_TRANSITIONS)):
        pairs: Mapping[Any, tuple[Any, ...]] = table
        arrows = [(start, finish, "") for start, finishes in pairs.items() for finish in finishes]
        parts.append(f"#### {title}\n\n{_diagram(arrows)}\n")
    return "\n".join(parts)


def _diagram(arrows: list[tuple[Any, Any, str]]) -> str:
    """A mermaid state diagram; states that nothing leaves end it."""
    lines = ["```mermaid", "stateDiagram-v2"]
    starts = {start for start, _, _ in arrows}
    for start, finish, label in arrows:
        lines.append(
            f"    {start.name if start is not None else '[*]'} --> {finish.name}{f': {label}' if label else ''}"
        )
    ends = {finish.name: None for _, finish, _ in arrows if finish not in starts}
    lines += [f"    {name} --> [*]" for name in ends]
    return "\n".join([*lines, "```"])


def _tag(op: Any) -> int:
    tag = op.__struct_config__.tag
    assert isinstance(tag, int), op
    return tag


def _string(node: ast.stmt | None) -> str:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
        return node.value.value
    return ""


def _prose(text: str | None) -> str:
    return "\n\n".join(
        " ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text or "") if paragraph.strip()
    )


def _cell(text: str) -> str:
    """Text for a cell of a table."""
    return _prose(text).replace("|", "\\|")


def recorded_journey() -> str:
    """One task's messages, recorded now."""
    from docs.journey import journey

    return journey()


PARTS: dict[str, tuple[str, Callable[[], str]]] = {
    "ops": ("wire.md", op_tables),
    "scheduler transitions": ("design.md", scheduler_transitions),
    "worker transitions": ("design.md", worker_transitions),
    "client transitions": ("design.md", client_transitions),
    "journey": ("journey.md", recorded_journey),
}


def generate() -> dict[Path, str]:
    """The files with generated parts, as they should be."""
    files: dict[Path, str] = {}
    for name, (file_name, make) in PARTS.items():
        path = FOLDER / file_name
        text = files.get(path) or path.read_text(encoding="utf-8")
        begin, end = f"<!-- generated: {name} -->", f"<!-- end of {name} -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise SystemExit(f"{path} has no part between {begin!r} and {end!r}")
        files[path] = f"{before}{begin}\n\n{make().strip()}\n\n{end}{after}"
    return files


def main() -> int:
    """Writes what differs; with --check, says what does and fails."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="only compare; exit code 1 when something is out of date")
    check = parser.parse_args().check
    stale = {path: text for path, text in generate().items() if path.read_text(encoding="utf-8") != text}
    for path, text in stale.items():
        if check:
            print(f"{path.name} is out of date: run  python -m docs.generate", file=sys.stderr)
        else:
            path.write_text(text, encoding="utf-8")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
