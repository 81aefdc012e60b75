"""Conformance: comms end in one way, told once, to both sides, and leave nothing behind."""

from __future__ import annotations

import asyncio
import gc
import resource
import sys

import pytest

from zmqtasks.errors import CommBrokenError, CommClosedError, ConnectError, ConnectionRefusedByPeerError
from zmqtasks.protocol.frames import MIB
from zmqtasks.testing.comms import DEADLINE_S, Recorder, memory_bytes, open_descriptors, wait_until
from zmqtasks.testing.conformance_base import OPEN, ConformanceBase, end
from zmqtasks.transports import Comm, connect, listen

_AT_ONCE = 500
_CYCLES = 2000
_CYCLES_SIDE_BY_SIDE = 20
_GROWTH_BYTES = 48 << 20


class EndingTests(ConformanceBase):
    """Close, break and abort are told apart."""

    def test_close_delivers_everything_first(self) -> None:
        """What was sent before `close` arrives, then the peer's close is told; the closing side is told `local`."""

        async def test() -> None:
            async with self.link() as (ours, theirs):
                here, there = Recorder(ours), Recorder(theirs)
                for number in range(200):
                    ours.send([b"%d" % number])
                ours.send([bytes(32 * MIB)])
                await ours.close()
                await _assert_closed(here, by="local")
                await _assert_closed(there, by="peer")
                assert [bytes(message[0]) for message in there.messages[:200]] == [b"%d" % n for n in range(200)]
                assert there.messages[200][0].nbytes == 32 * MIB

        self.run(test())

    def test_close_while_the_peer_pauses(self) -> None:
        """A peer that was not reading still gets all there was, and then the close."""

        async def test() -> None:
            async with self.link() as (ours, theirs):
                Recorder(ours)
                there = Recorder(theirs)
                theirs.pause_receiving()
                for number in range(50):
                    ours.send([b"%d" % number])
                await ours.close()
                assert not there.ends
                theirs.resume_receiving()
                await _assert_closed(there, by="peer")
                assert [bytes(message[0]) for message in there.messages] == [b"%d" % n for n in range(50)]

        self.run(test())

    def test_close_while_the_peer_sends(self) -> None:
        """A close crosses with the peer's messages: it is a close all the same."""

        async def test() -> None:
            async with self.link() as (ours, theirs):
                Recorder(ours)
                there = Recorder(theirs)
                for _ in range(100):
                    theirs.send([bytes(100_000)])
                    ours.send([b"x"])
                await ours.close()
                await _assert_closed(there, by="peer")
                assert len(there.messages) == 100

        self.run(test())

    def test_close_while_another_thread_sends(self) -> None:
        """Where other threads may send: what one of them has sent arrives whole, and then the close."""
        frame = bytes(3 * MIB)

        async def test() -> None:
            async with self.link() as (ours, theirs):
                if not ours.ready_for_direct:
                    pytest.skip("this transport sends from its own loop only")
                Recorder(ours)
                there = Recorder(theirs)
                sent: list[bytes] = []

                def send_by_thread() -> None:
                    while ours.ended is None:
                        if ours.ready_for_direct:
                            number = b"%d" % len(sent)
                            try:
                                ours.send_direct([number, frame] if len(sent) % 3 == 2 else [number])
                            except CommClosedError:
                                return
                            sent.append(number)

                thread = asyncio.create_task(asyncio.to_thread(send_by_thread))
                await wait_until(lambda: bool(sent), "the thread to send")
                await ours.close()
                await thread
                await _assert_closed(there, by="peer")
                assert [bytes(message[0]) for message in there.messages] == sent

        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)  # the threads take turns wherever they can
        try:
            for _ in range(20):
                self.run(test())
        finally:
            sys.setswitchinterval(interval)

    def test_both_sides_close_at_once(self) -> None:
        """Neither waits for the other, and for neither it is a break."""

        async def test() -> None:
            async with self.link() as (ours, theirs):
                here, there = Recorder(ours), Recorder(theirs)
                async with asyncio.timeout(5):
                    await asyncio.gather(ours.close(), theirs.close())
                for recorder in (here, there):
                    assert isinstance(await recorder.wait_end(), CommClosedError)
                    assert len(recorder.ends) == 1

        self.run(test())

    def test_abort_is_a_break_for_the_peer(self) -> None:
        """`abort` drops what is queued; the peer sees a break, also with nothing in flight."""

        async def test() -> None:
            for queued in (0, 64):
                async with self.link() as (ours, theirs):
                    here, there = Recorder(ours), Recorder(theirs)
                    for _ in range(queued):
                        ours.send([bytes(MIB)])
                    ours.abort("not needed any more")
                    assert isinstance(ours.ended, CommClosedError)
                    assert "not needed any more" in str(ours.ended)
                    assert ours.queued_bytes == 0
                    ours.abort()
                    await _assert_closed(here, by="local")
                    assert isinstance(await there.wait_end(), CommBrokenError)
                    await asyncio.gather(ours.close(), theirs.close())
                    assert (len(here.ends), len(there.ends)) == (1, 1)
                    assert not here.violations + there.violations

        self.run(test())

    def test_after_the_end(self) -> None:
        """On both sides: `send` and `drain` raise the end, `close` and `abort` do nothing, no call comes."""

        async def test() -> None:
            async with self.link() as (ours, theirs):
                here, there = Recorder(ours), Recorder(theirs)
                await ours.close()
                await there.wait_end()
                for comm, recorder, by in ((ours, here, "local"), (theirs, there, "peer")):
                    for _ in range(2):
                        with pytest.raises(CommClosedError) as caught:
                            comm.send([b"x"])
                        assert caught.value.by == by
                    with pytest.raises(CommClosedError):
                        await comm.drain()
                    assert comm.ended is recorder.ends[0]
                    async with asyncio.timeout(5):
                        await comm.close()
                        await comm.close()
                    comm.abort()
                    comm.pause_receiving()
                    comm.resume_receiving()
                    assert comm.statistics().queued_bytes == 0
                await asyncio.sleep(0.01)
                assert (len(here.ends), len(there.ends)) == (1, 1)

        self.run(test())

    def test_end_before_start(self) -> None:
        """A comm that ends before it is started tells its handler of it once started."""

        async def test() -> None:
            async with self.link() as (ours, theirs):
                ours.send([b"last words"])
                await ours.close()
                here, there = Recorder(ours), Recorder(theirs)
                await _assert_closed(here, by="local")
                await _assert_closed(there, by="peer")
                assert there.contents() == [[b"last words"]]

        self.run(test())

    def test_handler_may_end_the_comm(self) -> None:
        """`abort` and `close` from within `message_received`: no further message comes."""

        async def test() -> None:
            for way in ("abort", "close"):
                async with self.link() as (ours, theirs):
                    closing: list[asyncio.Task[None]] = []

                    def finish(frames: list[memoryview], comm: Comm = theirs, way: str = way) -> None:
                        if way == "abort":
                            comm.abort()
                        else:
                            closing.append(asyncio.ensure_future(comm.close()))  # noqa: B023 - used within the loop

                    Recorder(ours)
                    there = Recorder(theirs, finish)
                    ours.send([b"first"])
                    await _assert_closed(there, by="local")
                    assert there.contents() == [[b"first"]]
                    await asyncio.gather(*closing)

        self.run(test())


