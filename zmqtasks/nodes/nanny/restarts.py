"""When a worker process that died is started again: at once, later, or not at all."""

from __future__ import annotations

MAX_FAILED_STARTS = 5
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
SHORT_LIFE_S = 1.0
SHORT_LIFE_PAUSE_S = 0.2


class RestartPolicy:
    """Of one place for a worker.

    A worker that was ready once is always started again, after a pause when it lived less than `SHORT_LIFE_S`: it is
    the scheduler's business to give up on tasks that kill it. One that dies before it is ready probably will again:
    it gets growing pauses, and up to `MAX_FAILED_STARTS` attempts in a row.
    """

    def __init__(self) -> None:
        self.failures = 0

    def became_ready(self) -> None:
        """The process has started well."""
        self.failures = 0

    def died(self, was_ready: bool, lived_s: float) -> float | None:
        """Seconds to wait before the next start, None for no further one."""
        if was_ready:
            return 0.0 if lived_s >= SHORT_LIFE_S else SHORT_LIFE_PAUSE_S
        self.failures += 1
        if self.failures >= MAX_FAILED_STARTS:
            return None
        return float(min(FIRST_PAUSE_S * 2 ** (self.failures - 1), LONGEST_PAUSE_S))
