"""Who chooses shared memory: data links between processes of one host, without anybody asking for it.

A node that takes data at an address listens over shm too, at a name made from that address; whoever dials the address
for data tries the name first. A name that nobody listens at is refused at once, on another host as well, so nothing needs to be
known in advance. The handshake is the same on both ways.
"""

from __future__ import annotations

import logging
import sys

from zmqtasks.config import Config
from zmqtasks.errors import ZmqTasksError
from zmqtasks.transports import registry
from zmqtasks.transports.address import split_scheme

_log = logging.getLogger(__name__)

_LIMIT_SHARE = 4
"""Of a worker's memory limit, at most a quarter is lent to others at the same time."""


def nearby_address(address: str, config: Config) -> str | None:
    """Where to try first for data of the node at `address`; None: there is no other way than `address`."""
    if not config.shared_memory or sys.platform != "linux":
        return None
    scheme, _ = split_scheme(address)
    declared = registry.get_transport(scheme).capabilities
    if declared.shares_memory or not declared.crosses_processes:
        return None
    from zmqtasks.transports.shm import shm_address

    return shm_address(address)


def bound_arena(memory_limit_bytes: int) -> None:
    """Sees to it that what this process lends stays within a share of its memory limit (0: none)."""
    if sys.platform == "linux" and memory_limit_bytes:
        from zmqtasks.transports.shm.arena import process_arena

        if (arena := process_arena()) is not None:
            arena.limit_bytes = min(arena.limit_bytes, memory_limit_bytes // _LIMIT_SHARE)


def tell_failure(address: str, error: ZmqTasksError) -> None:
    """One line: the node is reached as well without shared memory."""
    _log.warning("no shared memory for data at %s, which goes through sockets instead: %s", address, error)
