"""dask's collections on clusters: arrays, dataframes, bags, xarray; annotations; processes that die."""

from __future__ import annotations

import operator
import os
import time

import pytest

dask = pytest.importorskip("dask", reason="needs the extra `dask`")
pytest.importorskip("pandas", reason="needs the extra `dask`")

import dask.array as da  # noqa: E402
import dask.bag as db  # noqa: E402
import dask.dataframe as dd  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
from dask_graphs import fail_until, fail_with, inc, kill_once, note, pid, wait_for_file  # noqa: E402

from zmqtasks import Client, LocalCluster, as_completed, futures_of, progress, wait  # noqa: E402
from zmqtasks.errors import ConfigError  # noqa: E402
from zmqtasks.integrations.dask import submission  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:The inplace keyword")  # dask's own calls of pandas
RNG = np.random.default_rng(7)


def table(rows: int = 1_000) -> pd.DataFrame:
    return pd.DataFrame(
        {"key": RNG.integers(0, 20, rows), "value": RNG.random(rows), "name": RNG.choice(["a", "b", "c"], rows)}
    )


def test_arrays(process_client):
    given = RNG.random((300, 200))
    x = da.from_array(given, chunks=(100, 60))
    np.testing.assert_allclose((x + 1).T.dot(x).compute(), (given + 1).T.dot(given))
    np.testing.assert_allclose(x.rechunk((50, 200)).mean(axis=0).compute(), given.mean(axis=0))
    np.testing.assert_allclose(da.overlap.overlap(x, depth=1, boundary="none").sum().compute(), _overlapped(given))
    total, least = dask.compute(x.sum(), x.min())
    assert np.isclose(total, given.sum())
    assert least == given.min()


def _overlapped(given: np.ndarray) -> float:
    x = da.from_array(given, chunks=(100, 60))
    return float(da.overlap.overlap(x, depth=1, boundary="none").sum().compute(scheduler="sync"))


def test_big_chunks_and_persist(process_client):
    x = da.random.default_rng(1).random((2_000, 2_000), chunks=(1_000, 1_000)).persist()
    futures = futures_of(x)
    assert len(futures) == 4
    assert {f.key for f in as_completed(futures)} == set(dask.core.flatten(x.__dask_keys__()))
    done, _ = wait(x)
    assert len(done) == 4
    progress(x, notebook=False)
    assert (x - x).compute().any() == np.False_
    y, z = dask.persist(x + 1, x + 2)
    assert np.isclose((z - y).sum().compute(), 4_000_000)


def test_dataframes(process_client, tmp_path):
    frame = table()
    df = dd.from_pandas(frame, npartitions=7)
    pd.testing.assert_series_equal(
        df.groupby("key").value.sum().compute().sort_index(), frame.groupby("key").value.sum(), check_dtype=False
    )
    assert dask.config.get("dataframe.shuffle.method") == "tasks"
    shuffled = df.shuffle("key", npartitions=5)
    parts = dask.compute(*shuffled.to_delayed())
    owners = [set(part.key) for part in parts]
    assert sum(map(len, owners)) == len(set().union(*owners)) == frame.key.nunique()
    other = pd.DataFrame({"key": range(20), "square": np.arange(20) ** 2})
    merged = df.merge(dd.from_pandas(other, npartitions=2), on="key").compute()
    assert merged.square.sum() == (frame.key**2).sum()
    df.to_parquet(tmp_path / "table")
    again = dd.read_parquet(tmp_path / "table")
    assert len(again) == len(frame)
    assert np.isclose(again[again.key > 5].value.mean().compute(), frame[frame.key > 5].value.mean())
    ordered = df.set_index("value").compute()
    assert ordered.index.is_monotonic_increasing
    kept = df.persist()
    assert len(futures_of(kept)) == 7
    assert np.isclose(kept.value.sum().compute(), frame.value.sum())


def test_bags(client, process_client):
    bag = db.from_sequence(range(1_000), npartitions=10)
    assert dict(bag.map(lambda x: x % 3).frequencies().compute()) == {0: 334, 1: 333, 2: 333}
    assert bag.map(inc).filter(lambda x: x % 2).fold(operator.add).compute() == sum(range(1, 1_001, 2))
    grouped = dict(bag.groupby(lambda x: x % 4).compute())
    assert {k: len(v) for k, v in grouped.items()} == {0: 250, 1: 250, 2: 250, 3: 250}


