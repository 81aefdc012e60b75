"""The worker's shell: links, executor and store around the machine.

Everything runs on the loop that calls `start`, except tasks (threads of the executor) and calls of `Client.run`. A
batch of ops or outcomes goes into the machine, its outbox is carried out, and at most one message leaves. While the
control link is cut the worker goes on; the channel sends what has gathered when it resumes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, assert_never

from zmqtasks.config import Config
from zmqtasks.errors import CommError, SchedulerLostError, ZmqTasksError
from zmqtasks.ids import InstanceId, Key, new_instance_id
from zmqtasks.nodes.channel import (
    Acceptor,
    Admission,
    Channel,
    DataPool,
    DataServer,
    PeerInfo,
    Refusal,
    open_channel,
)
from zmqtasks.nodes.nearby import bound_arena, nearby_address, tell_failure
from zmqtasks.nodes.worker import context
from zmqtasks.nodes.worker.addresses import listen_address_for
from zmqtasks.nodes.worker.calls import call_in_thread
from zmqtasks.nodes.worker.directory import WorkerDirectory
from zmqtasks.nodes.worker.executor import Executor
from zmqtasks.nodes.worker.instructions import (
    Call,
    DropInline,
    DropKeys,
    FetchKeys,
    Finished,
    Instruction,
    Interrupt,
    KeepInline,
    LearnFunctions,
    Plug,
    StartRuns,
    Stop,
    TakeBack,
)
from zmqtasks.nodes.worker.looks import Looks
from zmqtasks.nodes.worker.machine import WorkerMachine
from zmqtasks.nodes.worker.metrics import CpuMeter, resident_bytes
from zmqtasks.nodes.worker.outcomes import Blocked, Erred, NotStarted, Outcome, Resumed, Seceded
from zmqtasks.nodes.worker.output import LineBudget
from zmqtasks.nodes.worker.plugins import Plugins
from zmqtasks.nodes.worker.state import Run
from zmqtasks.nodes.worker.store import Store
from zmqtasks.protocol.compression import Counters
from zmqtasks.protocol.ops import (
    CallFinished,
    DataIntroduction,
    Introduction,
    LogMessages,
    LogRecord,
    Op,
    SchedulerToWorker,
    WorkerIntroduction,
    WorkerMetrics,
)
from zmqtasks.protocol.payload import Payload
from zmqtasks.security import Security
from zmqtasks.transports.buffer_pool import POOL, idle_bound

logger = logging.getLogger(__name__)

CALLS_ACTOR = 2
"""Of `TaskOptions.actor`: a call of the actor that is the last input."""


class WorkerNode:
    """A worker: connects to a scheduler, runs its tasks, holds results and gives them to peers.

    `listen_address` is where peers fetch data: by default any port of the interface that reaches the scheduler, over
    the same transport (`tcp://:0` names the transport only). `executing_slots` is memory that a nanny reads, see
    `Executor.marks`. Use `start`, `finished`, `close`.
    """

    def __init__(
        self,
        scheduler_address: str,
        *,
        security: Security,
        config: Config,
        name: str = "",
        nthreads: int = 1,
        memory_limit_bytes: int = 0,
        resources: dict[str, float] | None = None,
        local_directory: str | None = None,
        listen_address: str | None = None,
        instance_id: InstanceId | None = None,
        nanny_id: bytes = b"",
        executing_slots: memoryview | None = None,
    ) -> None:
        self.scheduler_address = scheduler_address
        self.security = security
        # Who names a transport gets that one, and no other.
        self.config = config if listen_address is None else replace(config, shared_memory=False)
        self.name = name
        self.nthreads = nthreads
        self.memory_limit_bytes = memory_limit_bytes
        POOL.limit(idle_bound(config.idle_buffer_bytes, memory_limit_bytes))
        self.resources = dict(resources or {})
        self.instance_id = instance_id or new_instance_id()
        self.directory = WorkerDirectory(local_directory, self.instance_id)
        self._base_directory = local_directory or ""
        self.nanny_id = nanny_id
        self.address = ""
        """Where peers fetch data; known after `start`."""
        self._listen_address = listen_address
        self._slots = executing_slots
        self._machine = WorkerMachine(config.fetch_bytes)
        self._store = Store()
        self._budget = LineBudget()
        self._cpu = CpuMeter()
        self._fetches: set[asyncio.Task[None]] = set()
        self._metrics_timer: asyncio.TimerHandle | None = None
        self._channel: Channel | None = None
        self._acceptor: Acceptor | None = None
        self._closing: asyncio.Task[None] | None = None
        self._error: Exception | None = None

    # --- life -------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Listens, connects, and sets up what clients have registered for all workers.

        Raises what `Acceptor.listen` and `open_channel` raise, and NodeStartError when a plugin fails; then `close` is due.
        """
        self.loop = asyncio.get_running_loop()
        self._finished = asyncio.Event()
        self.executor = Executor(
            self.nthreads,
            self._on_outcomes,
            inline_bytes=self.config.inline_result_bytes,
            marks=self._slots,
            worker=self,
        )
        self._looks = Looks(self.loop, self.executor, self._machine, self._flush)
        self._plugins = Plugins(self, self._call_finished)
        self._pool = DataPool(security=self.security, config=self.config, instance_id=self.instance_id, name=self.name)
        self._data = DataServer(self._read, self._write)
        self._acceptor = Acceptor(
            security=self.security, config=self.config, epoch=0, instance_id=self.instance_id, admit=self._admit
        )
        wanted = await listen_address_for(self.scheduler_address, self._listen_address)
        self.address = await self._acceptor.listen(wanted)
        if nearby := nearby_address(self.address, self.config):
            bound_arena(self.config, self.memory_limit_bytes)
            try:
                await self._acceptor.listen(nearby)
            except ZmqTasksError as exc:
                tell_failure(self.address, exc)
        self.name = self.name or self.address
        self.executor.start()
        context.workers.add(self)
        self._channel = await open_channel(
            self.scheduler_address,
            self._introduction(),
            self,
            incoming=SchedulerToWorker,
            security=self.security,
            config=self.config,
            instance_id=self.instance_id,
        )
        self._metrics_timer = self.loop.call_later(self.config.metrics_interval_s, self._tick)
        assert self._channel.welcome is not None
        await self._plugins.wait_set_up(self._channel.welcome.setups)

    def _introduction(self) -> WorkerIntroduction:
        return WorkerIntroduction(
            name=self.name,
            pid=os.getpid(),
            host=socket.gethostname(),
            data_address=self.address,
            nthreads=self.nthreads,
            memory_limit_bytes=self.memory_limit_bytes,
            resources=self.resources,
            nanny=self.nanny_id,
            local_directory=self._base_directory,
        )

    @property
    def scheduler_id(self) -> InstanceId:
        """Of the scheduler that it works for."""
        assert self._channel is not None
        return self._channel.peer_instance

    async def finished(self) -> Exception | None:
        """Waits until the worker has been told to end, or its scheduler is lost; gives the error of the latter."""
        await self._finished.wait()
        return self._error

    async def close(self, reason: str = "") -> None:
        """Leaves in good order: no more tasks, links closed; a task that runs is left behind. Idempotent."""
        if self._closing is None:
            self._closing = asyncio.get_running_loop().create_task(self._close(reason))
        await asyncio.shield(self._closing)

    async def _close(self, reason: str) -> None:
        if self._acceptor is None:
            return
        await self._plugins.close(self.config.termination_s / 2)
        self._quiet()
        steps: list[Any] = [self._acceptor.close(), self._data.close(), self._pool.close()]
        if self._channel is not None:
            steps.append(self._channel.close(reason))
        closing = asyncio.gather(*steps, return_exceptions=True)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.config.termination_s):
                await closing
        self.directory.remove()
        self._finished.set()

    def abort(self, reason: str = "") -> None:
        """Ends at once, without a word to anybody; `close` frees what is left."""
        if self._acceptor is not None:
            self._quiet()
            if self._channel is not None:
                self._channel.abort(reason)
            self._finished.set()

    def _quiet(self) -> None:
        context.workers.discard(self)
        for call in context.departures:
            call(self)
        if self._metrics_timer is not None:
            self._metrics_timer.cancel()
        self._looks.stop()
        self.executor.close()
        for fetch in self._fetches:
            fetch.cancel()

    @property
    def local_directory(self) -> str:
        """A directory of its own, which goes away with it."""
        return str(self.directory.path())

    @property
    def plugins(self) -> dict[str, Any]:
        """The plugins of `Client.register_plugin`, by name."""
        return self._plugins.active

    @property
    def fetched_bytes(self) -> int:
        """What has come in from other workers up to now."""
        return self._pool.received_bytes

    @property
    def data_pool(self) -> DataPool:
        """Its data links to other workers; for use in `loop` only."""
        return self._pool

    @property
    def channel(self) -> Channel:
        """The control link to the scheduler."""
        assert self._channel is not None
        return self._channel

    @property
    def answers_by(self) -> Channel | None:
        """The channel by which task threads may answer by themselves."""
        return self._channel if self._closing is None else None

    @property
    def closing(self) -> bool:
        """Whether the worker is on its way out."""
        return self._closing is not None

    def is_cancelled(self) -> bool:
        """Whether the task that calls this has been asked to stop."""
        return context.is_cancelled()

    # --- control link -----------------------------------------------------------------------------------------------

    def ops_received(self, channel: Channel, ops: list[Op]) -> None:
        """Runs a batch of the scheduler's ops."""
        if self._closing is None:
            self.executor.drain()  # the scheduler may speak of results that task threads have sent themselves
            self._machine.receive(ops, self.loop.time())  # type: ignore[arg-type]
            self._flush()

    def link_lost(self, channel: Channel, error: Exception) -> None:
        """Nothing changes: the channel keeps what is sent meanwhile."""

    def link_resumed(self, channel: Channel) -> None:
        """Nothing was lost."""

    def channel_ended(self, channel: Channel, error: Exception | None) -> None:
        """Without a scheduler there is nothing left to do."""
        if self._closing is None and not self._finished.is_set():
            if error is not None:
                self._error = error
                logger.error("worker %s ends: %s", self.name, error)
            else:
                logger.info("worker %s ends: the scheduler has said goodbye", self.name)
            self._finished.set()

    # --- the machine ------------------------------------------------------------------------------------------------

    def _flush(self) -> None:
        """Carries out what the machine asks for, then sends its ops in one message."""
        ops: list[Op] = []
        while True:
            more, instructions = self._machine.outbox.take()
            ops += more
            if not instructions:
                break
            for instruction in instructions:
                self._carry_out(instruction)
        if ops:
            self._send(ops)

    def _carry_out(self, instruction: Instruction) -> None:
        match instruction:
            case StartRuns(runs):
                entries = self._store.entries
                calls: list[Run] = []
                for run in runs:
                    if run.deps:
                        run.inputs = [entries[key] for key in run.deps]
                        if run.group.actor == CALLS_ACTOR:
                            calls.append(run)
                if calls:
                    self.executor.actors.call(calls)
                    runs = [run for run in runs if run.group.actor != CALLS_ACTOR]
                self._looks.look_later()
                self.executor.hand_over(runs)
            case TakeBack(runs):
                self._machine.runs_taken_back(self.executor.take_back(runs))
            case Interrupt(runs):
                self.executor.interrupt(runs)
            case FetchKeys():
                fetch = self.loop.create_task(self._fetch(instruction))
                self._fetches.add(fetch)
                fetch.add_done_callback(self._fetches.discard)
            case KeepInline(keys, values):
                self._store.put_inputs(keys, values)
            case DropKeys(keys):
                self._store.drop(keys)
                self.executor.actors.drop(keys)
            case DropInline(keys):
                self._store.drop_inputs(keys)
            case LearnFunctions(digests, functions):
                self.executor.learn_functions(digests, functions)
            case Call(op):
                call_in_thread(op, self, "dask_worker", self._call_finished)
            case Plug(plugin):
                self._plugins.do(plugin)
            case Stop(reason):
                logger.info("worker %s was told to end%s", self.name, f": {reason}" if reason else "")
                self._finished.set()
            case _:
                assert_never(instruction)

    def _send(self, ops: list[Op]) -> None:
        if self._channel is None or self._closing is not None:
            return
        try:
            self._channel.send(ops)
        except (CommError, SchedulerLostError):  # it has ended; channel_ended says the rest
            logger.debug("the channel is over: %d ops are not sent", len(ops))

    def _on_outcomes(self, outcomes: list[Outcome]) -> None:
        """What task threads have reported, in order; neighbouring results go into one op."""
        if self._closing is not None:
            return
        machine, put = self._machine, self._store.put_value
        finished: list[Finished] = []
        for outcome in outcomes:
            if type(outcome) is Finished:
                if not outcome.run.cancelled:
                    put(outcome.run.key, outcome.value, outcome.size, outcome.data)
                finished.append(outcome)
                continue
            if finished:
                machine.runs_finished(finished)
                finished = []
            match outcome:
                case Erred(run, error, duration_us):
                    machine.run_erred(run, error, duration_us)
                case NotStarted(run):
                    machine.runs_taken_back([run])
                case Blocked(run):
                    machine.run_blocked(run)
                case Resumed(run):
                    machine.run_resumed(run)
                case Seceded(run):
                    machine.run_seceded(run)
        if finished:
            machine.runs_finished(finished)
        if self.executor.actors.made:
            self.executor.actors.settle(self._store)
        self._flush()
        if machine.runs:
            self._looks.look_later()

    def _call_finished(self, answer: CallFinished) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self.loop.call_soon_threadsafe(lambda: self._send([answer]))

    # --- data -------------------------------------------------------------------------------------------------------

    async def _fetch(self, request: FetchKeys) -> None:
        """Gets values from a peer and tells the machine."""
        try:
            fetched = await self._pool.get(request.address, request.keys)
        except ZmqTasksError as exc:
            self._log_broken(request, len(request.keys), exc)
            self._machine.fetch_broken(request.request)
        else:
            unanswered: list[Key] = []
            if fetched.broken is not None:
                unanswered = fetched.unanswered(request.keys)
                self._log_broken(request, len(unanswered), fetched.broken)
            received = {key: payload.nbytes for key, payload in fetched.values.items()}
            kept = self._machine.fetch_finished(request.request, received, fetched.missing, fetched.failed, unanswered)
            for key in kept:
                self._store.put_payload(key, fetched.values[key])
        self._flush()

    def _log_broken(self, request: FetchKeys, count: int, error: ZmqTasksError) -> None:
        logger.info("%d inputs could not be fetched from %s: %s", count, request.address, error)

    def _read(self, keys: list[Key]) -> Iterator[tuple[Key, Payload | str | None]]:
        self.executor.drain()
        return ((key, self._store.read(key)) for key in keys)

    def _write(self, items: list[tuple[Key, Payload]]) -> None:
        for key, payload in items:
            self._store.put_payload(key, payload)
        self._machine.data_put([key for key, _ in items], [payload.nbytes for _, payload in items])
        self._flush()

    def _admit(self, introduction: Introduction, peer: PeerInfo) -> Admission | Refusal:
        if isinstance(introduction, DataIntroduction):
            return Admission(data_handler=self._data)
        return Refusal(f"{self.address} is a worker: it takes data links only; connect to its scheduler")

    # --- metrics and output -----------------------------------------------------------------------------------------

    def _tick(self) -> None:
        executing = self._looks.tick()
        self._flush()
        self._send(
            [
                WorkerMetrics(
                    memory_bytes=resident_bytes(),
                    stored_keys=len(self._store),
                    stored_bytes=self._store.stored_bytes,
                    cpu_percent=self._cpu.percent(),
                    queued=self.executor.queued,
                    executing=executing,
                    compression=self._compression(),
                )
            ]
        )
        self._send_lines()
        POOL.trim()
        self._metrics_timer = self.loop.call_later(self.config.metrics_interval_s, self._tick)

    def _compression(self) -> dict[str, int]:
        counted = Counters()
        counted.add(self._pool.compression)
        counted.add(self._data.compression)
        numbers = counted.as_dict()
        return numbers if any(numbers.values()) else {}

    def log_soon(self, record: LogRecord) -> None:
        """Sends a line to the clients, within bounds; for any thread."""
        if self._budget.add(record, time.monotonic()):
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self.loop.call_soon_threadsafe(self._send_lines)

    def _send_lines(self) -> None:
        if records := self._budget.take(self.address):
            self._send([LogMessages(records)])
