"""What tasks print, warn and log: forwarded to the clients, and written where it always went.

`install` is for worker processes: it replaces `sys.stdout` and `sys.stderr` by streams that know which thread writes,
and adds a logging handler and a hook for warnings. Only what task threads write is forwarded. Where the client shares the
worker's terminal (a local cluster), writing it here too would show each line twice: `install(local=False)`. `LineBudget` bounds how
much.
"""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from typing import Any, TextIO

from zmqtasks.nodes.worker import context
from zmqtasks.protocol.ops import LogRecord

MAX_TEXT = 64 << 10
"""A longer line is cut."""

_PARTIAL_LIMIT = 8 << 10


class ForwardingStream:
    """A text stream that writes to another one, and forwards whole lines when a task writes them."""

    def __init__(self, stream: TextIO, level: int, local: bool = True) -> None:
        self._stream = stream
        self._level = level
        self._local = local

    def write(self, text: str) -> int:
        """Writes `text`; a line that is not complete is forwarded later."""
        thread = context.current_thread()
        if thread is None or context.suppressed.depth:
            return self._stream.write(text)
        written = self._stream.write(text) if self._local else len(text)
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
        if _is_forwarded(record) and not context.suppressed.depth:
            try:
                context.forward(record.levelno, record.name, self.format(record))
            except Exception:
                self.handleError(record)


def _is_forwarded(record: logging.LogRecord) -> bool:
    return context.current_thread() is not None and record.name.partition(".")[0] != "zmqtasks"


def install(local: bool = True) -> None:
    """Forwards the output of this process's tasks from now on; writes it here as well if `local`."""
    context.output_is_forwarded, context.output_is_local = True, local
    stdout, stderr = sys.stdout, sys.stderr
    sys.stdout = ForwardingStream(stdout, context.STDOUT_LEVEL, local)
    sys.stderr = ForwardingStream(stderr, context.STDERR_LEVEL, local)
    if not local:
        for handler in logging.getLogger().handlers:
            handler.addFilter(lambda record: not _is_forwarded(record))
    logging.getLogger().addHandler(ForwardingHandler())
    show = warnings.showwarning

    def show_and_forward(
        message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None
    ) -> None:
        forwarded = not context.suppressed.depth and context.forward(
            logging.WARNING, "py.warnings", str(message), category.__name__
        )
        if forwarded and not local:
            return
        with context.not_forwarded():
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
