"""The matrix of a live cluster: what each worker gets from each other, over the links that its tasks use.

Theory of operation
-------------------
Values are made on the workers by tasks; another task on the receiving worker times how its data pool fetches them
(`probe.py`). So transport, encryption and compression are those that the nodes have chosen. Pairs that have a host in
common never run at the same time; others do. With `together` all pairs run at once instead, and the figures are those of a
loaded network.

A pair that fails costs its time limit, not the run: the error stands in its place, a worker that has left the cluster or
with which nothing has worked is not tried again. Ctrl-C ends the run with what there is.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import probe
from .document import Matrix
from .figures import MIB
from .matrix_parts import (
    Measured,
    better,
    describe_workers,
    link_of,
    nothing_found,
    size_of_all_at_once,
    sizes_that_fit,
)
from .pairs import Link, Pair, choose_pairs, next_free
from .processes import MeasuringError
from .remarks import compare_hosts
from .slow import judge

if TYPE_CHECKING:
    from zmqtasks import Client, Future

SMALL_BYTES = 8
"""Of the value whose fetch is the latency."""
LOOK_S = 1.0
"""So long after the last answer: a task whose worker is gone waits for it to come back, and nobody says so."""
ATTEMPTS = 3
"""A worker with which so many pairs have failed and none has worked is not tried again."""
Progress = Callable[[int, int, str], None]
"""Called after each pair: how many are done, of how many, and what it was."""


@dataclass(frozen=True, slots=True)
class MatrixPlan:
    """What to measure."""

    sizes: tuple[int, ...] = (MIB, 16 * MIB, 64 * MIB)
    """Of values for bandwidth, ascending; large ones are left out where they would take too long."""
    round_trips: int = 500
    """At most so many per pair."""
    time_s: float = 0.5
    """About the time for one figure."""
    limit_s: float = 30.0
    """Of a pair."""
    slack_s: float = 10.0
    """More than that: for the scheduler and the worker's start of the task."""
    prepare_s: float = 60.0
    """To make the values; a worker that is not done by then is busy with something else."""
    pairs: int | None = None
    """About so many ordered pairs; None: all of a small cluster, `DEFAULT_PAIRS` of a large one."""
    together: bool = False
    """All pairs at the same time."""


def measure_matrix(client: Client, plan: MatrixPlan, progress: Progress | None = None) -> Matrix:
    """Measures pairs of the workers of `client`'s cluster and judges them.

    Ctrl-C (KeyboardInterrupt) ends it early: the matrix has what was measured, and `facts["interrupted"]` is true. Nothing
    is left on the workers. Raises MeasuringError when there are not two workers.
    """
    run = _Run(client, plan, progress or (lambda done, total, text: None))
    began = time.monotonic()
    interrupted = False
    with _by_value():
        try:
            run.prepare()
            if plan.together:
                run.measure_together()
            else:
                run.measure()
                run.confirm()
        except KeyboardInterrupt:
            interrupted = True
        finally:
            run.clean_up()
    return run.matrix(interrupted, time.monotonic() - began)


@contextlib.contextmanager
def _by_value() -> Iterator[None]:
    """Functions of `probe` travel by value meanwhile: workers need not have this package."""
    import cloudpickle

    cloudpickle.register_pickle_by_value(probe)
    try:
        yield
    finally:
        cloudpickle.unregister_pickle_by_value(probe)


