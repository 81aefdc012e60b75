"""inproc: the conformance suite, and what is particular to it: two event loops in two threads."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from zmqtasks.errors import (
    AddressError,
    CommBrokenError,
    CommClosedError,
    ConnectionRefusedByPeerError,
    ConnectTimeoutError,
)
from zmqtasks.protocol.frames import DATA_LIMITS, MIB
from zmqtasks.testing.comms import Recorder, wait_until
from zmqtasks.testing.conformance import TransportConformance
from zmqtasks.testing.conformance_base import OPEN
from zmqtasks.transports import Comm, LinkSettings, connect, listen


class TestInproc(TransportConformance):
    scheme = "inproc"


@contextmanager
def loop_in_thread() -> Iterator[asyncio.AbstractEventLoop]:
    """A running event loop in another thread; stopped, and closed, in the end."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield loop
    finally:
        if not loop.is_closed():
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()


def run_in(loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run_coroutine_threadsafe(coroutine, loop).result(20)


def echoing(loop: asyncio.AbstractEventLoop, settings: LinkSettings = OPEN) -> Any:
    """A listener in `loop` whose comms echo."""
    return run_in(loop, listen("inproc://", lambda comm: Recorder(comm, comm.send) and None, settings))


def in_thread(test: Callable[[asyncio.AbstractEventLoop], Coroutine[Any, Any, None]]) -> None:
    with loop_in_thread() as other:
        asyncio.run(test(other))


def test_across_threads() -> None:
    async def test(other: asyncio.AbstractEventLoop) -> None:
        listener = echoing(other)
        comm = await connect(listener.address, OPEN)
        here = Recorder(comm)
        for number in range(5_000):
            comm.send([b"%d" % number])
        await here.wait_messages(5_000)
        assert [bytes(message[0]) for message in here.messages] == [b"%d" % number for number in range(5_000)]
        await comm.close()
        assert isinstance(await here.wait_end(), CommClosedError)
        run_in(other, listener.close())

    in_thread(test)


def test_drain_across_threads() -> None:
    async def test(other: asyncio.AbstractEventLoop) -> None:
        settings = LinkSettings(limits=DATA_LIMITS, high_water_bytes=4 * MIB, low_water_bytes=MIB)
        listener = echoing(other, settings)
        comm = await connect(listener.address, settings)
        here = Recorder(comm)
        for _ in range(200):
            comm.send([bytes(MIB)])
            await comm.drain()
            assert comm.queued_bytes <= 4 * MIB
        await here.wait_messages(200)
        comm.abort()
        run_in(other, listener.close())

    in_thread(test)


def test_frames_go_by_reference() -> None:
    async def test(other: asyncio.AbstractEventLoop) -> None:
        listener = echoing(other)
        comm = await connect(listener.address, OPEN)
        here = Recorder(comm)
        frame = b"x" * 1000
        comm.send([frame])
        await here.wait_messages(1)
        assert here.messages[0][0].obj is frame
        await comm.close()
        run_in(other, listener.close())

    in_thread(test)


@pytest.mark.parametrize("sending", [True, False])
def test_loop_of_the_peer_is_closed(sending: bool) -> None:
    async def test(other: asyncio.AbstractEventLoop) -> None:
        listener = echoing(other)
        comm = await connect(listener.address, LinkSettings(limits=DATA_LIMITS, heartbeat_s=0.6))
        here = Recorder(comm)
        other.call_soon_threadsafe(other.stop)
        await wait_until(lambda: not other.is_running(), "the other loop runs on")
        other.close()
        if sending:
            with pytest.raises(CommBrokenError, match="event loop"):
                comm.send([b"x"])
        assert isinstance(await here.wait_end(2), CommBrokenError)
        with pytest.raises(ConnectionRefusedByPeerError):
            await connect(listener.address, OPEN)
        again = await listen(listener.address, lambda comm: None, OPEN)
        await again.close()

    in_thread(test)


def test_loop_that_does_not_answer() -> None:
    async def test(other: asyncio.AbstractEventLoop) -> None:
        listener = echoing(other)
        released = threading.Event()
        other.call_soon_threadsafe(released.wait)
        with pytest.raises(ConnectTimeoutError, match=listener.address):
            await connect(listener.address, LinkSettings(connect_timeout_s=0.2))
        released.set()
        run_in(other, listener.close())

    in_thread(test)


def test_unknown_name_tells_the_known_ones() -> None:
    async def test() -> None:
        listener = await listen("inproc://here", lambda comm: None, OPEN)
        with pytest.raises(ConnectionRefusedByPeerError, match=r"inproc://nowhere.*inproc://here"):
            await connect("inproc://nowhere", OPEN)
        await listener.close()

    asyncio.run(test())


@pytest.mark.parametrize("address", ["inproc://", "inproc://a b", "inproc://a#1"])
def test_bad_names(address: str) -> None:
    with pytest.raises(AddressError, match="names no place"):
        asyncio.run(connect(address, OPEN))


def test_end_in_a_closed_loop_after_a_good_close() -> None:
    """A comm that was closed in good order is told so, although the loop of the other side is gone since."""

    async def test(other: asyncio.AbstractEventLoop) -> None:
        arrivals: list[Comm] = []
        listener = run_in(other, listen("inproc://", arrivals.append, OPEN))
        comm = await connect(listener.address, OPEN)
        await wait_until(lambda: bool(arrivals), "no comm came")

        async def finish() -> None:
            arrivals[0].send([b"last words"])
            await arrivals[0].close()
            await listener.close()

        run_in(other, finish())
        other.call_soon_threadsafe(other.stop)
        await wait_until(lambda: not other.is_running(), "the other loop runs on")
        other.close()
        comm.send([b"too late"])
        here = Recorder(comm)
        error = await here.wait_end()
        assert isinstance(error, CommClosedError)
        assert error.by == "peer"
        assert here.contents() == [[b"last words"]]

    in_thread(test)
