"""Addresses are parsed and printed, or refused with the text that is wrong."""

from __future__ import annotations

import pytest

from zmqtasks.errors import AddressError
from zmqtasks.transports.address import HostPort, parse_host_port, split_scheme


@pytest.mark.parametrize(
    ("text", "parts", "printed"),
    [
        ("tcp://127.0.0.1:80", ("tcp", "127.0.0.1", 80), None),
        ("TCP://node-1.cluster:8786/", ("tcp", "node-1.cluster", 8786), "tcp://node-1.cluster:8786"),
        ("zmq://[::1]:0", ("zmq", "::1", 0), None),
        ("tcp://[fe80::1%eth0]:5", ("tcp", "fe80::1%eth0", 5), None),
        ("tcp://:5", ("tcp", "127.0.0.1", 5), "tcp://127.0.0.1:5"),
        ("tcp://*:5", ("tcp", "0.0.0.0", 5), "tcp://0.0.0.0:5"),
        (" tcp://a:65535 ", ("tcp", "a", 65535), "tcp://a:65535"),
    ],
)
def test_parse_and_print(text: str, parts: tuple[str, str, int], printed: str | None) -> None:
    parsed = parse_host_port(text)
    assert parsed == HostPort(*parts)
    assert str(parsed) == (printed or text)


@pytest.mark.parametrize("text", ["tcp://a", "tcp://", "tcp://[::1]"])
def test_default_port(text: str) -> None:
    assert parse_host_port(text, default_port=8786).port == 8786
    with pytest.raises(AddressError, match="has no port"):
        parse_host_port(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "127.0.0.1:80",
        "://a:1",
        "1tcp://a:1",
        "tcp://a:b",
        "tcp://a:-1",
        "tcp://a:65536",
        "tcp://a:\u0661",
        "tcp://::1:80",
        "tcp://[::1:80",
        "tcp://[::1]80",
        "tcp://[host]:80",
        "tcp://a b:80",
        "tcp://a/b:80",
        None,
        7,
    ],
)
def test_no_address(text: str) -> None:
    with pytest.raises(AddressError) as caught:
        parse_host_port(text)
    assert repr(text)[:20] in str(caught.value)


def test_split_scheme() -> None:
    assert split_scheme("inproc://some name") == ("inproc", "some name")
    assert split_scheme("inproc://") == ("inproc", "")
