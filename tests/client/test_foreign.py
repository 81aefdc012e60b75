"""Futures of other clients: those of other clusters are refused, those of the same cluster are inputs like one's own."""

from __future__ import annotations

import asyncio
import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from client_tasks import Box, fail_until, inc, make_future, open_box, wait_for

import zmqtasks
from tests.recording_proxy import recording_proxy
from zmqtasks import Client, Future, LocalCluster, Queue, Variable
from zmqtasks.errors import ConfigError, DeserializationError
from zmqtasks.fetching import gather_async


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[LocalCluster]:
    """Another cluster: the keys of its first client are those of the first client of `here`."""
    with LocalCluster(processes=False, n_workers=1) as cluster:
        yield cluster


@pytest.fixture
def stranger(elsewhere: LocalCluster) -> Iterator[Client]:
    with Client(elsewhere, set_as_default=False) as client:
        yield client


def closing_over(future: Future[Any]) -> Callable[[], Any]:
    return lambda: future.result()


USES = {
    "argument": lambda client, future: client.submit(inc, future),
    "one of two arguments": lambda client, future: client.submit(max, 1, future),
    "keyword": lambda client, future: client.submit(pow, base=future, exp=2),
    "pure": lambda client, future: client.submit(inc, future, pure=True),
    "in a list": lambda client, future: client.submit(sum, [1, future]),
    "in an object": lambda client, future: client.submit(open_box, Box(future)),
    "in a large object": lambda client, future: client.submit(open_box, Box([future, b"-" * 300_000])),
    "in a closure": lambda client, future: client.submit(closing_over(future)),
    "column": lambda client, future: client.map(inc, [future, future]),
    "row of a map": lambda client, future: client.map(max, [1, 2], [3, future]),
    "actor": lambda client, future: client.submit(Box, future, actor=True),
    "graph": lambda client, future: client.get({"x": (inc, future)}, "x"),
    "variable": lambda client, future: Variable("foreign", client=client).set({"it": future}),
    "queue": lambda client, future: Queue("foreign", client=client).put(future),
    "dataset": lambda client, future: client.publish_dataset(foreign=future),
    "question": lambda client, future: client.who_has([future]),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_future_of_another_cluster_is_refused(client: Client, stranger: Client, use: Callable[..., Any]) -> None:
    theirs = stranger.submit(pow, 2, 10)
    with pytest.raises(
        ConfigError, match=r"the future 'pow-.*' belongs to a client of the cluster at inproc"
    ) as caught:
        use(client, theirs)
    assert client._node.address in str(caught.value)
    assert client.submit(inc, client.submit(pow, 3, 3)).result(timeout=20) == 28
    assert theirs.result(timeout=20) == 1024


@pytest.mark.parametrize("name", ["argument", "in an object", "column", "variable"])
def test_a_future_of_a_closed_client_is_refused(cluster: LocalCluster, client: Client, name: str) -> None:
    with Client(cluster, set_as_default=False) as closed:
        future = closed.submit(inc, 1)
        assert future.result(timeout=20) == 2
    with pytest.raises(ConfigError, match="belongs to a client that has ended"):
        USES[name](client, future)
    assert isinstance(client.story(future), list)  # to ask about it is allowed


def test_a_pickle_is_opened_by_a_client_of_its_cluster_or_refused(client: Client, elsewhere: LocalCluster) -> None:
    with LocalCluster(processes=False, n_workers=1) as gone, Client(gone, set_as_default=False) as its_client:
        made = its_client.submit(inc, 1), its_client.submit(Box, 1, actor=True).result(timeout=20)
        pickles = list(map(pickle.dumps, made))
        assert client is zmqtasks.get_client()
        future, actor = map(pickle.loads, pickles)
        assert (future.client, actor._future.client) == (its_client, its_client)
        assert copy.deepcopy([future])[0].result(timeout=20) == 2
    for data in pickles:
        with pytest.raises(DeserializationError, match="belongs to another cluster than the client in charge here"):
            pickle.loads(data)


def test_what_is_cancelled_or_tried_again_is_that_of_its_own_client(
    cluster: LocalCluster, client: Client, tmp_path: Path
) -> None:
    new = partial(LocalCluster, processes=False, n_workers=1)
    with new() as one, new() as two, Client(one) as first, Client(two) as second:
        theirs, mine = first.submit(wait_for, str(tmp_path / "gate")), second.submit(inc, 1)
        assert theirs._state.key == mine._state.key
        second.cancel(theirs)
        (tmp_path / "gate").touch()
        assert theirs.cancelled()
        assert mine.result(timeout=20) == 2
        assert second.submit(inc, mine).result(timeout=20) == 3
        failed, fine = first.submit(fail_until, str(tmp_path / "there")), second.submit(inc, 2)
        assert isinstance(failed.exception(timeout=20), FileNotFoundError)
        (tmp_path / "there").touch()
        second.retry(failed)
        assert failed.result(timeout=20) == "there"
        assert fine.result(timeout=20) == 3
    with Client(cluster, set_as_default=False) as other:
        waiting = other.submit(wait_for, str(tmp_path / "never"))
        client.cancel(waiting)
        assert waiting.cancelled()
        (tmp_path / "never").touch()


def test_results_of_two_clusters_are_gathered_together() -> None:
    new = partial(LocalCluster, processes=False, n_workers=1)
    with new() as one, new() as two, Client(one) as first, Client(two) as second:
        clients = (first, second)
        for size in (10, 100_000):  # small results come by themselves, larger ones are fetched
            futures = [client.submit(np.full, size, number) for number, client in enumerate(clients)]
            assert futures[0]._state.key == futures[1]._state.key
            assert [value[0] for value in first.gather(futures)] == [0, 1]
            assert [value[0] for value in second.gather(futures[::-1])] == [1, 0]
            assert [value[0] for value in asyncio.run(gather_async(futures, "raise"))] == [0, 1]
        actors = [client.submit(Box, number, actor=True).result(timeout=20) for number, client in enumerate(clients)]
        assert actors[0].key == actors[1].key
        assert actors[0] != actors[1]
        futures = [client.submit(make_future, number) for number, client in enumerate(clients)]
        assert [future.client for future in first.gather(futures)] == [first, second]


@pytest.fixture(scope="module")
def reached_over_tcp(workers_import: None) -> Iterator[LocalCluster]:
    with LocalCluster(n_workers=1, protocol="tcp") as cluster:
        yield cluster


class HeldLink:
    """A client whose messages are held back on their way to the scheduler while `open` is not set."""

    def __init__(self, client: Client, is_open: threading.Event) -> None:
        self.client = client
        self.open = is_open

    def hold(self, seconds: float = 0.3) -> None:
        """From now on, for a while."""
        self.open.clear()
        threading.Timer(seconds, self.open.set).start()


@pytest.fixture
def held(reached_over_tcp: LocalCluster) -> Iterator[HeldLink]:
    address = reached_over_tcp.scheduler_address
    loop, is_open = asyncio.new_event_loop(), threading.Event()
    is_open.set()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def run(coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(20)

    way = recording_proxy("127.0.0.1", int(address.rpartition(":")[2]))
    proxy = run(way.__aenter__())
    proxy.change = lambda data: data if is_open.wait(20) else b""
    try:
        with Client(
            f"tcp://127.0.0.1:{proxy.port}", security=reached_over_tcp.security, set_as_default=False
        ) as client:
            yield HeldLink(client, is_open)
    finally:
        run(way.__aexit__(None, None, None))
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


WAITING = ["argument", "keyword", "pure", "in a list", "in an object", "in a closure", "column", "graph", "variable"]


@pytest.mark.parametrize("name", WAITING)
def test_what_another_client_has_not_sent_yet_is_waited_for(
    reached_over_tcp: LocalCluster, held: HeldLink, name: str
) -> None:
    with Client(reached_over_tcp) as client:
        held.hold()
        future = held.client.submit(inc, 19)
        used = USES[name](client, future)
        del future
        result = client.gather(used if name != "variable" else Variable("foreign", client=client).get(timeout=20)["it"])
    expected = {"keyword": 400, "in an object": 20, "in a closure": 20, "column": [21, 21], "variable": 20}
    assert result == expected.get(name, 21)


def test_it_is_waited_for_in_a_notebook_too(reached_over_tcp: LocalCluster, held: HeldLink) -> None:
    """There the code of the cells runs in a loop, blocking calls and all."""

    async def cell() -> int:
        return client.submit(inc, future).result(timeout=20)

    with Client(reached_over_tcp) as client:
        held.hold()
        future = held.client.submit(inc, 1)
        assert asyncio.run(cell()) == 3


@pytest.mark.parametrize("name", ["argument", "pure", "in a list", "in an object", "column"])
def test_what_another_client_drops_meanwhile_is_kept(reached_over_tcp: LocalCluster, held: HeldLink, name: str) -> None:
    with Client(reached_over_tcp) as other:
        future = other.submit(inc, 19)
        assert future.result(timeout=20) == 20
        held.hold()
        used = USES[name](held.client, future)
        del future
        other.who_has()  # when it is answered, the scheduler knows what the other client has dropped up to now
        assert held.client.gather(used) == {"in an object": 20, "column": [21, 21]}.get(name, 21)


def test_clients_that_dialled_different_addresses_are_of_one_cluster(reached_over_tcp: LocalCluster) -> None:
    address = reached_over_tcp.scheduler_address.replace("127.0.0.1", "localhost")
    with Client(reached_over_tcp) as one:
        assert address != one._node.address
        with Client(address, security=reached_over_tcp.security, set_as_default=False) as other:
            assert other.submit(inc, one.submit(inc, 1)).result(timeout=20) == 3


def test_asynchronous_clients_wait_for_nothing(cluster: LocalCluster, client: Client) -> None:
    async def use() -> int:
        async with Client(cluster, asynchronous=True, set_as_default=False) as other:
            theirs = client.submit(inc, 1)
            await theirs
            mine = other.submit(inc, theirs)
            return await other.submit(inc, other.submit(inc, mine))

    assert asyncio.run(use()) == 5
