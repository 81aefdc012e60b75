"""Encrypted links against those who sniff, pretend, repeat and change: the same for all transports that encrypt."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import pytest

from tests.recording_proxy import RecordingProxy, recording_proxy
from zmqtasks.errors import CommError, ConnectError
from zmqtasks.testing.comms import Recorder, wait_until
from zmqtasks.testing.conformance_base import ENCRYPTED, OPEN, ConformanceBase, end
from zmqtasks.transports import PLAIN, Comm, Encryption, LinkSettings, connect, listen
from zmqtasks.transports.address import HostPort, parse_host_port

SECRET_WORDS = b"the launch code is 00000000, told to nobody "
OTHER_KEY = Encryption(secret=b"that of another cluster, or none", same_host=True)
WHERE_NEEDED = dataclasses.replace(ENCRYPTED, same_host=False)


def with_encryption(encryption: Encryption, **changes: Any) -> LinkSettings:
    return dataclasses.replace(OPEN, encryption=encryption, **changes)


@pytest.fixture(params=["tcp", "zmq"])
def links(request: pytest.FixtureRequest) -> EncryptedLinks:
    made = EncryptedLinks()
    made.scheme = request.param  # type: ignore[misc]
    made.needs(encrypts=True)
    return made


class EncryptedLinks(ConformanceBase):
    def at(self, proxy: RecordingProxy) -> str:
        return str(HostPort(self.scheme, "127.0.0.1", proxy.port))

    async def exchange(self, proxy: RecordingProxy, encryption: Encryption) -> None:
        """A link through the proxy over which the secret words go both ways, small and large; closed in good order."""
        ours = await connect(self.at(proxy), with_encryption(encryption))
        here = Recorder(ours)
        for words in (SECRET_WORDS, SECRET_WORDS * 5000):
            ours.send([words])
        await here.wait_messages(2)
        assert [len(message[0]) for message in here.messages] == [44, 220_000]
        await ours.close()


class Echo:
    """The listener's side: sends back what comes, and remembers whom it had to do with."""

    def __init__(self) -> None:
        self.recorders: list[Recorder] = []

    def __call__(self, comm: Comm) -> None:
        self.recorders.append(Recorder(comm, comm.send))

    async def close(self) -> None:
        for recorder in self.recorders:
            await end(recorder.comm)


@pytest.mark.parametrize("encryption", [ENCRYPTED, PLAIN], ids=["encrypted", "plain"])
def test_a_sniffed_link_shows_nothing(links: EncryptedLinks, encryption: Encryption) -> None:
    """The same words are found on the plain link: who looks there does see."""

    async def test() -> None:
        echo = Echo()
        async with links.listening(echo, with_encryption(encryption)) as listener:
            where = parse_host_port(listener.address)
            async with recording_proxy(where.host, where.port) as proxy:
                await links.exchange(proxy, encryption)
                passed = proxy.passed()
        await echo.close()
        assert len(passed) > 440_000
        for part in (SECRET_WORDS, b"launch code", SECRET_WORDS[20:]):
            assert (part in passed) == (encryption is PLAIN)
        assert encryption.secret is None or encryption.secret not in passed

    links.run(test())


def test_a_replayed_link_gets_nowhere(links: EncryptedLinks) -> None:
    """All that a node has sent, from its hello to its goodbye, sent again by somebody who recorded it."""

    async def test() -> None:
        echo = Echo()
        async with links.listening(echo, with_encryption(ENCRYPTED)) as listener:
            where = parse_host_port(listener.address)
            async with recording_proxy(where.host, where.port) as proxy:
                await links.exchange(proxy, ENCRYPTED)
            before = len(echo.recorders)
            reader, writer = await asyncio.open_connection(where.host, where.port)
            writer.write(bytes(proxy.sent))
            writer.write_eof()
            async with asyncio.timeout(10):
                try:
                    answer = await reader.read()
                except OSError:  # cut, perhaps before this side had said that it ends
                    answer = b""
            writer.close()
            assert SECRET_WORDS not in answer
            assert len(echo.recorders) == before, "the replay became a comm"
            assert sum(len(recorder.messages) for recorder in echo.recorders) == 2
        await echo.close()

    links.run(test())


