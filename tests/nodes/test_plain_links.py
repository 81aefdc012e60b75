"""Links between hosts without encryption, on a network that is trusted: who does not hold the key still gets nowhere.

Somebody who can change packets on the way is not kept out of these (docs/security.md says so): nothing is claimed here.
"""

from __future__ import annotations

import asyncio
import importlib.util
import secrets
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.links import CONFIG, SECURITY, Node, run
from zmqtasks.errors import AuthenticationError, CommError, ConnectError
from zmqtasks.ids import new_instance_id, new_session_id
from zmqtasks.nodes.links import dial, link_settings
from zmqtasks.nodes.versions import own_versions
from zmqtasks.protocol import ops
from zmqtasks.protocol.frames import CONTROL_LIMITS
from zmqtasks.protocol.handshake import NONCE_BYTES, ConnectorHandshake, LinkRequest
from zmqtasks.security import ClusterKey, Security
from zmqtasks.testing.comms import Recorder, wait_until
from zmqtasks.testing.conformance_base import end
from zmqtasks.transports import connect, known_schemes

ROOT = Path(__file__).parents[2]
TRUSTING = Security(SECURITY.key, "off")


def request() -> LinkRequest:
    return LinkRequest(
        ops.ClientIntroduction("test", 1, "here"),
        instance=new_instance_id(),
        session=new_session_id(),
        versions=own_versions(),
    )


async def at_a_node(scheme: str, test: Callable[[Node, str], object]) -> None:
    node = Node(security=TRUSTING)
    try:
        await test(node, await node.acceptor.listen(f"{scheme}://127.0.0.1:0"))  # type: ignore[misc]
    finally:
        await node.close()


@pytest.mark.parametrize("scheme", ["tcp", "zmq", "ucx"])
@pytest.mark.parametrize("attack", ["a_stranger_without_the_key", "a_replayed_hello"])
def test_who_lacks_the_key_gets_nowhere(attack: str, scheme: str) -> None:
    if scheme != "ucx":
        globals()[attack](scheme)
        return
    if "ucx" not in known_schemes() or importlib.util.find_spec("ucxx") is None:
        pytest.skip("needs the extra: pip install 'zmqtasks[ucx]'")
    # UCX keeps descriptors and threads for the rest of a process.
    program = f"from tests.nodes.test_plain_links import {attack}; {attack}({scheme!r})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def a_stranger_without_the_key(scheme: str) -> None:
    async def test(node: Node, address: str) -> None:
        stranger = Security(ClusterKey.generate(), "off")
        with pytest.raises((AuthenticationError, ConnectError)):
            await dial(address, request(), security=stranger, config=CONFIG, limits=CONTROL_LIMITS)
        assert not node.peers
        assert not node.recorders

    run(at_a_node(scheme, test))


def a_replayed_hello(scheme: str) -> None:
    """Every message of a handshake that succeeded, sent again by somebody who recorded it."""

    async def test(node: Node, address: str) -> None:
        settings = link_settings(CONFIG, TRUSTING)
        key = TRUSTING.key
        assert key is not None
        shake = ConnectorHandshake(
            request(), cluster_id=key.cluster_id, link_key=key.link_key, nonce=secrets.token_bytes(NONCE_BYTES)
        )
        friend = await connect(address, settings)
        assert not friend.encrypted
        here = Recorder(friend)
        recorded = [shake.start()]
        friend.send(recorded[0])
        for answers in range(1, 4):
            await here.wait_messages(answers)
            if (following := shake.receive(here.messages[-1])) is not None:
                recorded.append(following)
                friend.send(following)
        assert shake.done
        assert len(node.peers) == 1
        await end(friend)

        stranger = await connect(address, settings)
        there = Recorder(stranger)
        for message in recorded:
            if not there.ends:
                stranger.send(message)
            await asyncio.sleep(0)
        assert isinstance(await there.wait_end(), CommError)
        await wait_until(lambda: len(node.acceptor.channels) <= 1, "the replay has a channel")
        assert len(node.peers) == 1
        await end(stranger)

    run(at_a_node(scheme, test))
