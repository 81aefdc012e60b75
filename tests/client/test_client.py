"""Clients and futures on a real cluster: submit, map, results, keys."""

from __future__ import annotations

import gc
import os
import pickle
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import client_tasks as tasks
import numpy as np
import pytest

import zmqtasks
from zmqtasks import (
    CancelledError,
    Client,
    ClusterKey,
    Future,
    LocalCluster,
    Security,
    TaskTimeoutError,
    default_client,
    fire_and_forget,
    get_client,
)
from zmqtasks.errors import (
    AuthenticationError,
    ClientClosedError,
    ConfigError,
    ConnectError,
    KeyConflictError,
    SerializationError,
)
from zmqtasks.scheduler_file import SchedulerFile, write_scheduler_file

Eventually = Callable[[Callable[[], object]], None]


def test_submit_and_result(client: Client) -> None:
    future = client.submit(tasks.inc, 1)
    assert future.result(timeout=10) == 2
    assert (future.status, future.done(), future.cancelled(), future.exception()) == ("finished", True, False, None)
    assert future.type is int
    assert future.client is client
    assert str(future.key).startswith("inc-")
    assert "finished" in repr(future)
    assert "finished" in future._repr_html_()


def test_map_and_gather(client: Client) -> None:
    assert client.gather(client.map(tasks.inc, range(3000))) == list(range(1, 3001))
    assert client.gather(client.map(tasks.add, range(3), [10, 20, 30, 40])) == [10, 21, 32]
    assert client.gather(client.map(tasks.add, iter([1, 2]), y=5)) == [6, 7]
    assert client.map(tasks.inc, []) == []


def test_futures_in_containers_are_inputs(client: Client) -> None:
    a, b = client.submit(tasks.inc, 0), client.submit(tasks.inc, 1)
    args = client.submit(tasks.keywords, [a, (b, 3)], {"x": {a}}, key_a=a, other=[[b]]).result(10)
    assert args == (([1, (2, 3)], {"x": {1}}), {"key_a": 1, "other": [[2]]})
    assert client.submit(tasks.total, client.map(tasks.inc, range(2000))).result(10) == 2_001_000
    futures = client.map(tasks.inc, range(10))
    assert client.gather(client.map(tasks.add, futures, futures[::-1])) == [11] * 10
    assert client.gather(client.map(tasks.add, futures, y=a)) == list(range(2, 12))
    assert client.gather(client.map(tasks.add, futures, range(10))) == list(range(1, 20, 2))


def test_futures_elsewhere_arrive_live_and_are_kept(client: Client) -> None:
    future = client.submit(tasks.open_box, tasks.Box(client.submit(tasks.inc, 41)))
    gc.collect()
    assert future.result(20) == 42


def test_a_function_that_holds_a_future(client: Client) -> None:
    future = client.submit(tasks.inc, 1)
    assert client.submit(lambda x: x + future.result(), 10).result(20) == 12


def test_results_that_hold_futures(client: Client) -> None:
    inner = client.submit(tasks.make_future, 5).result(20)
    assert isinstance(inner, Future)
    assert inner.result(10) == 6


def test_gather_keeps_the_containers(client: Client) -> None:
    a, b = client.map(tasks.inc, [0, 1])
    assert client.gather({"a": a, "b": [b, (a, 5)], "c": {b}}) == {"a": 1, "b": [2, (1, 5)], "c": {2}}
    assert client.gather(iter([a, b])) == [1, 2]
    assert client.gather((a,)) == (1,)
    assert client.gather(a) == 1
    assert client.gather([]) == []


def test_gather_skips_or_raises(client: Client) -> None:
    good, bad = client.submit(tasks.inc, 1), client.submit(tasks.fail)
    assert client.gather([bad, good], errors="skip") == [2]
    assert client.gather({"x": bad, "y": good}, errors="skip") == {"y": 2}
    assert client.gather(bad, errors="skip") is None
    with pytest.raises(ValueError, match="no"):
        client.gather([good, bad])
    with pytest.raises(ConfigError, match="errors='maybe'"):
        client.gather([good], errors="maybe")


