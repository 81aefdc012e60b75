"""The handshake: one table of cases drives both sides, without any link between them."""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
import pytest

from zmqtasks.errors import (
    AuthenticationError,
    ConnectionRefusedByPeerError,
    LocalProtocolError,
    ProtocolError,
    RemoteProtocolError,
    SchedulerLostError,
    VersionMismatchError,
    ZmqTasksError,
)
from zmqtasks.protocol import ops
from zmqtasks.protocol.handshake import (
    AcceptorHandshake,
    ConnectorHandshake,
    LinkRequest,
    RefusalCode,
    Role,
    Welcome,
    error_for_refusal,
)
from zmqtasks.security import ClusterKey

KEY = ClusterKey(b"k" * 32)
OTHER = ClusterKey(b"o" * 32)
REQUEST = LinkRequest(ops.ClientIntroduction("me", 1, "here"), b"i" * 16, b"s" * 16, versions={"python": "3.11.7"})
WELCOME = Welcome(KEY.cluster_id, 9, b"s" * 16, False, 0, 3, b"a" * 16)

Message = list[bytes]
Tamper = Callable[[int, Message], Message]


def connector(
    key: ClusterKey = KEY, request: LinkRequest = REQUEST, cluster_id: bytes = b"", nonce: bytes = b"c" * 32
) -> ConnectorHandshake:
    return ConnectorHandshake(request, cluster_id=cluster_id or key.cluster_id, link_key=key.link_key, nonce=nonce)


def acceptor(key: ClusterKey = KEY, nonce: bytes = b"a" * 32) -> AcceptorHandshake:
    return AcceptorHandshake(cluster_id=key.cluster_id, link_key=key.link_key, nonce=nonce)


@dataclass
class Meeting:
    """What came of two sides that talked until the end."""

    connector: ConnectorHandshake
    acceptor: AcceptorHandshake
    connector_error: ZmqTasksError | None = None
    acceptor_error: ZmqTasksError | None = None
    messages: list[Message] = field(default_factory=list)


def meet(dialing: ConnectorHandshake, listening: AcceptorHandshake, tamper: Tamper | None = None) -> Meeting:
    """Passes messages, numbered from 0, between the sides; an error's farewell is passed on too."""
    meeting = Meeting(dialing, listening)
    message: Message | None = dialing.start()
    to_acceptor = True
    while message is not None:
        meeting.messages.append(message)
        if tamper is not None:
            message = tamper(len(meeting.messages) - 1, message)
        side = listening if to_acceptor else dialing
        try:
            answer = side.receive(message)
        except ZmqTasksError as exc:
            if to_acceptor:
                meeting.acceptor_error = exc
            else:
                meeting.connector_error = exc
            answer = side.farewell
            side.farewell = None
            if meeting.connector_error is not None and meeting.acceptor_error is not None:
                break
        else:
            if answer is None and to_acceptor:
                answer = listening.accept(WELCOME)
        message, to_acceptor = answer, not to_acceptor
    return meeting


def at(number: int, change: Callable[[Message], Message]) -> Tamper:
    return lambda index, message: change(message) if index == number else message


def overwrite(position: int, data: bytes) -> Callable[[Message], Message]:
    return lambda message: [message[0][:position] + data + message[0][position + len(data) :], *message[1:]]


HELLO, CHALLENGE, PROOF, PROVEN, INTRODUCTION, WELCOMED = range(6)
VERSION, KIND, ROLE, CLUSTER, NONCE, PROOF_OF_ACCEPTOR = 8, 10, 11, 12, 28, 60
AUTH, REMOTE, VERSIONS = AuthenticationError, RemoteProtocolError, VersionMismatchError


@dataclass
class Case:
    name: str
    connector_error: type[ZmqTasksError]
    acceptor_error: type[ZmqTasksError]
    says: str
    """In both errors."""
    tamper: Tamper | None = None
    dialing: Callable[[], ConnectorHandshake] = connector
    listening: Callable[[], AcceptorHandshake] = acceptor


