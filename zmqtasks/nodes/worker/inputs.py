"""The inputs of a worker's runs: which are held, which have to come from where, and what is fetched next.

Theory of operation
-------------------
`held` has the keys that this worker is a replica of: results, data put here, inputs fetched. `records` has the inputs
that are not held: those the scheduler named (`Inputs`), until they are held or nobody needs them. Fetches are planned
at the end of each batch of stimuli: inputs go into one request per holder, the holder being one that is asked anyway
or else the one with the fewest bytes on the way. A holder has a quarter of `fetch_bytes` in flight at most, so that one
that stalls holds up nobody else, and all of them together have `fetch_bytes`; but a little from each holder is always
allowed. Inputs whose holders have all reached that are set aside until a request of one of these ends. A holder that
fails is struck from the record and another one asked; when none is left the input is `MISSING` and the scheduler is
told (`FetchFailed`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

from zmqtasks.ids import Key
from zmqtasks.nodes.worker.instructions import DropKeys, FetchKeys, KeepInline, Outbox
from zmqtasks.nodes.worker.state import Input, InputState, Run
from zmqtasks.nodes.worker.transitions import change_input
from zmqtasks.protocol.ops import DataAdded, FetchFailed, Inputs

REQUEST_BYTES = 32 << 20
"""A request ends at this much: half of what a holder may have in flight by default, so that it always has the next."""
HOLDERS_SHARE = 4
"""One holder gets this part of `fetch_bytes`: several may stall before all that is left is `ALWAYS_SHARE`."""
ALWAYS_SHARE = 64
"""Of each holder this part of `fetch_bytes` may be in flight, whatever the others have: one input if it is larger."""

_NEEDED = InputState.NEEDED  # looked up once: reading a member of an Enum takes 30 ns
_INLINE = InputState.INLINE

NOBODY = -1
"""`FetchFailed.holder` when nobody was asked."""


class _Request:
    """A fetch that is on its way."""

    __slots__ = ("holder", "records", "size_bytes")

    def __init__(self, holder: int) -> None:
        self.holder = holder
        self.records: dict[Key, Input] = {}
        self.size_bytes = 0


class _Aside:
    """Inputs whose holders all have enough in flight, first in first out, found by each of these holders."""

    def __init__(self) -> None:
        # A queue for each set of holders: an input is in one place only, however many hold it.
        self._queues: dict[int, dict[tuple[int, ...], deque[Input]]] = {}

    def __contains__(self, holder: int) -> bool:
        return holder in self._queues

    def add(self, holders: tuple[int, ...], record: Input) -> None:
        queue = self._queues.setdefault(holders[0], {}).get(holders)
        if queue is None:
            queue = deque()
            for holder in holders:
                self._queues.setdefault(holder, {})[holders] = queue
        queue.append(record)

    def pop(self, holder: int) -> Input:
        """An input that `holder` had when it was set aside."""
        holders, queue = next(iter(self._queues[holder].items()))
        record = queue.popleft()
        if not queue:
            for other in holders:
                if (queues := self._queues.get(other)) is not None:
                    queues.pop(holders, None)
                    if not queues:
                        del self._queues[other]
        return record


class InputTable:
    """Inputs of runs; methods that may complete runs return those that now have all their inputs."""

    def __init__(self, outbox: Outbox, fetch_bytes: int) -> None:
        self.held: dict[Key, int] = {}
        self.records: dict[Key, Input] = {}
        self.peers: dict[int, str] = {}
        self._outbox = outbox
        self._fetch_bytes = fetch_bytes
        self._holder_bytes = max(fetch_bytes // HOLDERS_SHARE, 1)
        self._always_bytes = max(fetch_bytes // ALWAYS_SHARE, 1)
        self._needed: deque[Input] = deque()
        self._aside = _Aside()
        self._answered: list[int] = []
        """Holders of requests that have ended since fetches were planned."""
        self._requests: dict[int, _Request] = {}
        self._last_request = 0
        self._bytes_from: dict[int, int] = {}
        self._bytes_in_flight = 0

    # --- stimuli from the scheduler ---------------------------------------------------------------------------------

    def learn(self, op: Inputs) -> list[Run]:
        """Notes where inputs of the tasks that follow are."""
        ready: list[Run] = []
        lengths = op.lengths or [-1] * len(op.keys)
        held, records = self.held, self.records
        inline_keys: list[Key] = []
        inline_values: list[bytes] = []
        offset = 0
        for key, size, holders, length in zip(op.keys, op.sizes, op.holders, lengths, strict=True):
            value = None
            if length >= 0:
                value = op.values[offset : offset + length]
                offset += length
            if key in held:
                continue
            record = records.get(key)
            if record is None:
                records[key] = Input(key, size, holders, _NEEDED if value is None else _INLINE)
                if value is not None:
                    inline_keys.append(key)
                    inline_values.append(value)
            elif value is not None and record.state is not _INLINE:
                change_input(record, InputState.INLINE, "Inputs")
                inline_keys.append(key)
                inline_values.append(value)
                self._arrived(record, ready)
            elif value is None and record.state is not _INLINE:
                self._update(record, holders)
        if inline_keys:
            self._outbox.instructions.append(KeepInline(inline_keys, inline_values))
        return ready

    def update_locations(self, keys: Sequence[Key], holders: Sequence[Sequence[int]]) -> None:
        """Notes who holds inputs now; those that were missing are fetched again."""
        for key, numbers in zip(keys, holders, strict=True):
            if (record := self.records.get(key)) is not None and record.state is not _INLINE:
                self._update(record, numbers)

    def _update(self, record: Input, holders: Sequence[int]) -> None:
        record.holders = list(holders)
        if holders and record.state is InputState.MISSING:
            self._need(record)
        elif record.state is _NEEDED:
            # It may be set aside because of others. Where it then is twice, it is passed over later.
            self._needed.append(record)

    def free(self, keys: Sequence[Key]) -> None:
        """Forgets results and replicas; inputs that runs here still wait for are kept."""
        if dropped := [key for key in keys if self.held.pop(key, None) is not None]:
            self._outbox.instructions.append(DropKeys(dropped))

    # --- runs -------------------------------------------------------------------------------------------------------

    def register(self, run: Run) -> None:
        """Counts a new run as a user of its inputs; `run.missing` says for how many it has to wait."""
        records: list[Input] = []
        unknown: list[Key] = []
        held, known = self.held, self.records
        for key in dict.fromkeys(run.deps):
            if key in held:
                continue
            record = known.get(key)
            if record is None:
                record = known[key] = Input(key, 0, [], InputState.MISSING)
                unknown.append(key)
            record.users += 1
            records.append(record)
            if record.state is not _INLINE:
                if not record.waiters:
                    record.waiters = {}
                    if record.state is _NEEDED:
                        self._needed.append(record)
                record.waiters[run.run_id] = run
                run.missing += 1
        run.records = records
        if unknown:
            self._outbox.ops.append(FetchFailed(unknown, NOBODY, True))

    def gone_inputs(self, run: Run) -> bool:
        """Whether inputs of a run about to start have been freed since; it then waits for them again."""
        gone = [key for key in dict.fromkeys(run.deps) if key not in self.held and not self._is_inline(key)]
        if not gone:
            return False
        self.release(run)
        run.missing = 0
        self.register(run)
        return True

    def _is_inline(self, key: Key) -> bool:
        return (record := self.records.get(key)) is not None and record.state is _INLINE

    def release(self, run: Run) -> None:
        """The run is over, whatever its end: inputs that only it used are forgotten."""
        dropped = []
        for record in run.records:
            if record.waiters:
                record.waiters.pop(run.run_id, None)
            record.users -= 1
            if record.users:
                continue
            if record.state is _INLINE:  # by far the commonest: spelled out
                record.state = InputState.GONE
                del self.records[record.key]
                dropped.append(record.key)
            else:
                self._forget(record)
        run.records = ()
        if dropped:
            self._outbox.drop_inline(dropped)

    def _forget(self, record: Input) -> None:
        """A fetch on its way is left alone and judged when it ends."""
        if record.state in (InputState.FETCHING, InputState.HELD, InputState.GONE):
            return
        change_input(record, InputState.GONE, "no run uses it")
        del self.records[record.key]

    def tick(self) -> None:
        """Forgets inputs that were announced two ticks ago and that no run has named since."""
        unused = [record for record in self.records.values() if not record.users]
        inline = [record.key for record in unused if record.unused and record.state is _INLINE]
        for record in unused:
            if record.unused:
                self._forget(record)
            record.unused = True
        if inline:
            self._outbox.drop_inline(inline)

    # --- values arrive ----------------------------------------------------------------------------------------------

    def hold(self, key: Key, size: int, ready: list[Run]) -> None:
        """A value is in the store: a result, or data that was put here."""
        self.held[key] = size
        if (record := self.records.pop(key, None)) is not None:
            change_input(record, InputState.HELD, "held")
            self._arrived(record, ready)

    def _arrived(self, record: Input, ready: list[Run]) -> None:
        if record.waiters:
            for run in record.waiters.values():
                run.missing -= 1
                if run.missing == 0:
                    ready.append(run)
            record.waiters = None

    def fetch_finished(
        self, request: int, sizes: dict[Key, int], missing: Iterable[Key], unanswered: Iterable[Key], ready: list[Run]
    ) -> tuple[list[Key], list[Input]]:
        """A peer has answered, all but `unanswered`, for which the link broke; gives the keys to keep, and all other inputs."""
        fetch = self._end_request(request)
        kept: list[Key] = []
        for key, size in sizes.items():
            record = fetch.records.pop(key, None)
            if record is None or record.state is not InputState.FETCHING:
                continue
            if record.users == 0:
                change_input(record, InputState.GONE, "fetched for nobody")
                del self.records[key]
                continue
            kept.append(key)
            self.hold(key, size, ready)
        if kept:
            self._outbox.ops.append(DataAdded(kept, [sizes[key] for key in kept]))
        lost = [fetch.records.pop(key) for key in missing if key in fetch.records]
        self._failed(fetch.holder, lost, reachable=True)
        cut_off = [fetch.records.pop(key) for key in unanswered if key in fetch.records]
        self._failed(fetch.holder, cut_off, reachable=False)
        return kept, list(fetch.records.values())

    def fetch_broken(self, request: int) -> None:
        """A peer could not be reached, or the link broke: nothing of the request has come."""
        fetch = self._end_request(request)
        self._failed(fetch.holder, list(fetch.records.values()), reachable=False)

    def give_up(self, record: Input, stimulus: str) -> list[Run]:
        """The input cannot be had from anybody; gives the runs that wait for it, which now have to fail."""
        if record.state is not InputState.FETCHING:
            return []
        change_input(record, InputState.GONE, stimulus)
        del self.records[record.key]
        waiters = list(record.waiters.values()) if record.waiters else []
        record.waiters = None
        return waiters

    def _end_request(self, request: int) -> _Request:
        fetch = self._requests.pop(request)
        self._bytes_in_flight -= fetch.size_bytes
        left = self._bytes_from[fetch.holder] - fetch.size_bytes
        if left:
            self._bytes_from[fetch.holder] = left
        else:
            del self._bytes_from[fetch.holder]
        self._answered.append(fetch.holder)
        return fetch

    def _failed(self, holder: int, records: list[Input], reachable: bool) -> None:
        told = []
        for record in records:
            if record.state is not InputState.FETCHING:
                continue
            record.holders = [number for number in record.holders if number != holder]
            if record.users == 0:
                change_input(record, InputState.GONE, "fetch failed, wanted by nobody")
                del self.records[record.key]
            elif record.holders:
                self._need(record)
            else:
                change_input(record, InputState.MISSING, "no holder left")
                told.append(record.key)
        if told:
            self._outbox.ops.append(FetchFailed(told, holder, reachable))

    def _need(self, record: Input) -> None:
        change_input(record, InputState.NEEDED, "another holder")
        self._needed.append(record)

    # --- planning ---------------------------------------------------------------------------------------------------

    def plan_fetches(self) -> None:
        """Asks for inputs that are needed, as far as bytes in flight allow."""
        if not self._needed and not self._answered:
            return
        requests: dict[int, _Request] = {}
        complete: list[_Request] = []
        homeless: list[Key] = []
        for holder in self._answered:
            while holder in self._aside and self._bytes_from.get(holder, 0) < self._most_bytes:
                self._plan(self._aside.pop(holder), requests, complete, homeless)
        self._answered.clear()
        while self._needed:
            self._plan(self._needed.popleft(), requests, complete, homeless)
        for fetch in (*complete, *requests.values()):
            self._last_request += 1
            self._requests[self._last_request] = fetch
            self._outbox.instructions.append(
                FetchKeys(self._last_request, self.peers[fetch.holder], list(fetch.records))
            )
        if homeless:
            self._outbox.ops.append(FetchFailed(homeless, NOBODY, True))

    @property
    def _most_bytes(self) -> int:
        """A holder with less than this in flight is asked for more."""
        return self._holder_bytes if self._bytes_in_flight < self._fetch_bytes else self._always_bytes

    def _plan(
        self, record: Input, requests: dict[int, _Request], complete: list[_Request], homeless: list[Key]
    ) -> None:
        if record.state is not _NEEDED or not record.users:
            return
        holder = self._choose_holder(record, requests)
        if holder is not None:
            self._add(requests.setdefault(holder, _Request(holder)), record)
            if requests[holder].size_bytes >= REQUEST_BYTES:
                complete.append(requests.pop(holder))
        elif holders := tuple(holder for holder in record.holders if holder in self.peers):
            self._aside.add(holders, record)
        else:
            change_input(record, InputState.MISSING, "nobody holds it")
            homeless.append(record.key)

    def _choose_holder(self, record: Input, requests: dict[int, _Request]) -> int | None:
        best: int | None = None
        best_load = most = self._most_bytes
        for holder in record.holders:
            load = self._bytes_from.get(holder, 0)
            if load < most and holder in requests:
                return holder
            if load < best_load and holder in self.peers:
                best, best_load = holder, load
        return best

    def _add(self, fetch: _Request, record: Input) -> None:
        change_input(record, InputState.FETCHING, "planned")
        size = max(record.size, 1)
        fetch.records[record.key] = record
        fetch.size_bytes += size
        self._bytes_in_flight += size
        self._bytes_from[fetch.holder] = self._bytes_from.get(fetch.holder, 0) + size

    @property
    def fetching(self) -> int:
        """Requests on their way."""
        return len(self._requests)
