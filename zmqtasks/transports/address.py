"""Addresses: `tcp://host:port`, `tcp://[::1]:port`, `unix://name`, `inproc://name`.

The scheme names the transport; what follows belongs to it. Transports over IP share `HostPort`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from zmqtasks.errors import AddressError

LOOPBACK = "127.0.0.1"
"""Host of an address that names none: other hosts are let in only by an address that says so (`tcp://0.0.0.0:8786`)."""

_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*\Z")
_HOST = re.compile(r"[A-Za-z0-9_.\-]+\Z")
_IPV6 = re.compile(r"[0-9A-Fa-f:.]+(%[A-Za-z0-9_.\-]+)?\Z")
_MAX_PORT = 65535


@dataclass(frozen=True, slots=True)
class HostPort:
    """The parts of `scheme://host:port`; an IPv6 host stands without brackets."""

    scheme: str
    host: str
    port: int

    def __str__(self) -> str:
        return format_host_port(self.scheme, self.host, self.port)


def split_scheme(address: str) -> tuple[str, str]:
    """The scheme of `address`, in lower case, and what follows `://`; raises `AddressError` when there is no scheme."""
    if not isinstance(address, str):
        raise AddressError(f"an address is a text such as 'tcp://127.0.0.1:8786', not {address!r}")
    scheme, separator, rest = address.strip().partition("://")
    scheme = scheme.lower()
    if not separator or not _SCHEME.match(scheme):
        raise AddressError(
            f"{address!r} is not an address: write it as 'scheme://...', for example 'tcp://127.0.0.1:8786'"
        )
    return scheme, rest


def parse_host_port(address: str, *, default_host: str = LOOPBACK, default_port: int | None = None) -> HostPort:
    """The parts of `scheme://host:port`.

    A missing host is `default_host`, `*` is every IPv4 interface; a missing port is `default_port`, or an error when
    that is None. Raises `AddressError`.
    """
    scheme, rest = split_scheme(address)
    rest = rest.rstrip("/")
    if rest.startswith("["):
        host, closing, port_text = rest[1:].partition("]")
        if not closing or not _IPV6.match(host) or ":" not in host or (port_text and not port_text.startswith(":")):
            raise AddressError(f"{address!r} has a malformed IPv6 host: write it as '{scheme}://[::1]:8786'")
        port_text = port_text[1:]
    else:
        host, _, port_text = rest.partition(":")
        if ":" in port_text:
            raise AddressError(f"{address!r}: an IPv6 host stands in brackets, as in '{scheme}://[::1]:8786'")
        if host == "*":
            host = "0.0.0.0"
        if host and not _HOST.match(host):
            raise AddressError(f"{address!r}: {host!r} is not a host name or IP address")
    return HostPort(scheme, host or default_host, _parse_port(address, port_text, default_port))


def format_host_port(scheme: str, host: str, port: int) -> str:
    """`scheme://host:port`, with brackets around an IPv6 host."""
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def _parse_port(address: str, text: str, default: int | None) -> int:
    if not text:
        if default is None:
            raise AddressError(f"{address!r} has no port: write it as 'scheme://host:port'")
        return default
    if not (text.isascii() and text.isdigit()) or int(text) > _MAX_PORT:
        raise AddressError(f"{address!r}: {text!r} is not a port (0 to {_MAX_PORT})")
    return int(text)
