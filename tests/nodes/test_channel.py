"""Channels: order, acknowledgement, resumption over a wire that is cut and mended, and every kind of end."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import time
from typing import Any

import msgspec
import pytest

from tests.links import CONFIG, SCHEMES, SECURITY, Node, Recorder, dial, listening, run, until, wire_to
from zmqtasks.errors import CommBrokenError, CommClosedError, LocalProtocolError, ProtocolError, SchedulerLostError
from zmqtasks.ids import new_instance_id, new_session_id
from zmqtasks.nodes import links, session
from zmqtasks.protocol import ops
from zmqtasks.protocol.codec import Codec
from zmqtasks.protocol.frames import CONTROL_LIMITS
from zmqtasks.protocol.handshake import LinkRequest

every_scheme = pytest.mark.parametrize("scheme", SCHEMES)


def want(number: int) -> ops.WantKeys:
    return ops.WantKeys([number])


def numbers(recorder: Recorder) -> list[Any]:
    return [key for op in recorder.ops for key in op.keys]


def fast(**changes: Any) -> Any:
    return dataclasses.replace(CONFIG, **changes)


@every_scheme
def test_ops_go_both_ways_in_order(scheme: str) -> None:
    async def main() -> None:
        async with listening(scheme, epoch=7) as (node, address):
            mine = Recorder()
            channel = await dial(address, mine)
            assert channel.connected
            assert channel.number == 1
            assert channel.welcome is not None
            assert (channel.welcome.epoch, channel.welcome.cluster_id) == (7, SECURITY.cluster_id)
            assert node.channel.introduction == ops.ClientIntroduction("test", 1, "here")
            assert node.channel.session_id == channel.session_id
            for number in range(300):
                channel.send([want(2 * number), want(2 * number + 1)])
                node.channel.send([ops.DropData([number])])
            await until(lambda: len(node.recorders[0].ops) == 600 and len(mine.ops) == 300)
            assert numbers(node.recorders[0]) == list(range(600))
            assert numbers(mine) == list(range(300))
            await channel.close("done")
            assert await mine.ended() is None
            assert await node.recorders[0].ended() is None
            assert node.acceptor.channels == []

    run(main())


@every_scheme
def test_nothing_is_lost_or_repeated_over_many_cuts(scheme: str) -> None:
    """Traffic in both directions while the wire is cut at random moments."""

    async def main() -> None:
        async with listening(scheme) as (node, address), wire_to(address) as wire:
            mine = Recorder()
            channel = await dial(wire.address, mine)
            theirs = node.recorders[0]
            total, sent = 20_000, [0, 0]

            async def talk(side: int, end: Any, make: Any, seed: int) -> None:
                rng = random.Random(seed)
                while sent[side] < total:
                    size = min(rng.choice((1, 1, 10, 100)), total - sent[side])
                    end.send([make(number) for number in range(sent[side], sent[side] + size)])
                    sent[side] += size
                    await asyncio.sleep(0.0005 if rng.random() < 0.2 else 0)

            async def saw() -> None:
                rng = random.Random(3)
                for _ in range(8):
                    received = len(theirs.ops)
                    aim = received + rng.randrange(1, 1000)
                    await until(lambda aim=aim: len(theirs.ops) >= min(aim, total))  # type: ignore[misc]
                    wire.cut()
                    await until(lambda: not channel.connected and not node.channel.connected)
                    wire.mend()
                    await until(lambda: channel.connected and node.channel.connected)

            await asyncio.gather(
                talk(0, channel, want, 1), talk(1, node.channel, lambda number: ops.DropData([number]), 2), saw()
            )
            await until(lambda: len(theirs.ops) >= total and len(mine.ops) >= total)
            assert numbers(theirs) == list(range(total))
            assert numbers(mine) == list(range(total))
            assert mine.events == theirs.events == ["lost", "resumed"] * 8
            await until(lambda: channel.queued_bytes == node.channel.queued_bytes == 0)
            await channel.close()

    run(main())


@every_scheme
def test_what_is_sent_while_the_link_is_lost_arrives_later(scheme: str) -> None:
    async def main() -> None:
        async with listening(scheme) as (node, address), wire_to(address) as wire:
            mine = Recorder()
            channel = await dial(wire.address, mine)
            wire.cut()
            await until(lambda: not channel.connected and not node.channel.connected)
            for number in range(50):
                channel.send([want(number)])
                node.channel.send([ops.DropData([number])])
            assert channel.queued_bytes > 0
            wire.mend()
            await until(lambda: len(node.recorders[0].ops) == 50 and len(mine.ops) == 50)
            assert numbers(node.recorders[0]) == numbers(mine) == list(range(50))
            await channel.close()

    run(main())


@every_scheme
def test_link_that_does_not_come_back_ends_the_grace_time(scheme: str) -> None:
    async def main() -> None:
        async with listening(scheme) as (node, address), wire_to(address) as wire:
            mine = Recorder()
            channel = await dial(wire.address, mine, config=fast(grace_s=0.3))
            wire.cut()
            error = await mine.ended()
            with pytest.raises(SchedulerLostError, match=r"did not come back within 0\.3 s \(grace_s\)"):
                raise error or AssertionError
            assert mine.events == ["lost", "ended"]
            with pytest.raises(CommClosedError):
                channel.send([want(1)])
            with pytest.raises(CommClosedError):
                await channel.drain()
            assert node.recorders[0].events == ["lost"], "the accepting side leaves the decision to its owner"
            assert node.acceptor.channels == [node.channel]

    run(main())


@every_scheme
def test_forgotten_session_is_refused_with_the_reason(scheme: str) -> None:
    async def main() -> None:
        async with listening(scheme) as (node, address), wire_to(address) as wire:
            mine = Recorder()
            channel = await dial(wire.address, mine)
            wire.cut()
            await until(lambda: not node.channel.connected)
            node.acceptor.forget(channel.session_id, "worker declared lost")
            wire.mend()
            with pytest.raises(SchedulerLostError, match="cannot be resumed: worker declared lost"):
                raise await mine.ended() or AssertionError
            assert isinstance(await node.recorders[0].ended(), CommClosedError)
            assert node.acceptor.channels == []

    run(main())


@every_scheme
def test_scheduler_that_was_started_again_refuses_to_resume(scheme: str) -> None:
    async def main() -> None:
        async with listening(scheme, epoch=1) as (node, address):
            mine = Recorder()
            await dial(address, mine)
            await node.acceptor.close()
            again = Node(epoch=2)
            await again.acceptor.listen(address)
            node.channel.abort("killed")
            with pytest.raises(SchedulerLostError, match=r"started again since \(epoch 2, the session is of 1\)"):
                raise await mine.ended() or AssertionError
            await again.close()

    run(main())


def test_redial_goes_on_while_nobody_listens() -> None:
    """A refused connection is no end: the scheduler may be on its way back."""

    async def main() -> None:
        async with listening("tcp") as (node, address):
            mine = Recorder()
            channel = await dial(address, mine, config=fast(grace_s=0.5))
            await node.acceptor.close()
            node.channel.abort("killed")
            with pytest.raises(SchedulerLostError, match="the last attempt: nobody listens"):
                raise await mine.ended() or AssertionError
            assert channel.ended

    run(main())


@every_scheme
def test_unacknowledged_batches_are_bounded_on_the_accepting_side(scheme: str) -> None:
    config = fast(replay_bytes=100_000)

    async def main() -> None:
        async with listening(scheme, config=config) as (node, address), wire_to(address) as wire:
            mine = Recorder()
            await dial(wire.address, mine, config=config)
            wire.cut()
            await until(lambda: not node.channel.connected)
            channel = node.channel
            for _ in range(200):
                channel.send([ops.Goodbye("x" * 1000)])
                assert channel.queued_bytes <= 102_000
            with pytest.raises(CommBrokenError, match="replay_bytes is 100000"):
                raise await node.recorders[0].ended() or AssertionError
            wire.mend()
            with pytest.raises(SchedulerLostError, match="has not acknowledged"):
                raise await mine.ended() or AssertionError

    run(main())


@every_scheme
def test_one_way_traffic_is_acknowledged_now_and_then(scheme: str) -> None:
    async def main() -> None:
        async with listening(scheme) as (node, address):
            channel = await dial(address, Recorder())
            comm = node.channel._comm
            assert comm is not None
            before = comm.statistics().messages_sent
            for number in range(2000):
                channel.send([want(number)])
                if number % 20 == 0:
                    await asyncio.sleep(0)
            await until(lambda: len(node.recorders[0].ops) == 2000)
            await until(lambda: channel.queued_bytes == 0)
            acknowledgements = comm.statistics().messages_sent - before
            assert 1 <= acknowledgements <= 60, "about one in 64 batches"
            await channel.close()

    run(main())


@every_scheme
def test_draining_waits_for_the_peer(scheme: str) -> None:
    async def main() -> None:
        async with listening(scheme) as (node, address):
            channel = await dial(address, Recorder())
            await channel.drain()
            node.channel.pause_receiving()
            payload = ops.Goodbye("x" * 1_000_000)
            query = ops.Query(1, payload.reason)
            for _ in range(12):
                channel.send([query])
            waiting = asyncio.ensure_future(channel.drain())
            await until(lambda: channel.queued_bytes > 12_000_000)
            assert not waiting.done()
            node.channel.resume_receiving()
            await waiting
            assert channel.queued_bytes <= session.LOW_WATER_BYTES
            await channel.close()
            assert len(node.recorders[0].ops) == 12

    run(main())


@every_scheme
def test_draining_ends_with_the_channel(scheme: str) -> None:
    async def main() -> None:
        async with listening(scheme) as (node, address):
            mine = Recorder()
            channel = await dial(address, mine)
            node.channel.pause_receiving()
            for _ in range(12):
                channel.send([ops.Query(1, "x" * 1_000_000)])
            waiting = asyncio.ensure_future(channel.drain())
            await asyncio.sleep(0)
            channel.abort("tired of waiting")
            with pytest.raises(CommClosedError, match="has ended"):
                await waiting
            with pytest.raises(CommClosedError, match="tired of waiting"):
                raise await mine.ended() or AssertionError

    run(main())


@every_scheme
def test_closing_delivers_everything_and_ends_both_sides(scheme: str) -> None:
    async def main() -> None:
        for closer in (0, 1):
            async with listening(scheme) as (node, address):
                mine = Recorder()
                channel = await dial(address, mine)
                theirs = node.recorders[0]
                for number in range(500):
                    channel.send([want(number)])
                    node.channel.send([ops.DropData([number])])
                ends = [channel, node.channel]
                await ends[closer].close("enough")
                await ends[closer].close("again")
                assert await mine.ended() is None
                assert await theirs.ended() is None
                received = (theirs, mine)[closer]
                assert numbers(received) == list(range(500)), "all that was sent before close has arrived"
                with pytest.raises(CommClosedError):
                    channel.send([want(1)])

    run(main())


@every_scheme
def test_both_sides_close_at_once(scheme: str) -> None:
    async def main() -> None:
        async with listening(scheme) as (node, address):
            mine = Recorder()
            channel = await dial(address, mine)
            await asyncio.gather(channel.close(), node.channel.close())
            assert await mine.ended() is None
            assert await node.recorders[0].ended() is None

    run(main())


def test_closing_a_lost_link_ends_at_once() -> None:
    async def main() -> None:
        async with listening("tcp") as (node, address), wire_to(address) as wire:
            mine = Recorder()
            channel = await dial(wire.address, mine)
            wire.cut()
            await until(lambda: not channel.connected)
            await channel.close()
            assert await mine.ended() is None
            assert mine.events == ["lost", "ended"]
            assert not node.channel.ended

    run(main())


@every_scheme
def test_nothing_comes_before_open_channel_has_returned(scheme: str) -> None:
    class Eager(Recorder):
        def opened(self, channel: Any) -> None:
            super().opened(channel)
            for number in range(10):
                channel.send([ops.DropData([number])])

    async def main() -> None:
        async with listening(scheme, make=Eager) as (_, address):
            mine = Recorder()
            channel = await dial(address, mine)
            assert mine.ops == []
            channel.send([want(0)])
            await until(lambda: len(mine.ops) == 10)
            assert numbers(mine) == list(range(10))
            await channel.close()

    run(main())


@every_scheme
def test_op_that_the_other_side_does_not_know_is_told_to_both(scheme: str) -> None:
    async def main() -> None:
        async with listening(scheme) as (node, address):
            mine = Recorder()
            channel = await dial(address, mine)
            channel.send([ops.RunsDropped([1])])
            with pytest.raises(ProtocolError, match="unknown op, tag 82"):
                raise await node.recorders[0].ended() or AssertionError
            with pytest.raises(ProtocolError, match=r"ended the session: .*unknown op, tag 82"):
                raise await mine.ended() or AssertionError
            assert "lost" not in mine.events

    run(main())


def test_handler_that_fails_ends_the_channel_on_both_sides(caplog: pytest.LogCaptureFixture) -> None:
    def fail(channel: Any, batch: list[Any]) -> None:
        raise ZeroDivisionError("a bug")

    async def main() -> None:
        async with listening("tcp", make=lambda: Recorder(fail)) as (node, address):
            mine = Recorder()
            channel = await dial(address, mine)
            channel.send([want(1)])
            assert isinstance(await node.recorders[0].ended(), ZeroDivisionError)
            assert isinstance(await mine.ended(), ProtocolError)

    run(main())
    assert "a bug" in caplog.text


ENCODER = Codec(ops.ClientToScheduler)
RAW_CASES = [
    ("a gap", [ENCODER.encode(2, 0, [want(1)])], "batch 2 after batch 0: batches in between are missing"),
    (
        "an acknowledgement of what was never sent",
        [ENCODER.encode(1, 5, [want(1)])],
        "acknowledges batch 5; sent are 0",
    ),
    ("two frames", [ENCODER.encode(1, 0, [want(1)]), b"more"], "control message of 2 frames"),
    ("ops outside of the sequence", [ENCODER.encode(0, 0, [want(1)])], "1 ops outside of the sequence"),
    ("bytes that are no batch", [b"\xc1"], "1 bytes that are not a batch"),
    ("an empty frame", [b""], "0 bytes that are not a batch"),
]


@every_scheme
@pytest.mark.parametrize(("frames", "says"), [case[1:] for case in RAW_CASES], ids=[case[0] for case in RAW_CASES])
def test_peer_that_breaks_the_rules_is_told(scheme: str, frames: list[bytes], says: str) -> None:
    async def main() -> None:
        async with listening(scheme) as (node, address):
            request = LinkRequest(ops.ClientIntroduction("raw", 1, "h"), new_instance_id(), new_session_id())
            dialed = await links.dial(address, request, security=SECURITY, config=CONFIG, limits=CONTROL_LIMITS)
            seen = Frames()
            dialed.comm.set_handler(seen)
            dialed.comm.resume_receiving()
            dialed.comm.send(frames)
            with pytest.raises(ProtocolError, match=says):
                raise await node.recorders[0].ended() or AssertionError
            await until(lambda: seen.ended)
            goodbye = Codec(ops.SchedulerToClient).decode_untrusted(seen.messages[-1][0])[2]
            assert says in goodbye[0].reason
            await dialed.comm.close()

    run(main())


class Frames:
    """Handles a bare comm: keeps its messages."""

    def __init__(self) -> None:
        self.messages: list[list[memoryview]] = []
        self.ended: Exception | None = None

    def message_received(self, frames: list[memoryview]) -> None:
        self.messages.append(frames)

    def comm_ended(self, error: Exception) -> None:
        self.ended = error


@every_scheme
def test_repeated_batches_are_dropped_and_a_new_link_takes_the_place_of_the_old(scheme: str) -> None:
    """The peer dials again while this side still believes in the old link: half-open, as after a silent cut."""

    async def main() -> None:
        async with listening(scheme) as (node, address):
            request = LinkRequest(ops.ClientIntroduction("raw", 1, "h"), new_instance_id(), new_session_id())

            async def knock(request: LinkRequest) -> tuple[links.Dialed, Frames]:
                dialed = await links.dial(address, request, security=SECURITY, config=CONFIG, limits=CONTROL_LIMITS)
                frames = Frames()
                dialed.comm.set_handler(frames)
                dialed.comm.resume_receiving()
                return dialed, frames

            old, old_frames = await knock(request)
            for number in (1, 2, 2, 1, 3):
                old.comm.send([ENCODER.encode(number, 0, [want(number)])])
            recorder = node.recorders[0]
            await until(lambda: len(recorder.ops) == 3)
            node.channel.send([ops.DropData([1])])
            await until(lambda: old_frames.messages)
            new, new_frames = await knock(msgspec.structs.replace(request, resuming=True, epoch=1, last_seq=0))
            assert new.welcome.resumed
            assert new.welcome.last_seq == 3
            await until(lambda: old_frames.ended)
            assert recorder.events == ["lost", "resumed"]
            await until(lambda: new_frames.messages or new.arrived.messages)
            new.comm.send([ENCODER.encode(3, 1, [want(3)])])
            new.comm.send([ENCODER.encode(4, 1, [want(4)])])
            await until(lambda: len(recorder.ops) == 4)
            assert numbers(recorder) == [1, 2, 3, 4]
            for changes, says in (
                ({"instance": new_instance_id()}, "not known here"),
                ({"session": new_session_id()}, "not known here"),
                ({"epoch": 3}, "session is of 3"),
            ):
                other = msgspec.structs.replace(request, resuming=True, epoch=1)
                with pytest.raises(SchedulerLostError, match=says):
                    await knock(msgspec.structs.replace(other, **changes))
            assert node.channel.connected, "others can't take a session over"
            with pytest.raises(ProtocolError, match="its session exists"):
                await knock(request)
            await new.comm.close()
            await old.comm.close()

    run(main())


def test_pausing_lasts_over_a_resumption() -> None:
    async def main() -> None:
        async with listening("tcp") as (node, address), wire_to(address) as wire:
            mine = Recorder()
            channel = await dial(wire.address, mine)
            wire.cut()
            await until(lambda: not channel.connected and not node.channel.connected)
            channel.pause_receiving()
            for number in range(100):
                node.channel.send([ops.DropData([number])])
            wire.mend()
            await until(lambda: channel.connected)
            channel.send([want(1)])
            await until(lambda: node.recorders[0].ops)
            assert len(mine.ops) <= 2
            channel.resume_receiving()
            await until(lambda: len(mine.ops) == 100)
            await channel.close()

    run(main())


def test_long_batches_are_split_and_a_huge_op_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "SPLIT_BYTES", 10_000)

    async def main() -> None:
        async with listening("tcp") as (node, address):
            channel = await dial(address, Recorder())
            channel._codec.limit_bytes = 50_000
            channel.send([ops.WantKeys(["x" * 1000, number]) for number in range(100)])
            channel.send([ops.WantKeys(["x" * 20_000, 100])])
            with pytest.raises(LocalProtocolError, match=r"one WantKeys of 60.* bytes is over the limit"):
                channel.send([ops.WantKeys(["x" * 60_000])])
            channel.send([want(101)])
            await until(lambda: len(node.recorders[0].ops) == 102)
            assert [op.keys[-1] for op in node.recorders[0].ops] == list(range(102))
            await channel.close()

    run(main())


@every_scheme
def test_long_batches_of_other_threads_are_split_by_the_loop(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order with what comes after them, from whatever thread."""
    monkeypatch.setattr(session, "SPLIT_BYTES", 10_000)

    async def main() -> None:
        async with listening(scheme) as (node, address):
            channel = await dial(address, Recorder())
            sends_directly = channel._comm is not None and channel._comm.ready_for_direct
            direct = 0

            def send_some(first: int) -> None:
                nonlocal direct
                batch = [ops.WantKeys(["x" * 1000, number]) for number in range(first, first + 100)]
                if channel.send_taken(lambda: batch):
                    direct += 1
                else:
                    asyncio.run_coroutine_threadsafe(by_loop(batch), channel._loop).result()

            async def by_loop(batch: list[Any]) -> None:
                channel.send(batch)

            def other_thread() -> None:
                for number in range(20):
                    send_some(100 * number)

            await asyncio.to_thread(other_thread)
            channel.send([ops.WantKeys(["", 2000])])
            await until(lambda: len(node.recorders[0].ops) == 2001)
            assert [op.keys[-1] for op in node.recorders[0].ops] == list(range(2001))
            assert bool(direct) == sends_directly
            await channel.close()

    run(main())


