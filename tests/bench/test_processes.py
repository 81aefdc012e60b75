"""Processes that measure: started, fed and ended, also when an interruption comes at the worst moment."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys

import psutil
import pytest

from bench.network.processes import Child, terminated_as_interrupted
from zmqtasks.transports import non_temporal

DEADLINE_S = 60

MODULES = [
    ("worker", ""),
    ("peer", ""),
    ("data_links", ""),
    ("baselines_fans", "exchange"),
    ("baselines_socket", "answer"),
    ("baselines_zmq", "answer"),
    ("baselines_ucx", "answer"),
]


@pytest.mark.parametrize("given", [b"", b'{"module": '], ids=["nothing", "half a line"])
@pytest.mark.parametrize(("module", "argument"), MODULES)
def test_a_parent_that_is_gone_before_it_said_anything_is_no_fault(module, argument, given):
    command = [sys.executable, "-m", f"bench.network.{module}", argument]
    ended = subprocess.run(command, input=given, capture_output=True, timeout=DEADLINE_S)
    assert (ended.returncode, ended.stderr) == (0, b"")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_at_the_start_of_a_process_leaves_none(monkeypatch, request, number):
    non_temporal.set_for_child({})  # the first call starts a process as well
    started = []

    class Interrupted(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            started.append(self.pid)
            os.kill(os.getpid(), number)

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    request.addfinalizer(functools.partial(signal.signal, signal.SIGTERM, signal.getsignal(signal.SIGTERM)))
    with pytest.raises(KeyboardInterrupt), terminated_as_interrupted():
        Child("bench.network.worker", own_group=True, first_line="{}")
    assert len(started) == 1
    assert not psutil.pid_exists(started[0])
