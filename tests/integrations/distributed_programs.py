"""What runs on a cluster of dask.distributed over zmq, in a process of its own: `python THIS PART`.

Every part ends by looking at what is left: comms that are open, sockets of ZeroMQ, warnings in the log.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
from distributed import Client, LocalCluster
from distributed.comm.core import Comm

from zmqtasks.integrations.distributed_comm import KeySecurity

DEADLINE_S = 30.0


def increase(number: int) -> int:
    return number + 1


def collections(client: Client) -> None:
    """An array, and a data frame that is shuffled between workers by p2p."""
    assert client.scheduler.address.startswith("zmq://")
    x = da.arange(90_000, chunks=7_000).reshape((300, 300)).rechunk((100, 75))
    assert (x + x.T).sum().compute() == 2 * sum(range(90_000))
    data = pd.DataFrame({"a": np.arange(20_000) % 17, "b": np.arange(20_000.0)})
    with dask.config.set({"dataframe.shuffle.method": "p2p", "dataframe.convert-string": False}):
        shuffled = dd.from_pandas(data, npartitions=8).shuffle("a", npartitions=5)
        parts = dask.compute(*shuffled.to_delayed())
    assert sum(map(len, parts)) == len(data)
    values = [set(part["a"]) for part in parts]
    assert sum(map(len, values)) == 17  # each value is in one part only


def local_cluster() -> None:
    """Nannies and workers as processes, links encrypted: collections, restart, a worker that is killed, close."""
    security = KeySecurity.temporary(require_encryption=True)
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with (
        LocalCluster(protocol="zmq://", security=security, **options) as cluster,
        Client(cluster) as client,
    ):
        assert all(worker.startswith("zmq://") for worker in client.scheduler_info()["workers"])
        assert all(comm.extra_info["encrypted"] for comm in Comm._instances)
        collections(client)
        client.restart(timeout=DEADLINE_S)
        assert sum(client.gather(client.map(increase, range(100)))) == 5050
        before = set(client.scheduler_info()["workers"])
        os.kill(min(client.run(os.getpid).values()), signal.SIGKILL)
        until(lambda: len(now := set(client.scheduler_info()["workers"])) == 2 and now != before)
        assert sum(client.gather(client.map(increase, range(1000, 1100)))) == sum(range(1001, 1101))


def through_a_file(path: str) -> None:
    """A cluster that the command line started; ends it."""
    until(lambda: os.path.exists(path))
    with Client(scheduler_file=path) as client:
        client.wait_for_workers(1, timeout=DEADLINE_S)
        collections(client)
        assert client._scheduler_identity["address"].startswith("zmq://")
        client.shutdown()


def until(condition: Any) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)


def nothing_is_left() -> None:
    from zmqtasks.transports.zeromq import sockets

    until(lambda: all(comm.closed() for comm in Comm._instances))
    until(lambda: sockets._context_of_process._users == 0)
    # One thread of pyzmq stays: it learns when ZeroMQ has sent what it was lent.
    until(lambda: not any(thread.name.startswith("zmqtasks") for thread in threading.enumerate()))


if __name__ == "__main__":
    if sys.argv[1] == "local":
        local_cluster()
    else:
        through_a_file(str(Path(sys.argv[2])))
    nothing_is_left()
