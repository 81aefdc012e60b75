"""A nanny: starts worker processes on its host, says why they ended, starts them again, and answers when they can't.

One nanny process has n workers and a control link of its own, so that the scheduler hears of a worker whose loop is
held up by a task, or frozen, or dead. Workers are started at once, while the scheduler may still be starting; they
are told its address when the nanny itself is connected.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Awaitable, Sequence
from typing import TYPE_CHECKING, Any

from zmqtasks import errors
from zmqtasks.config import Config
from zmqtasks.errors import NodeStartError, ZmqTasksError
from zmqtasks.ids import InstanceId, new_instance_id
from zmqtasks.nodes.nanny.memory import KILL_SHARE, next_look_s, private_bytes
from zmqtasks.nodes.nanny.process import WorkerProcess, over_limit
from zmqtasks.nodes.nanny.restarts import RestartPolicy
from zmqtasks.nodes.worker.directory import base_directory, remove_directory
from zmqtasks.security import Security

if TYPE_CHECKING:
    from zmqtasks.nodes.nanny.control import ControlLink

logger = logging.getLogger(__name__)


class NannyNode:
    """Keeps `n_workers` worker processes running for a scheduler; use `start`, `finished`, `close`.

    `scheduler_address` may be an awaitable: workers are started before it is known. Limit, threads and resources are
    those of each worker. `protocol` is the transport for data between workers (default: the
    scheduler's), `listen_address` says more precisely where each of them listens (port 0). Without `local_output`
    what tasks print is only forwarded to the clients, not written here. `preload`: modules and files, see `Preloads`.
    `versions`: what `own_versions` would find, where that is known.
    """

    def __init__(
        self,
        scheduler_address: str | Awaitable[str],
        *,
        security: Security,
        config: Config,
        n_workers: int = 1,
        nthreads: int = 1,
        memory_limit_bytes: int = 0,
        resources: dict[str, float] | None = None,
        name: str = "",
        local_directory: str | None = None,
        protocol: str | None = None,
        listen_address: str | None = None,
        preload: Sequence[str] = (),
        local_output: bool = True,
        log_level: str | int | None = None,
        instance_id: InstanceId | None = None,
        versions: dict[str, str] | None = None,
    ) -> None:
        self.config = config
        self.security = security
        self.name = name
        self.n_workers = n_workers
        self.memory_limit_bytes = memory_limit_bytes
        self.instance_id = instance_id or new_instance_id()
        self.workers: dict[bytes, WorkerProcess] = {}
        """Processes that have not ended, by instance id."""
        self._target = scheduler_address
        self._address = ""
        self._settings: dict[str, Any] = {
            "key": security.key.hex() if security.key is not None else None,
            "encryption": security.encryption,
            "config": dataclasses.asdict(config),
            "nthreads": nthreads,
            "memory_limit_bytes": memory_limit_bytes,
            "resources": dict(resources or {}),
            "local_directory": local_directory,
            "local_output": local_output,
            "listen_address": listen_address or (f"{protocol}://:0" if protocol else None),
            "preload": list(preload),
            "nanny_id": self.instance_id.hex(),
            "log_level": log_level if log_level is not None else logging.getLogger("zmqtasks").getEffectiveLevel(),
        }
        self._versions = versions or {}
        self._places: dict[bytes, int] = {}
        self._policies = [RestartPolicy() for _ in range(n_workers)]
        self._unready = n_workers
        self._control: ControlLink | None = None
        self._closing: asyncio.Task[None] | None = None
        self._starting: asyncio.Task[None] | None = None
        self._error: Exception | None = None
        self._timers: set[asyncio.TimerHandle] = set()
        self._look: asyncio.TimerHandle | None = None

    # --- life -------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Returns when the nanny is connected and each of its workers has been ready once.

        Raises what `open_channel` raises, and NodeStartError, with what the process printed, when a worker cannot
        start.
        """
        self._settings["local_directory"] = base_directory(self._settings["local_directory"])
        self._loop = asyncio.get_running_loop()
        self._finished = asyncio.Event()
        self._all_ready: asyncio.Future[None] = self._loop.create_future()
        for place in range(self.n_workers):
            self._start_worker(place)
        from zmqtasks.nodes.nanny.control import ControlLink  # loads what links need while the workers load theirs

        control = ControlLink(self)
        self._address = self._target if isinstance(self._target, str) else await self._target
        await control.open(
            self._address,
            self.name,
            security=self.security,
            config=self.config,
            instance_id=self.instance_id,
        )
        self._control = control
        for worker in self.workers.values():
            control.worker_started(worker)
        for worker in self.workers.values():
            worker.connect(self._address)
        if self.memory_limit_bytes:
            self._watch_memory()
        if self.n_workers:  # a cluster may start without
            await self._all_ready

    async def finished(self) -> Exception | None:
        """Waits until the nanny has been told to end, or nothing is left for it to do; gives the error of the latter."""
        await self._finished.wait()
        return self._error

    async def close(self, reason: str = "") -> None:
        """Ends the workers, then the link; idempotent. No process is left when it returns."""
        if self._closing is None:
            self._closing = asyncio.get_running_loop().create_task(self._close(reason))
        await asyncio.shield(self._closing)

    async def _close(self, reason: str) -> None:
        if not hasattr(self, "_finished"):
            return
        for timer in (*self._timers, *((self._look,) if self._look is not None else ())):
            timer.cancel()
        workers = list(self.workers.values())
        for worker in workers:
            worker.restarting = False
            worker.terminate(self.config.termination_s)
        for worker in workers:
            await worker.wait_gone()
        if self._control is not None:
            await self._control.close(reason)
        if not self._all_ready.done():
            self._all_ready.cancel()
        elif not self._all_ready.cancelled():
            self._all_ready.exception()  # has been raised by `start`, or nobody waits
        self.end(None)

    def end(self, error: Exception | None) -> None:
        """There is nothing more to do: `finished` returns."""
        if not self._finished.is_set():
            self._error = error
            self._finished.set()

    # --- workers ----------------------------------------------------------------------------------------------------

    def _start_worker(self, place: int) -> None:
        name = self.name if self.n_workers == 1 or not self.name else f"{self.name}-{place}"
        # A worker that starts later looks for itself: one before it may have installed something.
        versions = self._versions if self._control is None else {}
        settings = {**self._settings, "name": name, "versions": versions}
        worker = WorkerProcess(settings, self._worker_ready, self._worker_exited)
        self.workers[worker.instance_id] = worker
        self._places[worker.instance_id] = place
        if self._control is not None:
            self._control.worker_started(worker)
            worker.connect(self._address)

    def _worker_ready(self, worker: WorkerProcess) -> None:
        self._policies[self._places[worker.instance_id]].became_ready()
        logger.debug("worker process %d is ready at %s", worker.pid, worker.address)
        if not self._all_ready.done():
            self._unready -= 1
            if self._unready == 0:
                self._all_ready.set_result(None)

    def _worker_exited(self, worker: WorkerProcess) -> None:
        del self.workers[worker.instance_id]
        remove_directory(self._settings["local_directory"], worker.instance_id)  # of one that was killed
        place = self._places.pop(worker.instance_id)
        wanted = self._closing is None and not self._finished.is_set() and (worker.restarting or not worker.expected)
        if not self._all_ready.done() and not worker.ready and not worker.expected:
            self._all_ready.set_exception(self._start_error(worker))
            wanted = False
        delay_s: float | None = None
        if wanted:
            lived_s = self._loop.time() - worker.started_at
            delay_s = 0.0 if worker.restarting else self._policies[place].died(worker.ready, lived_s)
        if self._control is not None:
            self._control.worker_exited(worker, restarting=delay_s is not None)
        if not worker.expected:
            doing = f" while it executed {len(worker.executing)} tasks" if worker.executing else ""
            logger.warning("worker process %d ended%s: %s", worker.pid, doing, worker.cause)
        if wanted:
            self._start_again(worker, place, delay_s)
        elif self._closing is None and self._all_ready.done() and not self.workers and not self._timers:
            logger.info("the nanny ends: its workers were told to")
            self.end(None)

    def _start_again(self, worker: WorkerProcess, place: int, delay_s: float | None) -> None:
        if delay_s is None:
            logger.error(
                "worker process %d is not started again after %d failed starts: %s",
                worker.pid,
                self._policies[place].failures,
                self._start_error(worker),
            )
            if not self.workers and not self._timers:
                self.end(self._start_error(worker))
            return
        if delay_s == 0:
            self._start_worker_or_end(place)
            return

        def start() -> None:
            self._timers.discard(timer)
            self._start_worker_or_end(place)

        timer = self._loop.call_later(delay_s, start)
        self._timers.add(timer)

    def _start_worker_or_end(self, place: int) -> None:
        if self._closing is not None:
            return
        try:
            self._start_worker(place)
        except NodeStartError as exc:
            logger.error("%s", exc)
            if not self.workers and not self._timers:
                self.end(exc)

    def _start_error(self, worker: WorkerProcess) -> ZmqTasksError:
        if worker.error is not None:
            kind, text = worker.error
            error = NodeStartError(f"a worker process could not start: {text}")
            cause = getattr(errors, kind, None)
            if isinstance(cause, type) and issubclass(cause, ZmqTasksError):
                error.__cause__ = cause(text)
            return error
        printed = worker.printed()
        shown = "; it printed:\n" + "\n".join(f"  {line}" for line in printed.splitlines()) if printed else ""
        return NodeStartError(f"a worker process {worker.cause} during its start{shown or '; it printed nothing'}")

    def _watch_memory(self) -> None:
        """Kills workers over their limit; looks again when one may be at the earliest."""
        delays = [1.0]
        for worker in list(self.workers.values()):
            used = private_bytes(worker.pid)
            if used > KILL_SHARE * self.memory_limit_bytes:
                worker.kill(over_limit(used, self.memory_limit_bytes))
            delays.append(next_look_s(used, self.memory_limit_bytes))
        self._look = self._loop.call_later(min(delays), self._watch_memory)

    def restart(self, instances: list[bytes]) -> None:
        """Ends worker processes; new ones take their places."""
        for instance in instances:
            if (worker := self.workers.get(instance)) is not None:
                worker.restarting = True
                worker.terminate(self.config.termination_s)
