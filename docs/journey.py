"""Records what really goes over the links while one task runs, for `docs/journey.md`.

A scheduler and two workers run in this process. Every message passes `Codec.encode`; a codec knows which ops it may read, and so
which link it belongs to. Values that differ from run to run (keys, run ids, sizes of pickles, addresses) are shown by kind.
"""

from __future__ import annotations

import textwrap
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import msgspec
import numpy as np

from zmqtasks import Client, LocalCluster, wait
from zmqtasks.ids import COUNTER_BITS
from zmqtasks.protocol import ops
from zmqtasks.protocol.codec import Codec

LINKS = {
    ops.SchedulerToClient: ("client", "scheduler"),
    ops.ClientToScheduler: ("scheduler", "client"),
    ops.SchedulerToWorker: ("worker", "scheduler"),
    ops.WorkerToScheduler: ("scheduler", "worker"),
    ops.DataReply: ("asking", "asked"),
    ops.DataRequest: ("asked", "asking"),
}
"""By what its codec reads: who sends, and to whom."""

BACKGROUND = (ops.WorkerMetrics, ops.LogMessages, ops.ClusterChanged, ops.RunsExecuting)
"""Sent now and then, whatever happens."""


TIMEOUT_S = 30.0
BYTES = {
    "function": "digest",
    "digests": "digest",
    "functions": "pickled function",
    "headers": "header of the payload",
}

SMALL = """A task with a small result. The function goes to the scheduler once, and from there to a worker once; the tasks
refer to it by its digest. The worker sends the result along with the notice that the task has finished, and the
scheduler passes it on, unopened: the client has it without asking."""
LARGE = """A task with a large result, which stays on the worker (length -1: it is not in the message). The client
learns that it exists, and how large it is."""
INPUT = """A task that needs this result, on the other worker. The scheduler says who holds the input (`Peers` gives
workers numbers, once), the worker fetches it directly, reports that it holds a copy now, and runs the task. The bytes
travel in a frame of their own beside the op, uncopied; the scheduler never sees them."""
FETCH = """The client wants the large result: it asks the scheduler who has it, and fetches it from there."""
RELEASE = """Nobody holds the futures any more: the scheduler tells the workers to drop what they hold."""


def half(x: float) -> float:
    """The task of the journey."""
    return x / 2


def fill(value: float) -> Any:
    """A result too large to travel with the notice."""
    return np.full(100_000, value)


def total(array: Any) -> float:
    """A task with an input that is on another worker."""
    return float(array.sum())


@dataclass(frozen=True)
class Sent:
    """One op on its way."""

    sender: str
    receiver: str
    op: Any


@dataclass(frozen=True)
class Step:
    """What a program does, and what goes over the links because of it."""

    code: str
    text: str
    sent: list[Sent]


