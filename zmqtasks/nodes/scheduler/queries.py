"""Answers to questions about the cluster: plain data, made on demand, never stored.

Keys are those of the wire, which the client turns into the user's; only `story` and `events`, made for people, name tasks as
people see them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from zmqtasks.ids import Key
from zmqtasks.nodes.scheduler.state import MEMORY, READY, SchedulerState, State, TaskState, WorkerState
from zmqtasks.protocol.ops import Query


class UnknownQueryError(ValueError):
    """The question is not one of `Queries.names`."""


class Queries:
    """One method for each question."""

    def __init__(self, state: SchedulerState) -> None:
        self.state = state
        self._answers: dict[str, Callable[[Query], Any]] = {
            "scheduler_info": self.scheduler_info,
            "who_has": self.who_has,
            "has_what": self.has_what,
            "nbytes": self.nbytes,
            "nthreads": self.nthreads,
            "processing": self.processing,
            "story": self.story,
            "tasks": self.tasks,
            "events": self.events,
        }

    @property
    def names(self) -> list[str]:
        """The questions that have an answer."""
        return sorted(self._answers)

    def answer(self, query: Query) -> Any:
        """Plain data (for MessagePack); raises `UnknownQueryError`."""
        method = self._answers.get(query.what)
        if method is None:
            raise UnknownQueryError(f"no such query: {query.what!r}; there are {', '.join(self.names)}")
        return method(query)

    def scheduler_info(self, query: Query) -> dict[str, Any]:
        """Counters and one record per worker."""
        state = self.state
        return {
            "type": "Scheduler",
            "epoch": state.epoch,
            "clients": [{"name": c.name, "host": c.host, "pid": c.pid} for c in state.clients.values()],
            "workers": {w.address: self._worker(w) for w in state.workers.values()},
            "tasks": self.tasks(query),
            "counters": dict(state.counters),
        }

    def _worker(self, worker: WorkerState) -> dict[str, Any]:
        return {
            "type": "Worker",
            "id": worker.instance.hex(),
            "name": worker.name,
            "host": worker.host,
            "pid": worker.pid,
            "nthreads": worker.nthreads,
            "memory_limit": worker.memory_limit_bytes,
            "resources": worker.resources,
            "nanny": bool(worker.nanny),
            "status": _status(worker),
            "metrics": {
                "memory": worker.memory_bytes,
                "cpu": worker.cpu_percent,
                "processing": len(worker.processing),
                "actors": worker.actors,
                "stored_keys": worker.stored_keys,
                "stored_bytes": worker.stored_bytes,
                "compression": _with_ratio(worker.compression),
            },
        }

    def _selected(self, query: Query) -> Iterable[TaskState]:
        if query.keys:
            return [self.state.tasks[k] for k in query.keys if k in self.state.tasks]
        return self.state.tasks.values()

    def _workers(self, query: Query) -> list[WorkerState]:
        every = list(self.state.workers.values())
        return [w for w in every if not query.workers or {w.address, w.name, w.host} & set(query.workers)]

    def who_has(self, query: Query) -> dict[Key, list[str]]:
        """Addresses of the workers that hold each key."""
        if query.keys:
            tasks = self.state.tasks
            return {k: [w.address for w in tasks[k].holders()] if k in tasks else [] for k in query.keys}
        return {ts.key: [w.address for w in ts.holders()] for ts in self._selected(query) if ts.state is MEMORY}

    def has_what(self, query: Query) -> dict[str, list[Key]]:
        """Keys that each worker holds."""
        found: dict[str, list[Key]] = {w.address: [] for w in self._workers(query)}
        for ts in self.state.tasks.values():
            for worker in ts.holders():
                if worker.address in found:
                    found[worker.address].append(ts.key)
        return found

    def nbytes(self, query: Query) -> dict[Key, int]:
        """Size of each value in memory."""
        return {ts.key: ts.size for ts in self._selected(query) if ts.state is MEMORY}

    def nthreads(self, query: Query) -> dict[str, int]:
        """Threads of each worker."""
        return {w.address: w.nthreads for w in self._workers(query)}

    def processing(self, query: Query) -> dict[str, list[Key]]:
        """Keys that each worker has been given and has not finished."""
        return {w.address: [ts.key for ts in w.processing.values() if ts is not None] for w in self._workers(query)}

    def tasks(self, query: Query) -> dict[str, int]:
        """Number of tasks in each state."""
        counts = Counter(ts.state for ts in self.state.tasks.values())
        return {state.name.lower(): counts.get(state, 0) for state in State}

    def story(self, query: Query) -> list[str]:
        """What is known and remembered of the given keys."""
        lines: list[str] = []
        for key in query.keys:
            ts = self.state.tasks.get(key)
            if ts is None:
                lines += [*self.state.story(key, str(key)), f"{key}: not known now"]
                continue
            lines += self.state.story(key, ts.name)
            where = (
                ts.worker.address if ts.worker is not None else ", ".join(w.address for w in ts.holders()) or "nowhere"
            )
            lines.append(
                f"{ts.name}: {ts.state.name.lower()} ({where}), {ts.waiting_on} inputs missing, {ts.holds} holds"
            )
            if ts.state is READY and (wanted := self._wanted_in_vain(ts)):
                lines.append(f"{ts.name}: no worker has {wanted}")
        return lines

    def _wanted_in_vain(self, ts: TaskState) -> str:
        """What a ready task asks for and no worker has, as the user wrote it; empty when some worker may run it."""
        workers = self.state.workers.values()
        if not workers:
            return "come yet"
        bucket = ts.spec.bucket if ts.spec is not None else None
        if bucket is None or bucket.allow_other or any(map(bucket.admits, workers)):
            return ""
        asked = {"workers": list(bucket.restrictions), "resources": bucket.resources}
        return ", ".join(f"{name}={value!r}" for name, value in asked.items() if value)

    def events(self, query: Query) -> list[list[Any]]:
        """The unusual events that are remembered: time, about what, what."""
        return [list(event) for event in self.state.events]


def _status(worker: WorkerState) -> str:
    if worker.lost_at is not None:
        return "unresponsive"
    return "closing" if worker.leaving else "preparing" if worker.preparing else "running"


def _with_ratio(counted: dict[str, int]) -> dict[str, int | float]:
    """Counters by name, with the `ratio` of bytes after and before compression where there are any."""
    before = counted.get("bytes_in", 0)
    return {**counted, "ratio": round(counted["bytes_out"] / before, 4)} if before else dict(counted)