class AddressTests(ConformanceBase):
    """Listening and connecting."""

    def test_addresses(self) -> None:
        """Each side knows its own address and the other's; the listener's is the one to connect to."""

        async def test() -> None:
            async with self.link() as (ours, theirs):
                for address in (ours.local_address, ours.peer_address, theirs.local_address, theirs.peer_address):
                    assert address.startswith(f"{self.scheme}://")

        self.run(test())

    def test_refused(self) -> None:
        """Where nobody listens any more, `connect` is refused at once, and the error names the address."""

        async def test() -> None:
            async with self.listening(_ignore) as listener:
                address = listener.address
            async with asyncio.timeout(5):
                with pytest.raises(ConnectionRefusedByPeerError) as caught:
                    await connect(address, self.encrypting(OPEN))
            assert address in str(caught.value)

        self.run(test())

    def test_listener_that_closes(self) -> None:
        """Comms outlive their listener, and its address is free again."""

        async def test() -> None:
            async with self.link() as (ours, theirs):
                Recorder(theirs, theirs.send)
                here = Recorder(ours)
                async with self.listening(_ignore) as listener:
                    address = listener.address
                    with pytest.raises(ConnectError) as caught:
                        await listen(address, _ignore, self.encrypting(OPEN))
                    assert address in str(caught.value)
                again = await listen(address, _ignore, self.encrypting(OPEN))
                assert again.address == address
                await again.close()
                await again.close()
                ours.send([b"still here"])
                await here.wait_messages(1)

        self.run(test())

    def test_comms_outlive_their_listener(self) -> None:
        """Closing a listener leaves its comms alone."""

        async def test() -> None:
            arrivals: asyncio.Queue[Comm] = asyncio.Queue()
            async with self.listening(arrivals.put_nowait) as listener:
                ours = await connect(listener.address, self.encrypting(OPEN))
                theirs = await arrivals.get()
            Recorder(theirs, theirs.send)
            here = Recorder(ours)
            ours.send([b"still here"])
            await here.wait_messages(1)
            await ours.close()
            await end(theirs)

        self.run(test())

    def test_failing_on_comm(self, caplog: pytest.LogCaptureFixture) -> None:
        """A node that fails to take a comm does not stop the listener."""

        async def test() -> None:
            arrivals: list[Comm] = []

            def fail_first(comm: Comm) -> None:
                arrivals.append(comm)
                if len(arrivals) == 1:
                    raise ZeroDivisionError("on_comm bug")

            async with self.listening(fail_first) as listener:
                try:
                    turned_away = await connect(listener.address, self.encrypting(OPEN))
                except ConnectionRefusedByPeerError:
                    pass  # a transport may know at once, or see it as a break
                else:
                    assert isinstance(await Recorder(turned_away).wait_end(), CommBrokenError)
                    await turned_away.close()
                ours = await connect(listener.address, self.encrypting(OPEN))
                await wait_until(lambda: len(arrivals) == 2, "the second comm did not arrive")
                await ours.close()
                for comm in arrivals:
                    await end(comm)

        self.run(test())
        assert "on_comm bug" in caplog.text

    def test_ipv6(self) -> None:
        """The same over IPv6."""
        self.needs(uses_ip=True)

        async def test() -> None:
            async with self.link(host="[::1]") as (ours, theirs):
                assert ours.peer_address.startswith(f"{self.scheme}://[::1]:")
                Recorder(theirs, theirs.send)
                here = Recorder(ours)
                ours.send([b"over IPv6"])
                await here.wait_messages(1)

        self.run(test())

    def test_wildcard_listener_names_a_host(self) -> None:
        """The address of a listener at all interfaces can be connected to."""
        self.needs(uses_ip=True)

        async def test() -> None:
            for host in ("0.0.0.0", "[::]"):
                arrivals: asyncio.Queue[Comm] = asyncio.Queue()
                async with self.listening(arrivals.put_nowait, host=host) as listener:
                    assert "0.0.0.0" not in listener.address
                    assert "[::]" not in listener.address
                    await end(await connect(listener.address, self.encrypting(OPEN)))
                    await end(await arrivals.get())

        self.run(test())


