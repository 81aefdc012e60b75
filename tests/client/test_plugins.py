"""Worker plugins and uploaded files on real clusters: on workers of now, on later ones, and on those that were started again."""

from __future__ import annotations

import asyncio
import os
import signal
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from zmqtasks import Client, LocalCluster, PluginError, WorkerPlugin, get_client, get_worker
from zmqtasks.deploy.process import NodeProcess
from zmqtasks.errors import NodeStartError

NOTES = "ZMQTASKS_TEST_NOTES"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """Two workers of one thread."""
    folder = tmp_path_factory.mktemp("workers")
    with LocalCluster(n_workers=2, threads_per_worker=1, local_directory=folder) as cluster:
        yield cluster
    assert os.listdir(folder) == []


@pytest.fixture
def mortal() -> Iterator[LocalCluster]:
    """The same for one test, which ends its processes."""
    with LocalCluster(n_workers=2, threads_per_worker=1) as cluster:
        yield cluster


@pytest.fixture
def client(cluster: LocalCluster) -> Iterator[Client]:
    with Client(cluster) as client:
        yield client


@pytest.fixture
def threads() -> Iterator[Client]:
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=False) as cluster, Client(cluster) as client:
        yield client


@contextmanager
def another_worker(cluster: LocalCluster) -> Iterator[None]:
    """Two more workers, as `zmqtasks worker` starts them."""
    process = NodeProcess("nanny", cluster._backend._settings["nanny"])
    try:
        process.send({"scheduler_address": cluster.scheduler_address})
        process.wait_ready(time.monotonic() + 30)
        yield
    finally:
        process.ask_to_end()
        process.wait_ended(time.monotonic() + 20)


class Marker(WorkerPlugin):
    """Leaves a line for each call of it."""

    def __init__(self, path: Path, name: str = "marker") -> None:
        self.path = str(path)
        self.name = name

    def setup(self, worker) -> None:
        self._note("setup", worker)
        worker.marks = [*getattr(worker, "marks", []), self.name]

    def teardown(self, worker) -> None:
        self._note("teardown", worker)
        worker.marks.remove(self.name)

    def _note(self, what, worker) -> None:
        assert get_worker() is worker
        with open(self.path, "a") as file:
            file.write(f"{what} {self.name} {os.getpid()}\n")


def marks(_=None):
    return list(getattr(get_worker(), "marks", []))


def pid_and_marks(_=None):
    return os.getpid(), marks()


def notes_of(path: Path, what: str) -> list[str]:
    return [line for line in path.read_text().splitlines() if line.startswith(what)]


def test_a_plugin_is_set_up_everywhere_and_torn_down(client, tmp_path):
    plugin = Marker(tmp_path / "notes")
    done = client.register_plugin(plugin)
    assert done == {address: {"status": "OK"} for address in client.nthreads()}
    assert set(map(tuple, client.run(marks).values())) == {("marker",)}
    assert client.run(lambda dask_worker: list(dask_worker.plugins)) == {address: ["marker"] for address in done}
    client.register_plugin(plugin)  # again: the old one goes first
    assert set(map(tuple, client.run(marks).values())) == {("marker",)}
    plugin.idempotent = True
    client.register_plugin(plugin)
    assert len(notes_of(tmp_path / "notes", "setup")) == 4
    client.unregister_plugin("marker")
    assert set(map(tuple, client.run(marks).values())) == {()}
    assert len(notes_of(tmp_path / "notes", "teardown")) == 4
    with pytest.raises(ValueError, match="no plugin is called 'marker': registered are none"):
        client.unregister_plugin("marker")


def test_workers_that_come_later_have_all_plugins_in_order_before_their_first_task(cluster, client, tmp_path):
    for name in ("first", "second", "third"):
        client.register_plugin(Marker(tmp_path / "notes", name))
    client.unregister_plugin("second")
    old = set(client.run(os.getpid).values())
    with another_worker(cluster):
        client.wait_for_workers(4, timeout=30)
        seen = client.gather(client.map(pid_and_marks, range(400)))
        assert {tuple(found) for _, found in seen} == {("first", "third")}
        assert set(client.run(os.getpid).values()) - old
        assert set(map(tuple, client.run(marks).values())) == {("first", "third")}
    # At the end of a worker the last plugin goes first.
    torn_down = [line.split()[1:] for line in notes_of(tmp_path / "notes", "teardown") if "second" not in line]
    for pid in {pid for _, pid in torn_down}:
        assert [name for name, of in torn_down if of == pid] == ["third", "first"]
    for name in ("first", "third"):
        client.unregister_plugin(name)