class _Run:
    """One run; all its methods belong to the thread that made it."""

    def __init__(self, client: Client, plan: MatrixPlan, progress: Progress) -> None:
        self._client = client
        self._plan = plan
        self._progress = progress
        self._token = secrets.token_hex(4)
        self._links: dict[Pair, Link] = {}
        self._tasks: dict[Any, Future[Any]] = {}
        self._ended: queue.Queue[Any] = queue.Queue()
        info = client.scheduler_info()["workers"]
        self._all_workers = len(info)
        if len(info) < 2:
            raise MeasuringError(f"a matrix needs at least two workers, the cluster has {len(info)}")
        self._workers = describe_workers(info)
        self._pairs = choose_pairs(len(self._workers), plan.pairs)
        self._sizes = sizes_that_fit(plan.sizes, info)
        if plan.together:
            self._sizes = (size_of_all_at_once(plan.sizes, info, self._pairs),)
        self._hosts: dict[str, dict[str, Any]] = {}
        self._done = 0
        self._expected = len(self._pairs)

    # Preparing and cleaning up

    def prepare(self) -> None:
        """Makes the values on their workers."""
        for worker in self._workers:
            for size in (SMALL_BYTES, *self._sizes):
                key = f"bench-net-{self._token}-{worker.address}-{size}"
                future = self._client.submit(probe.make_bytes, size, key=key, workers=[worker.address], priority=1)
                worker.values.append(future)
        firsts = {worker.host: worker for worker in reversed(self._workers)}
        about = {
            host: self._client.submit(probe.about_host, workers=[firsts[host].address], priority=1)
            for host in sorted(firsts)
        }
        end = time.monotonic() + self._plan.prepare_s
        for worker in self._workers:
            error = self._value_error(worker, end)
            if error:
                worker.gone = error
        for host, future in about.items():
            if not firsts[host].gone:
                with contextlib.suppress(Exception):  # good to know, no more
                    self._hosts[host] = future.result(timeout=max(1.0, end - time.monotonic()))

    def _value_error(self, worker: Measured, end: float) -> str:
        """Why its values are not there; looks at whether the worker still is, now and then."""
        for future in worker.values:
            while not future.done():
                left = end - time.monotonic()
                if left <= 0:
                    return f"it has not made its values within {self._plan.prepare_s:g} s: busy with other tasks, or stopped?"
                if not self._is_there(worker):
                    return "it has left the cluster"
                with contextlib.suppress(TimeoutError):
                    future.exception(timeout=min(1.0, left))
            error = future.exception()
            if error is not None:
                return f"its values could not be made: {error}"
        return ""

    def clean_up(self) -> None:
        """Cancels what runs and lets go of all values."""
        with contextlib.suppress(Exception):  # the cluster may be gone by now
            self._client.cancel(list(self._tasks.values()))
        for future in itertools.chain(self._tasks.values(), *(worker.values for worker in self._workers)):
            future.release()
        self._tasks.clear()

    # One pair after the other on each host

    def measure(self) -> None:
        """All pairs, as many at a time as have no host in common."""
        self._measure(self._pairs)

    def confirm(self) -> None:
        """Measures what looks slow once more, and keeps the better figures: what was chance is not named."""
        labels, hosts = self._labels()
        suspects: dict[Pair, None] = {}
        for finding in judge(labels, hosts, list(self._links.values())):
            if finding.pair is not None:
                suspects |= dict.fromkeys((finding.pair, finding.pair[::-1]))
            elif finding.kind in ("host", "worker"):
                named = hosts if finding.kind == "host" else labels
                ends = {number for number, name in enumerate(named) if name in finding.names}
                suspects |= dict.fromkeys(pair for pair in self._links if ends & set(pair))
        again = [pair for pair in suspects if pair in self._links and not self._links[pair].error]
        self._expected += len(again)
        before = {pair: self._links[pair] for pair in again}
        try:
            self._measure(again)
        finally:
            for pair, link in before.items():
                self._links[pair] = better(link, self._links[pair])

    def _measure(self, pairs: Iterable[Pair]) -> None:
        pending = dict.fromkeys(pairs)
        hosts = [worker.host for worker in self._workers]
        busy: Counter[str] = Counter()
        failed: Counter[int] = Counter()
        deadlines: dict[Pair, float] = {}
        while pending or deadlines:
            self._drop_hopeless(pending)
            while (pair := next_free(pending, hosts, +busy, failed)) is not None:
                del pending[pair]
                busy.update({hosts[pair[0]], hosts[pair[1]]})
                self._start(pair, [pair[0]], pair[1])
                deadlines[pair] = time.monotonic() + self._plan.limit_s + self._plan.slack_s
            if not deadlines:
                continue
            for pair in self._wait_any(deadlines):
                del deadlines[pair]
                busy.subtract({hosts[pair[0]], hosts[pair[1]]})
                link = self._finish(pair)
                if link.error:
                    failed.update(pair)
                self._report(link)

    def _drop_hopeless(self, pending: dict[Pair, None]) -> None:
        """Pairs of workers that were given up are not tried."""
        for pair in list(pending):
            for end in pair:
                if (why := self._workers[end].gone) and pair in pending:
                    del pending[pair]
                    link = Link(source=pair[0], target=pair[1], error=f"{self._workers[end].label}: {why}")
                    self._links[pair] = link
                    self._report(link)

    def _start(self, name: Any, sources: list[int], target: int) -> None:
        probing = probe.measure_together if self._plan.together else probe.measure_each
        plan: probe.Plan = {
            "time_s": self._plan.time_s,
            "round_trips": self._plan.round_trips,
            "limit_s": self._plan.limit_s,
        }
        described = [self._source(self._workers[source]) for source in sources]
        future = self._client.submit(
            probing, described, plan, workers=[self._workers[target].address], priority=1, idempotent=False
        )
        self._tasks[name] = future
        future.add_done_callback(lambda _: self._ended.put(name))

    def _source(self, worker: Measured) -> probe.Source:
        keys = [str(future.key) for future in worker.values]
        large = list(zip(self._sizes, keys[1:], strict=True))
        return {"address": worker.address, "small": keys[0], "large": large}

    def _wait_any(self, deadlines: dict[Any, float]) -> list[Any]:
        """What has ended, or must end now: its time is over, or its worker is gone. May be nothing yet."""
        found: list[Any] = []
        wait_s = min(deadlines.values()) - time.monotonic()
        with contextlib.suppress(queue.Empty):
            found.append(self._ended.get(timeout=min(LOOK_S, max(0.0, wait_s))))
            while True:
                found.append(self._ended.get_nowait())
        if not found:
            there = self._client.scheduler_info()["workers"]
            found += [name for name in deadlines if self._workers[_target(name)].address not in there]
        now = time.monotonic()
        found += [name for name, deadline in deadlines.items() if deadline <= now]
        return [name for name in dict.fromkeys(found) if name in deadlines]

    def _finish(self, pair: Pair) -> Link:
        source, target = self._workers[pair[0]], self._workers[pair[1]]
        answers, error = self._answers(pair, target)
        link = link_of(pair, answers[0]) if answers else Link(source=pair[0], target=pair[1], error=error)
        self._links[pair] = link
        for worker in (source, target):
            worker.failed += bool(link.error)
            worker.worked += not link.error
            if link.error and not worker.gone:
                if not self._is_there(worker):
                    worker.gone = "it has left the cluster"
                elif worker.failed >= ATTEMPTS and not worker.worked:
                    worker.gone = f"{link.error} (after {worker.failed} failed pairs it was not tried again)"
        return link

    def _answers(self, name: Any, target: Measured) -> tuple[list[dict[str, Any]], str]:
        """What a task has found; or nothing, and why."""
        future = self._tasks.pop(name)
        if not future.done():
            self._client.cancel([future])
            if not self._is_there(target):
                return [], f"{target.label} has left the cluster"
            waited_s = self._plan.limit_s + self._plan.slack_s
            return (
                [],
                f"{target.label} did not answer within {waited_s:g} s: busy with other tasks, stopped or cut off?",
            )
        error = future.exception()
        if error is not None:
            return [], f"the task on {target.label} failed: {error}"
        answers: list[dict[str, Any]] | None = future.result()
        future.release()  # the thread that calls back may hold on to the last one
        return answers or [], "" if answers else f"the task on {target.label} was cancelled"

    # All at once

    def measure_together(self) -> None:
        """One task on each worker, which fetches from all its partners at the same time."""
        sources: dict[int, list[int]] = {}
        for source, target in self._pairs:
            gone = [end for end in (source, target) if self._workers[end].gone]
            if gone:
                why = f"{self._workers[gone[0]].label}: {self._workers[gone[0]].gone}"
                self._links[source, target] = Link(source=source, target=target, error=why)
                self._report(self._links[source, target])
            else:
                sources.setdefault(target, []).append(source)
        limit = time.monotonic() + 3 * self._plan.limit_s + self._plan.time_s + self._plan.slack_s
        deadlines: dict[Any, float] = dict.fromkeys(sources, limit)
        for target, mine in sources.items():
            self._start(target, mine, target)
        while deadlines:
            for target in self._wait_any(deadlines):
                del deadlines[target]
                answers, error = self._answers(target, self._workers[target])
                for number, source in enumerate(sources[target]):
                    pair = (source, target)
                    link = (
                        link_of(pair, answers[number]) if answers else Link(source=source, target=target, error=error)
                    )
                    self._links[pair] = link
                    self._report(link)

    # What is known

    def _is_there(self, worker: Measured) -> bool:
        return worker.address in self._client.scheduler_info()["workers"]

    def _report(self, link: Link) -> None:
        self._done += 1
        source, target = self._workers[link.source], self._workers[link.target]
        self._progress(self._done, self._expected, f"{source.label} → {target.label}")

    def _labels(self) -> tuple[list[str], list[str]]:
        """Workers and their hosts."""
        return [worker.label for worker in self._workers], [worker.host for worker in self._workers]

    def matrix(self, interrupted: bool, seconds: float) -> Matrix:
        """The figures, and what they say."""
        labels, hosts = self._labels()
        links = [self._links[pair] for pair in self._pairs if pair in self._links]
        latency: list[list[float | None]] = [[None] * len(labels) for _ in labels]
        bandwidth: list[list[float | None]] = [[None] * len(labels) for _ in labels]
        for link in links:
            latency[link.source][link.target] = link.latency_us
            bandwidth[link.source][link.target] = link.bandwidth
        gone = {number: worker.gone for number, worker in enumerate(self._workers) if worker.gone}
        judged = [*judge(labels, hosts, links, gone), *compare_hosts(self._hosts)]
        facts = {
            "scheduler": self._client.scheduler_info()["address"] if not interrupted else "",
            "hosts": self._hosts,
            "addresses": [worker.address for worker in self._workers],
            "workers_in_cluster": self._all_workers,
            "pairs_possible": len(labels) * (len(labels) - 1),
            "pairs_chosen": len(self._pairs),
            "pairs_measured": sum(not link.error for link in links),
            "together": self._plan.together,
            "sizes": list(self._sizes),
            "interrupted": interrupted,
            "seconds": round(seconds, 3),
        }
        return Matrix(
            workers=labels,
            hosts=hosts,
            latency_us=latency,
            bandwidth=bandwidth,
            findings=[finding.text for finding in judged] or nothing_found(links),
            judged=judged,
            links=links,
            facts=facts,
        )


def _target(name: Pair | int) -> int:
    """The worker that runs a task, by the task's name: a pair, or the worker itself."""
    return name if isinstance(name, int) else name[1]
