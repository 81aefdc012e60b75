"""Conformance: the death of a peer process, its freezing, and a cut cable, each told for what it is."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import signal

import pytest

from zmqtasks.errors import CommBrokenError, CommClosedError
from zmqtasks.protocol.frames import MIB
from zmqtasks.testing.comms import Recorder, wait_until
from zmqtasks.testing.conformance_base import OPEN, ConformanceBase, PeerProcess
from zmqtasks.testing.netns import cable, can_make_namespaces
from zmqtasks.transports import Comm, LinkSettings

_FROZEN_S = 10.0
_KILL_NOTICED_S = 2.0
_HEARTBEAT_S = 3.0
_CUT_NOTICED_S = 2 * _HEARTBEAT_S + 1
_PATIENT = dataclasses.replace(OPEN, heartbeat_s=20.0)


class PeerProcessTests(ConformanceBase):
    """Ends that another process brings about."""

    def test_close_of_a_process(self) -> None:
        """A process that closes in good order has closed, not broken."""
        self.needs(crosses_processes=True)

        async def test() -> None:
            async with self.peer_process("close") as (comm, peer):
                here = Recorder(comm)
                error = await here.wait_end()
                assert isinstance(error, CommClosedError)
                assert error.by == "peer"
                assert here.contents() == [[b"message %d" % number] for number in range(3)]
                assert (await peer.last_words()).startswith("CommClosedError by=local")

        self.run(test())

    @pytest.mark.parametrize("role", ["echo", "listen-echo", "source", "stall"])
    def test_kill_is_a_break(self, role: str) -> None:
        """`kill -9` of the peer is noticed within 2 s, whoever connected, and whatever was under way."""
        self.needs(crosses_processes=True)

        async def test() -> None:
            async with self.peer_process(role) as (comm, peer):
                here = Recorder(comm)
                for _ in range(100 if role == "stall" else 1):
                    comm.send([bytes(MIB)])
                if role != "stall":
                    await here.wait_messages(1)
                peer.send_signal(signal.SIGKILL)
                assert isinstance(await here.wait_end(_KILL_NOTICED_S), CommBrokenError)
                with pytest.raises(CommBrokenError):
                    comm.send([b"x"])
                await comm.close()
                assert len(here.ends) == 1

        self.run(test())

    def test_abort_here_breaks_the_peer(self) -> None:
        """The other process sees our abort as a break, our close as a close."""
        self.needs(crosses_processes=True)

        async def test() -> None:
            async with self.peer_process("echo") as (comm, peer):
                Recorder(comm)
                comm.abort()
                assert (await peer.last_words()).startswith("CommBrokenError")
            async with self.peer_process("echo") as (comm, peer):
                Recorder(comm)
                await comm.close()
                assert (await peer.last_words()).startswith("CommClosedError by=peer")

        self.run(test())

    def test_frozen_peer_is_not_broken(self) -> None:
        """A process stopped for 10 s: idle, with a full queue towards it, and as it was sending; then all goes on."""
        self.needs(crosses_processes=True)
        settings = dataclasses.replace(OPEN, heartbeat_s=self.frozen_heartbeat_s)

        async def test() -> None:
            async with contextlib.AsyncExitStack() as stack:
                idle, idle_peer = await stack.enter_async_context(self.peer_process("echo", settings))
                flooded, flooded_peer = await stack.enter_async_context(self.peer_process("echo", settings))
                fed, fed_peer = await stack.enter_async_context(self.peer_process("source", settings))
                recorders = [Recorder(comm) for comm in (idle, flooded, fed)]
                await recorders[2].wait_messages(1)
                peers = (idle_peer, flooded_peer, fed_peer)
                for peer in peers:
                    peer.send_signal(signal.SIGSTOP)
                for _ in range(64):
                    flooded.send([bytes(MIB)])
                await asyncio.sleep(_FROZEN_S)  # the time itself is what is tested
                assert [recorder.ends for recorder in recorders] == [[], [], []]
                for peer in peers:
                    peer.send_signal(signal.SIGCONT)
                idle.send([b"are you there?"])
                await recorders[0].wait_messages(1)
                await recorders[1].wait_messages(64)
                await recorders[2].wait_messages(len(recorders[2].messages) + 1)

        self.run(test())


class CutLinkTests(ConformanceBase):
    """A link that loses every packet, and says nothing."""

    def test_cut_link(self) -> None:
        """Noticed on both sides within about `heartbeat_s`: idle, with data in flight, and towards a peer that reads
        nothing.

        A link with more patience outlives the same cut.
        """
        self.needs(detects_cut_link=True, crosses_hosts=True, uses_ip=True)
        if not can_make_namespaces():
            pytest.skip("needs root, ip and nft")
        settings = dataclasses.replace(OPEN, heartbeat_s=_HEARTBEAT_S)

        async def test() -> None:
            with cable() as wire:
                async with contextlib.AsyncExitStack() as stack:

                    async def peer_across(role: str, settings: LinkSettings) -> tuple[Comm, PeerProcess]:
                        opened = self.peer_process(role, settings, wire.prefix, wire.here)
                        return await stack.enter_async_context(opened)

                    comms = [await peer_across(role, settings) for role in ("echo", "echo", "stall", "source")]
                    patient, _ = await peer_across("echo", _PATIENT)
                    recorders = [Recorder(comm) for comm, _peer in comms]
                    patient_recorder = Recorder(patient)
                    busy, stalled = comms[1][0], comms[2][0]
                    for _ in range(32):
                        stalled.send([bytes(MIB)])
                    await self._let_pass(comms[0][0], recorders[0])
                    wire.cut()
                    busy.send([b"into the void"])
                    patient.send([b"late, but it arrives"])
                    for recorder in recorders:
                        error = await recorder.wait_end(_CUT_NOTICED_S)
                        assert isinstance(error, CommBrokenError), repr(error)
                    for _comm, peer in (comms[0], comms[1], comms[3]):
                        assert (await peer.last_words(_CUT_NOTICED_S)).startswith("CommBrokenError")
                    assert not patient_recorder.ends
                    wire.mend()
                    await patient_recorder.wait_messages(1)

        self.run(test())

    async def _let_pass(self, comm: Comm, recorder: Recorder) -> None:
        """Sees to it that the link works, so that what comes later is due to the cut."""
        comm.send([b"before"])
        await wait_until(lambda: len(recorder.messages) == 1, "the link never worked")
