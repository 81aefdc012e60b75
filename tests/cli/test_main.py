"""The command line before any node starts: help, and errors in one line."""

from __future__ import annotations

import subprocess
import sys

import pytest

from zmqtasks import __version__

TOO_LONG = "x" * 300
"""A path at which no file can be."""


def zmqtasks(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "zmqtasks", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_the_version():
    done = zmqtasks("--version")
    assert done.returncode == 0
    assert __version__ in done.stdout


@pytest.mark.parametrize("command", ["scheduler", "worker", "status", "demo"])
def test_every_command_has_help_and_is_listed(command):
    done = zmqtasks(command, "--help")
    assert done.returncode == 0, done.stderr
    assert f"zmqtasks {command}" in done.stdout
    assert command in zmqtasks("--help").stdout


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["dance"], 2, "No such command"),
        (["scheduler", "--port", "70000"], 2, "70000"),
        (["scheduler", "--protocol", "carrier-pigeon"], 2, "carrier-pigeon"),
        (["worker"], 1, "--scheduler-file"),
        (["worker", "tcp://127.0.0.1:1", "--resources", "GPU"], 1, "GPU=2"),
        (["worker", "tcp://127.0.0.1:1", "--memory-limit", "lots"], 1, "4GiB"),
        (["worker", "tcp://127.0.0.1:1", "--nworkers", "2", "--no-nanny"], 1, "--nworkers"),
        (["status"], 1, "--scheduler-file"),
        (["status", "carrier://pigeon"], 1, "carrier"),
        (["scheduler", "--key-file", TOO_LONG], 1, "--key-file"),
        (["worker", "tcp://127.0.0.1:1", "--key-file", TOO_LONG], 1, "--key-file"),
        (["status", "tcp://127.0.0.1:1", "--key-file", TOO_LONG], 1, "--key-file"),
        (["worker", "--scheduler-file", TOO_LONG], 1, "--scheduler-file"),
        (["key", "new", "~no-such-user/key"], 1, "~no-such-user/key"),
        (["status", "--scheduler-file", "~no-such-user/file"], 1, "~no-such-user/file"),
    ],
)
def test_mistakes_are_told_in_a_few_lines(arguments, code, text, tmp_path, monkeypatch):
    key = tmp_path / "cluster.key"
    key.touch(0o600)
    key.write_text("ab" * 32)
    monkeypatch.setenv("ZMQTASKS_KEY_FILE", str(key))
    done = zmqtasks(*arguments)
    assert done.returncode == code
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert not done.stdout


def test_a_command_imports_only_what_it_needs():
    program = (
        "import sys; from zmqtasks.cli.main import main; main(['--help']);"
        "print([name for name in ('numpy', 'zmq', 'uvloop', 'rich.console', 'zmqtasks.client') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]", done
