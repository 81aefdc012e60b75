"""What the subcommands share: addresses, keys and the running of a node in the foreground."""

from __future__ import annotations

import dataclasses
import logging
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from zmqtasks.config import COMPRESSION_MODES, ENCRYPTION_MODES, Config, load_config
from zmqtasks.deploy.serve import Node, run_loop, serve, stop_on_signals
from zmqtasks.errors import ConfigError
from zmqtasks.logs import LEVELS, configure_logging
from zmqtasks.protocol.compression import check_mode
from zmqtasks.scheduler_file import SchedulerFile, find_scheduler_file, wait_scheduler_file
from zmqtasks.security import (
    ClusterKey,
    Security,
    create_key,
    default_key_path,
    expand_user,
    find_key,
    wait_for_key,
)
from zmqtasks.transports.address import format_host_port

DEFAULT_PORT = 8786
"""The port that users of dask know."""
PROTOCOLS = ("tcp", "unix", "zmq", "ucx")
"""Transports between processes."""
FILE_WAIT_S = 30.0
"""How long nodes wait for a scheduler, started at the same time, to write its file or the key."""

key_file_option = click.option(
    "--key-file",
    type=click.Path(dir_okay=False),
    help="File with the cluster key (default: $ZMQTASKS_KEY_FILE, else ~/.config/zmqtasks/cluster.key).",
)
scheduler_file_option = click.option(
    "--scheduler-file", type=click.Path(dir_okay=False), help="File with the scheduler's address and the cluster key."
)
encryption_option = click.option(
    "--encryption",
    type=click.Choice(ENCRYPTION_MODES),
    help="Links to encrypt, the same on all nodes: those that leave the host (auto, the default), all over IP (on), "
    "none (off: who can reach the network is trusted). Default: the scheduler file's, else $ZMQTASKS_ENCRYPTION.",
)
compression_option = click.option(
    "--compression",
    type=click.Choice(COMPRESSION_MODES),
    help="Of bulk data that this node sends: lz4 on links slower than compressing (auto, the default); lz4 or zstd on "
    "every link to another process, for data that shrinks; off. Default: $ZMQTASKS_COMPRESSION.",
)
log_level_option = click.option(
    "--log-level",
    type=click.Choice(LEVELS, case_sensitive=False),
    default="INFO",
    show_default=True,
    help="The least important lines to log.",
)


@dataclass(frozen=True)
class Target:
    """The scheduler that a command talks to."""

    address: str
    security: Security


def config_with(compression: str | None) -> Config:
    """The settings of the environment, with what options say instead; ConfigError when this machine lacks what they need."""
    config = load_config()
    if compression:
        config = dataclasses.replace(config, compression=compression)
    check_mode(config.compression)  # here too, since what a nanny starts would fail again and again
    return config


def key_path(named: str | None) -> Path:
    """Where the cluster key is: the file that the command line names (~ is expanded), else the user's."""
    return expand_user(named) if named else default_key_path()


def find_scheduler(
    address: str | None,
    scheduler_file: str | None,
    key_file: str | None,
    wait_s: float = FILE_WAIT_S,
    encryption: str | None = None,
) -> Target:
    """The scheduler that ADDRESS or --scheduler-file names; files that are not there yet are waited for."""
    content: SchedulerFile | None = None
    if scheduler_file:
        path = expand_user(scheduler_file)
        _announce_wait(path, find_scheduler_file(path), wait_s)
        content = wait_scheduler_file(path, wait_s)
        address = address or content.address
        encryption = encryption or content.encryption or None
    if not address:
        raise ConfigError("which scheduler? Give its ADDRESS, as in tcp://127.0.0.1:8786, or --scheduler-file")
    if "://" not in address:
        address = f"tcp://{address}"
    if content and content.key and not key_file:
        return Target(address, Security(ClusterKey.from_hex(content.key), encryption))
    path = key_path(key_file)
    _announce_wait(path, find_key(path), wait_s)
    return Target(address, Security(wait_for_key(path, wait_s), encryption))


def _announce_wait(path: Path, found: object, wait_s: float) -> None:
    if wait_s and found is None:
        click.echo(f"zmqtasks: waiting up to {wait_s:g} s for {path}, which the scheduler writes", err=True)


@dataclass(frozen=True)
class SchedulerKey:
    """The key that a scheduler uses, and where it is."""

    security: Security
    path: Path
    made: bool
    """There was none before."""


def scheduler_key(key_file: str | None, encryption: str | None) -> SchedulerKey:
    """The key in `key_file` (default: where the user's is), which is made when there is none."""
    path = key_path(key_file)
    made = find_key(path) is None
    return SchedulerKey(Security(create_key(path), encryption), path, made)


def listen_address(protocol: str, host: str, port: int) -> str:
    """An address as transports write it; IPv6 hosts in brackets, and none at all for unix."""
    return "unix://" if protocol == "unix" else format_host_port(protocol, host.strip("[]"), port)


def run_node(name: str, log_level: str, make: Callable[[], Node], on_ready: Callable[[Any], None]) -> int:
    """Runs a node in the foreground until SIGINT, SIGTERM or its own end, and gives the exit code."""
    configure_logging(name, log_level.upper())
    log = logging.getLogger(f"zmqtasks.cli.{name}")

    async def main() -> Exception | None:
        stop = stop_on_signals(signal.SIGINT, signal.SIGTERM)
        node = make()
        return await serve(node, stop, lambda: on_ready(node))

    error = run_loop(main())
    if error is not None:
        log.error("%s", error)
        return 1
    log.info("stopped")
    return 0
