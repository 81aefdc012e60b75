"""Where a worker listens when nobody says: on the interface that reaches the scheduler, over the same transport."""

from __future__ import annotations

import asyncio
import socket

from zmqtasks.errors import ConnectError
from zmqtasks.transports import registry
from zmqtasks.transports.address import format_host_port, parse_host_port, split_scheme


async def listen_address_for(scheduler_address: str, wanted: str | None) -> str:
    """An address to listen at.

    `wanted` is taken as it is when it names a host; `scheme://:port` gets the host of the interface that reaches the
    scheduler (for transports without ports: any free name), and None stands for any port with the scheduler's
    transport. Raises AddressError, and ConnectError when the scheduler's host cannot be resolved.
    """
    scheme, rest = split_scheme(wanted if wanted is not None else scheduler_address)
    if not registry.get_transport(scheme).capabilities.uses_ip:
        return f"{scheme}://" if wanted is None or rest.startswith(":") else wanted
    if wanted is not None and rest and not rest.startswith(":"):
        return wanted
    port = int(rest[1:] or 0) if wanted is not None and rest else 0
    scheduler_scheme, _ = split_scheme(scheduler_address)
    if not registry.get_transport(scheduler_scheme).capabilities.uses_ip:
        return format_host_port(scheme, "127.0.0.1", port)
    target = parse_host_port(scheduler_address)
    return format_host_port(scheme, await _own_host(target.host, target.port), port)


async def _own_host(host: str, port: int) -> str:
    """The address of this host on the way to another one; no packet is sent."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_DGRAM)
    except OSError as exc:
        raise ConnectError(f"the host {host!r} of the scheduler cannot be resolved: {exc}") from exc
    last: OSError | None = None
    for family, kind, protocol, _, address in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(address)
                return str(probe.getsockname()[0])
        except OSError as exc:
            last = exc
    raise ConnectError(f"no interface of this host reaches the scheduler's host {host!r}: {last}")
