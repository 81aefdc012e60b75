"""The project as a whole: docs that follow from the code are current, links lead somewhere, the machines are pure."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import zmqtasks
from docs.generate import generate

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "zmqtasks"

PURE = {
    "scheduler": "machine",
    "worker": "machine",
    "client": "machine",
}
IMPURE = {"asyncio", "time", "random", "zmq", "pickle", "cloudpickle", "socket", "selectors", "threading", "uvloop"}


def modules_behind(name: str, *, found: set[str]) -> set[str]:
    """Modules that importing `name` brings in, as far as they belong to the machines: its own folder, ops, ids, errors."""
    path = PACKAGE.parent.joinpath(*name.split(".")).with_suffix(".py")
    if name in found or not path.exists():
        return found
    found.add(name)
    for imported in imports_of(path):
        if imported.startswith(("zmqtasks.nodes.", "zmqtasks.protocol.", "zmqtasks.ids", "zmqtasks.errors")):
            modules_behind(imported, found=found)
    return found


def imports_of(path: Path) -> set[str]:
    """Names of modules that a file imports when it runs (not those that only a type checker sees)."""
    names: set[str] = set()
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            pending += node.orelse
            continue
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        pending += ast.iter_child_nodes(node)
    return names


@pytest.mark.parametrize("kind", PURE)
def test_the_machines_are_pure(kind):
    start = f"zmqtasks.nodes.{kind}.{PURE[kind]}"
    modules = modules_behind(start, found=set())
    assert start in modules
    for name in modules:
        roots = {
            imported.partition(".")[0] for imported in imports_of(ROOT.joinpath(*name.split(".")).with_suffix(".py"))
        }
        assert not roots & IMPURE, f"{name}, which {start} needs, imports {sorted(roots & IMPURE)}"


def test_the_check_for_purity_can_fail(tmp_path):
    path = tmp_path / "machine.py"
    path.write_text("from __future__ import annotations\ndef f():\n    import time\n")
    assert "time" in imports_of(path)
    path.write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from random import Random\n")
    assert not {name.partition(".")[0] for name in imports_of(path)} & IMPURE


def test_generated_docs_are_current():
    for path, text in generate().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is out of date: run  make docs"


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))], ids=lambda path: str(path.relative_to(ROOT))
)
def test_links_in_docs_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_versions_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == zmqtasks.__version__
    assert f"## {zmqtasks.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_readme_begins_with_the_two_commands():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    commands = [line.split("#")[0].strip() for line in lines if line.startswith("make ")]
    assert commands[:2] == ["make demo", "make test"]


def test_import_loads_nothing_heavy():
    program = (
        "import sys, zmqtasks;"
        "print([name for name in ('numpy', 'zmq', 'rich', 'click', 'psutil', 'uvloop', 'cryptography') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["README.md", "docs/quickstart.md"])
def test_programs_in_the_docs_run(name, tmp_path):
    """All Python of a file, in its order, as one program; what its comments say that it prints is printed."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), flags=re.DOTALL)
    program = "\n".join(blocks)
    path = tmp_path / "program.py"
    path.write_text(program, encoding="utf-8")
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    for expected in re.findall(r"^print\(.*\)  # (\d+)$", program, flags=re.MULTILINE):
        assert expected in done.stdout.split()
