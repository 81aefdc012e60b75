"""`zmqtasks scheduler`."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import click

from zmqtasks.cli.interfaces import interface_host, interface_option
from zmqtasks.cli.options import (
    DEFAULT_PORT,
    PROTOCOLS,
    compression_option,
    config_with,
    encryption_option,
    key_file_option,
    listen_address,
    log_level_option,
    run_node,
    scheduler_file_option,
    scheduler_key,
)
from zmqtasks.deploy.serve import calm_collector
from zmqtasks.errors import ConfigError

if TYPE_CHECKING:
    from zmqtasks.nodes.scheduler.node import SchedulerNode

log = logging.getLogger(__name__)


@click.command()
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Where to listen: an IPv4 or IPv6 address or a name; 0.0.0.0 or :: for every interface.",
)
@interface_option
@click.option(
    "--port", type=click.IntRange(0, 65535), default=DEFAULT_PORT, show_default=True, help="0: any free port."
)
@click.option(
    "--protocol",
    type=click.Choice(PROTOCOLS),
    default="tcp",
    show_default=True,
    help="unix: for this user on this machine only; --host and --port are not used.",
)
@scheduler_file_option
@key_file_option
@encryption_option
@compression_option
@log_level_option
def scheduler(
    host: str,
    interface: str | None,
    port: int,
    protocol: str,
    scheduler_file: str | None,
    key_file: str | None,
    encryption: str | None,
    compression: str | None,
    log_level: str,
) -> int:
    """Start a scheduler and run it until Ctrl-C.

    Workers and clients need its address and the cluster key. The key is made when there is none; --scheduler-file
    writes address and key into one file for all of them.
    """
    from zmqtasks.nodes.scheduler.node import SchedulerNode

    if interface:
        if protocol == "unix":
            raise ConfigError(
                f"--interface {interface}: unix uses no network interface; leave it out, or take tcp or zmq"
            )
        host = interface_host(interface)
    config = config_with(compression)
    key = scheduler_key(key_file, encryption)

    def make() -> SchedulerNode:
        return SchedulerNode(
            [listen_address(protocol, host, port)],
            security=key.security,
            config=config,
            scheduler_file=scheduler_file,
        )

    def ready(node: SchedulerNode) -> None:
        calm_collector()
        if key.made:
            log.info("made the cluster key %s", key.path)
        for address in node.addresses:
            log.info("listens at %s; start workers with: zmqtasks worker %s", address, address)
        if protocol == "unix":
            log.info("only this user on this machine can connect; --protocol tcp --host 0.0.0.0 opens it to others")
        elif host in ("127.0.0.1", "localhost", "::1"):
            log.info("only this machine can connect; --host 0.0.0.0 opens it to others")
        else:
            log.info(
                "nodes on other machines need a copy of the cluster key %s (mode 0600), at the same place", key.path
            )
            if key.security.encryption_mode(node.config.encryption) == "off":
                log.warning("links are not encrypted: who can reach the network sees all that passes")

    return run_node("scheduler", log_level, make, ready)
