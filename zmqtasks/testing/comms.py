"""Small tools to exercise comms: a handler that records, waiting with a deadline, what this process uses."""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Callable

from zmqtasks.transports.base import Comm, CommHandler

DEADLINE_S = 20.0
"""Longest wait for something that should happen at once."""


class Recorder(CommHandler):
    """Starts `comm` and keeps what it delivers; `on_message`, if given, gets each message too."""

    def __init__(self, comm: Comm, on_message: Callable[[list[memoryview]], None] | None = None) -> None:
        self.comm = comm
        self.messages: list[list[memoryview]] = []
        self.ends: list[Exception] = []
        self.inside_call_of_comm = False
        self.violations: list[str] = []
        self._on_message = on_message
        self._changed = asyncio.Event()
        self.inside_call_of_comm = True
        comm.start(self)
        self.inside_call_of_comm = False

    def message_received(self, frames: list[memoryview]) -> None:
        if self.inside_call_of_comm:
            self.violations.append("message_received was called inside a method of the comm")
        if self.ends:
            self.violations.append("message_received was called after comm_ended")
        self.messages.append(frames)
        self._changed.set()
        if self._on_message is not None:
            self._on_message(frames)

    def comm_ended(self, error: Exception) -> None:
        if self.inside_call_of_comm:
            self.violations.append("comm_ended was called inside a method of the comm")
        self.ends.append(error)
        self._changed.set()

    def contents(self) -> list[list[bytes]]:
        """Copies of all messages."""
        return [[bytes(frame) for frame in frames] for frames in self.messages]

    async def wait_messages(self, count: int, timeout_s: float = DEADLINE_S) -> None:
        """Waits until `count` messages in all have come; fails when the comm ends or the time is over before."""
        async with _deadline(timeout_s, lambda: f"{len(self.messages)} of {count} messages came"):
            while len(self.messages) < count:
                assert not self.ends, f"the comm ended after {len(self.messages)} of {count} messages: {self.ends[0]!r}"
                await self._wait_change()

    async def wait_end(self, timeout_s: float = DEADLINE_S) -> Exception:
        """What ended the comm; fails when it does not end in time."""
        async with _deadline(timeout_s, lambda: "the comm did not end"):
            while not self.ends:
                await self._wait_change()
        return self.ends[0]

    async def _wait_change(self) -> None:
        self._changed.clear()
        await self._changed.wait()


class _deadline:  # noqa: N801 - reads as the statement it is
    """`asyncio.timeout` whose error tells what was missing."""

    def __init__(self, timeout_s: float, missing: Callable[[], str]) -> None:
        self._timeout = asyncio.timeout(timeout_s)
        self._timeout_s = timeout_s
        self._missing = missing

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()

    async def __aexit__(self, *exc_info: object) -> None:
        try:
            await self._timeout.__aexit__(*exc_info)  # type: ignore[arg-type]
        except TimeoutError:
            raise AssertionError(f"{self._missing()} within {self._timeout_s:g} s") from None


async def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = DEADLINE_S) -> None:
    """Looks at `condition` every 5 ms until it holds; fails with `what` when it does not in time."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {timeout_s:g} s"
        await asyncio.sleep(0.005)


def open_descriptors() -> dict[int, str]:
    """The open file descriptors of this process, and what they are."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue  # the descriptor of the listing itself
    return found


def memory_bytes(pid: int | str = "self", field: str = "VmRSS") -> int:
    """A size from `/proc/PID/status`: VmRSS now, VmHWM at most since `reset_peak_memory`."""
    with open(f"/proc/{pid}/status") as status:
        match = re.search(rf"^{field}:\s+(\d+) kB", status.read(), re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


def reset_peak_memory() -> None:
    """Lets VmHWM of this process begin anew."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def available_memory_bytes() -> int:
    """MemAvailable of the machine."""
    with open("/proc/meminfo") as file:
        match = re.search(r"^MemAvailable:\s+(\d+) kB", file.read(), re.MULTILINE)
    return int(match[1]) * 1024 if match else 0
