"""The table of `zmqtasks status`, from what a scheduler may say."""

from __future__ import annotations

from zmqtasks.cli.status import _show


def test_a_worker_that_has_not_measured_yet(capsys):
    metrics = {"memory": 0, "cpu": 0.0, "processing": 0, "stored_keys": 0, "stored_bytes": 0}
    worker = {"name": "ada", "status": "running", "nthreads": 1, "memory_limit": 1 << 30, "metrics": metrics}
    _show({"address": "tcp://h:1", "workers": {"tcp://h:2": worker}, "tasks": {"ready": 0}})
    first, second, _, row = capsys.readouterr().out.splitlines()
    assert first == "tcp://h:1  1 worker, 1 thread, memory - of 1.0 GiB"
    assert second == "tasks: none"
    assert row.split() == ["ada", "tcp://h:2", "running", "1", "0", "-", "1.0", "GiB", "0", "(0", "B)", "-"]


def test_what_became_of_large_frames_is_shown_once_there_were_some(capsys):
    base = {"memory": 1 << 20, "cpu": 1.0, "processing": 0, "stored_keys": 0, "stored_bytes": 0}
    counted = {"compressed": 12, "declined_by_sample": 1200, "declined_by_rate": 3, "too_small": 9, "decompressed": 0}
    counted |= {"bytes_in": 100 << 20, "bytes_out": 43 << 20, "ratio": 0.43}
    about = {"status": "running", "nthreads": 1, "memory_limit": 1 << 30}
    workers = {
        "tcp://h:2": {**about, "name": "ada", "metrics": {**base, "compression": counted}},
        "tcp://h:3": {**about, "name": "bob", "metrics": {**base, "compression": {}}},
    }
    _show({"address": "tcp://h:1", "workers": workers, "tasks": {}})
    *_, heading, ada, bob = capsys.readouterr().out.splitlines()
    assert heading.rstrip().endswith("compressed")
    assert ada.rstrip().endswith("12 (100 MiB to 43 MiB, 43%), 1,200 do not shrink, 3 link is faster")
    assert bob.rstrip().endswith("-")