def test_gather_raises_as_soon_as_one_has_failed(client: Client, tmp_path: Path) -> None:
    slow = client.submit(tasks.wait_for, str(tmp_path / "go"))
    with pytest.raises(ValueError, match="no"):
        client.gather([slow, client.submit(tasks.fail)])
    assert not slow.done()
    (tmp_path / "go").touch()


def test_large_results_are_fetched(client: Client) -> None:
    futures = client.map(tasks.blob, [100_000] * 6 + [10])
    assert list(map(len, client.gather(futures))) == [100_000] * 6 + [10]
    assert len(futures[0].result(10)) == 100_000
    assert futures[0].type is None


def test_each_result_is_a_fresh_object(client: Client) -> None:
    future = client.submit(tasks.keywords, [1])
    first = future.result(10)
    first[0][0].append(2)
    assert future.result(10) == (([1],), {})


@pytest.mark.parametrize("size", [10, 200_000])
def test_bulky_arguments_go_to_workers_and_may_change_afterwards(client: Client, size: int) -> None:
    array = np.ones(size)
    futures = [client.submit(tasks.sum_array, array) for _ in range(3)]
    futures += client.map(tasks.add, [1.0, 2.0], y=array)[:0]
    array[:] = 7
    assert client.gather(futures) == [size] * 3
    big = list(range(50_000))
    assert client.submit(tasks.total, big).result(20) == sum(big)
    assert client.gather(client.map(len, [big, "x" * 200_000, b"y" * 100_000])) == [50_000, 200_000, 100_000]


def test_bulky_containers_with_futures(client: Client) -> None:
    a = client.submit(tasks.inc, 0)
    args, kwargs = client.submit(tasks.keywords, [a, np.zeros(20_000)], text="x" * 100_000, n=a).result(20)
    assert args[0][0] == 1
    assert args[0][1].shape == (20_000,)
    assert (len(kwargs["text"]), kwargs["n"]) == (100_000, 1)


def test_bulky_data_is_sent_once_for_a_map_and_dropped_at_the_end(client: Client, eventually: Eventually) -> None:
    table = np.ones(50_000)
    futures = client.map(tasks.keywords, range(20), table=table)
    assert all(kwargs["table"].sum() == 50_000 for _, kwargs in client.gather(futures))
    data = [key for key in client.nbytes() if str(key).startswith("task-")]
    assert len(data) <= 1
    del futures
    eventually(lambda: not client._node.machine.payloads)


def test_large_functions(client: Client) -> None:
    text = "z" * 200_000
    assert client.gather(client.map(lambda i: len(text) + i, range(3))) == [200_000, 200_001, 200_002]
    assert client.submit(lambda: text[:3]).result(10) == "zzz"


def test_async_functions(client: Client) -> None:
    assert client.submit(tasks.async_inc, 1).result(10) == 2


def test_kwargs_named_like_options_of_concurrent_futures(client: Client) -> None:
    with client.get_executor() as pool:
        assert pool.submit(tasks.keywords, 1, key=2, workers=3).result(10) == ((1,), {"key": 2, "workers": 3})
        assert list(pool.map(tasks.add, [1, 2], [3, 4], timeout=10)) == [4, 6]
        with pytest.raises(ValueError, match="no"):
            pool.submit(tasks.fail).result(10)
    with pytest.raises(RuntimeError, match="after shutdown"):
        pool.submit(tasks.inc, 1)
    with pytest.raises(ConfigError, match="no options nice"):
        client.get_executor(nice=1)


# Keys


