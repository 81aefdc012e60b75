"""Graphs on a client: what nodes become, names, priorities, annotations, failures, size."""

from __future__ import annotations

import gc
import threading
import traceback

import pytest

dask = pytest.importorskip("dask", reason="needs the extra `dask`")

from dask._task_spec import Alias, DataNode, Dict, List, Set, Task, TaskRef, Tuple, fuse_linear_task_spec  # noqa: E402
from dask_graphs import add, fail_with, inc, note  # noqa: E402

from zmqtasks import Client, Future, LocalCluster, futures_of, get_client, wait  # noqa: E402
from zmqtasks.errors import ConfigError  # noqa: E402
from zmqtasks.integrations.dask import scheduler  # noqa: E402
from zmqtasks.integrations.dask.lowering import MAX_DEPTH, Lowering  # noqa: E402
from zmqtasks.integrations.dask.plans import run_plan  # noqa: E402
from zmqtasks.protocol.references import KeyRef  # noqa: E402


def names(client: Client) -> set[object]:
    """Keys that the client holds."""
    gc.collect()
    client._node.flush()
    return set(client._node.machine.states)


def test_legacy_graphs_and_nested_keys(client):
    graph = {"x": 1, ("y", 0): (add, "x", (inc, "x")), "z": [("y", 0), "x", "text"], "w": (sum, [("y", 0), "x"])}
    assert scheduler(graph, ["z", [["w"], ("y", 0)]]) == [[3, 1, "text"], [[4], 3]]
    assert scheduler(graph, "w") == 4


def test_task_specs_of_every_kind(client):
    graph = {
        "a": DataNode("a", 1),
        "b": Task("b", inc, TaskRef("a")),
        "list": Task("list", lambda x: x, List(TaskRef("b"), Tuple(TaskRef("a"), 5), Set(TaskRef("b")))),
        "dict": Task("dict", dict, Dict({"k": TaskRef("b"), "n": List(Task(None, inc, TaskRef("b")), 7)})),
        "kw": Task("kw", dict, x=TaskRef("a"), y=List(TaskRef("b"))),
        "nested": Task("nested", add, Task(None, inc, Task(None, inc, TaskRef("a"))), y=Task(None, inc, 10)),
        "alias": Alias("alias", "nested"),
        "bare": List(TaskRef("a"), 3),
    }
    assert scheduler(graph, ["list", "dict", "kw", "nested", "alias", "bare", "a"]) == [
        [2, (1, 5), {2}],
        {"k": 2, "n": [3, 7]},
        {"x": 1, "y": [2]},
        14,
        14,
        [1, 3],
        1,
    ]


def test_fused_tasks(client):
    chain = {"x0": Task("x0", inc, 0)} | {f"x{i}": Task(f"x{i}", inc, TaskRef(f"x{i - 1}")) for i in range(1, 200)}
    fused = fuse_linear_task_spec(chain, {"x199"})
    assert len(fused) < 3
    assert scheduler(fused, "x199") == 200
    square = Task.fuse(
        Task("p", inc, TaskRef("in")),
        Task("q", add, TaskRef("p"), TaskRef("p")),
        Task("r", add, TaskRef("q"), TaskRef("p")),
    )
    assert scheduler({"in": Task("in", inc, 1), "r": square}, "r") == 9
    outer = Task.fuse(square, Task("s", add, TaskRef("r"), TaskRef("in")))
    assert scheduler({"in": DataNode("in", 2), "s": outer}, "s") == 11


def test_a_fused_task_runs_each_part_once_and_drops_what_is_used_up():
    runs: list[str] = []

    def part(name: str, *_: object) -> str:
        runs.append(name)
        return name

    fused = Task.fuse(
        Task("a", part, "a"),
        Task("b", part, "b", TaskRef("a")),
        Task("c", part, "c", TaskRef("a"), TaskRef("b"), TaskRef("b")),
    )
    lowered = Lowering(lambda key: KeyRef(0), lambda future: KeyRef(0), lambda value: value).lower(fused)
    assert lowered.function is run_plan
    assert lowered.function(*lowered.args) == "c"
    assert runs == ["a", "b", "c"]
    assert MAX_DEPTH < 200


class Doubled(Task):
    """A class of somebody else, with its own way to run."""

    def __call__(self, values=()):
        return 2 * super().__call__(values)


def test_a_node_class_of_its_own_runs_itself(client):
    graph = {"a": DataNode("a", 3), "d": Doubled("d", inc, TaskRef("a"))}
    assert scheduler(graph, "d") == 8


def test_futures_and_scattered_data_in_graphs(client):
    future = client.submit(inc, 1)
    data = client.scatter([1, 2, 3], hash=False)
    table = client.scatter({"k": 5})["k"]
    assert scheduler({"x": (inc, future), "y": (add, "x", table), "z": future, "s": (sum, data)}, ["y", "z", "s"]) == [
        8,
        2,
        6,
    ]
    assert scheduler({"x": Task("x", sum, List(*data))}, "x") == 6
    assert dask.delayed(sum)([future, table, dask.delayed(inc)(future)]).compute() == 10


def test_get_of_the_client(client):
    graph = {"x": Task("x", inc, 1), "y": Task("y", add, TaskRef("x"), 5)}
    assert client.get(graph, [["x"], "y"]) == [[2], 7]
    assert [future.result() for future in client.get(graph, ["x", "y"], sync=False)] == [2, 7]
    value = dask.delayed(inc)(4)
    assert client.get(value.dask, value.key, retries=1) == 5
    plain = {"x": 1, "y": (sum, [{"k": "x"}["k"], 5])}
    assert client.get(plain, "y") == 6
    assert client.get(plain, "y", priority=3) == 6


