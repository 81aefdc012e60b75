"""The listening side against everything that may knock: strangers, other versions, other clusters, the silent, the many."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from typing import Any

import pytest

from tests.links import CONFIG, LISTEN, SCHEMES, SECURITY, Node, Recorder, dial, listening, run, until
from zmqtasks.errors import (
    AddressError,
    AuthenticationError,
    CommError,
    ConnectError,
    ConnectionRefusedByPeerError,
    ConnectTimeoutError,
    SecurityError,
    VersionMismatchError,
)
from zmqtasks.ids import new_instance_id, new_session_id
from zmqtasks.nodes import acceptor as acceptor_module
from zmqtasks.nodes import links, versions
from zmqtasks.nodes.channel import DataPool
from zmqtasks.protocol import handshake, ops
from zmqtasks.protocol.frames import CONTROL_LIMITS
from zmqtasks.protocol.handshake import LinkRequest
from zmqtasks.security import ClusterKey, Security
from zmqtasks.transports import registry
from zmqtasks.transports.base import Comm

every_scheme = pytest.mark.parametrize("scheme", SCHEMES)
between_processes = pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme != "inproc"])
OTHER = Security(ClusterKey.generate())


class Bare:
    """A comm without a handshake: what a stranger has."""

    def __init__(self, comm: Comm) -> None:
        self.comm = comm
        self.messages: list[list[memoryview]] = []
        self.ended: Exception | None = None
        comm.start(self)

    @classmethod
    async def to(cls, address: str) -> Bare:
        return cls(await registry.connect(address, links.link_settings(CONFIG, Security.none())))

    def message_received(self, frames: list[memoryview]) -> None:
        self.messages.append(frames)

    def comm_ended(self, error: Exception) -> None:
        self.ended = error


def faster(**changes: Any) -> Any:
    return dataclasses.replace(CONFIG, **changes)


@between_processes
def test_wrong_key_is_told_to_both(scheme: str, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with listening(scheme) as (node, address):
            with pytest.raises(AuthenticationError, match=f"{address}: .*need the same key"):
                await dial(address, Recorder(), security=OTHER)
            assert node.recorders == []
            channel = await dial(address, Recorder())
            await channel.close()

    run(main())
    (line,) = [record for record in caplog.records if "turned away" in record.message]
    assert "need the same key" in line.message
    assert line.exc_info is None


@every_scheme
def test_old_version_is_told_to_both(
    scheme: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with listening(scheme) as (_, address):
            bare = await Bare.to(address)
            bare.comm.send([handshake._hello.pack(b"zmqtasks", 0, 1, 1, SECURITY.cluster_id, b"n" * 32)])
            await until(lambda: bare.ended)
            answer = bytes(bare.messages[0][0])
            assert b"speaks version 0, the accepting side version 1" in answer
            with pytest.raises(VersionMismatchError, match="version 0, the accepting side version 1"):
                raise handshake._read_refusal_untrusted(answer, 1)
            await bare.comm.close()

    run(main())
    assert "speaks version 0, the accepting side version 1" in caplog.text


def test_inproc_links_need_no_key_and_others_do() -> None:
    async def main() -> None:
        async with listening("inproc", security=Security.none()) as (_, address):
            channel = await dial(address, Recorder(), security=OTHER)
            await channel.close()
        node = Node(security=Security.none())
        with pytest.raises(SecurityError, match=r"tcp://\S+ can be reached from other processes"):
            await node.acceptor.listen(LISTEN["tcp"])
        with pytest.raises(SecurityError, match="can be reached from other processes"):
            await dial("tcp://127.0.0.1:1", Recorder(), security=Security.none())
        await node.close()

    run(main())


@every_scheme
def test_refusal_reaches_the_node_with_its_reason(scheme: str) -> None:
    async def main() -> None:
        async with listening(scheme) as (node, address):
            node.refusal = "the name 'test' is taken"
            with pytest.raises(ConnectionRefusedByPeerError, match=f"{address}: the name 'test' is taken"):
                await dial(address, Recorder())
            node.refusal = ""
            channel = await dial(address, Recorder())
            await channel.close()

    run(main())


def test_error_in_admit_turns_the_node_away_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with listening("tcp") as (_, address):
            pool = DataPool(security=SECURITY, config=CONFIG, instance_id=new_instance_id(), name="p")
            with pytest.raises(ConnectionRefusedByPeerError, match="error on the accepting side"):
                await pool.get(address, [1])
            await pool.close()

    run(main())
    assert "named no data_handler" in caplog.text


@pytest.mark.parametrize("allowed", [True, False])
def test_versions_that_differ_are_told_in_one_line(
    allowed: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = faster(allow_other_python=allowed)
    theirs = {**versions.own_versions(), "python": "3.99.1", "numpy": "1.0"}
    request = LinkRequest(ops.ClientIntroduction("old", 1, "h"), new_instance_id(), new_session_id(), versions=theirs)

    async def main() -> None:
        async with listening("tcp", config=config) as (node, address):
            dialing = links.dial(address, request, security=SECURITY, config=config, limits=CONTROL_LIMITS)
            if not allowed:
                with pytest.raises(ConnectionRefusedByPeerError, match="allow_other_python is off") as caught:
                    await dialing
                line = str(caught.value)
            else:
                dialed = await dialing
                (line,) = dialed.welcome.warnings
                assert node.peers[0].warnings == [line]
                assert dialed.welcome.versions == versions.own_versions()
                await dialed.comm.close()
            assert "the client old (there)" in line
            assert f"python 3.99.1 there, {versions.own_versions()['python']} here" in line
            assert "numpy 1.0 there" in line
            assert "msgspec" not in line

    run(main())
    assert "python 3.99.1 there" in caplog.text


def test_patch_releases_of_python_are_the_same() -> None:
    ours = {"python": "3.11.7", "numpy": "2.0"}
    assert versions.version_warnings("x", {"python": "3.11.2", "numpy": "2.0"}, ours) == []
    assert versions.version_warnings("x", {}, ours) == []
    assert versions.same_python({}, ours)
    assert not versions.same_python({"python": "3.12.7"}, ours)


@every_scheme
def test_silent_stranger_is_dropped_in_time(scheme: str, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with listening(scheme, config=faster(handshake_timeout_s=0.1)) as (_, address):
            bare = await Bare.to(address)
            await until(lambda: bare.ended)

    run(main())
    assert "not finished within 0.1 s" in caplog.text


@every_scheme
def test_listener_that_never_answers_is_a_timeout(scheme: str) -> None:
    async def main() -> None:
        comms: list[Comm] = []
        listener = await registry.listen(LISTEN[scheme], comms.append)
        with pytest.raises(ConnectTimeoutError, match=f"{listener.address} took the connection and did not finish"):
            await dial(listener.address, Recorder(), config=faster(handshake_timeout_s=0.2))
        for comm in comms:
            comm.abort()
        await listener.close()

    run(main())


@every_scheme
def test_listener_that_hangs_up_is_named(scheme: str) -> None:
    async def main() -> None:
        listener = await registry.listen(LISTEN[scheme], lambda comm: comm.abort("not wanted"))
        with pytest.raises(ConnectError, match=listener.address):
            await dial(listener.address, Recorder())
        await listener.close()

    run(main())


@every_scheme
def test_nobody_there(scheme: str) -> None:
    async def main() -> None:
        async with listening(scheme) as (_, address):
            pass
        with pytest.raises(ConnectError, match=address):
            await dial(address, Recorder())
        with pytest.raises(AddressError):
            await dial("nonsense", Recorder())

    run(main())


@every_scheme
def test_half_open_handshakes_are_bounded_and_the_oldest_goes(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceptor_module, "HALF_OPEN", 5)

    async def main() -> None:
        async with listening(scheme) as (node, address):
            bare = []
            for _ in range(9):
                bare.append(await Bare.to(address))
                await until(lambda: len(node.acceptor._inside) == min(len(bare), 5))
            await until(lambda: sum(stranger.ended is not None for stranger in bare) == 4)
            assert [stranger.ended is not None for stranger in bare] == [True] * 4 + [False] * 5
            channel = await dial(address, Recorder())
            await channel.close()
            for stranger in bare:
                await stranger.comm.close()

    run(main())


def test_log_lines_about_strangers_are_limited(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with listening("tcp") as (_, address):
            for _ in range(40):
                bare = await Bare.to(address)
                bare.comm.send([b"nonsense" * 4])
                await until(lambda bare=bare: bare.ended)  # type: ignore[misc]
                await bare.comm.close()

    with caplog.at_level(logging.INFO):
        run(main())
    lines = [record.message for record in caplog.records if record.name == acceptor_module.__name__]
    assert len(lines) == acceptor_module.LINES_PER_PERIOD + 1
    assert lines[-1].startswith("turned away 30 more peers")


@every_scheme
def test_stranger_hears_why_before_the_link_closes(scheme: str) -> None:
    async def main() -> None:
        async with listening(scheme) as (_, address):
            bare = await Bare.to(address)
            bare.comm.send([b"GET / HTTP/1.1\r\n\r\n"])
            await until(lambda: bare.ended)
            assert b"does not speak the zmqtasks protocol" in bytes(bare.messages[0][0])
            await bare.comm.close()

    run(main())


@every_scheme
def test_closing_while_somebody_is_in_the_handshake(scheme: str) -> None:
    async def main() -> None:
        async with listening(scheme) as (node, address):
            bare = await Bare.to(address)
            await until(lambda: node.acceptor._inside)
            await node.acceptor.close()
            await until(lambda: bare.ended)
            assert node.acceptor.addresses == []

    run(main())


@every_scheme
def test_cancelled_dial_leaves_nothing(scheme: str) -> None:
    async def main() -> None:
        comms: list[Comm] = []
        listener = await registry.listen(LISTEN[scheme], comms.append)
        dialing = asyncio.ensure_future(dial(listener.address, Recorder()))
        await until(lambda: comms)
        stranger = Bare(comms[0])
        await until(lambda: stranger.messages)
        dialing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await dialing
        await until(lambda: stranger.ended)
        assert isinstance(stranger.ended, CommError)
        await listener.close()

    run(main())


def test_several_addresses_at_once() -> None:
    async def main() -> None:
        async with listening("tcp") as (node, first):
            second = await node.acceptor.listen("inproc://several")
            third = await node.acceptor.listen(LISTEN["zmq"])
            assert node.acceptor.addresses == [first, second, third]
            channels = [await dial(address, Recorder()) for address in (first, second, third)]
            assert [peer.crosses_processes for peer in node.peers] == [True, False, True]
            for channel in channels:
                await channel.close()

    run(main())
