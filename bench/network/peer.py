"""The other end of a measured link: a process of its own, which ends with its parent or with its link.

The first line of standard input is a `Call` in JSON.
"""

from __future__ import annotations

import asyncio
import sys
import time

import msgspec
import uvloop

from zmqtasks.errors import CommError
from zmqtasks.protocol.frames import DATA_LIMITS
from zmqtasks.transports import Comm, Encryption, LinkSettings, connect

from .gil import holding_gil
from .processes import live_with_parent, read_first_line
from .traffic import ECHO, WAIT_S, Answerer


class Call(msgspec.Struct, kw_only=True):
    """Whom to call, and for what."""

    address: str
    secret: str | None = None
    """In hexadecimal digits."""
    hold_gil: bool = False
    connects_s: float = 0.0
    """Instead of one link: make links for so long, one after the other, and print how many a second."""


def link_settings(secret: bytes | None) -> LinkSettings:
    """The same at both ends; links are encrypted when there is a secret, though they never leave this host."""
    return LinkSettings(limits=DATA_LIMITS, encryption=Encryption(secret, same_host=True))


class _Once:
    """One round trip on a new link."""

    def __init__(self, comm: Comm) -> None:
        self.answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        comm.start(self)

    def message_received(self, frames: list[memoryview]) -> None:
        if not self.answered.done():
            self.answered.set_result(None)

    def comm_ended(self, error: Exception) -> None:
        if not self.answered.done():
            self.answered.set_exception(error)


async def connects_per_s(address: str, settings: LinkSettings, time_s: float) -> float:
    """Links made one after the other, each used for one round trip and closed."""
    count, began = -1, 0.0
    while count < 2 or time.perf_counter() - began < time_s:
        if count == 0:  # the first one warms up
            began = time.perf_counter()
        comm = await connect(address, settings)
        once = _Once(comm)
        comm.send([bytes([ECHO])])
        async with asyncio.timeout(WAIT_S):
            await once.answered
        await comm.close()
        count += 1
    return count / (time.perf_counter() - began)


async def _answer_calls(call: Call) -> None:
    settings = link_settings(None if call.secret is None else bytes.fromhex(call.secret))
    if call.connects_s:
        print(await connects_per_s(call.address, settings, call.connects_s), flush=True)
        return
    comm = await connect(call.address, settings)
    answerer = Answerer(comm)
    await answerer.ended
    await comm.close()


def main() -> int:
    """Plays the other end."""
    call = msgspec.json.decode(read_first_line(), type=Call)
    live_with_parent()
    with holding_gil(call.hold_gil):
        try:
            uvloop.run(_answer_calls(call))
        except CommError as exc:
            print(f"the other end of {call.address}: {exc}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