@every_scheme
def test_a_handler_that_fails_ends_the_session_and_nothing_else(scheme: str) -> None:
    """Also when the batch that it fails at acknowledges what is kept for the peer."""

    def fail(channel: Any, _: list[Any]) -> None:
        raise ZeroDivisionError("the handler's own")

    async def main() -> None:
        told: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: told.append(context))
        async with listening(scheme) as (node, address):
            mine = Recorder(fail)
            channel = await dial(address, mine)
            channel.send([want(1)])
            await until(lambda: node.recorders[0].ops)
            node.channel.send([ops.DropData([1])])
            assert isinstance(await mine.ended(), ZeroDivisionError)
            error = await node.recorders[0].ended()
            assert error is not None
            assert "the handler's own" in str(error)
            await channel.close()
        assert not told

    run(main())


def test_what_comes_while_another_thread_sends_is_acknowledged() -> None:
    """A batch that the loop receives after the thread has looked what to acknowledge, and before it is done."""

    async def main() -> None:
        async with listening("tcp") as (node, address):
            channel = await dial(address, Recorder())
            loop = asyncio.get_running_loop()
            encode = channel._encode

            def encode_slowly(*batch: Any) -> Any:
                data = encode(*batch)
                came = channel.last_seq
                loop.call_soon_threadsafe(node.channel.send, [ops.DropData([1])])
                deadline = time.monotonic() + 10
                while channel.last_seq == came and time.monotonic() < deadline:
                    time.sleep(0.001)
                return data

            channel._encode = encode_slowly
            assert await asyncio.to_thread(channel.send_taken, lambda: [want(1)])
            channel._encode = encode
            await until(lambda: channel.queued_bytes == 0)
            await until(lambda: node.channel.queued_bytes == 0, lambda: "the batch was not acknowledged", timeout_s=5)
            await channel.close()

    run(main())
