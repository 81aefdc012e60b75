"""A cluster on this machine: scheduler, nanny and workers as processes of their own, or all of them in this process.

Processes are started by `python -m zmqtasks`, never by fork or multiprocessing: no `if __name__ == "__main__"` guard is
needed, and a busy main thread of the program does not slow the scheduler down. They end with the cluster, with this
process, and when this process is killed.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
import weakref
from collections.abc import Generator, Sequence
from dataclasses import asdict
from types import TracebackType
from typing import Any

from zmqtasks.config import Config, load_config
from zmqtasks.deploy.inprocess import InProcessNodes
from zmqtasks.deploy.process import NodeProcess
from zmqtasks.deploy.resources import available_cpus, parse_memory_limit, split_threads
from zmqtasks.errors import ConfigError
from zmqtasks.protocol.compression import check_mode
from zmqtasks.security import ClusterKey, Security
from zmqtasks.transports.address import format_host_port

__all__ = ["LocalCluster"]

START_TIMEOUT_S = 30.0


class LocalCluster:
    """A scheduler and workers on this machine.

    Args:
        n_workers: Worker processes (default: by the number of processors).
        threads_per_worker: Threads of each (default: the processors, shared evenly).
        processes: False runs everything in this process, over inproc, with one worker by default.
        memory_limit: Of each worker: bytes, `4GiB`, a part of the machine as a float, `auto` (an even share), or None
            for none.
        protocol: `unix` (default on Linux, unless `host` or `scheduler_port` is given), `tcp` (default elsewhere) or
            `zmq`; `inproc` implies `processes=False`.
        name: What workers are called: `NAME-0`, `NAME-1`, ...
        host: The interface to listen on (default: loopback); not with `unix`, which is for this machine only.
        scheduler_port: 0 for any free one; not with `unix`.
        asynchronous: For use in an event loop: `async with LocalCluster(asynchronous=True) as cluster`.
        security: The cluster key, and which links are encrypted (default: a new key, known to this cluster alone, and
            links that leave the host).
        resources: What tasks may ask for, of each worker.
        local_directory: Where workers make their own directories, for files that go away with them.
        preload: A module or file (`.py`), or several, that each worker loads before its first task; their `dask_setup(worker)`
            and `dask_teardown(worker)` are called.
        silence_logs: The least level of log lines that the processes print to stderr.
        config: Settings for all nodes (default: the defaults and the `ZMQTASKS_*` variables).
        dashboard_address: Taken for compatibility; there is no dashboard.

    Raises:
        NodeStartError: a process failed to start; the message has what it printed, and none is left.
        ConfigError: an argument has a value that cannot be used.
    """

    def __init__(
        self,
        n_workers: int | None = None,
        threads_per_worker: int | None = None,
        *,
        processes: bool | None = None,
        memory_limit: str | float | None = "auto",
        protocol: str | None = None,
        name: str | None = None,
        host: str | None = None,
        scheduler_port: int = 0,
        asynchronous: bool = False,
        security: Security | None = None,
        resources: dict[str, float] | None = None,
        local_directory: str | os.PathLike[str] | None = None,
        preload: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
        silence_logs: int | str | None = logging.WARNING,
        config: Config | None = None,
        dashboard_address: str | None = None,
    ) -> None:
        if processes is None:
            processes = protocol != "inproc"
        over_ip = bool(host or scheduler_port)
        protocol = protocol or (_default_protocol(over_ip) if processes else "inproc")
        _check(protocol, processes, over_ip, n_workers, threads_per_worker)
        workers, threads = _layout(n_workers, threads_per_worker, processes)
        self.name = name or ""
        self.asynchronous = asynchronous
        self.security = security or (Security(ClusterKey.generate()) if processes else Security.none())
        self.scheduler_address = ""
        self.status = "created"
        self.n_workers = workers
        self.threads_per_worker = threads
        self.config = config or load_config()
        check_mode(self.config.compression)
        nanny = {
            "n_workers": workers,
            "nthreads": threads,
            "memory_limit_bytes": parse_memory_limit(memory_limit, threads, workers),
            "resources": dict(resources or {}),
            "name": self.name,
            "local_directory": os.fspath(local_directory) if local_directory is not None else None,
            "preload": [
                os.fspath(name) for name in ([preload] if isinstance(preload, (str, os.PathLike)) else preload)
            ],
        }
        address = _listen_address(protocol, host or "127.0.0.1", scheduler_port)
        self._backend: _Processes | InProcessNodes
        if processes:
            level = logging.WARNING if silence_logs is None else silence_logs
            self._backend = _Processes(address, self.security, self.config, nanny, level)
        else:
            del nanny["n_workers"]
            self._backend = InProcessNodes(address, self.security, self.config, nanny, workers)
        if not asynchronous:
            self._start()

    # --- life -------------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        self.status = "starting"
        try:
            self.scheduler_address = self._backend.start()
        except BaseException:
            self.status = "failed"
            self._backend.close()
            raise
        self.status = "running"

    def close(self, timeout: float | None = None) -> Any:
        """Ends workers and scheduler and waits until they are gone; idempotent.

        With `asynchronous=True` the result is to be awaited.
        """
        if self.asynchronous:
            return self._close_async()
        self._close()
        return None

    def _close(self) -> None:
        if self.status not in ("closed", "created"):
            self._backend.close()
        self.status = "closed"

    async def _close_async(self) -> None:
        await asyncio.to_thread(self._close)

    def __enter__(self) -> LocalCluster:
        if self.asynchronous:
            raise TypeError(
                "this cluster is asynchronous: write `async with LocalCluster(asynchronous=True) as cluster`"
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __await__(self) -> Generator[Any, None, LocalCluster]:
        return self._start_async().__await__()

    async def _start_async(self) -> LocalCluster:
        if self.status == "created":
            await asyncio.to_thread(self._start)
        return self

    async def __aenter__(self) -> LocalCluster:
        return await self._start_async()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._close_async()

    # --- what users look at -----------------------------------------------------------------------------------------

    @property
    def scheduler_info(self) -> dict[str, Any]:
        """What `Client.scheduler_info` gives, without a client."""
        from zmqtasks.deploy.ask import ask
        from zmqtasks.nodes.client.loop import shared_loop

        address, security, config = self.scheduler_address, self.security, self.config
        info: dict[str, Any] = shared_loop().run(
            lambda: ask(address, "scheduler_info", security=security, config=config)
        )
        return info

    @property
    def workers(self) -> dict[str, Any]:
        """What is known of each worker, by address."""
        workers: dict[str, Any] = self.scheduler_info["workers"]
        return workers

    def get_client(self) -> Any:
        """A new client of this cluster."""
        from zmqtasks.client import Client

        return Client(self)

    def __repr__(self) -> str:
        where = self.scheduler_address or self.status
        return f"<LocalCluster {where} workers={self.n_workers} threads={self.n_workers * self.threads_per_worker}>"


class _Processes:
    """Scheduler and nanny as processes; the nanny starts the workers."""

    def __init__(
        self, address: str, security: Security, config: Config, nanny: dict[str, Any], log_level: int | str
    ) -> None:
        assert security.key is not None
        common: dict[str, Any] = {
            "key": security.key.hex(),
            "encryption": security.encryption,
            "config": asdict(config),
            "log_level": log_level,
        }
        self._settings: dict[str, dict[str, Any]] = {
            "scheduler": {**common, "addresses": [address], "scheduler_file": None},
            "nanny": {**common, "nanny": nanny},
        }
        self._started: list[NodeProcess] = []
        self._termination_s = config.termination_s
        self._finalizer = weakref.finalize(self, _end_processes, self._started, self._termination_s, os.getpid())

    def start(self) -> str:
        """Starts all at once, so that their imports overlap, and returns when every worker has registered."""
        deadline = time.monotonic() + START_TIMEOUT_S
        scheduler = NodeProcess("scheduler", self._settings["scheduler"])
        self._started.append(scheduler)
        nanny = NodeProcess("nanny", self._settings["nanny"])
        self._started.append(nanny)
        address: str = scheduler.wait_ready(deadline)["addresses"][0]
        nanny.send({"scheduler_address": address})
        nanny.wait_ready(deadline)
        return address

    def close(self) -> None:
        self._finalizer()


def _end_processes(started: list[NodeProcess], termination_s: float, owner_pid: int) -> None:
    """Ends nanny and workers, then the scheduler; a forked copy of this process leaves them alone."""
    if os.getpid() != owner_pid:
        return
    while started:
        process = started.pop()
        process.ask_to_end()
        process.wait_ended(time.monotonic() + 2 * termination_s)


def _listen_address(protocol: str, host: str, port: int) -> str:
    return f"{protocol}://" if protocol in ("inproc", "unix") else format_host_port(protocol, host.strip("[]"), port)


def _default_protocol(over_ip: bool) -> str:
    # What crosses neither hosts nor users needs no TCP: `python -m bench.links` has what that saves.
    return "unix" if sys.platform == "linux" and not over_ip else "tcp"


def _check(
    protocol: str, processes: bool, over_ip: bool, n_workers: int | None, threads_per_worker: int | None
) -> None:
    if processes and protocol == "inproc":
        raise ConfigError(
            "protocol='inproc' stays inside one process: leave out processes=True, or take unix, tcp or zmq"
        )
    if protocol == "unix" and over_ip:
        raise ConfigError("protocol='unix' has neither host nor port: leave out host and scheduler_port, or take tcp")
    for name, value in (("n_workers", n_workers), ("threads_per_worker", threads_per_worker)):
        least = 0 if name == "n_workers" else 1
        if value is not None and value < least:
            raise ConfigError(f"{name}={value!r}: at least {least}")


def _layout(n_workers: int | None, threads: int | None, processes: bool) -> tuple[int, int]:
    """Workers and threads of each; what is not given follows from the processors."""
    cpus = available_cpus()
    if n_workers is None and threads is None:
        return split_threads(cpus) if processes else (1, cpus)
    if n_workers is None:
        assert threads is not None
        return (max(1, cpus // threads) if processes else 1), threads
    return n_workers, threads or max(1, cpus // max(1, n_workers))