def test_xarray(process_client):
    xr = pytest.importorskip("xarray")
    data = xr.DataArray(RNG.random((40, 30)), dims=("t", "x"), coords={"t": range(40)}, name="v")
    chunked = data.chunk({"t": 10})
    xr.testing.assert_allclose(chunked.mean("t").compute(), data.mean("t"))
    kept = chunked.persist()
    assert len(futures_of(kept)) == 4
    xr.testing.assert_allclose((kept + 1).groupby(kept.t % 4).sum().compute(), (data + 1).groupby(data.t % 4).sum())


def test_tasks_run_in_the_workers(process_client):
    pids = set(dask.compute(*[dask.delayed(pid)(i) for i in range(20)]))
    assert os.getpid() not in pids


def test_annotations(process_client, tmp_path):
    worker = sorted(process_client.scheduler_info()["workers"])[0]
    with dask.annotate(workers=worker):
        chosen = [dask.delayed(pid)(i) for i in range(10)]
    assert len(set(dask.compute(*chosen, optimize_graph=False))) == 1
    with dask.annotate(retries=2):
        patient = dask.delayed(fail_until)(str(tmp_path / "patient"), 2)
    assert patient.compute(optimize_graph=False) == 2
    with pytest.raises(RuntimeError, match="attempt 0"):
        dask.delayed(fail_until)(str(tmp_path / "hasty"), 2).compute()
    assert dask.delayed(fail_until)(str(tmp_path / "option"), 1).compute(retries=1) == 1
    with dask.annotate(resources={"licence": 1}, workers="nobody", allow_other_workers=True):
        assert isinstance(dask.delayed(pid)().compute(optimize_graph=False), int)
    with dask.annotate(resources={"unheard-of": 1}):
        future = process_client.compute(dask.delayed(inc)(1), optimize_graph=False)
    assert not wait_a_moment(future)


def wait_a_moment(future: object) -> bool:
    try:
        wait(future, timeout=0.3)
    except TimeoutError:
        return False
    return True


def test_priorities_decide_what_runs_first(client, tmp_path):
    order, gate = tmp_path / "order", tmp_path / "gate"

    def tasks(name: str) -> list[object]:
        return [dask.delayed(note)(str(order), name, i) for i in range(200)]

    blockers = [client.submit(wait_for_file, str(gate)) for _ in range(4)]
    with dask.annotate(priority=-10):
        late = client.compute(tasks("late"), optimize_graph=False)
    with dask.annotate(priority=10):
        soon = client.compute(tasks("soon"), optimize_graph=False)
    client.processing()  # when it is answered, the scheduler has them all
    gate.write_text("")
    wait([late, soon, blockers])
    names = order.read_text().split()
    assert (len(names), names.count("soon")) == (400, 200)
    # A few may be with the worker before what is more urgent comes, and a task that has begun may be slow.
    assert names[:200].count("soon") >= 190


def test_a_worker_that_dies_while_a_collection_is_computed(tmp_path):
    with LocalCluster(n_workers=2, threads_per_worker=1, silence_logs="ERROR") as cluster, Client(cluster):
        x = da.ones((400, 400), chunks=(50, 50)).persist()
        total = dask.delayed(kill_once)(str(tmp_path / "killed"), (x + 1).sum())
        assert total.compute() == 2 * 400 * 400
        assert (tmp_path / "killed").exists()
        assert (x + 1).sum().compute() == 2 * 400 * 400


def test_collections_inside_of_tasks(process_client):
    kept = da.arange(100, chunks=10).persist()

    def total(array: da.Array) -> float:
        return float(array.sum().compute())

    assert process_client.submit(total, kept).result() == 4950
    assert process_client.submit(total, da.arange(10, chunks=5)).result() == 45


def test_errors_in_collections(process_client):
    x = da.ones((10, 10), chunks=5).map_blocks(lambda block: fail_with("bad block"), dtype=float)
    with pytest.raises(ValueError, match="bad block"):
        x.sum().compute()
    kept = x.persist()
    wait(kept)
    assert {future.status for future in futures_of(kept)} == {"error"}


