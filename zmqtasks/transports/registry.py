"""From the scheme of an address to its transport.

Built-in transports are imported when first used, so that a node over TCP never imports zmq. Others plug in by the entry
point group `zmqtasks.transports` (name: the scheme, object: a `Transport` class or a function that makes one), or by
`register_transport`. A built-in scheme cannot be taken by an entry point.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

from zmqtasks.errors import AddressError
from zmqtasks.transports.address import split_scheme
from zmqtasks.transports.base import Comm, LinkSettings, Listener, Transport

ENTRY_POINT_GROUP = "zmqtasks.transports"

_BUILT_IN = {
    "tcp": ("zmqtasks.transports.tcp", "TcpTransport"),
    "unix": ("zmqtasks.transports.unix", "UnixTransport"),
    "zmq": ("zmqtasks.transports.zeromq", "ZmqTransport"),
    "shm": ("zmqtasks.transports.shm", "ShmTransport"),
    "ucx": ("zmqtasks.transports.ucx", "UcxTransport"),
    "inproc": ("zmqtasks.transports.inproc", "InprocTransport"),
}

_transports: dict[str, Transport] = {}


def get_transport(scheme: str) -> Transport:
    """The transport of `scheme`, one object per process; raises `AddressError` when there is none."""
    transport = _transports.get(scheme)
    if transport is None:
        # Two threads may both make one: transports are stateless until used, and setdefault keeps the first.
        transport = _transports.setdefault(scheme, _load(scheme))
    return transport


def register_transport(transport: Transport) -> None:
    """Makes `transport` the one of its scheme in this process, in place of any other."""
    _transports[transport.scheme] = transport


def known_schemes() -> list[str]:
    """Every scheme that `get_transport` can be asked for, sorted."""
    from importlib import metadata  # 25 ms, needed for transports of others only

    plugged_in = (point.name for point in metadata.entry_points(group=ENTRY_POINT_GROUP))
    return sorted({*_BUILT_IN, *_transports, *plugged_in})


async def connect(address: str, settings: LinkSettings | None = None) -> Comm:
    """A comm to the listener at `address`, by the transport of its scheme; see `Transport.connect`."""
    scheme, _ = split_scheme(address)
    return await get_transport(scheme).connect(address, settings or LinkSettings())


async def listen(address: str, on_comm: Callable[[Comm], None], settings: LinkSettings | None = None) -> Listener:
    """A listener at `address`, by the transport of its scheme; see `Transport.listen`."""
    scheme, _ = split_scheme(address)
    return await get_transport(scheme).listen(address, on_comm, settings or LinkSettings())


def _load(scheme: str) -> Transport:
    try:
        if scheme in _BUILT_IN:
            module_name, class_name = _BUILT_IN[scheme]
            made = getattr(importlib.import_module(module_name), class_name)()
        else:
            from importlib import metadata

            points = metadata.entry_points(group=ENTRY_POINT_GROUP, name=scheme)
            if not points:
                raise AddressError(f"no transport for {scheme!r}: known are {', '.join(known_schemes())}")
            made = next(iter(points)).load()()
    except (ImportError, AttributeError) as exc:
        raise AddressError(f"the transport for {scheme!r} cannot be loaded: {exc}") from exc
    if not isinstance(made, Transport):
        raise AddressError(f"the transport for {scheme!r} cannot be used: {made!r} is not a zmqtasks Transport")
    return made
