"""The scheduler file: written whole, secret, and refused when it is not."""

from __future__ import annotations

import dataclasses
import os
import stat
import threading
import time

import pytest

from zmqtasks.errors import ConfigError, SecurityError
from zmqtasks.scheduler_file import (
    SchedulerFile,
    read_scheduler_file,
    remove_scheduler_file,
    wait_scheduler_file,
    write_scheduler_file,
)

CONTENT = SchedulerFile("tcp://127.0.0.1:8786", ["tcp://127.0.0.1:8786"], "ab" * 16, "cd" * 32, 7, 1234)


def test_what_is_written_is_read_by_the_owner_only(tmp_path):
    path = tmp_path / "scheduler.json"
    write_scheduler_file(path, CONTENT)
    assert read_scheduler_file(path) == CONTENT
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["scheduler.json"]


def test_it_replaces_the_file_of_an_earlier_scheduler(tmp_path):
    path = tmp_path / "scheduler.json"
    path.write_text("old")
    path.chmod(0o644)
    write_scheduler_file(path, CONTENT)
    assert read_scheduler_file(path) == CONTENT


def test_the_secret_is_not_in_its_repr():
    assert CONTENT.key not in repr(CONTENT)


def test_a_file_that_others_can_read_is_refused(tmp_path):
    path = tmp_path / "scheduler.json"
    write_scheduler_file(path, CONTENT)
    path.chmod(0o640)
    with pytest.raises(SecurityError, match="chmod 600"):
        read_scheduler_file(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"address": 3}', '{"address": "tcp://h:1", "epoch": "x"}'])
def test_a_file_that_is_none_is_refused_by_name(tmp_path, text):
    path = tmp_path / "scheduler.json"
    path.touch(0o600)
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"scheduler\.json"):
        read_scheduler_file(path)


@pytest.mark.parametrize("key", ["abab", "zz" * 32, "00" * 32])
def test_a_file_with_a_bad_key_is_named(tmp_path, key):
    path = tmp_path / "scheduler.json"
    write_scheduler_file(path, dataclasses.replace(CONTENT, key=key))
    with pytest.raises(SecurityError, match=r"scheduler\.json' was changed") as caught:
        read_scheduler_file(path)
    assert key not in str(caught.value)


def test_a_file_that_cannot_be_opened_is_named_with_the_way_out(tmp_path):
    path = tmp_path / ("x" * 300)
    for attempt in (read_scheduler_file, lambda path: wait_scheduler_file(path, 20)):
        with pytest.raises(ConfigError, match=r"x' cannot be read: File name too long.*--scheduler-file"):
            attempt(path)
    with pytest.raises(ConfigError, match=r"x' cannot be written: File name too long.*--scheduler-file"):
        write_scheduler_file(path, CONTENT)


def test_a_home_that_is_not_known(tmp_path):
    path = "~no-such-user/scheduler.json"
    for attempt in (read_scheduler_file, lambda path: write_scheduler_file(path, CONTENT)):
        with pytest.raises(SecurityError, match=f"{path} cannot be found.*--scheduler-file"):
            attempt(path)


def test_a_missing_file_names_the_way_out(tmp_path):
    with pytest.raises(ConfigError, match="--scheduler-file"):
        read_scheduler_file(tmp_path / "none.json")


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="cannot be written"):
        write_scheduler_file(tmp_path / "no" / "scheduler.json", CONTENT)


def test_waiting_ends_when_the_file_appears(tmp_path):
    path = tmp_path / "scheduler.json"
    writer = threading.Timer(0.1, write_scheduler_file, (path, CONTENT))
    writer.start()
    assert wait_scheduler_file(path, timeout_s=20.0) == CONTENT
    writer.join()


def test_waiting_ends_when_it_does_not(tmp_path):
    began = time.monotonic()
    with pytest.raises(ConfigError):
        wait_scheduler_file(tmp_path / "none.json", timeout_s=0.1)
    assert time.monotonic() - began < 10


def test_only_its_writer_removes_it(tmp_path):
    path = tmp_path / "scheduler.json"
    write_scheduler_file(path, CONTENT)
    remove_scheduler_file(path, pid=CONTENT.pid + 1)
    assert path.exists()
    remove_scheduler_file(path, pid=CONTENT.pid)
    assert not path.exists()
    remove_scheduler_file(path, pid=os.getpid())
