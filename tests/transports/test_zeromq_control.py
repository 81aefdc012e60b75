"""Control parts of the zmq transport: what is encoded is decoded, and any other bytes are one error."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zmqtasks.errors import RemoteProtocolError
from zmqtasks.transports.zeromq.control import (
    CONTROL_BYTES,
    SESSION_BYTES,
    Abort,
    Accept,
    Control,
    Credit,
    Fin,
    FinAck,
    Hello,
    Refuse,
    decode_control_untrusted,
    encode_control,
)

_SESSION = bytes(range(SESSION_BYTES))


@pytest.mark.parametrize(
    "control",
    [
        Hello(_SESSION, 4),
        Accept(_SESSION, (1 << 32) - 1),
        Refuse("the listener is closed"),
        Refuse(""),
        Credit(0, 64),
        Credit((1 << 64) - 1, 1),
        Fin(),
        FinAck(),
        Abort("grüße"),
    ],
)
def test_round_trip(control: Control) -> None:
    assert decode_control_untrusted(encode_control(control)) == control


def test_long_texts_are_cut() -> None:
    data = encode_control(Abort("ü" * 10_000))
    assert len(data) <= CONTROL_BYTES
    assert isinstance(decode_control_untrusted(data), Abort)


def test_other_versions_are_told_apart() -> None:
    assert decode_control_untrusted(encode_control(Hello(_SESSION, 4, 7))) == Hello(b"", 0, 7)
    assert decode_control_untrusted(encode_control(Accept(_SESSION, 4, 7))[:-9]) == Accept(b"", 0, 7)


@pytest.mark.parametrize("damage", [b"", b"x"], ids=["cut", "trailing"])
@pytest.mark.parametrize("control", [Hello(_SESSION, 4), Accept(_SESSION, 4), Credit(5, 4), Fin(), FinAck()])
def test_damaged(control: Control, damage: bytes) -> None:
    data = encode_control(control)
    with pytest.raises(RemoteProtocolError):
        decode_control_untrusted(data + damage if damage else data[:-1])


@given(st.binary(max_size=2 * CONTROL_BYTES))
def test_any_bytes(data: bytes) -> None:
    try:
        decode_control_untrusted(data)
    except RemoteProtocolError:
        pass
