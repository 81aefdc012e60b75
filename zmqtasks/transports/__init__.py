"""Moves frames between nodes; knows no op and no object. The contract is in `base`, the way in is `registry`."""

from zmqtasks.transports.base import (
    Capabilities,
    Comm,
    CommHandler,
    CommStatistics,
    LinkSettings,
    Listener,
    Transport,
)
from zmqtasks.transports.registry import connect, get_transport, known_schemes, listen, register_transport

__all__ = [
    "Capabilities",
    "Comm",
    "CommHandler",
    "CommStatistics",
    "LinkSettings",
    "Listener",
    "Transport",
    "connect",
    "get_transport",
    "known_schemes",
    "listen",
    "register_transport",
]