CASES = [
    Case("wrong key", AUTH, AUTH, "need the same key", dialing=lambda: connector(OTHER)),
    Case(
        "wrong key, cluster id of the right one",
        AUTH,
        AUTH,
        "need the same key",
        dialing=lambda: connector(OTHER, cluster_id=KEY.cluster_id),
    ),
    Case(
        "stranger that ignores the challenge's proof",
        ProtocolError,
        AUTH,
        "key",
        tamper=at(PROOF, overwrite(43, b"\0" * 32)),
    ),
    Case("old connector", VERSIONS, VERSIONS, "version 0, the accepting side version 1", at(HELLO, overwrite(VERSION, b"\0\0"))),
    Case("new connector", VERSIONS, VERSIONS, "version 770, the accepting side version 1", at(HELLO, overwrite(VERSION, b"\3\2"))),
    Case("old acceptor", VERSIONS, VERSIONS, "version 1, the accepting side version 0", at(CHALLENGE, overwrite(VERSION, b"\0\0"))),
    Case("unknown role", ProtocolError, REMOTE, "unknown role 9", at(HELLO, overwrite(ROLE, b"\x09"))),
    Case("in the role of an acceptor", ProtocolError, REMOTE, "unknown role 0", at(HELLO, overwrite(ROLE, b"\0"))),
    Case("another role than vouched for", AUTH, AUTH, "need the same key", at(HELLO, overwrite(ROLE, b"\x02"))),
    Case("another protocol", ProtocolError, REMOTE, "began with b'GET / HT'", at(HELLO, lambda _: [b"GET / HTTP/1.1\r\n\r\n"])),
    Case("connector's nonce changed", AUTH, AUTH, "need the same key", at(HELLO, overwrite(NONCE, b"x"))),
    Case("acceptor's nonce changed", AUTH, AUTH, "need the same key", at(CHALLENGE, overwrite(NONCE, b"x"))),
    Case("acceptor's proof changed", AUTH, AUTH, "need the same key", at(CHALLENGE, overwrite(PROOF_OF_ACCEPTOR, b"\0" * 32))),
    Case("acceptor of another cluster", AUTH, AUTH, "need the same key", at(CHALLENGE, overwrite(CLUSTER, b"\0" * 16))),
    Case("hello sent back", REMOTE, ProtocolError, "message 1 where CHALLENGE", at(CHALLENGE, lambda _: connector().start())),
    Case("introduction changed", AUTH, AUTH, "introduction is not the one", at(INTRODUCTION, lambda m: [m[0], m[1] + b"\xc0"])),
    Case("introduction left out", ProtocolError, REMOTE, "INTRODUCTION of 1 frames", at(INTRODUCTION, lambda m: m[:1])),
    Case("more frames", ProtocolError, REMOTE, "HELLO of 2 frames", at(HELLO, lambda m: [*m, b""])),
    Case("no frame", ProtocolError, REMOTE, "0 bytes that are no zmqtasks handshake", at(HELLO, lambda _: [])),
    Case(
        "introduction of another role",
        ProtocolError,
        REMOTE,
        "came in role client and introduces itself by NannyIntroduction",
        dialing=lambda: _lying_connector(ops.NannyIntroduction("n", 1, "h")),
    ),
    Case(
        "short ids",
        ProtocolError,
        REMOTE,
        r"ids of 3 \(instance\) and 0 \(session\) bytes",
        dialing=lambda: connector(request=LinkRequest(REQUEST.introduction, b"abc", b"")),
    ),
]  # fmt: skip


def _lying_connector(introduction: ops.Introduction) -> ConnectorHandshake:
    made = connector(request=msgspec.structs.replace(REQUEST, introduction=introduction))
    made._role = Role.CLIENT
    return made


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_both_sides_learn_what_is_wrong(case: Case) -> None:
    met = meet(case.dialing(), case.listening(), case.tamper)
    for error, kind in ((met.connector_error, case.connector_error), (met.acceptor_error, case.acceptor_error)):
        assert isinstance(error, kind), f"{error!r} is no {kind.__name__}"
        with pytest.raises(kind, match=case.says):
            raise error
    assert not met.connector.done


