"""A node that listens until its standard input ends; run by tests as `python -m tests.listener_process SCHEME`.

The first line of its input is the cluster key. It prints its address, and `unpickled NAME` whenever anything in the
process looks a name up for a pickle: the first of these lines is its own doing, to show that it would be seen.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import sys
from typing import Any

import uvloop

from tests.links import LISTEN, Node, Recorder
from zmqtasks.config import Config
from zmqtasks.nodes.channel import DataServer
from zmqtasks.protocol import ops
from zmqtasks.security import ClusterKey, Security


def report(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "pickle.find_class":
        print("unpickled", ".".join(map(str, arguments)), flush=True)


def echo(channel: Any, batch: list[Any]) -> None:
    for op in batch:
        channel.send([ops.DropData(op.keys)])


async def main(scheme: str, key: str) -> None:
    store: dict[Any, Any] = {}
    node = Node(
        config=Config(handshake_timeout_s=2, heartbeat_s=5),
        security=Security(ClusterKey.from_hex(key)),
        make=lambda: Recorder(echo),
        data_server=DataServer(lambda keys: [(each, store.get(each)) for each in keys], store.update),
    )
    print("listens at", await node.acceptor.listen(LISTEN[scheme]), flush=True)
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), ended.set)
    await ended.wait()
    asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
    await node.close()
    print("closed in good order", flush=True)


if __name__ == "__main__":
    sys.addaudithook(report)
    pickle.loads(pickle.dumps(os.getcwd))
    uvloop.run(main(sys.argv[1], sys.stdin.readline()))
