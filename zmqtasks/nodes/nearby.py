"""Who chooses shared memory: data links between processes of one host, without anybody asking for it.

A node that takes data at an address listens over shm too, at a name made from that address; whoever dials the address
for data tries the name first. A name that nobody listens at is refused at once, on another host as well, so nothing needs to be
known in advance. The handshake is the same on both ways.
"""

from __future__ import annotations

import logging
import sys

from zmqtasks.config import PREFIX, Config
from zmqtasks.errors import ConfigError, ZmqTasksError
from zmqtasks.protocol.frames import MIB
from zmqtasks.transports import registry
from zmqtasks.transports.address import split_scheme

_log = logging.getLogger(__name__)

SMALLEST_BYTES = MIB
_VARIABLE = f"{PREFIX}SHARED_MEMORY_BYTES"

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


def bound_arena(config: Config, memory_limit_bytes: int = 0) -> None:
    """Sees to it that what this process lends stays within its bound: the configured one, or a share of its memory limit.

    Raises ConfigError when the configured one cannot be.
    """
    if sys.platform != "linux" or not config.shared_memory or not (config.shared_memory_bytes or memory_limit_bytes):
        return
    from zmqtasks.transports.shm.own_arena import process_arena

    wanted = config.shared_memory_bytes
    if wanted and wanted < SMALLEST_BYTES:
        raise ConfigError(
            f"{_VARIABLE}={wanted} is less than the {SMALLEST_BYTES} bytes that lending needs: "
            f"set {PREFIX}SHARED_MEMORY=0 to do without shared memory"
        )
    if memory_limit_bytes and wanted > memory_limit_bytes:
        raise ConfigError(
            f"{_VARIABLE}={wanted} is more than the memory limit of the worker, {memory_limit_bytes} bytes: "
            f"lower it (0 means a quarter of the limit), or raise the limit"
        )
    if (arena := process_arena()) is None:
        return
    if wanted > arena.size:
        raise ConfigError(
            f"{_VARIABLE}={wanted} is more than this machine can lend, {arena.size} bytes: lower it, or leave it at 0"
        )
    arena.limit_bytes = wanted or min(arena.limit_bytes, memory_limit_bytes // _LIMIT_SHARE)


def tell_failure(address: str, error: ZmqTasksError) -> None:
    """One line: the node is reached as well without shared memory."""
    _log.warning("no shared memory for data at %s, which goes through sockets instead: %s", address, error)
