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
