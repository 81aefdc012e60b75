"""A child that a peer has forked does not keep the peer's links alive."""

from __future__ import annotations

import asyncio
import os
import signal
import sys

import pytest

from zmqtasks.errors import CommBrokenError
from zmqtasks.testing.comms import Recorder
from zmqtasks.testing.conformance_base import OPEN, ConformanceBase
from zmqtasks.transports import Comm, connect

_PEER = """
import asyncio, os, signal, sys
import uvloop
from zmqtasks.testing.comms import Recorder
from zmqtasks.testing.conformance_base import OPEN
from zmqtasks.transports import connect

async def main(address, how):
    comm = await connect(address, OPEN)
    recorder = Recorder(comm)
    child = os.fork()
    if child == 0:
        signal.pause()
    comm.send([str(child).encode()])
    await recorder.wait_messages(1)
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    comm.abort()
    await asyncio.Event().wait()

uvloop.run(main(*sys.argv[1:]))
"""


class _ForkedChildren(ConformanceBase):
    @pytest.mark.parametrize("how", ["killed", "aborted"])
    def test_the_link_ends_although_a_child_lives(self, how: str) -> None:
        async def test() -> None:
            arrivals: asyncio.Queue[Comm] = asyncio.Queue()
            async with self.listening(arrivals.put_nowait) as listener:
                process = await asyncio.create_subprocess_exec(sys.executable, "-c", _PEER, listener.address, how)
                comm = await arrivals.get()
                recorder = Recorder(comm)
                await recorder.wait_messages(1)
                child = int(bytes(recorder.messages[0][0]))
                comm.send([b"go on"])
                try:
                    assert isinstance(await recorder.wait_end(5.0), CommBrokenError)
                    os.kill(child, 0)  # it lives
                finally:
                    os.kill(child, signal.SIGKILL)
                    if how == "aborted":
                        process.kill()
                    await process.wait()
                await comm.close()

        self.run(test())

    def test_listeners_are_not_held_by_children(self) -> None:
        async def test() -> None:
            async with self.listening(lambda comm: comm.abort()) as listener:
                one, other = os.pipe()
                child = os.fork()
                if child == 0:
                    os.write(other, b"!")
                    signal.pause()
                os.read(one, 1)
                os.close(one)
                os.close(other)
                await listener.close()
                try:
                    with pytest.raises(OSError, match="nobody listens"):
                        await connect(listener.address, OPEN)
                finally:
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)

        self.run(test())


class TestTcp(_ForkedChildren):
    scheme = "tcp"


class TestUnix(_ForkedChildren):
    scheme = "unix"


class TestShm(_ForkedChildren):
    scheme = "shm"