def test_a_worker_that_was_killed_has_its_plugins_again_and_so_do_all_after_a_restart(mortal, tmp_path):
    client = mortal.get_client()
    client.register_plugin(Marker(tmp_path / "notes"))
    victim = next(iter(client.run(os.getpid).values()))
    os.kill(victim, signal.SIGKILL)
    seen = client.gather(client.map(pid_and_marks, range(200)))
    assert {tuple(found) for _, found in seen} == {("marker",)}
    client.wait_for_workers(2, timeout=30)
    before = set(client.run(os.getpid).values())
    client.restart()
    after = client.run(pid_and_marks)
    assert not before & {pid for pid, _ in after.values()}
    assert [found for _, found in after.values()] == [["marker"]] * 2
    client.close()


class Failing(WorkerPlugin):
    name = "failing"

    def __init__(self, path: Path, fails: str) -> None:
        self.path = str(path)
        self.fails = fails

    def setup(self, worker) -> None:
        with open(self.path, "a") as file:
            file.write(f"setup of {self.fails}\n")
        if self.fails == "all" or (self.fails == "one" and worker.address == max(os.environ[NOTES].split(","))):
            raise ValueError(f"no {self.fails}")
        worker.marks = [self.fails]

    def teardown(self, worker) -> None:
        worker.marks = []


def set_environment(name: str, value: str) -> None:
    os.environ[name] = value


def test_a_plugin_that_fails_on_one_worker_is_taken_back_on_all(client, tmp_path, eventually):
    addresses = sorted(client.nthreads())
    client.run(set_environment, NOTES, ",".join(addresses))
    with pytest.raises(
        PluginError, match=rf"setup of the plugin 'failing' failed on worker {addresses[-1]}: "
    ) as caught:
        client.register_plugin(Failing(tmp_path / "notes", "one"))
    assert isinstance(caught.value.__cause__, ValueError)
    assert caught.value.__cause__.__traceback__.tb_next is None
    assert caught.value.__cause__.__traceback__.tb_frame.f_code.co_name == "setup"
    eventually(lambda: set(map(tuple, client.run(marks).values())) == {()})
    with pytest.raises(ValueError, match="registered are none"):
        client.unregister_plugin("failing")


def test_the_plugin_that_a_failing_one_was_to_replace_is_back(client, tmp_path, eventually):
    client.register_plugin(Failing(tmp_path / "notes", "none"))
    with pytest.raises(PluginError, match="ValueError: no all"):
        client.register_plugin(Failing(tmp_path / "notes", "all"))
    eventually(lambda: set(map(tuple, client.run(marks).values())) == {("none",)})
    client.unregister_plugin("failing")


class Picky(WorkerPlugin):
    name = "picky"

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def setup(self, worker) -> None:
        if str(os.getpid()) not in Path(self.path).read_text().split():
            raise OSError("not in this process")


def test_a_worker_that_cannot_set_up_a_plugin_when_it_joins_ends_and_gets_no_tasks(
    cluster, client, tmp_path, capfd, eventually
):
    pids = {str(pid) for pid in client.run(os.getpid).values()}
    (tmp_path / "pids").write_text(" ".join(pids))
    client.register_plugin(Picky(tmp_path / "pids"))
    why = "setup of plugin 'picky', which a client has registered, failed on this worker: OSError: not in this process"
    with pytest.raises(NodeStartError, match=why), another_worker(cluster):
        raise AssertionError("the worker has started")
    assert {str(pid) for pid, _ in client.gather(client.map(pid_and_marks, range(50)))} <= pids
    eventually(lambda: "setup of plugin 'picky' failed" in capfd.readouterr().err)
    client.unregister_plugin("picky")


class Asking(WorkerPlugin):
    """Uses the cluster itself, and leaves something running on the loop of async tasks."""

    name = "asking"

    async def setup(self, worker) -> None:
        self.loop = asyncio.get_running_loop()
        self.task = asyncio.ensure_future(asyncio.sleep(3600))
        worker.answer = await get_client(worker.scheduler_address).submit(pow, 2, 10)

    async def teardown(self, worker) -> None:
        self.task.cancel()
        worker.answer = None


async def same_loop() -> bool:
    return asyncio.get_running_loop() is get_worker().plugins["asking"].loop


def answer() -> object:
    return get_worker().answer


class Dasks:
    """What an object made for dask.distributed has, without anything of ours."""

    name = "dasks"

    def setup(self, worker):
        worker.answer = (worker.name, worker.address, os.path.isdir(worker.local_directory))


