"""The directory of a worker: where it is, and what happens when there can't be one."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from zmqtasks import Client, LocalCluster, get_worker
from zmqtasks.errors import NodeStartError
from zmqtasks.nodes.worker.directory import base_directory


def place() -> tuple[str, str | None]:
    return get_worker().local_directory, tempfile.tempdir


def test_workers_are_told_and_do_not_look_for_it() -> None:
    with LocalCluster(n_workers=1, threads_per_worker=1) as cluster, Client(cluster) as client:
        directory, looked_for = client.submit(place).result()
        assert Path(directory).parent == Path(tempfile.gettempdir())
        assert looked_for is None, "a worker that is killed while it looks would leave a file"


def test_without_a_place_the_error_says_how_to_give_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "missing")])
    with pytest.raises(NodeStartError, match=r"missing.*--local-directory"):
        base_directory(None)
    assert base_directory(str(tmp_path)) == str(tmp_path)
