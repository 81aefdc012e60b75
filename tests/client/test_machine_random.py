"""Any sequence of submissions, drops, cancellations, retries and losses: client and scheduler agree in the end."""

from __future__ import annotations

from collections import deque

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from zmqtasks.nodes.client.machine import ClientMachine
from zmqtasks.nodes.client.state import CANCELLED, ERROR, FINISHED, LOST, PENDING, FutureState
from zmqtasks.protocol.ops import (
    CancelTasks,
    ErrorInfo,
    KeysCancelled,
    KeysErred,
    KeysInMemory,
    KeysRecomputing,
    Locations,
    Op,
    ReleaseKeys,
    RequestLocations,
    RetryTasks,
    SubmitTasks,
)

NAMES = ["a", "b", "c"]


class _Scheduler:
    """As little of a scheduler as a client can tell from a real one: keys that one client wants, each with a generation."""

    def __init__(self) -> None:
        self.tasks: dict[str, tuple[str, int]] = {}
        self.generation = 0
        self.to_client: deque[Op] = deque()

    def receive(self, op: Op) -> None:
        if isinstance(op, SubmitTasks):
            (key,) = op.keys
            assert isinstance(key, str)
            self.generation += 1
            assert key not in self.tasks, f"{key} was submitted again while it was wanted"
            self.tasks[key] = ("pending", int(op.name))
        elif isinstance(op, ReleaseKeys):
            for key in op.keys:
                self.tasks.pop(str(key), None)
        elif isinstance(op, CancelTasks):
            self.to_client.append(KeysCancelled(op.keys, "cancelled"))
            for key in op.keys:
                self.tasks.pop(str(key), None)
        elif isinstance(op, RetryTasks):
            for key in op.keys:
                task = self.tasks.get(str(key))
                if task is not None and task[0] == "error":
                    self.tasks[str(key)] = ("pending", task[1])
                    self.to_client.append(KeysRecomputing([key]))
        elif isinstance(op, RequestLocations):
            self.to_client.append(Locations(op.request, [], []))

    def settle(self, key: str, fate: str) -> None:
        status, submission = self.tasks[key]
        if fate == "lost" and status == "finished":
            self.tasks[key] = ("pending", submission)
            self.to_client.append(KeysRecomputing([key]))
        elif fate == "finished" and status == "pending":
            self.tasks[key] = ("finished", submission)
            value = str(submission).encode()
            self.to_client.append(KeysInMemory([key], [len(value)], [len(value)], value))
        elif fate == "error" and status == "pending":
            self.tasks[key] = ("error", submission)
            self.to_client.append(KeysErred([key], ErrorInfo("exception", str(submission))))


class ClientAndScheduler(RuleBasedStateMachine):
    """Ops travel with any delay, in order; what a future says must be about its own submission."""

    def __init__(self) -> None:
        super().__init__()
        self.machine = ClientMachine()
        self.scheduler = _Scheduler()
        self.to_scheduler: deque[Op] = deque()
        self.futures: list[tuple[FutureState, int]] = []
        self.submissions = 0

    @rule(name=st.sampled_from(NAMES))
    def submit(self, name: str) -> None:
        state = self.machine.share(name)
        number = self.submissions
        if state is None:
            self.submissions = number = number + 1
            state = FutureState(name, None, str(number))
            self.machine.submit(SubmitTasks(b"f", str(number), 0, 1, [name]), b"code", (state,))
        self.futures.append((state, int(state.name)))

    @precondition(lambda self: self.futures)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.futures) - 1))
        self.machine.dropped.append(self.futures.pop(index)[0])

    @precondition(lambda self: self.futures)
    @rule(data=st.data(), what=st.sampled_from(["cancel", "retry"]))
    def steer(self, data: st.DataObject, what: str) -> None:
        state, _ = self.futures[data.draw(st.integers(0, len(self.futures) - 1))]
        if what == "cancel":
            self.machine.cancel([state])
        else:
            self.machine.retry([state])

    @rule()
    def flush(self) -> None:
        self.machine.collect_dropped()
        self.to_scheduler.extend(self.machine.take())

    @precondition(lambda self: self.to_scheduler)
    @rule(count=st.integers(1, 4))
    def deliver_up(self, count: int) -> None:
        for _ in range(min(count, len(self.to_scheduler))):
            self.scheduler.receive(self.to_scheduler.popleft())

    @precondition(lambda self: self.scheduler.to_client)
    @rule(count=st.integers(1, 4))
    def deliver_down(self, count: int) -> None:
        ops = self.scheduler.to_client
        self.machine.receive([ops.popleft() for _ in range(min(count, len(ops)))])

    @precondition(lambda self: self.scheduler.tasks)
    @rule(data=st.data(), fate=st.sampled_from(["finished", "error", "lost"]))
    def settle(self, data: st.DataObject, fate: str) -> None:
        self.scheduler.settle(data.draw(st.sampled_from(sorted(self.scheduler.tasks))), fate)

    @invariant()
    def futures_tell_of_their_own_submission(self) -> None:
        for state, number in self.futures:
            if state.status is FINISHED:
                assert state.value == str(number).encode()
            elif state.status is ERROR:
                assert isinstance(state.value, ErrorInfo)
                assert state.value.text == str(number)

    def teardown(self) -> None:
        for _ in range(4):
            self.flush()
            self.deliver_up(len(self.to_scheduler))
            self.deliver_down(len(self.scheduler.to_client))
        held = {state.key: state for state, _ in self.futures if state.wanted}
        assert set(self.machine.states) == set(held) == set(self.scheduler.tasks)
        for key, state in held.items():
            assert state.status.value == self.scheduler.tasks[str(key)][0]
        for state, _ in self.futures:
            assert state.wanted or state.status in (CANCELLED, LOST) or state.status is PENDING
        self.machine.dropped.extend(state for state, _ in self.futures)
        self.flush()
        self.deliver_up(len(self.to_scheduler))
        assert not self.scheduler.tasks
        assert not self.machine.states


TestClientAndScheduler = ClientAndScheduler.TestCase
TestClientAndScheduler.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
