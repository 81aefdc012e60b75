"""Errors of tasks as exceptions: the original one, with the traceback that it had on the worker."""

from __future__ import annotations

import concurrent.futures

from zmqtasks import errors
from zmqtasks.errors import DeserializationError, ZmqTasksError
from zmqtasks.nodes.client.state import Fault
from zmqtasks.protocol.failures import load_exception
from zmqtasks.protocol.ops import ErrorInfo


class RemoteTraceback(Exception):
    """The traceback of a task as text: the cause of an exception whose real traceback could not be carried over."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f'\n"""\n{self.text.rstrip()}\n"""'


def fault_to_exception(fault: Fault, name: str) -> BaseException:
    """What the cancelled or lost future `name` raises."""
    # A lost scheduler is no matter of one future.
    is_own = fault.kind in ("CancelledError", "LostDataError") and name not in fault.reason
    return own_error(fault.kind)(f"{name}: {fault.reason}" if is_own else fault.reason)


def error_to_exception(info: ErrorInfo) -> BaseException:
    """What a failed task raised: a fresh object each time, so that the frames of several `result()` calls don't add up.

    Its `__traceback__` has the frames of the worker. Where those, or the exception itself, cannot be read here, the
    traceback's text is its `__cause__`.
    """
    if not info.payload:
        return _with_text(own_error(info.kind)(info.text), info)
    try:
        exc, traceback = load_exception(info.payload)
    except DeserializationError as why:
        return _with_text(
            DeserializationError(f"a task failed with {info.text!r}, which cannot be read here: {why}"), info
        )
    if traceback is None:
        return _with_text(exc, info)
    return exc.with_traceback(traceback)


def _with_text(error: BaseException, info: ErrorInfo) -> BaseException:
    if info.traceback_text and error.__cause__ is None:
        error.__cause__ = RemoteTraceback(info.traceback_text)
    return error


def own_error(kind: str) -> type[BaseException]:
    """The class in `zmqtasks.errors` of that name, or else their common base."""
    found = getattr(errors, kind, None)
    if isinstance(found, type) and issubclass(found, (ZmqTasksError, concurrent.futures.CancelledError)):
        return found
    return ZmqTasksError
