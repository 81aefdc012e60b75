"""What a client decides: which keys it wants, what is told of them, which requests are open. Pure: calls and ops in, ops out.

Theory of operation
-------------------
User threads call the methods that submit, declare, cancel, ... : they change records at once and append ops to an outbox, in
order. The shell hands in what the scheduler sent (`receive`), and takes the outbox (`take`) whenever there is something in it.
All of this happens under one lock, which the shell owns.

A record lives while futures refer to it. A future that goes away only appends its record to `dropped`, from whatever thread
or garbage collection; `collect_dropped` counts them down, and `ReleaseKeys` follows for a record without futures.

A named key may be submitted again after it was released, while ops about the old task are still on their way here. So the
release of a named key is remembered, and the next submission of it is preceded by a fence: an empty `RequestLocations`, whose
answer separates what is about the old task from what is about the new one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

from zmqtasks.errors import InvalidTransitionError, KeyConflictError
from zmqtasks.ids import COUNTER_BITS, Key, first_key_of_client, format_key
from zmqtasks.nodes.client.columns import merge_submissions
from zmqtasks.nodes.client.state import (
    CANCELLED,
    ERROR,
    FINISHED,
    LOST,
    PENDING,
    TRANSITIONS,
    Fault,
    FutureState,
    Status,
)
from zmqtasks.protocol.ops import (
    CancelTasks,
    DeclareData,
    DropData,
    ErrorInfo,
    KeepTasks,
    KeysCancelled,
    KeysErred,
    KeysInMemory,
    KeysRecomputing,
    Locations,
    Op,
    PlaceData,
    PlacementFailed,
    PutFunctions,
    Query,
    ReleaseKeys,
    ReportMissing,
    RequestLocations,
    Restart,
    RetryTasks,
    RunFunction,
    SubmitTasks,
    WantKeys,
)
from zmqtasks.protocol.payload import Payload

RELEASED_NAMES_LIMIT = 10_000
"""Released names that are remembered before a fence makes them forgettable: bounds memory, at a tiny op per so many."""


def key_conflict(key: Key) -> KeyConflictError:
    """The error for a key that is submitted again as something else."""
    return KeyConflictError(
        f"the key {format_key(key)!r} is in use for a different function or different arguments: "
        "release its future first, or take another key"
    )


class ClientMachine:
    """The state of one client session; see the module's docstring."""

    def __init__(self, client_number: int = 0) -> None:
        self.states: dict[Key, FutureState] = {}
        self.payloads: dict[Key, Payload] = {}
        """Bytes of declared data that the scheduler may still ask for."""
        self.dropped: deque[FutureState] = deque()
        self.fault: Fault | None = None
        """Why nothing more can be told: the client is closed, or the scheduler lost."""
        self._outbox: list[Op] = []
        self._functions_sent: set[bytes] = set()
        self._first_key = first_key_of_client(client_number)
        self._next_counter = 1
        self._next_request = 1
        self._released_names: dict[Key, int] = {}
        """Names that were released, each with the number of that release."""
        self._releases = 0
        self._bounding: tuple[int, int] | None = None
        """The fence under way that will let names be forgotten: its request, and the last release before it."""
        self._fences: dict[int, frozenset[Key]] = {}
        self._data_fences: dict[Key, int] = {}
        """Retained data that was released and declared again: until the answer, `DropData` is about the former wish."""
        self._retained: set[Key] = set()

    def admitted(self, client_number: int) -> None:
        """The scheduler has given this client its number, which its anonymous keys begin with."""
        self._first_key = first_key_of_client(client_number)

    # What users ask for

    def take_keys(self, count: int) -> int:
        """The first of `count` new anonymous keys, which follow each other."""
        counter = self._next_counter
        self._next_counter = counter + count
        if self._next_counter >> COUNTER_BITS:
            raise OverflowError("this client has used up its 2**40 keys: make a new one")
        return self._first_key + counter

    def next_request(self) -> int:
        """A number for a request."""
        self._next_request += 1
        return self._next_request - 1

    def submit(self, op: SubmitTasks, code: bytes, states: Sequence[FutureState]) -> None:
        """Tasks with their records; `code` is the function, sent when the scheduler doesn't have it yet."""
        if self.fault is not None:
            self._refuse(states)
            return
        if op.function not in self._functions_sent:
            self._functions_sent.add(op.function)
            self._outbox.append(PutFunctions([op.function], [code]))
        if op.keys:
            self._add_states(states)
        elif states:
            self.states.update(zip(range(op.first_key, op.first_key + op.count), states, strict=True))
        self._outbox.append(op)

    def submit_graph(self, op: SubmitTasks, code: bytes, states: Sequence[FutureState]) -> None:
        """As `submit`, with records for some of the tasks only. `release` ends the wish for the others."""
        if self.fault is None and not op.keys:
            self.submit(op, code, ())
            self.states.update((state.key, state) for state in states)
        else:
            self.submit(op, code, states)

    def declare(self, op: DeclareData, payloads: Sequence[Payload], states: Sequence[FutureState] = ()) -> None:
        """Data of this client, with records when users will hold futures of it."""
        if self.fault is not None:
            self._refuse(states)
            return
        self.payloads.update(zip(op.keys, payloads, strict=True))
        if op.retained:
            self._retained.update(op.keys)
            again = self._released_names.keys() & op.keys
            if again:
                self._data_fences.update(dict.fromkeys(again, self._fence(again)))
        self._add_states(states)
        self._outbox.append(op)

    def share(self, key: Key, spec: bytes = b"") -> FutureState | None:
        """The live record of `key`, with one more future counted, or None when a new one is to be made.

        Raises KeyConflictError when `spec` is given and the key was submitted by this client as something else.
        """
        state = self.states.get(key)
        if state is None:
            return None
        if spec and state.spec and state.spec != spec:
            raise key_conflict(key)
        if state.status is CANCELLED or state.status is LOST:
            return None
        state.refs += 1
        return state

    def want(self, state: FutureState) -> None:
        """A future of a key that this client has not submitted."""
        if self.fault is not None:
            self._refuse((state,))
            return
        self._add_states((state,))
        self._outbox.append(WantKeys([state.key]))

    def release(self, keys: list[Key]) -> None:
        """Ends the wish for keys that have no records: implicit data, once its tasks are submitted."""
        for key in keys:
            if key not in self._retained:
                self.payloads.pop(key, None)
            if isinstance(key, str):
                self._remember_release(key)
        self._outbox.append(ReleaseKeys(keys))
        self._bound_released_names()

    def collect_dropped(self) -> None:
        """Counts down the records of futures that went away; the keys of those without futures are released."""
        dropped = self.dropped
        released: list[Key] = []
        while dropped:
            state = dropped.popleft()
            state.refs -= 1
            if state.refs == 0 and state.wanted:
                state.wanted = False
                key = state.key
                if self.states.pop(key, None) is None:  # an interrupt came before it was submitted
                    continue
                released.append(key)
                if self.payloads and key not in self._retained:
                    self.payloads.pop(key, None)
                if isinstance(key, str):
                    self._remember_release(key)
        if released and self.fault is None:
            self._outbox.append(ReleaseKeys(released))
            self._bound_released_names()

    def cancel(self, states: Iterable[FutureState], force: bool = False, reason: str = "") -> None:
        """Ends tasks; their futures are cancelled from now on, whatever arrives."""
        fault = Fault("CancelledError", reason or "the future was cancelled")
        cancelled = [state for state in states if state.status not in (CANCELLED, LOST)]
        keys = [state.key for state in cancelled if state.wanted]
        for state in cancelled:
            self._detach(state)
            self._settle(state, CANCELLED, fault)
        if keys and self.fault is None:
            self._outbox += [CancelTasks(keys, force, reason), ReleaseKeys(keys)]
            self._bound_released_names()

    def retry(self, states: Iterable[FutureState]) -> None:
        """Failed tasks are pending again; others are left as they are."""
        failed = [state for state in states if state.status is ERROR]
        for state in failed:
            self._step(state, PENDING, None)
        if failed and self.fault is None:
            self._outbox.append(RetryTasks([state.key for state in failed]))

    def keep(self, keys: list[Key]) -> None:
        """Tasks that run to their end even when nobody holds a future."""
        self._outbox.append(KeepTasks(keys))

    def send(self, op: RequestLocations | ReportMissing | PlacementFailed | Query | RunFunction | Restart | Op) -> None:
        """An op that changes nothing here."""
        self._outbox.append(op)

    def take(self) -> list[Op]:
        """What is to be sent, in order; empties the outbox."""
        if not self._outbox:
            return []
        ops, self._outbox = self._outbox, []
        return merge_submissions(ops)

    # What the scheduler tells

    def receive(self, ops: Iterable[Op]) -> list[Op]:
        """Takes in what the scheduler sent; gives the ops that are for the shell: answers, places for data, messages."""
        for_shell: list[Op] = []
        for op in ops:
            if isinstance(op, KeysInMemory):
                self._on_keys_in_memory(op)
            elif isinstance(op, KeysErred):
                self._on_keys_erred(op)
            elif isinstance(op, KeysCancelled):
                self._on_keys_cancelled(op)
            elif isinstance(op, KeysRecomputing):
                self._on_keys_recomputing(op)
            elif isinstance(op, DropData):
                self._on_drop_data(op)
            elif isinstance(op, PlaceData):
                self._on_place_data(op, for_shell)
            elif isinstance(op, Locations) and op.request in self._fences:
                self._on_fence(op.request)
            else:
                for_shell.append(op)
        return for_shell

    def end(self, kind: str, reason: str) -> None:
        """Nothing more will be told: what is pending is lost (or cancelled, when the client was closed)."""
        if self.fault is not None:
            return
        self.fault = Fault(kind, reason)
        self._refuse(self.states.values())
        self.states.clear()
        self.payloads.clear()
        self._outbox.clear()
        self._fences.clear()

    def _on_keys_in_memory(self, op: KeysInMemory) -> None:
        states = self.states
        values = op.values
        start = 0
        for key, size, length in zip(op.keys, op.sizes, op.lengths, strict=True):
            value = None
            if length >= 0:
                end = start + length
                value = values[start:end]
                start = end
            state = states.get(key)
            if state is None or state.fence:
                continue
            # The hottest step of a client, so `_step` is written out: PENDING, FINISHED and ERROR may all go to FINISHED.
            if state.status is CANCELLED or state.status is LOST:
                continue
            state.value = value
            state.size = size
            state.status = FINISHED
            waiters = state.waiters
            if waiters is not None:
                state.waiters = None
                for waiter in waiters:
                    waiter.settled(state)
            if self.payloads and key not in self._retained:
                self.payloads.pop(key, None)

    def _on_keys_erred(self, op: KeysErred) -> None:
        for state in self._live(op.keys):
            self._settle(state, ERROR, op.error)

    def _on_keys_cancelled(self, op: KeysCancelled) -> None:
        status = CANCELLED if op.kind == "CancelledError" else LOST
        for state in self._live(op.keys):
            self._settle(state, status, Fault(op.kind, op.reason))

    def _on_keys_recomputing(self, op: KeysRecomputing) -> None:
        for state in self._live(op.keys):
            if state.status is not PENDING:
                self._step(state, PENDING, None)

    def _on_drop_data(self, op: DropData) -> None:
        for key in op.keys:
            if key in self._data_fences:  # it was declared again since
                continue
            self._retained.discard(key)
            self.payloads.pop(key, None)

    def _on_place_data(self, op: PlaceData, for_shell: list[Op]) -> None:
        gone = [key for key in op.keys if key not in self.payloads]
        if gone:
            self._outbox += [PlacementFailed(gone, a, "the client has released the data") for a in op.addresses]
            op = PlaceData([key for key in op.keys if key in self.payloads], op.addresses)
        if op.keys:
            for_shell.append(op)

    def _on_fence(self, request: int) -> None:
        if self._bounding is not None and request == self._bounding[0]:
            last = self._bounding[1]
            self._bounding = None
            self._released_names = {key: number for key, number in self._released_names.items() if number > last}
        for key in self._fences.pop(request):
            if self._data_fences.get(key) == request:
                del self._data_fences[key]
            state = self.states.get(key)
            if state is not None and state.fence == request:
                state.fence = 0

    # Records

    def _refuse(self, states: Iterable[FutureState]) -> None:
        """Settles pending records after the end."""
        fault = self.fault
        assert fault is not None
        status = CANCELLED if fault.kind == "CancelledError" else LOST
        for state in states:
            state.wanted = False
            if state.status is PENDING:
                self._settle(state, status, fault)

    def _add_states(self, states: Iterable[FutureState]) -> None:
        for state in states:
            key = state.key
            old = self.states.get(key)
            if old is not None:  # cancelled or lost, see `share`: the wish goes over to the new record
                old.wanted = False
                self._remember_release(key)
            if key in self._released_names:
                state.fence = self._fence((key,))
            self.states[key] = state

    def _remember_release(self, key: Key) -> None:
        self._releases += 1
        self._released_names[key] = self._releases

    def _bound_released_names(self) -> None:
        """After the release is in the outbox: with the answer to this fence, what was released before may be forgotten."""
        if len(self._released_names) > RELEASED_NAMES_LIMIT and self._bounding is None:
            self._bounding = (self._fence(()), self._releases)

    def _fence(self, keys: Iterable[Key]) -> int:
        request = self.next_request()
        self._fences[request] = frozenset(keys)
        for key in keys:
            self._released_names.pop(key, None)
        self._outbox.append(RequestLocations(request, []))
        return request

    def _live(self, keys: Iterable[Key]) -> list[FutureState]:
        found = [state for key in keys if (state := self.states.get(key)) is not None]
        return [s for s in found if not s.fence and s.status is not CANCELLED and s.status is not LOST]

    def _detach(self, state: FutureState) -> None:
        if state.wanted:
            state.wanted = False
            del self.states[state.key]
            self.payloads.pop(state.key, None)
            if isinstance(state.key, str):
                self._remember_release(state.key)

    def _step(self, state: FutureState, status: Status, value: bytes | ErrorInfo | Fault | None) -> None:
        if (state.status, status) not in TRANSITIONS:
            name = format_key(state.key, state.name)
            raise InvalidTransitionError(f"future {name} can't go from {state.status.value} to {status.value}")
        state.value = value
        state.status = status

    def _settle(self, state: FutureState, status: Status, value: ErrorInfo | Fault) -> None:
        self._step(state, status, value)
        waiters = state.waiters
        if waiters is not None:
            state.waiters = None
            for waiter in waiters:
                waiter.settled(state)
