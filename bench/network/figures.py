"""What is measured and what comes of it: `measure(plan: Plan) -> Figures` is all that a subject offers.

So that figures of different subjects can be laid beside each other, all of them mean the same:

- *latency*: one message of `size` bytes goes to another process, which sends it back; the next goes when it has come.
  The time of the whole round trip.
- *bandwidth*: messages of `size` bytes, all from the same memory, go one way, one after the other; the receiver lets go
  of each, and answers the last one of a burst by a small message. The time counts up to that answer. Bursts grow (1, 2,
  4, ... messages) until one takes long enough to be told from noise, and several count: `Burst` does that for everyone.
- *rates*: see `RATES`.

With `plan.hold_gil` a thread in the processes of both ends computes in pure Python all the while (`gil.holding_gil`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from . import turns

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

RATES = {
    "messages_per_s": "messages of 100 bytes, each sent on its own",
    "batched_messages_per_s": "messages of 100 bytes, in batches of `plan.batch`",
    "duplex_bytes_per_s": "bytes in both directions together, both ends sending large messages at the same time",
    "read_bytes_per_s": "bytes in messages of `READ_BYTES`, sent from memory of the transport (`Comm.allocate`); the "
    "receiver copies each into warm memory of its own",
    "fan_in_bytes_per_s": "bytes from `plan.peers` processes to one, in large messages",
    "fan_out_bytes_per_s": "bytes from one process to `plan.peers`, in large messages",
    "fan_in_messages_per_s": "messages of 100 bytes from `plan.peers` processes to one",
    "fan_out_messages_per_s": "messages of 100 bytes from one process to `plan.peers`",
    "connects_per_s": "links made one after the other, each used for one round trip and closed",
}
"""Names of rates and what they mean; a subject gives those that make sense for it."""

SMALL_BYTES = 100
"""Of the messages whose rate is measured: about an op."""
BULK_BYTES = 4 * MIB
"""Of the large messages of duplex, fan-in and fan-out."""
READ_BYTES = 64 * MIB


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure in one round of one subject, and for how long."""

    sizes: tuple[int, ...] = (KIB, 64 * KIB, MIB, 64 * MIB)
    """Message sizes for bandwidth."""
    latency_sizes: tuple[int, ...] = (1,)
    """Message sizes for round trips."""
    round_trips: int = 1000
    """At most so many per size."""
    time_s: float = 0.25
    """About the time for one figure; what is slow ends after it with fewer messages."""
    tail_s: float = 0.0
    """The smallest messages have so long for their `round_trips`: of what 99.9 % stay within, 1000 tell."""
    batch: int = 1000
    peers: int = 4
    rates: tuple[str, ...] = tuple(RATES)
    """The rates to measure; none while the GIL is held."""
    hold_gil: bool = False
    in_turns: bool = False
    """Whether others are measured at the same time, so that bursts have to wait for their turns (`turns`)."""

    def latency_s(self, size: int) -> float:
        """The time for round trips of messages of `size` bytes."""
        usual_s = 2 * self.time_s
        return max(usual_s, self.tail_s) if size == min(self.latency_sizes) else usual_s


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Of one round's times, in microseconds; None where there were too few to tell."""

    count: int
    minimum: float
    p50: float
    p99: float | None
    p999: float | None
    mean: float | None = None

    @classmethod
    def of(cls, times_s: Sequence[float]) -> Quantiles:
        """From at least one time in seconds."""
        ordered = sorted(times_s)

        def at(share: float) -> float | None:
            if len(ordered) * (1 - share) < 1 - 1e-9:
                return None
            return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)] * 1e6

        middle = ordered[(len(ordered) - 1) // 2] * 1e6
        mean = sum(ordered) / len(ordered) * 1e6
        return cls(len(ordered), ordered[0] * 1e6, middle, at(0.99), at(0.999), mean)


@dataclass(slots=True)
class Figures:
    """What one round of one subject gave."""

    name: str
    """Of the subject, for people: "tcp", "raw socket"."""
    settings: dict[str, str | int | float | bool] = field(default_factory=dict)
    """What tells subjects of one name apart ("encryption": "on"), and what a reader may want to know."""
    latency_us: dict[int, Quantiles] = field(default_factory=dict)
    """By message size: whole round trips."""
    bandwidth: dict[int, float] = field(default_factory=dict)
    """By message size: bytes/s."""
    rates: dict[str, float] = field(default_factory=dict)
    """See `RATES`; bytes/s or 1/s."""


class Trips:
    """The round trips of a latency figure: how many there are to be, and their times.

    At most `count` for `time_s`, but one at least. Those that are compared take turns (`turns`), as processors are slower at
    some times than at others; what begins in the first `COLD_S` of a turn is not counted.

    Use: `trips = Trips(count, time_s)`, then `while trips.going: trips.began(); ...; trips.ended()`.
    """

    TURN_S = 0.05
    COLD_S = 0.01

    def __init__(
        self, count: int, time_s: float, clock: Callable[[], float] = turns.clock, takes_turns: bool = True
    ) -> None:
        self.going = True
        self._count = count
        self._time_s = time_s
        self._clock = clock
        self._takes_turns = takes_turns
        self._warm_from = math.inf  # until the first is over, which may have waited for imports
        self._turn_ends = math.inf
        self._end = math.inf
        self._began = 0.0
        self._times: list[float] = []

    def began(self) -> None:
        """The message is about to be sent; waits when it is the turn of others."""
        self._began = self._clock()
        if self._takes_turns and self._began >= self._turn_ends and turns.take_turn():
            self._began = self._clock()
            self._begin_turn(self._began)

    def ended(self) -> None:
        """The message is back."""
        now = self._clock()
        if self._began >= self._warm_from:
            self._times.append(now - self._began)
            self._turn_ends = self._warm_from + self.TURN_S
            self.going = len(self._times) < self._count and now < self._end
        elif self._warm_from == math.inf:
            self._begin_turn(now)
            self._end = self._warm_from + self._time_s

    def _begin_turn(self, now: float) -> None:
        self._warm_from = now + self.COLD_S
        self._turn_ends = math.inf  # until one has counted, however long they take

    @property
    def quantiles(self) -> Quantiles:
        """Of those that count."""
        return Quantiles.of(self._times)


class Burst:
    """How many messages the next burst of a bandwidth figure has, and what the bandwidth came to.

    Bursts grow until one takes half of `time_s` on a warm link. That one counts, and those after it, all together, for `time_s` at
    least, large messages for longer. A link is warm after twice that time, large messages after more (`_is_warm`).

    Use: `burst = Burst(size, plan.time_s)`, then `while burst.going: burst.began(); ...; burst.ended()`, where the dots
    send `burst.count` messages and wait for the answer.
    """

    MOST_MESSAGES = 1 << 20
    _SECOND_BURST_BYTES = 4 * MIB
    _WARM_BYTES = GIB
    """Links speed up for the first GB or so; one that would take too long for that is warm after 8 times `time_s`."""
    _WARM_MESSAGES = 4
    """But not before these: while receive buffers are new it may take ten times as long, where the system is slow to find pages."""
    _FEWEST_MESSAGES = 8
    """Fewer count for 5 times `time_s`, and so do large messages: one of 256 MiB is there in half the time of the next."""
    _LONGEST_S = 5.0
    """For all after the first burst, which is over by then as well, or stays the only one. A first message of 1 GiB takes some
    seconds, in pages that are new: what is measured comes after it."""

    def __init__(self, size_bytes: int, time_s: float, clock: Callable[[], float] = turns.clock) -> None:
        self.size_bytes = size_bytes
        self.count = 1
        self.going = True
        self._time_s = time_s
        self._clock = clock
        self._longest_s = max(14 * time_s, self._LONGEST_S)
        self._end = -math.inf  # until the first burst is over
        self._began = 0.0
        self._warming_since = math.inf  # until the first burst is over
        self._warmed = 0  # messages, but for the first burst
        self._counted = 0
        self._counted_s = 0.0

    def began(self) -> None:
        """The first message of the burst is about to be sent; waits for its turn."""
        turns.take_turn()
        self._began = self._clock()

    def ended(self) -> None:
        """The answer is here."""
        now = self._clock()
        elapsed_s = max(now - self._began, 1e-9)
        if self._warming_since == math.inf:
            # It warmed up buffers, pages and windows. One message alone is mostly latency where another thread holds
            # the GIL, so the next burst has some, whatever this one took.
            self._warming_since = now
            if elapsed_s < self._longest_s:
                self._end = now + self._longest_s
                self.count = max(1, min(64, self._SECOND_BURST_BYTES // self.size_bytes))
                return
        late = now >= self._end
        warm = self._is_warm(self._began - self._warming_since)
        self._warmed += self.count
        short = elapsed_s < self._time_s / 2 and self.count < self.MOST_MESSAGES
        if short and not late and not self._counted:
            self.count = min(
                self.MOST_MESSAGES, max(self.count + 1, int(self.count * min(self._time_s / elapsed_s, 8)))
            )
            return
        if warm or (late and not self._counted):  # what comes after has as many messages
            self._counted += self.count
            self._counted_s += elapsed_s
        self.going = not late and not self._is_enough()

    def _is_warm(self, warming_s: float) -> bool:
        if self.size_bytes < self._SECOND_BURST_BYTES:
            return warming_s >= 2 * self._time_s
        enough = self._warmed * self.size_bytes >= self._WARM_BYTES
        return self._warmed >= self._WARM_MESSAGES and warming_s >= self._time_s * (2 if enough else 8)

    def _is_enough(self) -> bool:
        few = self._counted < self._FEWEST_MESSAGES or self.size_bytes >= self._SECOND_BURST_BYTES
        return self._counted_s >= self._time_s * (5 if few else 1)

    @property
    def bandwidth(self) -> float:
        """Bytes/s of the bursts that count."""
        return self.messages_per_s * self.size_bytes

    @property
    def messages_per_s(self) -> float:
        """Messages/s of the bursts that count."""
        return self._counted / self._counted_s
