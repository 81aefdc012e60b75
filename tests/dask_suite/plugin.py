"""A pytest plugin: dask's own tests with a zmqtasks client as the scheduler.

One cluster and one client for the session; workers live in this process unless ZMQTASKS_SUITE_PROCESSES is set. `assert_eq`
of dask's test tools computes on the synchronous scheduler unless told otherwise: that default is replaced. What is known to
fail is listed with its reason in `expected_failures.txt`. ZMQTASKS_SUITE_ENGINE=distributed puts the client of
dask.distributed in the same place, for comparison.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import dask
import dask.array.utils
import dask.bag.utils
import dask.dataframe.utils
import pytest

from zmqtasks import Client, LocalCluster
from zmqtasks.integrations.dask import scheduler as zmqtasks_scheduler
from zmqtasks.integrations.dask.defaults import SETTINGS

DISTRIBUTED = os.environ.get("ZMQTASKS_SUITE_ENGINE", "zmqtasks") == "distributed"
PROCESSES = bool(os.environ.get("ZMQTASKS_SUITE_PROCESSES"))
LIST = Path(__file__).parent / "expected_failures.txt"


def distributed_scheduler(graph: Any, keys: Any, **options: Any) -> Any:
    """What the default client of dask.distributed computes."""
    import distributed

    return distributed.default_client().get(graph, keys, **options)


scheduler = distributed_scheduler if DISTRIBUTED else zmqtasks_scheduler


def replace_default(function: object, name: str = "scheduler") -> None:
    """Makes the zmqtasks client the default of the parameter `name` of `function`."""
    code = function.__code__
    positional = code.co_varnames[: code.co_argcount]
    if name in positional:
        defaults = list(function.__defaults__)
        defaults[positional.index(name) - len(positional)] = scheduler
        function.__defaults__ = tuple(defaults)
    else:
        function.__kwdefaults__ = {**function.__kwdefaults__, name: scheduler}


for tool in (
    dask.array.utils.assert_eq,
    dask.array.utils._get_dt_meta_computed,
    dask.bag.utils.assert_eq,
    dask.dataframe.utils.assert_eq,
    dask.dataframe.utils._check_dask,
):
    replace_default(tool)


def read_expected() -> list[tuple[str, str, bool]]:
    """Patterns of test ids, each with its reason and whether it fails for certain: see the list itself."""
    found = []
    for line in LIST.read_text().splitlines():
        pattern, _, reason = line.partition("  # ")
        if pattern.strip() and not pattern.startswith("#"):
            certain = not pattern.startswith("? ")
            found.append((pattern.removeprefix("? ").strip(), reason.strip(), certain))
    return found


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what is known to fail; what is certain to fail and passes is a failure, so that the list stays true."""
    expected = [] if DISTRIBUTED else read_expected()
    for item in items:
        name = item.nodeid.rpartition("site-packages/")[2] or item.nodeid
        for pattern, reason, certain in expected:
            if fnmatchcase(name, "*dask/" + pattern):
                item.add_marker(pytest.mark.xfail(reason=reason, strict=certain))


_settings: dict[str, Any] = {}
"""What the client has put into dask's configuration."""


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Fixtures of distributed that some tests use put dask's whole configuration back to what it was when it was imported."""
    if _settings and dask.config.get("scheduler", None) is None:
        dask.config.set(_settings)


@pytest.fixture(scope="session", autouse=True)
def session_client() -> Iterator[Any]:
    """The client that everything computes on."""
    workers = {"n_workers": 2 if PROCESSES else 1, "threads_per_worker": 2, "processes": PROCESSES}
    if DISTRIBUTED:
        import distributed

        with (
            closing(distributed.LocalCluster(dashboard_address=None, **workers)) as cluster,
            distributed.Client(cluster) as client,
        ):
            yield client
        return
    with LocalCluster(**workers) as cluster, Client(cluster) as client:
        _settings.update({name: dask.config.get(name) for name in ("scheduler", *SETTINGS)})
        yield client
