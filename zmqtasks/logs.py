"""Logs that people read: one line per event with time, level, node and message, on stderr.

    2026-11-21 09:15:02.117  INFO     scheduler  listens at tcp://127.0.0.1:8786

`configure_logging` is for processes that belong to zmqtasks (the command line, the processes of a cluster). Inside a
user's program nothing is configured: records of the logger `zmqtasks` go where the program sends them.
"""

from __future__ import annotations

import logging
import sys
import time
from typing import TextIO

ROOT_LOGGER = "zmqtasks"
DEFAULT_LEVEL = "INFO"
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


class LogFormatter(logging.Formatter):
    """Time, level, node and message; the lines of a longer message are indented under its first one."""

    def __init__(self, node: str) -> None:
        super().__init__()
        self.node = node

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        text = record.getMessage()
        if record.exc_info:
            text = f"{text}\n{self.formatException(record.exc_info)}"
        if "\n" in text:
            text = text.replace("\n", "\n    ")
        return f"{clock}.{int(record.msecs):03d}  {record.levelname:<8} {self.node}  {text}"


def configure_logging(node: str, level: str | int = DEFAULT_LEVEL, stream: TextIO | None = None) -> None:
    """Sends the records of zmqtasks, and warnings and errors of everything else, to `stream` (default: stderr)."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(LogFormatter(node))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger(ROOT_LOGGER).setLevel(level)
    logging.raiseExceptions = False  # a reader of stderr that is gone is no reason for more output


def rename_node(node: str) -> None:
    """Lines from now on carry another node name (one that was only known after the start)."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler.formatter, LogFormatter):
            handler.formatter.node = node
