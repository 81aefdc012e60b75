"""Schemes lead to transports, which are imported only when used."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from zmqtasks.errors import AddressError
from zmqtasks.transports import connect, get_transport, known_schemes, register_transport, registry
from zmqtasks.transports.inproc import InprocTransport


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_transports", {})


def test_built_in_transports() -> None:
    assert {"tcp", "zmq", "inproc"} <= set(known_schemes())
    assert get_transport("tcp").scheme == "tcp"
    assert get_transport("tcp") is get_transport("tcp")


def test_unknown_scheme_names_the_known_ones() -> None:
    with pytest.raises(AddressError, match=r"'carrier-pigeon'.*inproc.*tcp.*zmq"):
        asyncio.run(connect("carrier-pigeon://coop"))


def test_imports_are_lazy() -> None:
    code = (
        "import sys, zmqtasks.transports as t; t.get_transport('tcp')\n"
        "print([m for m in ('zmq', 'numpy', 'uvloop', 'zmqtasks.transports.inproc') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.usefixtures("own_registry")
def test_register() -> None:
    class Pigeon(InprocTransport):
        scheme = "pigeon"

    pigeon = Pigeon()
    register_transport(pigeon)
    assert get_transport("pigeon") is pigeon
    assert "pigeon" in known_schemes()


@pytest.mark.usefixtures("own_registry")
def test_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "coop.py").write_text(
        "from zmqtasks.transports.inproc import InprocTransport\nclass Owl(InprocTransport):\n    scheme = 'owl'\n"
    )
    info = tmp_path / "coop-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: coop\nVersion: 1\n")
    (info / "entry_points.txt").write_text(
        "[zmqtasks.transports]\nowl = coop:Owl\nbroken = coop:Missing\nwrong = builtins:dict\ntcp = coop:Owl\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert get_transport("owl").scheme == "owl"
    assert "owl" in known_schemes()
    assert get_transport("tcp").scheme == "tcp"
    with pytest.raises(AddressError, match="cannot be loaded"):
        get_transport("broken")
    with pytest.raises(AddressError, match="is not a zmqtasks Transport"):
        get_transport("wrong")
