"""Exceptions of tasks as bytes and back, with tracebacks that debuggers and `raise` show as if they were local.

The payload of an `ErrorInfo` is the inline payload of (exception, traceback, links): the traceback is a pickle of plain
data (file, name and line of each frame, no locals) or None; the links are what `raise ... from` and a failing `except` block
leave behind: for each whether it is the cause (else the context) of the one before, and such a payload of its own.
"""

from __future__ import annotations

import pickle
import traceback
from types import TracebackType
from typing import Any

from zmqtasks.errors import DeserializationError
from zmqtasks.protocol.serialize import deserialize_inline, serialize_inline

MAX_LINKS = 10
"""Causes and contexts that travel with an exception."""
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
    return text, _dump(exc, trace, _dump_links(exc)), formatted


class _Alone:
    """Pickles as the exception by itself: once tblib is installed, as dask does it, others pickle with all their links."""

    __slots__ = ("exc",)

    def __init__(self, exc: BaseException) -> None:
        self.exc = exc

    def __reduce__(self) -> Any:
        return self.exc.__reduce_ex__(5)


def _dump(exc: BaseException, trace: TracebackType | None, links: list[tuple[bool, bytes]]) -> bytes:
    frozen = dump_traceback(trace)
    try:
        payload = serialize_inline((_Alone(exc), frozen, links))
        copy = deserialize_inline(payload)[0]  # exceptions with arguments of their own often pickle, but don't unpickle
        if type(copy).__qualname__ != type(exc).__qualname__:
            raise TypeError(f"it comes back as {type(copy).__qualname__}")
    except Exception as problem:
        text = f"{_text_of(exc)} (a stand-in: the exception itself cannot be pickled: {_text_of(problem)})"
        payload = serialize_inline((RuntimeError(text), frozen, links))
    return payload


def _dump_links(exc: BaseException) -> list[tuple[bool, bytes]]:
    """The causes or contexts that a traceback shows, nearest first; pickle leaves them out."""
    links: list[tuple[bool, bytes]] = []
    seen = {id(exc)}
    link = _next_link(exc)
    while link is not None and id(link) not in seen and len(links) < MAX_LINKS:
        seen.add(id(link))
        links.append((exc.__cause__ is link, _dump(link, link.__traceback__, [])))
        exc, link = link, _next_link(link)
    return links


def _next_link(exc: BaseException) -> BaseException | None:
    if exc.__cause__ is not None or exc.__suppress_context__:
        return exc.__cause__
    return exc.__context__


def load_exception(payload: bytes) -> tuple[BaseException, TracebackType | None]:
    """The exception and the traceback in the payload of an `ErrorInfo`; opens it, so it runs the sender's code.

    Raises DeserializationError when the payload holds something else or its types are missing here.
    """
    exc, trace, links = _load(payload)
    last = exc
    for is_cause, data in links:
        try:
            link, link_trace, _ = _load(data)
        except DeserializationError:  # what went before is a convenience, as tracebacks are
            break
        link.with_traceback(link_trace)
        if is_cause:
            last.__cause__ = link
        else:
            last.__context__ = link
        last = link
    return exc, trace


def _load(payload: bytes) -> tuple[BaseException, TracebackType | None, list[tuple[bool, bytes]]]:
    content = deserialize_inline(payload)
    if not (isinstance(content, tuple) and len(content) == 3 and isinstance(content[0], BaseException)):
        raise DeserializationError(f"the payload of an error holds a {type(content).__name__}, not an exception")
    exc, frozen, links = content
    return exc, load_traceback(frozen), links


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