def test_objects_with_the_methods_of_a_plugin_will_do(client):
    distributed = pytest.importorskip("distributed")
    client.register_plugin(Dasks())
    assert all(found[2] for found in client.run(answer).values())
    client.unregister_plugin("dasks")

    class Theirs(distributed.WorkerPlugin):
        name = "theirs"

        def setup(self, worker):
            worker.answer = "theirs"

    client.register_plugin(Theirs())
    assert set(client.run(answer).values()) == {"theirs"}
    client.unregister_plugin("theirs")
    with pytest.raises(TypeError, match="for the scheduler, which runs no user code"):
        client.register_plugin(distributed.SchedulerPlugin())
    with pytest.raises(TypeError, match="for nannies"):
        client.register_plugin(distributed.NannyPlugin())
    with pytest.raises(TypeError, match="neither setup"):
        client.register_plugin(object())
    with pytest.raises(TypeError, match="is a class: register an object"):
        client.register_plugin(Dasks)

    class Watching(WorkerPlugin):
        def transition(self, *_):
            raise AssertionError("called")

    with pytest.warns(UserWarning, match="transition is never called"):
        client.register_plugin(Watching(), name="watching")
    client.unregister_plugin("watching")


def test_workers_in_threads(threads, tmp_path):
    threads.register_plugin(Asking())
    assert set(threads.run(answer).values()) == {1024}
    assert threads.submit(same_loop).result()
    threads.register_plugin(Marker(tmp_path / "notes"))
    assert threads.gather(threads.map(marks, range(4))) == [["marker"]] * 4
    with pytest.raises(PluginError, match="ValueError: no all"):
        threads.register_plugin(Failing(tmp_path / "failing", "all"))
    threads.unregister_plugin("asking")
    assert set(threads.run(answer).values()) == {None}


def test_an_asynchronous_client(cluster, tmp_path):
    async def program() -> None:
        async with Client(cluster, asynchronous=True) as client:
            assert len(await client.register_plugin(Marker(tmp_path / "notes"))) == 2
            await client.unregister_plugin("marker")

    asyncio.run(program())


# --- files ----------------------------------------------------------------------------------------------------------


def answer_of(name: str, _: int = 0) -> object:
    return __import__(name).answer()


def path_of(name: str) -> str:
    return __import__(name).__file__


def pid_and_path(name: str) -> tuple[int, str]:
    return os.getpid(), path_of(name)


def write_module(path: Path, value: object) -> Path:
    path.write_text(f"def answer():\n    return {value!r}\n")
    return path


def test_an_uploaded_module_is_imported_and_a_second_upload_is_seen(client, tmp_path):
    path = write_module(tmp_path / "zt_one.py", 1)
    assert set(client.upload_file(path)) == set(client.nthreads())
    assert client.gather(client.map(answer_of, ["zt_one"] * 20)) == [1] * 20

    # Functions by name and by value, which workers keep opened.
    space: dict = {}
    exec(
        "import zt_one\nfrom zt_one import answer\ndef by_value():\n    return zt_one.answer(), answer()",
        _seen(space, path),
    )
    by_name, by_value = space["answer"], space["by_value"]
    assert client.gather([client.submit(by_name), client.submit(by_value)]) == [1, (1, 1)]
    write_module(path, 2)  # of the same second and size
    client.upload_file(path)
    for _ in range(4):
        assert client.gather([client.submit(by_name), client.submit(by_value)]) == [2, (2, 2)]
    path.write_text("def answer(:\n")
    with pytest.raises(
        PluginError, match=r"import of the uploaded file zt_one.py failed on worker .*: SyntaxError"
    ) as caught:
        client.upload_file(path)
    assert isinstance(caught.value.__cause__, SyntaxError)
    assert client.submit(by_name).result() == 2


def test_after_a_restart_workers_have_the_last_version_that_could_be_imported(mortal, tmp_path):
    path = tmp_path / "zt_restarted.py"
    with mortal.get_client() as client:
        for value in (1, 2):
            client.upload_file(write_module(path, value))
        path.write_text("raise ValueError('no')")
        with pytest.raises(PluginError, match="ValueError: no"):
            client.upload_file(path)
        client.restart()
        assert client.gather(client.map(answer_of, ["zt_restarted"] * 20)) == [2] * 20
        victim, directory = next(iter(client.run(pid_and_path, "zt_restarted").values()))
        os.kill(victim, signal.SIGKILL)  # which leaves it to the nanny to tidy up
        deadline = time.monotonic() + 10
        while os.path.exists(directory):
            assert time.monotonic() < deadline
            time.sleep(0.005)


def _seen(space: dict, path: Path) -> dict:
    """The namespace, in a process that imports the module itself, from elsewhere."""
    import importlib.util
    import sys

    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    space["__name__"] = "__main__"
    return space