def test_what_is_missing_is_named(client):
    with pytest.raises(KeyError, match="nowhere"):
        scheduler({"x": Task("x", inc, TaskRef("nowhere"))}, "x")
    with pytest.raises(ConfigError, match="no graph"):
        scheduler(5, "x")


def test_bulky_values_go_to_workers_as_data(client):
    big = b"x" * 1_000_000
    graph = {"big": DataNode("big", big), **{f"n{i}": Task(f"n{i}", len, TaskRef("big")) for i in range(5)}}
    graph["arg"] = Task("arg", len, big)
    graph["plan"] = Task("plan", add, Task(None, len, big), 1)
    assert scheduler(graph, ["n0", "n4", "arg", "plan"]) == [1_000_000, 1_000_000, 1_000_000, 1_000_001]
    assert scheduler({"big": DataNode("big", big)}, "big") == big


def test_nothing_is_kept_of_a_computed_graph(client, wait_until):
    before = names(client)
    assert scheduler({i: (inc, i - 1) if i else 0 for i in range(500)}, 499) == 499
    wait_until(lambda: names(client) == before)
    wait_until(lambda: not client.who_has() or set(client.who_has()) <= before)


def test_an_unpicklable_graph_leaves_nothing_behind(client, wait_until):
    before = names(client)
    with pytest.raises(Exception, match="cannot be pickled"):
        scheduler({"a": (inc, 1), "b": (add, "a", threading.Lock())}, "b")
    wait_until(lambda: names(client) == before)


def test_errors_come_with_their_traceback(client):
    value = dask.delayed(add)(dask.delayed(fail_with)("no luck"), 1)
    with pytest.raises(ValueError, match="no luck") as caught:
        value.compute()
    assert "fail_with" in "".join(traceback.format_tb(caught.value.__traceback__))
    future = client.compute(value)
    assert isinstance(future.exception(), ValueError)


def test_persisted_keys_feed_later_graphs(client, tmp_path):
    def runs() -> int:
        return len((tmp_path / "part").read_text().splitlines())

    value = dask.delayed(note)(str(tmp_path / "part"), "part")
    kept = value.persist()
    (future,) = futures_of(kept)
    assert future.key == value.key
    wait(kept)
    assert dask.delayed(len)(kept).compute() == 4
    assert dask.delayed(len)(value).compute() == 4  # the same key: known as long as the future lives
    assert value.persist().compute() == "part"
    assert runs() == 1
    del kept, future
    gc.collect()
    assert value.compute() == "part"
    assert runs() == 2


def test_the_same_key_again_after_its_release(client):
    for value in range(20):
        future = client.compute(dask.delayed(inc, pure=False)(value, dask_key_name="again"))
        assert future.result() == value + 1
        del future


def test_compute_gives_futures(client):
    a, b = dask.delayed(inc)(1), dask.delayed(inc)(2)
    future = client.compute(a)
    assert isinstance(future, Future)
    assert [client.compute([a, b, 7])[i] for i in (2,)] == [7]
    assert client.gather(client.compute([a, b])) == [2, 3]
    assert client.compute(a, sync=True) == 2
    assert client.compute({"k": [a, b]}).result() == {"k": [2, 3]}
    assert client.submit(inc, client.compute(a)).result() == 3


def ask_in_a_task() -> int:
    return get_client().submit(inc, 1).result()


def test_the_configuration_goes_with_the_clients_of_tasks_too():
    before = dask.config.get("scheduler", None)
    with LocalCluster(processes=False, n_workers=2) as cluster, Client(cluster) as client:
        assert client.submit(ask_in_a_task).result() == 2
        assert dask.config.get("scheduler", None) is not None
    assert dask.config.get("scheduler", None) is before


def test_the_configuration_goes_with_the_client(inprocess_cluster):
    assert dask.config.get("scheduler", None) is None
    with dask.config.set({"dataframe.shuffle.method": "disk"}), Client(inprocess_cluster) as client:
        assert "zmqtasks" in repr(dask.base.get_scheduler())
        assert dask.config.get("dataframe.shuffle.method") == "disk"
        with Client(inprocess_cluster) as second:
            assert futures_of(dask.delayed(inc)(1).persist())[0].client is second
        assert dask.delayed(inc)(1).compute() == 2
        assert dask.delayed(inc)(1).compute(scheduler="sync") == 2
        assert dask.delayed(inc)(1).compute(scheduler=client) == 2
    assert dask.config.get("scheduler", None) is None
    with Client(inprocess_cluster, set_as_default=False):
        assert dask.config.get("scheduler", None) is None


def test_a_graph_of_many_tasks(client):
    n = 20_000
    graph = {("x", i): Task(("x", i), inc, i) for i in range(n)}
    level, keys = 0, list(graph)
    while len(keys) > 1:
        level += 1
        parents = [(f"s{level}", i) for i in range((len(keys) + 9) // 10)]
        for i, key in enumerate(parents):
            graph[key] = Task(key, sum, List(*map(TaskRef, keys[10 * i : 10 * i + 10])))
        keys = parents
    assert scheduler(graph, keys[0]) == sum(range(1, n + 1))
