"""Locks that dask and xarray take for files hold on the whole cluster, and nothing of that is left when the client has gone."""

from __future__ import annotations

import gc
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest

dask = pytest.importorskip("dask", reason="needs the extra `dask`")
pytest.importorskip("xarray", reason="needs xarray, of the extra `dev`")
pytest.importorskip("h5netcdf", reason="needs h5netcdf, of the extra `dev`")

import dask.array as da  # noqa: E402
import dask.utils  # noqa: E402, F811
import numpy as np  # noqa: E402
import xarray as xr  # noqa: E402
import xarray.backends.locks  # noqa: E402
import xarray.backends.writers  # noqa: E402
from file_targets import WatchedFile, hold, identity, take_both  # noqa: E402

from zmqtasks import Lock, wait  # noqa: E402
from zmqtasks.integrations.dask.locks import FileLock  # noqa: E402

FILE_LOCKS = dask.utils.SerializableLock


def test_blocks_are_stored_one_by_one_by_several_processes(process_client, tmp_path):
    x = da.ones((24, 3), chunks=(1, 3))
    target = WatchedFile(tmp_path / "stored")
    da.store(x, target, lock=True)
    assert target.written() == dict.fromkeys(range(24), 3.0)
    assert len(target.writers()) == 2
    assert not target.overlaps()


def test_without_the_lock_the_target_does_notice(process_client, tmp_path):
    target = WatchedFile(tmp_path / "stored")
    da.store(da.ones((24, 3), chunks=(1, 3)), target, lock=False)
    assert target.overlaps()


def test_netcdf_written_by_several_processes(process_client, tmp_path):
    values = np.random.default_rng(3).random((16, 40))
    data = xr.Dataset(
        {name: (("x", "y"), da.from_array(values, chunks=(2, 40)) * factor) for name, factor in (("a", 1), ("b", 2))}
    )
    path = tmp_path / "data.nc"
    data.to_netcdf(path, engine="h5netcdf")
    with xr.open_dataset(path, engine="h5netcdf") as written:
        np.testing.assert_array_equal(written.a, values)
        np.testing.assert_array_equal(written.b, values * 2)


def test_the_lock_of_a_file_is_one_for_all_processes(process_client, tmp_path):
    lock = xarray.backends.locks.get_write_lock(str(tmp_path / "x.nc"))
    assert isinstance(lock, FileLock)
    begun, until = tmp_path / "begun", tmp_path / "until"
    holding = process_client.submit(hold, lock, str(begun), str(until))
    while not begun.exists():
        assert not holding.done()
    assert lock.locked()
    assert lock.acquire(blocking=False) is False
    other = FileLock("another file")
    with other:
        assert other.locked()
    until.touch()
    holding.result(timeout=20)
    assert lock.acquire(blocking=False) is True
    lock.release()
    with pytest.raises(RuntimeError, match="not acquired"):
        lock.release()


def test_a_task_that_waits_for_a_file_keeps_its_slot(process_client, tmp_path):
    """As it may hold a lock of its process, which the next task on the slot would wait for while it keeps the slot."""
    inside, outside = FILE_LOCKS(), FileLock()
    tasks = process_client.map(take_both, [inside] * 60, [outside] * 60, pure=False)
    wait(tasks, timeout=20)
    assert len(set(process_client.gather(tasks))) == 2


def test_a_name_is_one_object_in_a_process(process_client):
    lock = FileLock("one")
    assert pickle.loads(pickle.dumps(lock)) is lock
    hold_all = [xarray.backends.locks.combine_locks([lock, FILE_LOCKS()])]
    first, second = process_client.gather([process_client.submit(identity, [lock, hold_all]) for _ in range(2)])
    assert first[0]
    assert second[0]