def test_welcome_that_is_none() -> None:
    met = meet(connector(), acceptor(), at(WELCOMED, lambda message: [message[0], b"\xc1"]))
    assert met.acceptor.done
    assert not met.connector.done
    with pytest.raises(RemoteProtocolError, match="WELCOME that cannot be read"):
        raise met.connector_error or AssertionError


@pytest.mark.parametrize("size", [0, 100_000])
def test_two_that_belong_together_meet(size: int) -> None:
    introduction = ops.WorkerIntroduction("w", 1, "h", "tcp://h:1", 2, 0, {}, held_keys=list(range(size)))
    request = msgspec.structs.replace(REQUEST, introduction=introduction, epoch=4, last_seq=17, resuming=True)
    met = meet(connector(request=request), acceptor())
    assert (met.connector_error, met.acceptor_error) == (None, None)
    assert met.connector.done
    assert met.acceptor.done
    assert met.connector.welcome == WELCOME
    assert met.acceptor.request == request
    before_proof = met.messages[:PROVEN]
    assert all(len(message) == 1 and len(message[0]) <= 128 for message in before_proof), "fixed and tiny"


def test_recorded_messages_prove_nothing() -> None:
    """A stranger who heard a whole handshake plays the connector's part again."""
    heard = meet(connector(), acceptor()).messages
    fresh = acceptor(nonce=b"b" * 32)
    assert fresh.receive(heard[HELLO]) is not None
    with pytest.raises(AuthenticationError, match="need the same key"):
        fresh.receive(heard[PROOF])
    assert not fresh.proven
    assert fresh.request is None


def test_recorded_acceptor_proves_nothing() -> None:
    heard = meet(connector(), acceptor()).messages
    fresh = connector(nonce=b"d" * 32)
    fresh.start()
    with pytest.raises(AuthenticationError, match="need the same key"):
        fresh.receive(heard[CHALLENGE])


def test_proof_sent_back_proves_nothing() -> None:
    """A stranger without the key gives the acceptor its own proof, in every shape it can."""
    stranger = connector(OTHER, cluster_id=KEY.cluster_id)
    listening = acceptor()
    challenge = listening.receive(stranger.start())
    assert challenge is not None
    proof = challenge[0][-32:]
    for digest in (hashlib.sha256(b"").digest(), b"\0" * 32, proof):
        listening = acceptor()
        listening.receive(stranger.start())
        with pytest.raises(AuthenticationError):
            listening.receive([struct.pack(">8sHB", b"zmqtasks", 1, 3) + digest + proof])
        assert not listening.proven


def test_acceptor_is_no_oracle_for_connectors() -> None:
    """A stranger in the middle asks a second acceptor for a proof over the first one's nonce: labels keep them apart."""
    first, second = acceptor(nonce=b"1" * 32), acceptor(nonce=b"2" * 32)
    stranger = connector(OTHER, cluster_id=KEY.cluster_id)
    challenge = first.receive(stranger.start())
    assert challenge is not None
    nonce = challenge[0][NONCE : NONCE + 32]
    answer = second.receive(
        connector(OTHER, cluster_id=KEY.cluster_id, nonce=nonce).start(),
    )
    assert answer is not None
    with pytest.raises(AuthenticationError):
        first.receive([struct.pack(">8sHB", b"zmqtasks", 1, 3) + b"\0" * 32 + answer[0][-32:]])


