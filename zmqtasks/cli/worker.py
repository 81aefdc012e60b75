"""`zmqtasks worker`."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import click

from zmqtasks.cli.interfaces import interface_address, interface_host, interface_option
from zmqtasks.cli.options import (
    PROTOCOLS,
    compression_option,
    config_with,
    encryption_option,
    find_scheduler,
    key_file_option,
    log_level_option,
    run_node,
    scheduler_file_option,
)
from zmqtasks.deploy.resources import available_cpus, parse_memory_limit, parse_resources
from zmqtasks.errors import ConfigError

if TYPE_CHECKING:
    from zmqtasks.deploy.serve import Node

log = logging.getLogger(__name__)


@click.command()
@click.argument("address", required=False)
@scheduler_file_option
@click.option("--nworkers", type=click.IntRange(1), default=1, show_default=True, help="Worker processes.")
@click.option(
    "--nthreads", type=click.IntRange(1), help="Threads of each worker (default: the processors, shared evenly)."
)
@click.option(
    "--memory-limit",
    default="auto",
    show_default=True,
    help="For each worker: 4GiB, 0.5 (of the machine), auto (its share of the machine), 0 (none).",
)
@click.option("--resources", default="", help="What tasks may ask for, as in GPU=2,foo=1; for each worker.")
@click.option("--name", default="", help="Name of the worker; with --nworkers N they are NAME-0, NAME-1, ...")
@click.option("--local-directory", type=click.Path(file_okay=False), help="Where workers keep files.")
@click.option("--protocol", type=click.Choice(PROTOCOLS), help="For data between workers (default: the scheduler's).")
@interface_option
@click.option(
    "--preload",
    multiple=True,
    metavar="MODULE|FILE.py",
    help="Loaded by each worker before it joins, its dask_setup(worker) called; may be given several times.",
)
@click.option("--nanny/--no-nanny", default=True, help="Whether a nanny watches and restarts the worker processes.")
@key_file_option
@encryption_option
@compression_option
@log_level_option
def worker(
    address: str | None,
    scheduler_file: str | None,
    nworkers: int,
    nthreads: int | None,
    memory_limit: str,
    resources: str,
    name: str,
    local_directory: str | None,
    protocol: str | None,
    interface: str | None,
    preload: tuple[str, ...],
    nanny: bool,
    key_file: str | None,
    encryption: str | None,
    compression: str | None,
    log_level: str,
) -> int:
    """Start workers for the scheduler at ADDRESS (or in --scheduler-file) and run them until Ctrl-C."""
    if not nanny and nworkers != 1:
        raise ConfigError(f"--no-nanny runs one worker in this process, not {nworkers}: leave out --nworkers")
    if preload and not nanny:
        raise ConfigError("--preload is for worker processes of their own: leave out --no-nanny")
    threads = nthreads or max(1, available_cpus() // nworkers)
    limit_bytes = parse_memory_limit(memory_limit, threads, nworkers)
    amounts = parse_resources(resources)
    config = config_with(compression)
    if interface:
        interface_host(interface)  # before anything is waited for
    target = find_scheduler(address, scheduler_file, key_file, encryption=encryption)
    listens = f"{protocol}://:0" if protocol else None
    if interface:
        listens = interface_address(interface, protocol, target.address)

    def make_nanny() -> Node:
        from zmqtasks.nodes.nanny.node import NannyNode

        return NannyNode(
            target.address,
            security=target.security,
            config=config,
            n_workers=nworkers,
            nthreads=threads,
            memory_limit_bytes=limit_bytes,
            resources=amounts,
            name=name,
            local_directory=local_directory,
            listen_address=listens,
            preload=preload,
        )

    def make_worker() -> Node:
        from zmqtasks.nodes.worker.node import WorkerNode

        return WorkerNode(
            target.address,
            security=target.security,
            config=config,
            name=name,
            nthreads=threads,
            memory_limit_bytes=limit_bytes,
            resources=amounts,
            local_directory=local_directory,
            listen_address=listens,
        )

    def ready(_: Node) -> None:
        what = "1 worker" if nworkers == 1 else f"{nworkers} workers"
        log.info("%s with %d %s each at %s", what, threads, "thread" if threads == 1 else "threads", target.address)

    return run_node("nanny" if nanny else "worker", log_level, make_nanny if nanny else make_worker, ready)