def test_named_tasks_are_shared(client: Client, cluster: LocalCluster) -> None:
    future = client.submit(tasks.inc, 1, key="shared")
    again = client.submit(tasks.inc, 1, key="shared")
    assert future == again
    assert again.result(10) == 2
    with pytest.raises(KeyConflictError, match="'shared' is in use"):
        client.submit(tasks.inc, 2, key="shared")
    assert future.result(10) == 2
    with Client(cluster, set_as_default=False) as other:
        assert Future("shared", client=other).result(10) == 2
        assert other.submit(tasks.inc, 1, key="shared").result(10) == 2
        there = other.submit(tasks.add, 1, 2, key=("shared", 1))
        assert there.result(10) == 3  # submissions of two clients have no order but that of waiting
        conflict = client.submit(tasks.add, 1, 3, key=("shared", 1))
        with pytest.raises(KeyConflictError):
            conflict.result(10)
        assert there.result(10) == 3


def test_a_name_is_free_after_release(client: Client) -> None:
    for value in range(20):
        assert client.submit(tasks.inc, value, key="again").result(10) == value + 1


def test_keys_come_back_as_they_were_given(client: Client) -> None:
    keys: list[Any] = [1, 1.0, True, ("x", 0, 1.5), "#x", "inc-3.4#"]
    futures = [client.submit(tasks.keywords, n, key=key) for n, key in enumerate(keys)]
    assert [future.key for future in futures] == keys
    assert list(map(type, (future.key for future in futures))) == list(map(type, keys))
    assert client.gather(futures) == [((n,), {}) for n in range(len(keys))]
    named = client.map(tasks.inc, [1, 2], key=["one", "two"])
    assert [future.key for future in named] == ["one", "two"]
    assert str(client.map(tasks.inc, [1], key="prefix")[0].key).startswith("prefix-")
    with pytest.raises(ConfigError, match="1 keys for 2 tasks"):
        client.map(tasks.inc, [1, 2], key=["one"])


def test_pure_tasks_run_once(client: Client, tmp_path: Path) -> None:
    array = np.ones(20_000)
    a = client.submit(tasks.sum_array, array, pure=True)
    b = client.submit(tasks.sum_array, array.copy(), pure=True)
    assert a == b
    assert b.result(10) == 20_000
    assert client.submit(tasks.inc, 1) != client.submit(tasks.inc, 1)
    many = client.map(tasks.inc, [1, 1, 2], pure=True)
    assert many[0] == many[1] != many[2]
    assert client.gather(many) == [2, 2, 3]


def test_futures_travel_by_pickle(client: Client, cluster: LocalCluster) -> None:
    future = client.submit(tasks.inc, 1)
    data = pickle.dumps(future)
    same = pickle.loads(data)
    assert same == future
    with Client(cluster) as other:
        there = pickle.loads(data)
        assert there.client is other
        assert there.result(10) == 2
        assert there.key == future.key
        assert other.submit(tasks.inc, there).result(10) == 3


def test_a_released_future_is_of_no_use(client: Client, eventually: Eventually) -> None:
    future = client.submit(tasks.inc, 1)
    again = pickle.loads(pickle.dumps(future))
    future.release()
    assert again.result(10) == 2
    with pytest.raises(CancelledError, match="was released"):
        future.result()
    again.release()
    eventually(lambda: not client._node.machine.states)


def test_futures_in_results_belong_to_who_asked(client: Client, cluster: LocalCluster) -> None:
    with Client(cluster, set_as_default=False) as other:
        inner = other.submit(tasks.make_future, 5).result(20)
        assert inner.client is other
        assert inner.result(10) == 6
        assert other.submit(tasks.result_of, other.submit(tasks.make_future, 5)).result(20) == 6


def test_unknown_keys_are_lost(client: Client) -> None:
    future: Future[int] = Future("nobody-knows-this", client=client)
    with pytest.raises(Exception, match="unknown to the scheduler"):
        future.result(10)
    assert future.status == "lost"


def test_dropped_futures_are_released(client: Client, eventually: Eventually) -> None:
    futures = client.map(tasks.inc, range(100))
    client.gather(futures)
    assert len(client._node.machine.states) >= 100
    del futures
    eventually(lambda: not client._node.machine.states)
    eventually(lambda: client.who_has() == {})