class NumberTests(ConformanceBase):
    """Many comms, at once and one after the other."""

    def test_500_comms_at_once(self) -> None:
        """All are made at once, all carry messages, all are closed."""
        _raise_descriptor_limit()

        async def test() -> None:
            echoing: list[Comm] = []

            def echo(comm: Comm) -> None:
                echoing.append(comm)
                Recorder(comm, comm.send)

            async with self.listening(echo) as listener:
                comms = await asyncio.gather(
                    *(connect(listener.address, self.encrypting(OPEN)) for _ in range(_AT_ONCE))
                )
                recorders = [Recorder(comm) for comm in comms]
                for number, comm in enumerate(comms):
                    comm.send([b"%d" % number, bytes(10_000)])
                for number, recorder in enumerate(recorders):
                    await recorder.wait_messages(1)
                    assert bytes(recorder.messages[0][0]) == b"%d" % number
                await asyncio.gather(*(comm.close() for comm in comms))
                await wait_until(lambda: all(comm.ended is not None for comm in echoing), "not all comms ended")
                await asyncio.gather(*(comm.close() for comm in echoing))

        self.run(test())

    def test_nothing_leaks_over_2000_cycles(self) -> None:
        """Descriptors, tasks and memory are as before after 2,000 comms, closed and aborted in turn."""

        async def test() -> None:
            def serve(comm: Comm) -> None:
                Recorder(comm, comm.send)

            async with self.listening(serve) as listener:

                async def cycle(number: int) -> None:
                    comm = await connect(listener.address, self.encrypting(OPEN))
                    recorder = Recorder(comm)
                    comm.send([b"x" * 100])
                    await recorder.wait_messages(1)
                    if number % 2:
                        comm.abort()
                    await comm.close()

                async def cycles(first: int, last: int) -> None:
                    for start in range(first, last, _CYCLES_SIDE_BY_SIDE):
                        await asyncio.gather(*(cycle(start + number) for number in range(_CYCLES_SIDE_BY_SIDE)))

                await cycles(0, 200)  # what a library sets up once is set up now
                gc.collect()
                descriptors, tasks, memory = len(open_descriptors()), len(asyncio.all_tasks()), memory_bytes()
                await cycles(0, _CYCLES)
                gc.collect()
                await wait_until(lambda: len(open_descriptors()) <= descriptors, "descriptors were left open", 5)
                await wait_until(lambda: len(asyncio.all_tasks()) <= tasks, "tasks were left behind", 5)
                growth = memory_bytes() - memory
                assert growth < _GROWTH_BYTES, f"{_CYCLES} comms left {growth >> 20} MiB behind"

        self.run(test())


async def _assert_closed(recorder: Recorder, by: str) -> None:
    error = await recorder.wait_end(DEADLINE_S)
    assert isinstance(error, CommClosedError), repr(error)
    assert error.by == by
    assert len(recorder.ends) == 1
    assert not recorder.violations, recorder.violations


def _ignore(comm: Comm) -> None:
    comm.abort("nobody wants it")


def _raise_descriptor_limit() -> None:
    """1,000 ends with up to a few descriptors each are over the usual soft limit of 1,024."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 16_384 if hard == resource.RLIM_INFINITY else min(hard, 16_384)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
