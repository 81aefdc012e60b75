"""Exceptions of tasks as bytes and back, with tracebacks that debuggers and `raise` show as if they were local.

The payload of an `ErrorInfo` is the inline payload of (exception, traceback): the traceback is a pickle of plain data
(file, name and line of each frame, no locals) or None.
"""

from __future__ import annotations

import pickle
import traceback
from types import TracebackType
from typing import Any

from zmqtasks.errors import DeserializationError
from zmqtasks.protocol.serialize import deserialize_inline, serialize_inline

MAX_FRAMES = 100
"""Frames of a traceback that travel: a runaway recursion has a thousand, and all but a few say the same."""


def describe_exception(exc: BaseException, skip_frames: int = 0) -> tuple[str, bytes, str]:
    """Text (`ValueError: message`), payload and formatted traceback of an exception, without its outermost frames.

    An exception that does not survive pickling is replaced by a RuntimeError that names its type, message and the
    obstacle.
    """
    trace = exc.__traceback__
    for _ in range(skip_frames):
        if trace is not None:
            trace = trace.tb_next
    text = _text_of(exc)
    try:
        formatted = "".join(traceback.format_exception(type(exc), exc, trace))
    except Exception as problem:  # a __str__ or __repr__ of user code
        formatted = f"{text}\n(the traceback cannot be shown: {type(problem).__name__})\n"
    frozen = dump_traceback(trace)
    try:
        payload = serialize_inline((exc, frozen))
        copy, _ = deserialize_inline(payload)  # exceptions with arguments of their own often pickle, but don't unpickle
        if type(copy).__qualname__ != type(exc).__qualname__:
            raise TypeError(f"it comes back as {type(copy).__qualname__}")
    except Exception as problem:
        stand_in = RuntimeError(f"{text} (a stand-in: the exception itself cannot be pickled: {_text_of(problem)})")
        payload = serialize_inline((stand_in, frozen))
    return text, payload, formatted


def load_exception(payload: bytes) -> tuple[BaseException, TracebackType | None]:
    """The exception and the traceback in the payload of an `ErrorInfo`; opens it, so it runs the sender's code.

    Raises DeserializationError when the payload holds something else or its types are missing here.
    """
    content = deserialize_inline(payload)
    if not (isinstance(content, tuple) and len(content) == 2 and isinstance(content[0], BaseException)):
        raise DeserializationError(f"the payload of an error holds a {type(content).__name__}, not an exception")
    exc, frozen = content
    return exc, load_traceback(frozen)


def dump_traceback(trace: TracebackType | None) -> bytes | None:
    """A traceback as bytes: the first and last frames of a long one; None for None."""
    if trace is None:
        return None
    from tblib import Traceback  # needed for failures only: keeps the import of the package fast

    frames = []
    while trace is not None:
        frames.append(trace)
        trace = trace.tb_next
    if len(frames) > MAX_FRAMES:
        frames[MAX_FRAMES // 2 : -MAX_FRAMES // 2] = []
    chain: dict[str, Any] | None = None
    for frame in reversed(frames):
        chain = _dump_frame(Traceback, frame, chain)
    return pickle.dumps(chain, 5)


def _dump_frame(kind: Any, trace: TracebackType, rest: dict[str, Any] | None) -> dict[str, Any]:
    alone = TracebackType(None, trace.tb_frame, trace.tb_lasti, trace.tb_lineno)
    record: dict[str, Any] = kind(alone).to_dict()
    record["tb_next"] = rest
    return record


def load_traceback(data: bytes | None) -> TracebackType | None:
    """A traceback from `dump_traceback`; None when there is none or it cannot be read."""
    if data is None:
        return None
    from tblib import Traceback

    try:
        trace: TracebackType | None = Traceback.from_dict(pickle.loads(data)).as_traceback()
    except Exception:  # a traceback is a convenience: never the reason why an error is not shown
        return None
    return trace


def _text_of(exc: BaseException) -> str:
    try:
        message = str(exc)
    except Exception as problem:
        message = f"(its message cannot be shown: {type(problem).__name__})"
    name = type(exc).__qualname__
    return f"{name}: {message}" if message else name
