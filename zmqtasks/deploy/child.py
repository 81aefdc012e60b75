"""A process of a cluster, seen from inside: settings come through stdin, readiness goes out through stdout.

The parent writes JSON lines into the child's stdin. The first one has all settings, the cluster key among them (so
neither the process list nor the environment shows it); a nanny gets a second one with the scheduler's address, so that
it can start at the same time as the scheduler. The pipe stays open for as long as the parent lives: at its end the
child closes in good order and exits. The child answers with one JSON line, `{"ready": {...}}` or `{"error": "...",
"kind": "ConnectError"}`; whatever else is printed goes to stderr. Ctrl-C is for the program of the user, so children
ignore SIGINT; SIGTERM ends them in good order.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from typing import Any, TypeAlias

from zmqtasks.config import Config
from zmqtasks.deploy.serve import calm_collector, run_loop, serve, stop_on_signals
from zmqtasks.errors import ZmqTasksError
from zmqtasks.logs import configure_logging
from zmqtasks.nodes.versions import adopt_versions

__all__ = ["run_nanny", "run_scheduler"]

Settings: TypeAlias = dict[str, Any]

EXIT_FAILED_START = 3


class ParentPipe:
    """The lines that the parent sends, and its end."""

    def __init__(self) -> None:
        self._descriptor = os.dup(0)
        _replace_descriptor(0, os.devnull, os.O_RDONLY)
        self._received = b""
        self._lines: asyncio.Queue[Settings] = asyncio.Queue()
        self._pidfd = -1

    def read_settings(self) -> Settings:
        """The first line; blocks until it is there."""
        while b"\n" not in self._received:
            chunk = os.read(self._descriptor, 1 << 16)
            if not chunk:
                raise SystemExit(0)
            self._received += chunk
        line, _, self._received = self._received.partition(b"\n")
        settings: Settings = json.loads(line)
        return settings

    def watch(self, on_end: Callable[[], None], parent_pid: int) -> None:
        """Calls `on_end` when the parent has closed the pipe or is gone; further lines are kept for `next_line`."""
        loop = asyncio.get_running_loop()
        os.set_blocking(self._descriptor, False)

        def readable() -> None:
            try:
                chunk = os.read(self._descriptor, 1 << 16)
            except BlockingIOError:
                return
            if not chunk:
                loop.remove_reader(self._descriptor)
                on_end()
                return
            self._received += chunk
            self._split()

        self._split()
        loop.add_reader(self._descriptor, readable)
        # A process forked by the parent may hold the other end of the pipe open, so the parent itself is watched too.
        if hasattr(os, "pidfd_open"):
            try:
                self._pidfd = os.pidfd_open(parent_pid)
            except OSError:
                on_end()
                return
            loop.add_reader(self._pidfd, self._parent_gone, on_end)

    async def next_line(self) -> Settings:
        """The next line that the parent sends."""
        return await self._lines.get()

    def _split(self) -> None:
        *lines, self._received = self._received.split(b"\n")
        for line in lines:
            self._lines.put_nowait(json.loads(line))

    def _parent_gone(self, on_end: Callable[[], None]) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        on_end()


class ReadinessPipe:
    """The one line that goes to the parent."""

    def __init__(self) -> None:
        self._descriptor = os.dup(1)
        os.dup2(2, 1)

    def report(self, message: Settings) -> None:
        """Sends the line and closes the pipe; later calls do nothing."""
        if self._descriptor < 0:
            return
        try:
            os.write(self._descriptor, json.dumps(message).encode() + b"\n")
        except OSError:  # the parent is gone: its end of stdin says so too
            pass
        os.close(self._descriptor)
        self._descriptor = -1


def run_scheduler() -> int:
    """The process of a scheduler."""
    return _run("scheduler", _scheduler)


def run_nanny() -> int:
    """The process of a nanny with its workers."""
    return _run("nanny", _nanny)


Main: TypeAlias = Callable[[Settings, ParentPipe, ReadinessPipe], Coroutine[Any, Any, None]]


def _run(role: str, main: Main) -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent, readiness = ParentPipe(), ReadinessPipe()
    settings = parent.read_settings()
    configure_logging(role, settings["log_level"])
    sys.path[:] = settings["sys_path"]
    adopt_versions(settings["versions"])
    try:
        run_loop(main(settings, parent, readiness))
    except ZmqTasksError as exc:
        readiness.report({"error": str(exc), "kind": type(exc).__name__})
        return EXIT_FAILED_START
    return 0


async def _scheduler(settings: Settings, parent: ParentPipe, readiness: ReadinessPipe) -> None:
    from zmqtasks.nodes.scheduler.node import SchedulerNode

    stop = stop_on_signals(signal.SIGTERM)
    parent.watch(stop.set, settings["parent_pid"])
    node = SchedulerNode(
        settings["addresses"],
        security=_security(settings),
        config=Config(**settings["config"]),
        scheduler_file=settings["scheduler_file"],
    )
    calm_collector()
    await serve(node, stop, lambda: readiness.report({"ready": {"addresses": node.addresses}}))


async def _nanny(settings: Settings, parent: ParentPipe, readiness: ReadinessPipe) -> None:
    from zmqtasks.nodes.nanny.node import NannyNode

    stop = stop_on_signals(signal.SIGTERM)
    parent.watch(stop.set, settings["parent_pid"])
    node = NannyNode(
        _scheduler_address(parent),
        security=_security(settings),
        config=Config(**settings["config"]),
        versions=settings["versions"],
        local_output=False,  # the program that started the cluster has its client, and shows what tasks print
        **settings["nanny"],
    )
    await serve(node, stop, lambda: readiness.report({"ready": {}}))


async def _scheduler_address(parent: ParentPipe) -> str:
    """The second line for a nanny, which has started its workers by then."""
    address: str = (await parent.next_line())["scheduler_address"]
    return address


def _security(settings: Settings) -> Any:
    from zmqtasks.security import ClusterKey, Security

    return Security(ClusterKey(bytes.fromhex(settings["key"])), settings["encryption"])


def _replace_descriptor(descriptor: int, path: str, flags: int) -> None:
    replacement = os.open(path, flags)
    os.dup2(replacement, descriptor)
    os.close(replacement)
