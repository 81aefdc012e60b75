"""Conformance: messages come no faster than they are taken, and to whoever handles them now."""

from __future__ import annotations

import asyncio
import logging
import signal

import pytest

from zmqtasks.errors import CommClosedError, CommError, LimitExceededError
from zmqtasks.protocol.frames import DATA_LIMITS, HELLO_LIMITS, KIB, MIB
from zmqtasks.testing.comms import DEADLINE_S, Recorder, memory_bytes, wait_until
from zmqtasks.testing.conformance_base import OPEN, ConformanceBase
from zmqtasks.transports import Comm, LinkSettings


class FlowTests(ConformanceBase):
    """Receiving can be held up, and then nothing grows without bound but what the sender itself queues."""

    def test_messages_before_start_are_held(self) -> None:
        """What comes before `start` is delivered after it."""

        async def test() -> None:
            async with self.link() as (ours, theirs):
                here = Recorder(ours)
                for number in range(100):
                    ours.send([b"%d" % number, bytes(1000)])
                theirs.send([b"hello"])
                await here.wait_messages(1)
                there = Recorder(theirs)
                await there.wait_messages(100)
                assert [bytes(message[0]) for message in there.messages] == [b"%d" % number for number in range(100)]

        self.run(test())

    def test_pause_and_resume(self) -> None:
        """A handler that pauses gets no further message until it resumes; none is lost."""

        async def test() -> None:
            async with self.link() as (ours, theirs):
                there = Recorder(theirs, lambda frames: theirs.pause_receiving())
                here = Recorder(ours)
                for number in range(20):
                    ours.send([b"%d" % number])
                for number in range(20):
                    await there.wait_messages(number + 1)
                    theirs.send([b"still alive"])  # its arrival shows that the loop has turned meanwhile
                    await here.wait_messages(number + 1)
                    assert len(there.messages) == number + 1
                    theirs.resume_receiving()
                assert [bytes(message[0]) for message in there.messages] == [b"%d" % number for number in range(20)]

        self.run(test())

    def test_drain_waits_for_a_stalled_receiver(self) -> None:
        """A sender that drains stops when the receiver does, and loses nothing."""
        settings = LinkSettings(limits=DATA_LIMITS, high_water_bytes=4 * MIB, low_water_bytes=MIB)
        chunk = bytes(MIB)

        async def test() -> None:
            async with self.link(settings) as (ours, theirs):
                there = Recorder(theirs)
                Recorder(ours)
                theirs.pause_receiving()
                sent = 0
                stalled = False
                while not stalled:
                    ours.send([b"%d" % sent, chunk])
                    sent += 1
                    assert sent * MIB < 8 * MIB + self.memory_slack_bytes, "drain did not wait for the receiver"
                    stalled = not await _drains(ours, 0.5)
                assert ours.queued_bytes > settings.low_water_bytes
                draining = asyncio.ensure_future(ours.drain())
                theirs.resume_receiving()
                await asyncio.wait_for(draining, DEADLINE_S)
                assert ours.queued_bytes <= settings.low_water_bytes + 64 * KIB
                await there.wait_messages(sent)
                assert [bytes(message[0]) for message in there.messages] == [b"%d" % number for number in range(sent)]

        self.run(test())

    def test_memory_of_a_stalled_peer_is_bounded(self) -> None:
        """200 MiB for a process that does not read stay in the sender's queue; all arrives in the end."""
        self.needs(crosses_processes=True)
        chunk, count = bytes(MIB), 200

        async def test() -> None:
            async with self.peer_process("stall") as (comm, peer):
                here = Recorder(comm)
                before = memory_bytes(peer.pid)
                for _ in range(count):
                    comm.send([chunk])
                assert not await _drains(comm, 1.0), "drain did not wait for the receiver"
                taken = memory_bytes(peer.pid) - before
                limit = 2 * OPEN.high_water_bytes + self.memory_slack_bytes // 2
                assert taken < limit, f"the stalled peer took {taken >> 20} MiB"
                assert comm.queued_bytes > count * MIB - limit
                peer.send_signal(signal.SIGUSR1)
                await comm.drain()
                await here.wait_messages(count)

        self.run(test())

    def test_drain_is_woken_by_the_end(self) -> None:
        """`drain` raises what ended the comm, also when it was waiting already."""
        settings = LinkSettings(limits=DATA_LIMITS, high_water_bytes=MIB, low_water_bytes=MIB // 2)

        async def test() -> None:
            async with self.link(settings) as (ours, theirs):
                Recorder(ours)
                Recorder(theirs)
                theirs.pause_receiving()
                for _ in range(100):
                    ours.send([bytes(MIB)])
                draining = [asyncio.ensure_future(ours.drain()) for _ in range(2)]
                await asyncio.sleep(0)
                ours.abort()
                for task in draining:
                    with pytest.raises(CommClosedError):
                        await asyncio.wait_for(task, DEADLINE_S)
                with pytest.raises(CommClosedError):
                    await ours.drain()

        self.run(test())

    def test_handlers_can_be_exchanged(self) -> None:
        """`set_handler` holds from the very next message on, also within one batch."""

        async def test() -> None:
            async with self.link() as (ours, theirs):
                later = _Collector()
                first = Recorder(theirs, lambda frames: theirs.set_handler(later))
                Recorder(ours)
                for number in range(50):
                    ours.send([b"%d" % number])
                await wait_until(lambda: len(later.received) == 49, "the second handler did not get the rest")
                assert first.contents() == [[b"0"]]
                assert later.received == [b"%d" % number for number in range(1, 50)]
                ours.abort()
                await wait_until(lambda: later.ended == 1, "the second handler was not told of the end")
                assert not first.ends

        self.run(test())

    def test_limits_hold_from_the_next_message_on(self) -> None:
        """The limits of a new comm are those of its settings; `set_limits` within a handler counts at once."""
        narrow = LinkSettings(limits=HELLO_LIMITS)

        async def test() -> None:
            async with self.link(OPEN, narrow) as (ours, theirs):
                there = Recorder(theirs, lambda frames: theirs.set_limits(DATA_LIMITS))
                Recorder(ours)
                ours.send([b"a hello"])
                ours.send([bytes(MIB)] * 5)
                await there.wait_messages(2)
                theirs.set_limits(HELLO_LIMITS)
                ours.send([b""] * (HELLO_LIMITS.frames + 1))
                assert isinstance(await there.wait_end(), LimitExceededError)
                with pytest.raises(CommError):  # who sends only is told what every broken link tells
                    theirs.send([b"too late"])
                with pytest.raises(CommError):
                    await theirs.drain()

        self.run(test())

    def test_a_failing_handler_ends_the_comm(self, caplog: pytest.LogCaptureFixture) -> None:
        """An exception from a handler is logged, and is the cause of the end; the other side sees a break."""

        async def test() -> None:
            def fail(frames: list[memoryview]) -> None:
                raise ZeroDivisionError("handler bug")

            async with self.link() as (ours, theirs):
                there, here = Recorder(theirs, fail), Recorder(ours)
                ours.send([b"1"])
                ours.send([b"2"])
                error = await there.wait_end()
                assert isinstance(error.__cause__, ZeroDivisionError)
                assert len(there.messages) == 1
                await here.wait_end()

        with caplog.at_level(logging.ERROR):
            self.run(test())
        assert "handler bug" in caplog.text


async def _drains(comm: Comm, timeout_s: float) -> bool:
    try:
        await asyncio.wait_for(comm.drain(), timeout_s)
    except TimeoutError:
        return False
    return True


class _Collector:
    """A handler to change to."""

    def __init__(self) -> None:
        self.received: list[bytes] = []
        self.ended = 0

    def message_received(self, frames: list[memoryview]) -> None:
        self.received.append(bytes(frames[0]))

    def comm_ended(self, error: Exception) -> None:
        self.ended += 1
