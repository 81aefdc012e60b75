"""Versions of a node: found, or taken over from the process that started it."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version

from zmqtasks import Client, LocalCluster
from zmqtasks.nodes.versions import own_versions

LOOK = """
import json, sys
from zmqtasks.nodes.versions import adopt_versions, own_versions
adopt_versions(json.loads(sys.argv[1]))
print(json.dumps([own_versions(), "importlib.metadata" in sys.modules]))
"""


def look(adopted: dict[str, str]) -> list:
    done = subprocess.run(
        [sys.executable, "-c", LOOK, json.dumps(adopted)], capture_output=True, text=True, check=True, timeout=60
    )
    return json.loads(done.stdout)


def test_versions_are_looked_up_unless_they_are_known():
    assert own_versions()["msgspec"] == version("msgspec")
    assert own_versions()["python"] == ".".join(map(str, sys.version_info[:3]))
    assert look({}) == [own_versions(), True]
    known = {"python": "3.99.0", "numpy": "1"}
    assert look(known) == [known, False]


def test_a_worker_that_is_started_again_looks_for_itself():
    def found() -> dict[str, str]:
        from zmqtasks.nodes import versions

        return versions.own_versions()

    with LocalCluster(n_workers=1, threads_per_worker=1) as cluster, Client(cluster) as client:
        assert client.submit(found).result(30) == own_versions()
        client.restart()
        assert client.submit(found).result(30) == own_versions()