def test_one_in_the_middle_with_another_key_is_told_apart_by_both() -> None:
    victim, target = connector(), acceptor()
    middle_acceptor = AcceptorHandshake(cluster_id=KEY.cluster_id, link_key=OTHER.link_key, nonce=b"m" * 32)
    middle_connector = connector(OTHER, cluster_id=KEY.cluster_id, nonce=b"n" * 32)
    challenge = middle_acceptor.receive(victim.start())
    assert challenge is not None
    with pytest.raises(AuthenticationError, match="need the same key"):
        victim.receive(challenge)
    answer = target.receive(middle_connector.start())
    assert answer is not None
    with pytest.raises(AuthenticationError):
        middle_connector.receive(answer)
    # It goes on regardless, with the proof it can make.
    forged = middle_connector._proof(b"zmqtasks proof of the connecting side", b"\0" * 32)
    with pytest.raises(AuthenticationError, match="need the same key"):
        target.receive([struct.pack(">8sHB", b"zmqtasks", 1, 3) + b"\0" * 32 + forged])


@pytest.mark.parametrize("number", range(6))
def test_cut_messages(number: int) -> None:
    """Each message, cut at each byte, and with a byte too many: a named error on both sides."""
    whole = meet(connector(), acceptor()).messages[number][-1]

    def tampered(data: bytes) -> Meeting:
        return meet(connector(), acceptor(), at(number, lambda message: [*message[:-1], data]))

    for data in [whole[:size] for size in range(len(whole))] + [whole + b"\0"]:
        met = tampered(data)
        assert isinstance(met.connector_error, ProtocolError), data
        assert isinstance(met.acceptor_error, ProtocolError), data


def test_any_bytes_in_any_state_raise_only_named_errors() -> None:
    rng = random.Random(3)
    whole = meet(connector(), acceptor()).messages
    for _ in range(20_000):
        number = rng.randrange(6)
        data = bytearray(rng.choice(whole[number]))
        for _ in range(rng.choice((1, 2, 8))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        frames = [bytes(data[: rng.choice((len(data), rng.randrange(len(data)))) or None])]
        if len(whole[number]) == 2 and rng.random() < 0.8:
            frames = [whole[number][0], *frames]
        met = meet(connector(), acceptor(), at(number, lambda _, frames=frames: frames))  # type: ignore[misc]
        done = met.connector.done and met.acceptor.done
        assert done == (met.connector_error is None and met.acceptor_error is None)
        assert not done or frames == whole[number] or number == WELCOMED, "a change that was not noticed"


def test_acceptor_refuses_with_a_reason() -> None:
    for code, kind in (
        (RefusalCode.NOT_ADMITTED, ConnectionRefusedByPeerError),
        (RefusalCode.BUSY, ConnectionRefusedByPeerError),
        (RefusalCode.SESSION_UNKNOWN, SchedulerLostError),
        (RefusalCode.OTHER_EPOCH, SchedulerLostError),
        (77, ConnectionRefusedByPeerError),
    ):
        met_connector, met_acceptor = connector(), acceptor()
        proof = met_connector.receive(met_acceptor.receive(met_connector.start()) or [])
        introduction = met_connector.receive(met_acceptor.receive(proof or []) or [])
        assert met_acceptor.receive(introduction or []) is None
        refusal = [met_acceptor.refuse(RefusalCode.NOT_ADMITTED, "no\x1b[31m room\n" * 200)[0]]
        refusal[0] = refusal[0][:11] + bytes([code]) + refusal[0][12:]
        with pytest.raises(kind) as caught:
            met_connector.receive(refusal)
        text = str(caught.value)
        assert text.startswith("no [31m room no")
        assert len(text) <= 1024
        assert text.isprintable()
        assert type(error_for_refusal(code, "x")) is kind


def test_misuse_is_a_local_error() -> None:
    with pytest.raises(LocalProtocolError, match="nonce has 32 bytes"):
        connector(nonce=b"x")
    with pytest.raises(LocalProtocolError, match="no message of a handshake is due"):
        connector().receive([b""])
    met = meet(connector(), acceptor())
    with pytest.raises(LocalProtocolError, match="no message of a handshake is due"):
        met.acceptor.receive([b""])