def test_windows_follow_each_other(client, monkeypatch):
    monkeypatch.setattr(submission, "WINDOW", 7)
    x = da.from_array(np.arange(10_000).reshape(100, 100), chunks=10)
    assert (x + x.T).sum().compute() == 2 * np.arange(10_000).sum()
    assert dd.from_pandas(table(100), npartitions=5).groupby("key").value.count().sum().compute() == 100


def test_visualize_and_graphs_are_dasks_own(client):
    x = da.ones(10, chunks=5) + 1
    assert len(x.__dask_graph__()) >= 2
    assert futures_of(x) == []


async def use_it(cluster: object) -> None:
    async with Client(cluster, asynchronous=True) as client:
        value = dask.delayed(inc)(1)
        assert await client.compute(value) == 2
        assert await client.gather(client.compute([value, value])) == [2, 2]
        assert await client.get({"x": (inc, 1)}, "x") == 2
        with pytest.raises(RuntimeError, match="synchronous context"):
            value.compute()


def test_an_asynchronous_client(process_cluster):
    import asyncio

    asyncio.run(use_it(process_cluster))


def test_persisted_frames_of_two_clusters_are_two(inprocess_cluster, process_cluster):
    """dask takes equal expressions for the same object, and the keys of two clusters are alike."""
    given = table()
    with Client(inprocess_cluster):
        first = dd.from_pandas(given, npartitions=2).persist()
        assert len(first) == 1_000
    with Client(process_cluster) as client:
        second = dd.from_pandas(given, npartitions=2).persist()
        assert second._name != first._name
        assert len(second) == 1_000
        assert {future.client for future in futures_of(second)} == {client}
        with pytest.raises(ConfigError, match="belongs to a client that has ended"):
            len(first)


def test_futures_of_another_cluster_are_refused(inprocess_cluster, process_cluster):
    with Client(inprocess_cluster) as other, Client(process_cluster) as client:
        future = other.submit(inc, 1)
        with pytest.raises(ConfigError, match="belongs to a client of the cluster at inproc"):
            client.compute(dask.delayed(inc)(future))
        assert other.compute(dask.delayed(inc)(future)).result(timeout=20) == 3
    with Client(process_cluster) as one, Client(process_cluster) as same:
        future = one.submit(inc, 1)
        assert same.compute(dask.delayed(inc)(future)).result(timeout=20) == 3


def test_a_collection_that_another_client_has_persisted(inprocess_cluster, process_cluster):
    """Under a name that both have. By default dask optimizes, which must not lose sight of whose futures they are."""
    with Client(inprocess_cluster) as other, Client(process_cluster) as client, Client(process_cluster) as same:
        ours = client.persist(da.from_array(np.ones(4), chunks=2, name="data"))
        theirs = other.persist(da.from_array(np.full(4, 100.0), chunks=2, name="data"))
        value = other.persist(dask.delayed(operator.add)(1, 2, dask_key_name="value"))
        mine = client.persist(dask.delayed(operator.add)(1_000, 2, dask_key_name="value"))
        wait([ours, theirs, value, mine])
        for wrong in (theirs.sum(), theirs, theirs + 1, value, dask.delayed(operator.add)(value, 1)):
            with pytest.raises(ConfigError, match="belongs to a client of the cluster at inproc"):
                client.compute(wrong)
        assert other.compute(theirs.sum()).result(timeout=20) == 400
        assert same.compute(ours.sum()).result(timeout=20) == 4
        assert same.compute(ours + 1).result(timeout=20).tolist() == [2, 2, 2, 2]
        assert same.compute(dask.delayed(operator.add)(mine, 1)).result(timeout=20) == 1_003
        assert same.persist(ours.sum()).compute() == 4


def test_a_future_of_another_client_whose_submission_is_still_on_its_way(process_cluster):
    with Client(process_cluster) as one, Client(process_cluster) as same:
        one.submit(inc, 0).result(timeout=20)
        one._node.loop.call_soon_threadsafe(time.sleep, 0.5)
        futures = [one.submit(inc, number) for number in range(20)]  # but for the first, the loop has to send them
        assert same.compute(dask.delayed(inc)(futures[-1])).result(timeout=20) == 21
