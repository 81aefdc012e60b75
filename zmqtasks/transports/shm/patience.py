"""When a large frame waits for a warm block, instead of taking new pages at once.

New pages take 400 us per MiB to fill here, and on some hosts several times that; warm ones 90 (`python -m bench.shm`). Who
sends one large value after another often needs the next block a moment before the last one is back: its reader has dropped
it, and looks at the mapping first, which takes 20 us per MiB. So it pays to wait for a tenth of what new pages would take,
unless the readers keep what they get: waits that were in vain are followed by ever more messages that do not wait.
"""

from __future__ import annotations

from zmqtasks.protocol.frames import MIB

FROM_BYTES = 4 * MIB
"""Smaller frames never wait."""

_S_PER_BYTE = 32e-6 / MIB
_MOST_SKIPPED = 31


class Patience:
    """What one comm has learned of waiting."""

    __slots__ = ("_skip", "_skipped_last")

    def __init__(self) -> None:
        self._skip = 0
        self._skipped_last = 0

    def wait_s(self, size_bytes: int) -> float:
        """How long a frame of that size may wait now; 0.0: not at all."""
        if self._skip:
            self._skip -= 1
            return 0.0
        return size_bytes * _S_PER_BYTE

    def waited(self, in_vain: bool) -> None:
        """A wait has ended."""
        self._skipped_last = self._skip = min(2 * self._skipped_last + 1, _MOST_SKIPPED) if in_vain else 0