def write_archive(path: Path, value: object) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("zt_package/__init__.py", "from zt_package.inner import answer\n")
        archive.writestr("zt_package/inner.py", "import pathlib\n" + _READING)
        archive.writestr("zt_package/data.txt", str(value))
        archive.writestr("zt_beside.py", f"def answer():\n    return {value!r}\n")
        archive.writestr("setup.py", "raise SystemExit('a program')\n")
        archive.writestr("zt_package-1.dist-info/METADATA", "Name: zt\n")
    return path


_READING = "def answer():\n    return int(pathlib.Path(__file__).with_name('data.txt').read_text())\n"


@pytest.mark.parametrize("suffix", [".zip", ".whl", ".egg"])
def test_archives_of_packages(client, tmp_path, suffix):
    for value in (1, 2):
        client.upload_file(write_archive(tmp_path / f"zt_archive{suffix}", value))
        for module in ("zt_package", "zt_package.inner", "zt_beside"):
            assert client.gather(client.map(answer_of, [module] * 4)) == [value] * 4, module


def test_a_module_may_import_one_that_was_uploaded_before_on_later_workers_too(cluster, client, tmp_path):
    base = write_module(tmp_path / "zt_base.py", 1)
    client.upload_file(base)
    (tmp_path / "zt_user.py").write_text("from zt_base import answer as inner\ndef answer():\n    return inner() + 1\n")
    client.upload_file(tmp_path / "zt_user.py")
    # The one that was uploaded first now needs one that comes after it in the order.
    write_module(tmp_path / "zt_late.py", 5)
    client.upload_file(tmp_path / "zt_late.py", load=False)
    base.write_text("from zt_late import answer\n")
    client.upload_file(base)
    with another_worker(cluster):
        client.wait_for_workers(4, timeout=30)
        assert set(client.run(answer_of, "zt_user").values()) >= {6}
        directories = {os.path.dirname(path) for path in client.run(path_of, "zt_user").values()}
        assert len(directories) == 4
        assert all(map(os.path.isdir, directories))
    assert len([path for path in directories if not os.path.isdir(path)]) == 2


def test_workers_in_threads_see_a_second_upload(threads, tmp_path):
    path = write_module(tmp_path / "zt_threads.py", 1)
    for value in (1, 2):
        write_module(path, value)
        threads.upload_file(path)
        assert threads.gather(threads.map(answer_of, ["zt_threads"] * 4)) == [value] * 4
    for value in (1, 2):
        threads.upload_file(write_archive(tmp_path / "zt_threads.zip", value))
        assert threads.gather(threads.map(answer_of, ["zt_package"] * 4)) == [value] * 4


def test_files_that_cannot_be_uploaded(client, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"upload_file: there is no file '.*missing.py'"):
        client.upload_file(tmp_path / "missing.py")
    (tmp_path / "data.csv").write_text("1,2\n")
    with pytest.raises(ValueError, match=r"data.csv' cannot be uploaded: modules \(.py\) and packages"):
        client.upload_file(tmp_path / "data.csv")
    with pytest.raises(ValueError, match="'two-words' is not a name that can be imported"):
        client.upload_file(tmp_path / "two-words.py")
    (tmp_path / "folder.zip").mkdir()
    with pytest.raises(ValueError, match=r"is a directory: make a .zip of it"):
        client.upload_file(tmp_path / "folder.zip")
    (tmp_path / "broken.zip").write_bytes(b"no archive")
    with pytest.raises(PluginError, match=r"import of the uploaded file broken.zip failed on worker .*: BadZipFile"):
        client.upload_file(tmp_path / "broken.zip")
    with (tmp_path / "huge.py").open("wb") as file:
        file.truncate(65 << 20)
    with pytest.raises(ValueError, match="65 MiB, more than the 64 that can be uploaded"):
        client.upload_file(tmp_path / "huge.py")


# --- preload --------------------------------------------------------------------------------------------------------


PRELOAD = """
ready = []

def dask_setup(worker):
    ready.append(worker.name)

def dask_teardown(worker):
    with open({path!r}, "a") as file:
        file.write(worker.name + "\\n")
"""


@pytest.mark.parametrize("processes", [True, False])
def test_preload_of_a_local_cluster(tmp_path, processes):
    path = tmp_path / f"zt_preload_{processes}.py"
    path.write_text(PRELOAD.format(path=str(tmp_path / "ended")))
    with (
        LocalCluster(1, 1, name="w", processes=processes, preload=["json.tool", path]) as cluster,
        Client(cluster) as client,
    ):
        (name,) = client.submit(lambda: __import__(path.stem).ready).result()
    assert (tmp_path / "ended").read_text() == f"{name}\n"
