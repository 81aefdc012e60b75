"""`zmqtasks key`."""

from __future__ import annotations

import os
import re
import shlex
import stat
import subprocess
import sys
from pathlib import Path

from zmqtasks.security import load_key


def key(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "zmqtasks", "key", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, **environ})


def test_new_and_show(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "cluster.key"
    done = key("new", str(path))
    assert done.returncode == 0, done.stderr
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    secret = path.read_text().strip()
    assert str(path) in done.stdout
    assert "ssh" in done.stdout
    assert secret not in done.stdout + done.stderr

    shown = key("show", str(path))
    assert load_key(path).cluster_id.hex() in shown.stdout
    assert "mode 0600" in shown.stdout
    assert re.search(r"TLS certificate: +SHA-256 [0-9a-f]{64}\n", shown.stdout)
    assert re.search(r"CURVE listener: +\S{40}\n", shown.stdout)
    assert secret not in shown.stdout + shown.stderr
    assert key("show", str(path)).stdout == shown.stdout
    assert key("show", "--secret", str(path)).stdout == f"{secret}\n"


def test_the_command_that_hands_the_key_to_another_host_is_quoted(tmp_path: Path) -> None:
    """It is run with an ssh whose other host is another folder of this one."""
    path, there = tmp_path / "here" / "it's mine" / "cluster.key", tmp_path / "there"
    done = key("new", str(path))
    (command,) = [line for line in done.stdout.splitlines() if line.startswith("  ssh HOST ")]
    ssh = tmp_path / "ssh"
    ssh.write_text(f'#!/bin/sh\nshift\nexec sh -c "$(echo "$*" | sed s:{tmp_path}/here:{there}:g)"\n')
    ssh.chmod(0o700)
    environ = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(command, shell=True, check=True, env=environ, timeout=60)
    assert load_key(there / "it's mine" / "cluster.key") == load_key(path)
    assert done.stdout.count(f"--key-file {shlex.quote(str(path))}") == 2


def test_no_key_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "cluster.key"
    assert key("new", str(path)).returncode == 0
    before = path.read_text()
    done = key("new", str(path))
    assert done.returncode == 1
    assert f"{path} exists" in done.stderr
    assert "Traceback" not in done.stderr
    assert path.read_text() == before
    assert [file.name for file in tmp_path.iterdir()] == ["cluster.key"]


def test_default_place(tmp_path: Path) -> None:
    path = tmp_path / "named.key"
    assert f"in {path}" in key("new", ZMQTASKS_KEY_FILE=str(path)).stdout
    assert str(path) in key("show", ZMQTASKS_KEY_FILE=str(path)).stdout


def test_show_of_what_is_no_key(tmp_path: Path) -> None:
    missing = key("show", str(tmp_path / "missing"))
    (tmp_path / "open").write_text("00" * 32)
    (tmp_path / "open").chmod(0o644)
    unprotected = key("show", str(tmp_path / "open"))
    for done, what in ((missing, "no cluster key at"), (unprotected, "chmod 600")):
        assert done.returncode == 1
        assert what in done.stderr
        assert "Traceback" not in done.stderr
