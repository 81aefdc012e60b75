"""Keys of futures inside shared values: wanted for as long as a value with them is shared.

They are wanted by one client that is none, so that all rules for what clients want hold for them: a result that got lost is
computed again, another client's `cancel` leaves them alone, unless it is forced. What that client is told is needed for one case
only: a key that will not come true (cancelled, lost for good) is unknown soon after, and who asks for it later is to hear why.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from zmqtasks.ids import Key
from zmqtasks.nodes.scheduler.lifecycle import Lifecycle
from zmqtasks.nodes.scheduler.outbox import ClientOutbox
from zmqtasks.nodes.scheduler.state import ClientState, SchedulerState
from zmqtasks.protocol.ops import KeysCancelled, Op

SESSION = b"shared"
UNKNOWN = "unknown to the scheduler: released or cancelled"


class _Fates(ClientOutbox):
    """Takes note of keys that are cancelled or lost; nothing is ever sent."""

    __slots__ = ("noted",)

    def __init__(self) -> None:
        super().__init__(SESSION, [])
        self.noted: dict[Key, KeysCancelled] = {}

    def add(self, op: Op) -> None:
        if isinstance(op, KeysCancelled):
            self.noted.update((key, KeysCancelled([key], op.reason, op.kind)) for key in op.keys)

    def add_result(self, key: Key, size: int, value: bytes | None) -> None:
        pass

    def add_results(self, keys: list[Key], sizes: list[int], lengths: list[int], values: bytes) -> None:
        pass


class KeptKeys:
    """How many shared values hold each key."""

    def __init__(self, state: SchedulerState, lifecycle: Lifecycle) -> None:
        self.state = state
        self.lifecycle = lifecycle
        self.counts: dict[Key, int] = {}
        self._fates = _Fates()
        self._client = ClientState(SESSION, 0, "shared values", "", 0, [])
        self._client.outbox = self._fates
        self._client.congested = True  # it has no use for values

    def hold(self, keys: Sequence[Key]) -> None:
        """One more value with these keys is shared."""
        for key in keys:
            self.counts[key] = self.counts.get(key, 0) + 1
            ts = self.state.tasks.get(key)
            if (
                ts is not None
            ):  # also when it is held already: it may be a new task of a name whose old one was cancelled
                self._fates.noted.pop(key, None)
                self.lifecycle.want(self._client, ts)
            elif key not in self._fates.noted:
                self._fates.noted[key] = KeysCancelled([key], UNKNOWN, "LostDataError")

    def let_go(self, keys: Iterable[Key]) -> None:
        """One value less."""
        gone = []
        for key in keys:
            self.counts[key] -= 1
            if not self.counts[key]:
                del self.counts[key]
                self._fates.noted.pop(key, None)
                gone.append(key)
        self.lifecycle.release(self._client, gone)

    def fate(self, key: Key) -> KeysCancelled | None:
        """Why a shared key is unknown."""
        return self._fates.noted.get(key)
