"""Moves frames between nodes; knows no op and no object. The contract is in `base`, the way in is `registry`."""

from zmqtasks.transports.base import (
    PLAIN,
    Capabilities,
    Comm,
    CommHandler,
    CommStatistics,
    Encryption,
    LinkSettings,
    Listener,
    Transport,
)
from zmqtasks.transports.registry import connect, get_transport, known_schemes, listen, register_transport

__all__ = [
    "PLAIN",
    "Capabilities",
    "Comm",
    "CommHandler",
    "CommStatistics",
    "Encryption",
    "LinkSettings",
    "Listener",
    "Transport",
    "connect",
    "get_transport",
    "known_schemes",
    "listen",
    "register_transport",
]
