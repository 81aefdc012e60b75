"""A worker process, seen from inside; `nodes.nanny.process` is the other side.

The nanny writes JSON lines into stdin: first all settings (the cluster key among them), then, as soon as it is known,
the scheduler's address: by then everything has been imported. The pipe stays open as long as the nanny lives; at its
end the worker leaves in good order. Lines go back through another pipe: `{"ready": {...}}` or `{"error": ..., "kind":
...}`, and `{"stopped": true}` when the scheduler has told the worker to end.

Until it is ready the process writes its stderr into a pipe of the nanny, which shows it when the start fails; then it
takes over the nanny's own stderr.
"""

from __future__ import annotations

import asyncio
import atexit
import faulthandler
import gc
import json
import logging
import mmap
import os
import signal
import sys
import threading
from collections.abc import Coroutine
from typing import Any, NoReturn

from zmqtasks.config import Config
from zmqtasks.errors import ZmqTasksError
from zmqtasks.logs import configure_logging
from zmqtasks.nodes.versions import adopt_versions
from zmqtasks.nodes.worker import output
from zmqtasks.nodes.worker.node import WorkerNode
from zmqtasks.nodes.worker.preloading import Preloads
from zmqtasks.security import ClusterKey, Security

logger = logging.getLogger(__name__)

EXIT_FAILED_START = 3
EXIT_SCHEDULER_LOST = 4

SWITCH_INTERVAL_S = 0.002
"""How long a task may hold the interpreter while the loop waits: results gather for as long when tasks are tiny."""

GC_THRESHOLD = 20_000
"""Runs and results of tiny tasks make few objects that the collector follows, but many passes over all others at 700."""

_PR_SET_PDEATHSIG = 1


def main() -> int:
    """The process, to its end; returns only when the nanny has gone before saying anything."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever started the nanny
    faulthandler.enable()
    lines = _Lines(0)
    settings = lines.read()
    if settings is None:
        return 0
    configure_logging(settings["name"] or "worker", settings["log_level"])
    sys.path[:] = settings["sys_path"]
    adopt_versions(settings["versions"])
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    _die_with(settings["nanny_pid"])
    try:
        code = _run(_serve(settings, lines))
    except ZmqTasksError as exc:
        _report(settings, {"error": str(exc), "kind": type(exc).__name__})
        code = EXIT_FAILED_START
    return _leave(code)


class _Lines:
    """JSON lines from the nanny; belongs to one thread until `watch`, then to the loop."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = os.dup(descriptor)
        null = os.open(os.devnull, os.O_RDONLY)  # tasks that read stdin find nothing, instead of the nanny's lines
        os.dup2(null, descriptor)
        os.close(null)
        self._received = b""
        self._arrived = asyncio.Event()
        self._ended = False

    def read(self) -> dict[str, Any] | None:
        """The next line, blocking; None when the nanny is gone."""
        while (line := self._take()) is None:
            chunk = os.read(self._descriptor, 1 << 16)
            if not chunk:
                return None
            self._received += chunk
        return line

    def watch(self, stop: asyncio.Event) -> None:
        """Sets `stop` when the nanny closes the pipe."""
        loop = asyncio.get_running_loop()
        os.set_blocking(self._descriptor, False)

        def readable() -> None:
            try:
                chunk = os.read(self._descriptor, 1 << 16)
            except BlockingIOError:
                return
            self._received += chunk
            if not chunk:
                loop.remove_reader(self._descriptor)
                self._ended = True
                stop.set()
            self._arrived.set()

        loop.add_reader(self._descriptor, readable)

    async def next(self) -> dict[str, Any] | None:
        """The next line; None when the nanny is gone."""
        while (line := self._take()) is None:
            if self._ended:
                return None
            self._arrived.clear()
            await self._arrived.wait()
        return line

    def _take(self) -> dict[str, Any] | None:
        line, newline, rest = self._received.partition(b"\n")
        if not newline:
            return None
        self._received = rest
        content: dict[str, Any] = json.loads(line)
        return content


async def _serve(settings: dict[str, Any], lines: _Lines) -> int:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    lines.watch(stop)
    address = await lines.next()
    if address is None:
        return 0
    node = WorkerNode(
        address["scheduler_address"],
        security=Security(ClusterKey.from_hex(settings["key"]) if settings["key"] else None, settings["encryption"]),
        config=Config(**settings["config"]),
        name=settings["name"],
        nthreads=settings["nthreads"],
        memory_limit_bytes=settings["memory_limit_bytes"],
        resources=settings["resources"],
        local_directory=settings["local_directory"],
        listen_address=settings["listen_address"],
        instance_id=bytes.fromhex(settings["instance_id"]),  # type: ignore[arg-type]
        nanny_id=bytes.fromhex(settings["nanny_id"]),
        executing_slots=_map_marks(settings["marks_descriptor"]),
    )
    preloads = Preloads(settings["preload"])
    try:
        if not await _first(preloads.set_up(node), stop) or not await _first(node.start(), stop):
            return 0
        _become_ready(settings, node)
        if not await _first(node.finished(), stop):
            return 0
        if await node.finished() is not None:
            return EXIT_SCHEDULER_LOST
        _report(settings, {"stopped": True})
        return 0
    finally:
        await preloads.tear_down(node)
        await node.close("the worker ends")


async def _first(work: Coroutine[Any, Any, Any], stop: asyncio.Event) -> bool:
    """Whether `work` is done before `stop` is set; raises its error."""
    task, stopped = asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())
    await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        stopped.cancel()
        task.result()
        return True
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return False


def _become_ready(settings: dict[str, Any], node: WorkerNode) -> None:
    _report(settings, {"ready": {"address": node.address}})
    os.set_inheritable(settings["ready_descriptor"], False)  # not for processes that tasks start
    sys.stderr.flush()
    os.dup2(settings["stderr_descriptor"], 2)
    os.close(settings["stderr_descriptor"])
    output.install(local=settings["local_output"])
    gc.collect()
    gc.freeze()  # what has been imported stays: no need to look at it again
    gc.set_threshold(GC_THRESHOLD, 10, 10)


def _map_marks(descriptor: int) -> memoryview:
    size = os.fstat(descriptor).st_size
    marks = memoryview(mmap.mmap(descriptor, size)).cast("q")
    os.close(descriptor)
    return marks


def _report(settings: dict[str, Any], message: dict[str, Any]) -> None:
    try:
        os.write(settings["ready_descriptor"], json.dumps(message).encode() + b"\n")
    except OSError:  # the nanny is gone
        return


def _die_with(parent_pid: int) -> None:
    """Linux kills this process with its nanny, even while a task holds the interpreter so that no pipe is watched."""
    if sys.platform != "linux":
        return
    import ctypes

    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != parent_pid:
        os._exit(0)


def _run(work: Coroutine[Any, Any, int]) -> int:
    try:
        from uvloop import new_event_loop
    except ImportError:
        return asyncio.run(work)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(work)


def _leave(code: int) -> NoReturn:
    """Ends the process although task threads may still run: what users registered for the exit has a second's time."""
    exits = threading.Thread(target=atexit._run_exitfuncs, daemon=True)
    exits.start()
    exits.join(1.0)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            continue
    os._exit(code)
