"""The suite ships in the wheel and runs where there is no checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 100


def run(*command: object, cwd: Path) -> str:
    environment = {
        name: value for name, value in os.environ.items() if name != "PYTHONPATH"
    }  # which may name the checkout
    words = [str(part) for part in command]
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of what is in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("zmqtasks", "bench"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    program = "import hatchling.build; print(hatchling.build.build_wheel('..'))"
    name = run(sys.executable, "-c", program, cwd=source).split()[-1]
    shutil.rmtree(source)
    return folder / name


def test_only_what_belongs_there_is_in_the_wheel(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"zmqtasks", "zmqtasks_bench"}
    assert "zmqtasks_bench/network/suite.py" in names
    assert not [name for name in names if "__pycache__" in name or name.startswith("zmqtasks_bench/tasks")]


def test_it_runs_from_the_wheel(wheel, tmp_path):
    environment = tmp_path / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=tmp_path)
    python = environment / "bin" / "python"
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        wheel,
        cwd=tmp_path,
    )
    # Dependencies come from the environment of the tests; its own .pth files are not read, so neither is the checkout.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    where = run(python, "-c", "import zmqtasks; print(zmqtasks.__file__)", cwd=tmp_path)
    assert str(packages) in where
    output = run(
        environment / "bin" / "zmqtasks", "bench", "net", "--quick", "--transports", "tcp", "--rounds", "1",
        "--sizes", "64KiB", "--json", "a.json", "--html", "a.html", cwd=tmp_path,
    )  # fmt: skip
    assert "Bandwidth" in output
    assert '"tcp"' in (tmp_path / "a.json").read_text(encoding="utf-8")
    assert "changed beyond the noise" in run(
        environment / "bin" / "zmqtasks", "bench", "compare", "a.json", "a.json", cwd=tmp_path
    )
