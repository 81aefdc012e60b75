"""`--interface`: listening at the address of a network interface, which is the same name on all nodes of a cluster."""

from __future__ import annotations

import socket

import click
import psutil

from zmqtasks.errors import ConfigError
from zmqtasks.transports import registry
from zmqtasks.transports.address import format_host_port, split_scheme

interface_option = click.option(
    "--interface", metavar="NAME", help="Listen at the address of this network interface, as eth0 or ib0."
)


def interface_host(name: str) -> str:
    """The address of an interface: IPv4 where it has one, else an IPv6 address that other hosts can use.

    Raises ConfigError, which names the interfaces that there are.
    """
    found = psutil.net_if_addrs()
    hosts = {each: _host([(a.family, a.address) for a in addresses]) for each, addresses in found.items()}
    if host := hosts.get(name):
        return host
    there = ", ".join(f"{each} ({host})" for each, host in sorted(hosts.items()) if host) or "none"
    what = "has no address" if name in found else "does not exist here"
    raise ConfigError(f"--interface {name}: it {what}; interfaces with an address: {there}")


def interface_address(name: str, protocol: str | None, scheduler_address: str) -> str:
    """Where a worker listens: at the interface, any port, over `protocol` or as its scheduler. Raises ConfigError."""
    scheme = protocol or split_scheme(scheduler_address)[0]
    if not registry.get_transport(scheme).capabilities.uses_ip:
        raise ConfigError(f"--interface {name}: {scheme} uses no network interface; add --protocol tcp or zmq")
    return format_host_port(scheme, interface_host(name), 0)


def _host(addresses: list[tuple[int, str]]) -> str:
    """The best of an interface's addresses, empty when there is none to connect to."""
    for family, address in addresses:
        if family == socket.AF_INET:
            return address
    for family, address in addresses:
        # Link-local addresses mean something on one link only, and need its name.
        if family == socket.AF_INET6 and not address.lower().startswith("fe80:"):
            return address
    return ""