def test_fire_and_forget(client: Client, tmp_path: Path, eventually: Eventually) -> None:
    fire_and_forget(client.submit(tasks.touch, str(tmp_path / "done"), client.submit(tasks.inc, 1)))
    eventually((tmp_path / "done").exists)


# Steering


def test_cancel(client: Client, tmp_path: Path) -> None:
    blocked = client.submit(tasks.wait_for, str(tmp_path / "go"))
    after = client.submit(tasks.inc, blocked)
    blocked.cancel(reason="not today")
    assert blocked.cancelled()
    with pytest.raises(CancelledError, match="not today"):
        blocked.result(10)
    with pytest.raises(CancelledError):
        after.result(10)
    (tmp_path / "go").touch()


def test_retry(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "file"
    future = client.submit(tasks.fail_until, str(path))
    after = client.submit(tasks.keywords, future)
    with pytest.raises(FileNotFoundError):
        after.result(10)
    path.touch()
    after.retry()
    assert after.result(10) == (("there",), {})
    assert future.result(10) == "there"


def test_retries(client: Client, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no"):
        client.submit(tasks.fail, retries=2).result(10)


def test_restrictions_and_resources(client: Client) -> None:
    address = sorted(client.nthreads())[1]
    futures = client.map(tasks.keywords, range(8), workers=address)
    client.gather(futures)
    assert {tuple(holders) for holders in client.who_has(futures).values()} == {(address,)}
    with pytest.raises(ConfigError, match="allow_other_workers"):
        client.submit(tasks.inc, 1, allow_other_workers=True)
    assert client.submit(tasks.inc, 1, workers=["nowhere"], allow_other_workers=True).result(10) == 2
    waiting = client.submit(tasks.inc, 1, resources={"moon": 1})
    with pytest.raises(TaskTimeoutError, match=r"did not end within 0.1 s"):
        waiting.result(timeout=0.1)


def test_refused_arguments(client: Client) -> None:
    with pytest.raises(TypeError, match="must be callable, got 3"):
        client.submit(3)  # type: ignore[arg-type]
    with pytest.raises(SerializationError):
        client.submit(tasks.inc, threading.Lock())
    with pytest.raises(ConfigError, match="retries=-1"):
        client.submit(tasks.inc, 1, retries=-1)
    with pytest.raises(ConfigError, match="not a time"):
        client.submit(tasks.inc, 1).result(timeout="soon")
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(client)


# Beginning and end


def test_repr_never_asks(client: Client, cluster: LocalCluster) -> None:
    assert repr(client).startswith(f"<Client: '{cluster.scheduler_address}' workers=2 threads=4 memory=")
    assert "<table>" in client._repr_html_()


def test_a_closed_client_says_so(cluster: LocalCluster, tmp_path: Path) -> None:
    client = Client(cluster)
    future = client.submit(tasks.wait_for, str(tmp_path / "go"))
    done = client.submit(tasks.inc, 1)
    assert done.result(10) == 2
    client.close()
    client.close()
    (tmp_path / "go").touch()
    assert future.cancelled()
    assert done.result() == 2
    with pytest.raises(CancelledError, match="was closed"):
        future.result()
    with pytest.raises(ClientClosedError, match="make a new one"):
        client.submit(tasks.inc, 1)
    assert "status=closed" in repr(client)


def test_closing_wakes_who_waits(cluster: LocalCluster, tmp_path: Path, eventually: Eventually) -> None:
    client = Client(cluster)
    future = client.submit(tasks.wait_for, str(tmp_path / "go"))
    seen: list[str] = []

    def wait() -> None:
        try:
            future.result()
        except CancelledError as exc:
            seen.append(str(exc))

    thread = threading.Thread(target=wait)
    thread.start()
    eventually(lambda: future._state.waiters)
    client.close()
    thread.join(10)
    assert seen == [f"{future.key}: the client was closed"]
    (tmp_path / "go").touch()


def test_default_clients(cluster: LocalCluster) -> None:
    with Client(cluster) as first:
        with Client(cluster) as second:
            assert default_client() is get_client() is second
        assert default_client() is first
        with Client(cluster, set_as_default=False):
            assert default_client() is first


def test_wrong_addresses_and_keys(cluster: LocalCluster) -> None:
    with pytest.raises(ConnectError):
        Client("tcp://127.0.0.1:9", security=Security(ClusterKey.generate()), timeout=0.3)
    with pytest.raises(AuthenticationError):
        Client(cluster.scheduler_address, security=Security(ClusterKey.generate()))
    with pytest.raises(ConfigError, match="n_workers"):
        Client(cluster.scheduler_address, n_workers=3)
    with pytest.raises(ConfigError, match="address=7"):
        Client(7)


def test_a_client_waits_for_its_scheduler(tmp_path: Path) -> None:
    path = tmp_path / "scheduler.json"
    with pytest.raises(ConfigError, match="no scheduler file"):
        Client(scheduler_file=path)
    made: list[str] = []

    def connect() -> None:
        with Client(scheduler_file=path, timeout=20, set_as_default=False) as client:
            made.append(client.address)

    thread = threading.Thread(target=connect)
    thread.start()
    with LocalCluster(n_workers=1, threads_per_worker=1, protocol="zmq") as cluster:
        key = cluster.security.key
        assert key is not None
        write_scheduler_file(path, SchedulerFile(cluster.scheduler_address, key=key.hex()))
        thread.join(20)
        assert made == [cluster.scheduler_address]


def test_a_client_waits_for_the_key_and_needs_no_scheme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, made = tmp_path / "cluster.key", tmp_path / "made"
    monkeypatch.setenv("ZMQTASKS_KEY_FILE", str(path))
    connected: list[str] = []
    with LocalCluster(n_workers=0, protocol="tcp") as cluster:

        def connect() -> None:
            address = cluster.scheduler_address.removeprefix("tcp://")
            with Client(address, timeout=20, set_as_default=False) as client:
                connected.append(client.address)

        thread = threading.Thread(target=connect)
        thread.start()
        assert cluster.security.key is not None
        made.touch(0o600)
        made.write_text(cluster.security.key.hex())
        made.rename(path)
        thread.join(20)
        assert connected == [cluster.scheduler_address]


def test_what_tasks_print_in_this_process_appears_once(capsys: pytest.CaptureFixture[str]) -> None:
    with Client(processes=False, threads_per_worker=1) as client:
        client.submit(zmqtasks.print, "a line").result(10)
        client.run(os.getpid)  # what the task sent has come by now
    assert capsys.readouterr().out == "a line\n"


def test_running_out_of_time_without_workers_says_so() -> None:
    with LocalCluster(n_workers=0, processes=False) as cluster, Client(cluster) as client:
        future = client.submit(pow, 2, 3)
        with pytest.raises(TaskTimeoutError, match="no workers"):
            future.result(timeout=0.01)


def test_a_client_owns_the_cluster_it_makes() -> None:
    with Client(processes=False, threads_per_worker=2) as client:
        assert client.submit(tasks.inc, 1).result(10) == 2
        assert client.submit(tasks.fib, 6).result(20) == 8
        array = np.ones(100_000)
        assert client.submit(tasks.sum_array, array).result(10) == 100_000
    assert client.cluster.status == "closed"


def test_many_threads_share_a_client(client: Client) -> None:
    results: list[int] = []

    def work(n: int) -> None:
        results.extend([client.submit(tasks.add, n, i).result(20) for i in range(20)])

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(results) == sorted(n + i for n in range(8) for i in range(20))


def test_backlog_makes_submitting_wait(client: Client) -> None:
    start = time.monotonic()
    futures = client.map(len, [b"x" * 60_000] * 2_000)
    assert sum(client.gather(futures)) == 120_000_000
    assert time.monotonic() - start < 60