class Recorder:
    """What was sent, in order."""

    def __init__(self) -> None:
        self._sent: list[Sent] = []
        self._changed = threading.Condition()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Listens at every codec that is used meanwhile."""
        encode = Codec.encode

        def listening(codec: Codec, seq: int, ack: int, batch: Sequence[Any]) -> bytes:
            if (link := LINKS.get(codec.incoming)) is not None:
                with self._changed:
                    self._sent += (Sent(*link, op) for op in batch if not isinstance(op, BACKGROUND))
                    self._changed.notify_all()
            return encode(codec, seq, ack, batch)

        with patch.object(Codec, "encode", listening):
            yield

    def take(self, last: type, count: int = 1, **names: str) -> list[Sent]:
        """What was sent since the last call, up to the `count`-th op of type `last`; `names` say who is meant by whom."""
        with self._changed:
            enough = self._changed.wait_for(
                lambda: sum(type(sent.op) is last for sent in self._sent) >= count, TIMEOUT_S
            )
            assert enough, f"no {last.__name__} among {self._sent}"
            taken, self._sent = self._sent, []
        return [
            Sent(names.get(sent.sender, sent.sender), names.get(sent.receiver, sent.receiver), sent.op)
            for sent in taken
        ]

    def skip(self) -> None:
        """Forgets what was sent."""
        with self._changed:
            self._sent = []


def record() -> tuple[list[Step], list[str]]:
    """The steps of the journey as they really went, and the addresses of the two workers."""
    recorder = Recorder()
    steps = []
    with (
        recorder.recording(),
        LocalCluster(n_workers=2, threads_per_worker=1, processes=False) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        workers = list(client.scheduler_info()["workers"])  # in the order in which the scheduler numbered them
        first, second = workers
        recorder.skip()

        small = client.submit(half, 42.0, workers=[first])
        assert small.result() == 21.0
        sent = recorder.take(ops.KeysInMemory, worker="worker 0")
        steps.append(Step("small = client.submit(half, 42.0, workers=[first]); small.result()", SMALL, sent))

        large = client.submit(fill, 2.0, workers=[first])
        wait(large)
        sent = recorder.take(ops.KeysInMemory, worker="worker 0")
        steps.append(Step("large = client.submit(fill, 2.0, workers=[first]); wait(large)", LARGE, sent))

        answer = client.submit(total, large, workers=[second])
        assert answer.result() == 200_000.0
        sent = recorder.take(ops.KeysInMemory, worker="worker 1", asking="worker 1", asked="worker 0")
        steps.append(Step("answer = client.submit(total, large, workers=[second]); answer.result()", INPUT, sent))

        assert large.result().sum() == 200_000.0
        sent = recorder.take(ops.DataSent, asking="client", asked="a worker")
        steps.append(Step("large.result()", FETCH, sent))

        del small, large, answer
        sent = recorder.take(ops.FreeKeys, count=2, worker="a worker")
        steps.append(Step("del small, large, answer", RELEASE, sent))
    return steps, workers


def journey() -> str:
    """The generated part of `journey.md`."""
    steps, workers = record()
    names = {address: f"worker {number}" for number, address in enumerate(workers)}
    show = Shown(names)
    parts = []
    for step in steps:
        lines = [f"{sent.sender} → {sent.receiver}: {show.op(sent.op)}" for sent in step.sent]
        wrapped = [textwrap.fill(line, 100, subsequent_indent="    ", break_long_words=False) for line in lines]
        parts.append(f"### `{step.code}`\n\n{step.text}\n\n```\n" + "\n".join(wrapped) + "\n```\n")
    return "\n".join(parts)


class Shown:
    """Ops as text, the same in every run."""

    def __init__(self, workers: dict[str, str]) -> None:
        self._workers = workers
        self._runs: dict[int, str] = {}

    def op(self, op: Any) -> str:
        """The op with all fields that differ from their defaults."""
        fields = []
        for field in msgspec.structs.fields(op):
            value = getattr(op, field.name)
            default = field.default_factory() if field.default_factory is not msgspec.NODEFAULT else field.default
            if value != default:
                fields.append(f"{field.name}={self._value(field.name, value)}")
        return f"{type(op).__name__}({', '.join(fields)})"

    def _place(self, holder: Any) -> str:
        return self._workers.get(holder, str(holder))

    def _value(self, name: str, value: Any) -> str:
        if isinstance(value, msgspec.Struct):
            return self.op(value)
        if name == "holders" and isinstance(value, list) and value and isinstance(value[0], list):
            value = [sorted(holders, key=self._place) for holders in value]  # their order means nothing
        if isinstance(value, list):
            return f"[{', '.join(self._value(name, item) for item in value)}]"
        if value == b"":
            return "b''"
        if isinstance(value, bytes):
            return f"<{BYTES.get(name, 'payload')}>"
        if isinstance(value, str):
            return f"<{self._workers[value]}>" if value in self._workers else repr(value)
        if name in ("keys", "deps", "first_key"):
            return f"{value >> COUNTER_BITS}.{value & ((1 << COUNTER_BITS) - 1)}"
        if name == "run_ids":
            return self._runs.setdefault(value, f"run{len(self._runs) + 1}")
        if name in ("sizes", "lengths", "args_lengths", "durations_us") and value >= 0:
            return "n"
        return repr(value)