def test_clusters_do_not_disturb_each_other(process_client, client, inprocess_cluster, tmp_path):
    """Both hold the lock of the same file, each on its own cluster."""
    lock = FileLock("shared name")
    begun, until = tmp_path / "begun", tmp_path / "until"
    holding = process_client.submit(hold, lock, str(begun), str(until))
    while not begun.exists():
        assert not holding.done()
    try:
        assert client.submit(_take, lock).result(timeout=10) == "taken"
        target = WatchedFile(tmp_path / "stored")
        da.store(da.ones((4, 3), chunks=(1, 3)), target, lock=lock, scheduler=client)
        assert len(target.written()) == 4
    finally:
        until.touch()
    holding.result(timeout=20)


def _take(lock: FileLock) -> str:
    with lock:
        return "taken"


def test_the_scheduler_in_charge_decides(client):
    assert isinstance(dask.utils.get_scheduler_lock(), FileLock)
    assert isinstance(dask.utils.get_scheduler_lock(scheduler=client), FileLock)
    assert isinstance(dask.utils.get_scheduler_lock(scheduler="threads"), FILE_LOCKS)
    assert xarray.backends.writers.get_dask_scheduler() == "distributed"
    with dask.config.set(scheduler="threads"):
        assert xarray.backends.writers.get_dask_scheduler() == "threaded"
        assert not isinstance(xarray.backends.locks.get_write_lock("x"), FileLock)


def test_a_finalizer_in_the_loop_does_not_wait(client):
    """Garbage is collected in any thread, also in the one that would have to answer."""
    lock = FileLock()
    answers: list[object] = []
    done = threading.Event()

    def collect() -> None:
        answers.append(lock.acquire(blocking=False))
        done.set()

    client._node.loop.call_soon_threadsafe(collect)
    assert done.wait(10)
    assert answers == [False]


LATE = """
import dask.array as da
from zmqtasks import Client

with Client(processes=False, n_workers=1) as client:
    import xarray.backends.locks, xarray.backends.writers
    print(type(xarray.backends.locks.get_write_lock("x.nc")).__name__)
    print(xarray.backends.writers.get_dask_scheduler())
    print(xarray.backends.locks.__spec__.loader is xarray.backends.locks.__loader__)
print(xarray.backends.locks.get_dask_scheduler())
"""

BACK = """
import sys
import dask.array as da, dask.utils
import xarray.backends.locks as locks, xarray.backends.writers as writers
from zmqtasks import Client

places = [(module, name) for module in (dask.utils, da.core, locks, writers)
          for name in ("get_scheduler_lock", "get_dask_scheduler", "_get_lock_maker") if hasattr(module, name)]
before = [getattr(module, name) for module, name in places]
finders = list(sys.meta_path)
with Client(processes=False, n_workers=1) as client:
    print(len(places), sum(getattr(*place) is not old for place, old in zip(places, before)))
    kept = dask.utils.get_scheduler_lock  # a module may import the wrapper by its name
    lock = kept()
    print(type(lock).__name__)
print([getattr(*place) for place in places] == before, sys.meta_path == finders)
print(type(kept()).__name__)
with lock:  # files may be closed later than the client
    print(lock.locked())
"""


def _output(directory: Path, program: str) -> list[str]:
    script = directory / "program.py"
    script.write_text(program)
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


def test_xarray_may_be_imported_after_the_client_was_made(tmp_path):
    assert _output(tmp_path, LATE) == ["FileLock", "distributed", "True", "threaded"]


def test_all_is_back_when_the_client_has_gone(tmp_path):
    assert _output(tmp_path, BACK) == ["5", "5", "FileLock", "True", "True", "SerializableLock", "True"]


def test_locks_of_files_are_forgotten(client):
    name = FileLock().name
    gc.collect()
    assert name not in FileLock._known


def test_a_name_is_shared_with_nobody_by_chance(client):
    """A program may hold a `Lock` of the file's name while it writes the file."""
    with Lock("x.nc"), xarray.backends.locks.get_write_lock("x.nc") as taken:
        assert taken
