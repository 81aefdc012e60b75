"""What tasks printed, warned and logged, shown by the client as if it had happened here."""

from __future__ import annotations

import builtins
import logging
import sys
import warnings
from collections.abc import Iterable
from typing import Final

from zmqtasks.protocol.ops import LogRecord

STDOUT_LEVEL: Final = 0
STDERR_LEVEL: Final = 1


def show_records(records: Iterable[LogRecord]) -> None:
    """Prints, warns and logs `records` in order. Never raises: a broken pipe of the user must not end the client's loop."""
    for record in records:
        try:
            _show(record)
        except Exception:  # whatever streams and logging handlers of the user raise
            continue


def _show(record: LogRecord) -> None:
    if record.level in (STDOUT_LEVEL, STDERR_LEVEL):
        stream = sys.stdout if record.level == STDOUT_LEVEL else sys.stderr
        if stream is not None:
            stream.write(record.text if record.text.endswith("\n") else record.text + "\n")
            stream.flush()
    elif record.category:
        warnings.warn_explicit(record.text, _category(record.category), record.worker or "(worker)", 1)
    else:
        logger = logging.getLogger(record.logger or "zmqtasks.tasks")
        if logger.isEnabledFor(record.level):
            made = logger.makeRecord(
                logger.name, record.level, record.worker or "(worker)", 0, record.text, (), None, extra=None
            )
            logger.handle(made)


def _category(name: str) -> type[Warning]:
    found = getattr(builtins, name, None)
    return found if isinstance(found, type) and issubclass(found, Warning) else UserWarning
