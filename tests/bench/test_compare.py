"""What `bench compare` calls better, worse and noise."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from bench.network.compare import beyond_noise, compare
from bench.network.document import read_json, write_json
from bench.network.processes import MeasuringError
from tests.bench.documents import report
from zmqtasks.cli.bench import bench


def compared(first: Path, second: Path) -> str:
    done = CliRunner().invoke(bench, ["compare", str(first), str(second)], env={"COLUMNS": "120"})
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([100, 101, 102], [80, 81, 82], True),
        ([100, 101, 102], [98, 99, 100], False),  # the ranges overlap
        ([100, 101, 102], [97, 98, 99], False),  # told apart, but next to nothing
        ([100, 150, 90], [80, 85, 95], False),
        ([100], [80], False),  # one round: nobody knows the noise
        ([100], [40], True),
        ([100, 110], [95, 80], False),  # two rounds say little of it
        ([100, 102], [80, 82], True),
        ([0, 0, 0], [0, 0, 0], False),
    ],
)
def test_noise(first, second, expected):
    assert beyond_noise(first, second) is expected
    assert beyond_noise(second, first) is expected


def test_more_bandwidth_and_less_time_are_better():
    changes = compare(report(slower=2), report())
    changed = {(change.subject, change.figure.split(" ")[0]): change.verdict for change in changes if change.verdict}
    assert changed == {("tcp", "bandwidth"): 1, ("tcp", "median"): 1, ("tcp", "99"): 1}
    assert {change.verdict for change in compare(report(), report(slower=2))} == {0, -1}


def test_the_output_says_what_changed(tmp_path):
    write_json(report(), tmp_path / "a.json")
    write_json(report(slower=3), tmp_path / "b.json")
    output = compared(tmp_path / "a.json", tmp_path / "b.json")
    assert "Worse beyond the noise" in output
    assert "tcp, bandwidth at 64 MiB: 2.96 GB/s → 986 MB/s (0.33 ×)" in output  # noqa: RUF001
    assert "Better beyond" not in output
    assert "Nothing has changed" in compared(tmp_path / "a.json", tmp_path / "a.json")


def test_other_machines_and_other_runs_are_said(tmp_path):
    first, second = report(matrix=True), report(matrix=True)
    second.machine = {**second.machine, "processor": "Another one", "packages": {"pyzmq": "28.0.0"}}
    second.complete = False
    write_json(first, tmp_path / "a.json")
    write_json(second, tmp_path / "b.json")
    output = compared(tmp_path / "a.json", tmp_path / "b.json")
    assert "A processor → Another one" in output
    assert "27.3.0 → 28.0.0" in output
    assert "interrupted" in output
    assert "12 links between workers" in output


def test_runs_with_nothing_in_common(tmp_path):
    first, second = report(), report()
    second.subjects.clear()
    write_json(first, tmp_path / "a.json")
    write_json(second, tmp_path / "b.json")
    assert "no figures in common" in compared(tmp_path / "a.json", tmp_path / "b.json")


def test_a_document_comes_back_as_it_was(tmp_path):
    path = tmp_path / "a.json"
    write_json(report(matrix=True), path)
    assert read_json(path) == report(matrix=True)


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "cannot be read"), ("[]", "no result of"), ('{"format": 99}', "has format 99"), ("\xff", "no result of")],
)
def test_a_file_that_is_something_else(content, words, tmp_path):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content.encode("latin-1"))
    with pytest.raises(MeasuringError, match=words):
        read_json(path)
    done = CliRunner().invoke(bench, ["compare", str(path), str(path)])
    assert done.exit_code == 1
    assert words in done.output


@pytest.mark.parametrize(
    ("content", "words"), [("{}", "no result of"), ('{"format": 2, "title": {"text": "other"}}', "has format 2")]
)
def test_a_document_of_no_format_or_of_a_later_one(content, words, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(content)
    done = CliRunner().invoke(bench, ["compare", str(path), str(path)])
    assert done.exit_code == 1
    assert words in done.output
