"""What tasks print, warn and log: written where it always went, and forwarded to the clients.

`install` is for worker processes: it replaces `sys.stdout` and `sys.stderr` by streams that know which thread writes,
and adds a logging handler and a hook for warnings. Only what task threads write is forwarded. `LineBudget` bounds how
much.
"""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from zmqtasks.nodes.worker import context
from zmqtasks.protocol.ops import LogRecord

MAX_TEXT = 64 << 10
"""A longer line is cut."""

_PARTIAL_LIMIT = 8 << 10


class _Suppressed(threading.local):
    depth = 0


_suppressed = _Suppressed()


@contextmanager
def not_forwarded() -> Iterator[None]:
    """While open, nothing that this thread writes is forwarded."""
    _suppressed.depth += 1
    try:
        yield
    finally:
        _suppressed.depth -= 1


class ForwardingStream:
    """A text stream that writes to another one, and forwards whole lines when a task writes them."""

    def __init__(self, stream: TextIO, level: int) -> None:
        self._stream = stream
        self._level = level

    def write(self, text: str) -> int:
        """Writes `text`; a line that is not complete is forwarded later."""
        written = self._stream.write(text)
        thread = context.current_thread()
        if thread is None or _suppressed.depth:
            return written
        text = thread.partial.pop(self._level, "") + text
        whole, newline, rest = text.rpartition("\n")
        if newline:
            context.forward(self._level, "", whole)
        if len(rest) > _PARTIAL_LIMIT:
            context.forward(self._level, "", rest)
        elif rest:
            thread.partial[self._level] = rest
        return written

    def writelines(self, lines: Any) -> None:
        """Writes each of the lines."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class ForwardingHandler(logging.Handler):
    """Forwards log records that tasks make; those of zmqtasks itself are not the task's."""

    def emit(self, record: logging.LogRecord) -> None:
        """Forwards one record."""
        if record.name.partition(".")[0] != "zmqtasks" and not _suppressed.depth:
            try:
                context.forward(record.levelno, record.name, self.format(record))
            except Exception:
                self.handleError(record)


def install() -> None:
    """Forwards the output of this process's tasks from now on."""
    stdout, stderr = sys.stdout, sys.stderr
    sys.stdout = ForwardingStream(stdout, context.STDOUT_LEVEL)
    sys.stderr = ForwardingStream(stderr, context.STDERR_LEVEL)
    logging.getLogger().addHandler(ForwardingHandler())
    show = warnings.showwarning

    def show_and_forward(
        message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None
    ) -> None:
        if not _suppressed.depth:
            context.forward(logging.WARNING, "py.warnings", str(message), category.__name__)
        with not_forwarded():
            show(message, category, filename, lineno, file, line)

    warnings.showwarning = show_and_forward


class LineBudget:
    """Records on their way to the clients: bounded in number and size per second. For any thread but `take`."""

    def __init__(self, max_records: int = 2_000, max_bytes: int = 1 << 20) -> None:
        self._max_records = max_records
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._records: list[LogRecord] = []
        self._window = 0.0
        self._count = 0
        self._bytes = 0
        self._left_out = 0

    def add(self, record: LogRecord, now: float) -> bool:
        """Takes a record, or counts it as left out; True when it is the first since `take`."""
        if len(record.text) > MAX_TEXT:
            text = record.text[:MAX_TEXT] + f"... ({len(record.text) - MAX_TEXT} characters more)"
            record = LogRecord(record.level, record.logger, text, record.worker, record.category)
        with self._lock:
            if now - self._window >= 1:
                self._window = now
                self._count = self._bytes = 0
            self._count += 1
            self._bytes += len(record.text)
            if self._count > self._max_records or self._bytes > self._max_bytes:
                self._left_out += 1
                return False
            self._records.append(record)
            return len(self._records) == 1

    def take(self, worker: str) -> list[LogRecord]:
        """What has been gathered, signed by the worker, with a line about what was left out."""
        with self._lock:
            records, self._records = self._records, []
            left_out, self._left_out = self._left_out, 0
        if left_out:
            text = f"{left_out} more lines of tasks were not forwarded: more than {self._max_records} in a second"
            records.append(LogRecord(logging.WARNING, "zmqtasks", text))
        return [LogRecord(r.level, r.logger, r.text, worker, r.category) for r in records]
