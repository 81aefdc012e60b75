"""What tasks print and warn: whole lines, bounded, and only theirs."""

from __future__ import annotations

import io
import logging

import pytest

from zmqtasks.nodes.worker import context
from zmqtasks.nodes.worker.output import ForwardingHandler, ForwardingStream, LineBudget
from zmqtasks.protocol.ops import LogRecord


class Worker:
    """Stands where tasks find their worker: keeps what is to be sent."""

    def __init__(self) -> None:
        self.records: list[LogRecord] = []
        self.worker = self
        self.partial: dict[int, str] = {}
        self.current = None

    @property
    def executor(self) -> Worker:
        return self

    def log_soon(self, record: LogRecord) -> None:
        self.records.append(record)


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> Worker:
    worker = Worker()
    monkeypatch.setattr(context.local, "thread", worker)
    return worker


def test_lines_of_tasks_are_forwarded_when_they_are_complete(task: Worker) -> None:
    real = io.StringIO()
    stream = ForwardingStream(real, 0)  # type: ignore[arg-type]
    print("a", "b", file=stream)
    stream.write("begin")
    stream.write(" end\nrest")
    with context.not_forwarded():
        stream.write("private\n")
    assert real.getvalue() == "a b\nbegin end\nrestprivate\n"
    assert [record.text for record in task.records] == ["a b", "begin end"]
    assert task.partial == {0: "rest"}
    stream.writelines(["x" * 10_000])
    assert [len(record.text) for record in task.records] == [3, 9, 10_004]
    assert stream.getvalue() == real.getvalue()


def test_where_the_client_shares_the_terminal_lines_are_shown_once(task: Worker) -> None:
    real = io.StringIO()
    print("a", file=ForwardingStream(real, 0, local=False))  # type: ignore[arg-type]
    assert (real.getvalue(), [record.text for record in task.records]) == ("", ["a"])


def test_what_others_write_stays_here() -> None:
    real = io.StringIO()
    print("a", file=ForwardingStream(real, 0, local=False))  # type: ignore[arg-type]
    assert real.getvalue() == "a\n"


def test_log_records_of_tasks_but_not_of_zmqtasks_are_forwarded(task: Worker) -> None:
    handler = ForwardingHandler()
    for name in ("user.module", "zmqtasks.nodes"):
        handler.handle(logging.LogRecord(name, logging.WARNING, "f.py", 1, "count %d", (3,), None))
    assert task.records == [LogRecord(logging.WARNING, "user.module", "count 3")]


def test_a_flood_is_cut_and_what_is_missing_is_counted() -> None:
    budget = LineBudget(max_records=3, max_bytes=1000)
    assert [budget.add(LogRecord(0, "", str(i)), 10.0) for i in range(5)] == [True, False, False, False, False]
    taken = budget.take("tcp://w")
    assert [(record.text, record.worker) for record in taken[:3]] == [(str(i), "tcp://w") for i in range(3)]
    assert taken[3].text.startswith("2 more lines of tasks were not forwarded")
    assert budget.take("tcp://w") == []
    assert budget.add(LogRecord(0, "", "next second"), 11.0)
    budget.add(LogRecord(0, "", "x" * 5000), 11.1)
    assert [record.text[:11] for record in budget.take("w")] == ["next second", "1 more line"]


def test_a_very_long_line_is_cut() -> None:
    budget = LineBudget()
    budget.add(LogRecord(0, "", "y" * 100_000), 1.0)
    (record,) = budget.take("w")
    assert record.text.endswith("... (34464 characters more)")
