"""Exceptions as bytes and back: type, message, notes, frames."""

from __future__ import annotations

import traceback

import pytest

from zmqtasks.errors import DeserializationError
from zmqtasks.protocol.failures import MAX_FRAMES, describe_exception, dump_traceback, load_exception, load_traceback
from zmqtasks.protocol.serialize import serialize_inline


def caught(function: object) -> BaseException:
    try:
        function()  # type: ignore[operator]
    except BaseException as exc:
        return exc
    raise AssertionError("it did not raise")


def recurse() -> None:
    recurse()


def chain() -> None:
    try:
        raise KeyError("first")
    except KeyError as exc:
        exc2 = ValueError("second")
        exc2.add_note("a note")
        raise exc2 from exc


def test_type_message_notes_and_frames_survive() -> None:
    text, payload, formatted = describe_exception(caught(chain), skip_frames=1)
    assert text == "ValueError: second"
    assert "KeyError: 'first'" in formatted
    exc, trace = load_exception(payload)
    assert type(exc) is ValueError
    assert exc.__notes__ == ["a note"]
    assert [frame.name for frame in traceback.extract_tb(trace)] == ["chain"]
    with pytest.raises(ValueError, match="second") as info:
        raise exc.with_traceback(trace)
    assert [entry.name for entry in info.traceback][-1] == "chain"


def test_a_runaway_recursion_is_cut() -> None:
    exc = caught(recurse)
    _, payload, _ = describe_exception(exc)
    loaded, trace = load_exception(payload)
    assert isinstance(loaded, RecursionError)
    assert len(traceback.extract_tb(trace)) <= MAX_FRAMES
    assert len(payload) < 100_000


class _Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


def test_an_exception_that_cannot_be_shown_is_still_reported() -> None:
    text, _, formatted = describe_exception(_Mute())
    assert text == "_Mute: (its message cannot be shown: RuntimeError)"
    assert "_Mute" in formatted


def test_payloads_that_are_no_error_are_refused() -> None:
    with pytest.raises(DeserializationError, match="int"):
        load_exception(serialize_inline(5))
    assert dump_traceback(None) is None
    assert load_traceback(None) is None
    assert load_traceback(b"nonsense") is None