def test_a_stranger_with_another_key_is_turned_away(links: EncryptedLinks) -> None:
    """It has seen what the listener presents to everybody, and does not have the secret."""

    async def test() -> None:
        echo = Echo()
        async with links.listening(echo, with_encryption(ENCRYPTED)) as listener:
            with pytest.raises(ConnectError) as caught:
                await connect(listener.address, with_encryption(OTHER_KEY, connect_timeout_s=2.0))
            assert listener.address in str(caught.value)
            friend = await connect(listener.address, with_encryption(ENCRYPTED))
            assert friend.encrypted
            assert len(echo.recorders) <= 1
            await end(friend)
        await echo.close()

    links.run(test())


def test_a_man_in_the_middle_with_a_key_of_his_own(links: EncryptedLinks) -> None:
    """He answers in the listener's place: nobody talks to him."""

    async def test() -> None:
        man = Echo()
        async with links.listening(man, with_encryption(OTHER_KEY)) as in_the_middle:
            with pytest.raises(ConnectError) as caught:
                await connect(in_the_middle.address, with_encryption(ENCRYPTED, connect_timeout_s=2.0))
            assert in_the_middle.address in str(caught.value)
        assert not any(recorder.messages for recorder in man.recorders)
        await man.close()

    links.run(test())


def test_what_is_changed_on_the_way_breaks_the_link(links: EncryptedLinks) -> None:
    async def test() -> None:
        echo = Echo()
        async with links.listening(echo, with_encryption(ENCRYPTED, heartbeat_s=2.0)) as listener:
            where = parse_host_port(listener.address)
            async with recording_proxy(where.host, where.port) as proxy:
                ours = await connect(links.at(proxy), with_encryption(ENCRYPTED, heartbeat_s=2.0))
                here = Recorder(ours)
                ours.send([SECRET_WORDS])
                await here.wait_messages(1)
                proxy.change = lambda data: data[:-1] + bytes([data[-1] ^ 1])
                ours.send([b"pay 10 to the bearer"])
                assert isinstance(await here.wait_end(), CommError)
                await wait_until(lambda: bool(echo.recorders[0].ends), "the listener's side lives on")
                assert [bytes(m[0]) for m in echo.recorders[0].messages] == [SECRET_WORDS]
                await end(ours)
        await echo.close()

    links.run(test())


@pytest.mark.parametrize(
    ("listener", "connector", "encrypted"),
    [
        (WHERE_NEEDED, WHERE_NEEDED, False),
        (WHERE_NEEDED, ENCRYPTED, True),
        (ENCRYPTED, WHERE_NEEDED, True),
        (ENCRYPTED, ENCRYPTED, True),
        (WHERE_NEEDED, PLAIN, False),
        (PLAIN, WHERE_NEEDED, False),
        (PLAIN, PLAIN, False),
    ],
)
def test_who_encrypts_on_one_host(listener: Encryption, connector: Encryption, encrypted: bool) -> None:
    """A link is encrypted when one side wants it and the other can; this one stays on the host."""
    links = EncryptedLinks()
    links.scheme = "tcp"  # type: ignore[misc]

    async def test() -> None:
        async with links.link(with_encryption(connector), with_encryption(listener)) as (ours, theirs):
            assert (ours.encrypted, theirs.encrypted) == (encrypted, encrypted)
            assert theirs.same_host
            ours.send([b"hello"])
            there = Recorder(theirs)
            await there.wait_messages(1)

    links.run(test())


@pytest.mark.parametrize(("listener", "encrypted"), [(WHERE_NEEDED, False), (ENCRYPTED, True)])
def test_a_zmq_listener_decides_on_one_host(listener: Encryption, encrypted: bool) -> None:
    """A caller that would do without encryption encrypts where it is asked to."""
    links = EncryptedLinks()
    links.scheme = "zmq"  # type: ignore[misc]

    async def test() -> None:
        async with links.link(with_encryption(WHERE_NEEDED), with_encryption(listener)) as (ours, theirs):
            assert (ours.encrypted, theirs.encrypted) == (encrypted, encrypted)
            assert ours.same_host
            assert theirs.same_host

    links.run(test())


@pytest.mark.parametrize(("listener", "connector"), [(ENCRYPTED, PLAIN), (PLAIN, ENCRYPTED)])
def test_one_side_only_is_told(
    links: EncryptedLinks, listener: Encryption, connector: Encryption, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        echo = Echo()
        there = await listen(links.listen_address(), echo, with_encryption(listener))
        with pytest.raises(ConnectError, match="--encryption") as caught:
            await connect(there.address, with_encryption(connector))
        assert there.address in str(caught.value)
        await there.close()
        told = caplog.text + "".join(str(error) for recorder in echo.recorders for error in recorder.ends)
        assert "--encryption" in told
        await echo.close()

    links.run(test())
