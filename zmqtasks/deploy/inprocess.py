"""A whole cluster inside this process: scheduler and workers in one event loop, in a thread of its own."""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from concurrent.futures import Future, wait
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from zmqtasks.config import Config
from zmqtasks.deploy.serve import Node, run_loop
from zmqtasks.nodes.client.gate import in_slices
from zmqtasks.security import Security

if TYPE_CHECKING:
    from zmqtasks.nodes.worker.preloading import Preloads

__all__ = ["InProcessNodes"]

CLOSE_TIMEOUT_S = 30.0


class InProcessNodes:
    """Scheduler and workers that talk over inproc; ends with the object, at the latest at the end of the
    interpreter."""

    def __init__(
        self, address: str, security: Security, config: Config, worker: dict[str, Any], n_workers: int
    ) -> None:
        self._nodes = _Nodes(address, security, config, worker, n_workers)
        self._finalizer = weakref.finalize(self, self._nodes.end, os.getpid())

    def start(self) -> str:
        """Starts everything and gives the scheduler's address."""
        return self._nodes.start()

    def close(self) -> None:
        """Ends everything; idempotent."""
        self._finalizer()


class _Nodes:
    def __init__(
        self, address: str, security: Security, config: Config, worker: dict[str, Any], n_workers: int
    ) -> None:
        self._address = address
        self._security = security
        self._config = config
        self._worker = dict(worker)
        self._preload: list[str] = self._worker.pop("preload", [])
        self._n_workers = n_workers
        self._started: Future[str] = Future()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._thread = threading.Thread(target=self._run, name="zmqtasks-cluster", daemon=True)

    def start(self) -> str:
        self._thread.start()
        in_slices(lambda slice_s: not wait((self._started,), slice_s).not_done, None)
        return self._started.result()

    def end(self, owner_pid: int) -> None:
        if os.getpid() != owner_pid or self._loop is None or self._stop is None:
            return
        try:
            self._loop.call_soon_threadsafe(self._stop.set)
        except RuntimeError:  # the loop has ended by itself
            pass
        self._thread.join(CLOSE_TIMEOUT_S)

    def _run(self) -> None:
        try:
            run_loop(self._main())
        except BaseException as exc:
            if not self._started.done():
                self._started.set_exception(exc)
                return
            raise

    async def _main(self) -> None:
        from zmqtasks.nodes.scheduler.node import SchedulerNode
        from zmqtasks.nodes.worker.preloading import Preloads

        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        nodes: list[Node] = []
        preloads: list[tuple[Preloads, Node]] = []
        try:
            sleeping = replace(self._config, spin_s=0.0)  # the tasks are in this interpreter
            scheduler = SchedulerNode([self._address], security=self._security, config=sleeping)
            nodes.append(scheduler)
            await scheduler.start()
            workers = [self._make_worker(scheduler.address, number) for number in range(self._n_workers)]
            nodes.extend(workers)
            for worker in workers:
                preloads.append((Preloads(self._preload), worker))
                await preloads[-1][0].set_up(worker)
            await asyncio.gather(*(worker.start() for worker in workers))
            self._started.set_result(scheduler.address)
            await self._stop.wait()
        finally:
            for preload, worker in reversed(preloads):
                await preload.tear_down(worker)
            for node in reversed(nodes):
                await node.close("the cluster is closed")

    def _make_worker(self, address: str, number: int) -> Node:
        from zmqtasks.nodes.worker.node import WorkerNode

        settings = dict(self._worker)
        settings["name"] = f"{settings['name']}-{number}" if settings["name"] else str(number)
        return WorkerNode(address, security=self._security, config=self._config, listen_address="inproc://", **settings)
