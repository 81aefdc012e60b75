"""Errors of tasks: themselves, with the traceback of the worker, however often they are asked for."""

from __future__ import annotations

import traceback

import client_tasks as tasks
import pytest

from zmqtasks import Client
from zmqtasks.nodes.client.failures import RemoteTraceback, error_to_exception
from zmqtasks.protocol.failures import describe_exception
from zmqtasks.protocol.ops import ErrorInfo
from zmqtasks.protocol.serialize import serialize_inline


def functions(exc: BaseException) -> list[str]:
    return [frame.name for frame in traceback.extract_tb(exc.__traceback__)]


def test_the_traceback_of_the_worker(client: Client) -> None:
    future = client.submit(tasks.fail, "not good")
    with pytest.raises(ValueError, match="not good") as caught:
        future.result(10)
    assert functions(caught.value)[-2:] == ["fail", "_inner"]
    assert "raise ValueError(message)" in "".join(traceback.format_exception(caught.value))
    assert functions(future.exception() or Exception())[-2:] == ["fail", "_inner"]
    frames = future.traceback()
    assert frames is not None
    assert "_inner" in "".join(traceback.format_tb(frames))
    assert future.status == "error"
    assert "ValueError: not good" in repr(future)


def test_frames_do_not_add_up(client: Client) -> None:
    future = client.submit(tasks.fail)
    lengths = []
    for _ in range(5):
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            future.result(10)
        lengths.append(len(functions(caught.value)))
    assert len(set(lengths)) <= 2
    assert lengths[1] == lengths[-1]


def test_errors_travel_down_the_graph(client: Client) -> None:
    bad = client.submit(tasks.fail, "first")
    after = client.submit(tasks.inc, client.submit(tasks.inc, bad))
    with pytest.raises(ValueError, match="first") as caught:
        after.result(10)
    assert functions(caught.value)[-1] == "_inner"


def test_exceptions_that_cannot_be_pickled_are_told(client: Client) -> None:
    with pytest.raises(Exception, match="1 and 2"):
        client.submit(tasks.fail_oddly).result(10)


def chained(explicitly: bool) -> None:
    class LocalError(Exception):
        """Is gone where this test's classes are not: travels by value."""

    try:
        try:
            tasks.fail("first")
        except ValueError as exc:
            raise LocalError("second") from exc
    except LocalError as exc:
        if explicitly:
            raise RuntimeError("third") from exc
        raise RuntimeError("third")  # noqa: B904 - the context is what is tested


@pytest.mark.parametrize("explicitly", [True, False])
def test_what_went_before_comes_along(client: Client, explicitly: bool) -> None:
    exc = client.submit(chained, explicitly).exception(10)
    assert exc is not None
    second = exc.__cause__ if explicitly else exc.__context__
    assert second is not None
    assert str(second) == "second"
    assert type(second.__cause__) is ValueError
    shown = "".join(traceback.format_exception(exc))
    assert shown.index("first") < shown.index("second") < shown.index("third")
    assert "_inner" in shown  # the traceback of the first


def test_a_cause_that_cannot_be_pickled_has_a_stand_in() -> None:
    class Odd(Exception):
        def __reduce__(self) -> str:
            raise TypeError("not me")

    error = RuntimeError("outer")
    error.__cause__ = Odd("inner")
    exc = error_to_exception(ErrorInfo("exception", "RuntimeError: outer", describe_exception(error)[1]))
    assert type(exc) is RuntimeError
    assert "Odd: inner (a stand-in" in str(exc.__cause__)


def test_causes_in_a_circle_end() -> None:
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__cause__ = second, first
    exc = error_to_exception(ErrorInfo("exception", "ValueError: first", describe_exception(first)[1]))
    assert str(exc.__cause__) == "second"
    assert exc.__cause__ is not None
    assert exc.__cause__.__cause__ is None


def caught_error() -> ValueError:
    try:
        tasks.fail("text")
    except ValueError as exc:
        return exc
    raise AssertionError


def test_without_frames_the_text_is_the_cause() -> None:
    payload = serialize_inline((ValueError("text"), b"not a pickled traceback", []))
    exc = error_to_exception(ErrorInfo("exception", "ValueError: text", payload, "Traceback: the text"))
    assert isinstance(exc, ValueError)
    assert isinstance(exc.__cause__, RemoteTraceback)
    assert "the text" in "".join(traceback.format_exception(exc))


def test_an_unreadable_error_is_told() -> None:
    exc = error_to_exception(ErrorInfo("exception", "Strange: thing", b"\x80\x05nonsense", "Traceback: the text"))
    assert "Strange: thing" in str(exc)
    assert isinstance(exc.__cause__, RemoteTraceback)


def test_a_round_trip() -> None:
    text, payload, shown = describe_exception(caught_error())
    exc = error_to_exception(ErrorInfo("exception", text, payload, shown))
    assert type(exc) is ValueError
    assert functions(exc)[-2:] == ["fail", "_inner"]


@pytest.mark.parametrize(
    "kind", ["KilledWorker", "NoWorkerError", "LostDataError", "KeyConflictError", "ZmqTasksError"]
)
def test_errors_of_the_scheduler(kind: str) -> None:
    exc = error_to_exception(ErrorInfo(kind, "why"))
    assert (type(exc).__name__, str(exc)) == (kind, "why")


def test_an_unknown_kind_is_an_error_of_ours() -> None:
    assert type(error_to_exception(ErrorInfo("os", "why"))).__name__ == "ZmqTasksError"
