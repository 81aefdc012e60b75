"""What `bench compare` calls better, worse and noise."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench.network.compare import compare
from bench.network.compare_matrix import compare_matrices
from bench.network.document import Matrix, Report, Series, Subject, read_json, write_json
from bench.network.noise import beyond_noise
from bench.network.pairs import Link
from bench.network.processes import MeasuringError
from tests.bench.documents import report
from zmqtasks.cli.bench import bench


def compared(first: Path, second: Path) -> str:
    done = CliRunner().invoke(bench, ["compare", str(first), str(second)], env={"COLUMNS": "120"})
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize(
    ("first", "second", "noise", "expected"),
    [
        ([100, 101, 102], [80, 81, 82], 0.02, True),
        ([100, 101, 102], [80, 81, 82], 0.2, False),  # other subjects show that the kind is noisier than this one looks
        ([100, 101, 102], [98, 99, 100], 0.001, False),  # the ranges overlap
        ([100, 101, 102], [97, 98, 99], 0.001, False),  # told apart, but next to nothing
        ([100, 110, 120], [80, 85, 98], 0.001, False),  # a gap of 2 %, within runs that spread by 20
        ([100, 150, 90], [80, 85, 95], 0.02, False),
        ([100], [40], None, False),  # one round: nobody knows the noise
        ([100], [30], None, True),
        ([100], [80], 0.01, True),  # but others of its kind have more rounds
        ([100, 102], [80, 82], 0.01, True),
        ([0, 0, 0], [0, 0, 0], 0.01, False),
    ],
)
def test_noise(first, second, noise, expected):
    assert beyond_noise(first, second, noise, 100) is expected
    assert beyond_noise(second, first, noise, 100) is expected


def test_the_more_is_compared_the_larger_a_change_must_be():
    first, second = [100, 102, 98], [84, 86, 82]
    assert beyond_noise(first, second, 0.05, 1)
    assert not beyond_noise(first, second, 0.05, 500)


def chance_report(seed: int) -> Report:
    """A run whose figures are chance: in each run of it the same distributions."""
    chance = random.Random(seed)

    def rounds(middle: float) -> list[float]:
        return [middle * math.exp(chance.gauss(0, 0.15)) for _ in range(3)]

    sizes = [1 << number for number in range(20)]
    subjects = [
        Subject(
            id=f"s{number}", name=f"s{number}", kind="transport", idle=Series(bandwidth={s: rounds(1e9) for s in sizes})
        )
        for number in range(25)
    ]
    return Report(subjects=subjects)


@pytest.mark.parametrize("seed", range(0, 10, 2))
def test_of_hundreds_of_figures_chance_changes_none(seed):
    changes = compare(chance_report(seed), chance_report(seed + 1))
    assert len(changes) == 500
    assert not [change for change in changes if change.verdict]


def test_what_changed_with_its_baseline_is_the_machine():
    first, second = report(), report(slower=2)
    raw = second.subject("raw-socket")
    assert raw is not None
    raw.idle.bandwidth = {size: [value / 2 for value in values] for size, values in raw.idle.bandwidth.items()}
    changed = {(each.subject, each.figure.partition(" ")[0]) for each in compare(first, second) if each.verdict}
    assert ("raw socket", "bandwidth") in changed
    assert ("tcp", "bandwidth") not in changed
    assert ("tcp", "median") in changed


def test_runs_with_other_plans_are_not_laid_side_by_side(tmp_path):
    first, second = report(), report()
    first.plan = {"idle": {"peers": 8, "sizes": [1 << 10, 64 << 20], "time_s": 0.1}}
    second.plan = {"idle": {"peers": 2, "sizes": [1 << 10, 1 << 20], "time_s": 0.04}}
    for each in (first, second):
        each.subjects[0].idle.rates["read_bytes_per_s"] = [1e9]
    figures = {change.figure for change in compare(first, second)}
    assert "messages" in figures
    assert not [figure for figure in figures if figure.startswith(("fan", "read"))]
    write_json(first, tmp_path / "a.json")
    write_json(second, tmp_path / "b.json")
    output = " ".join(compared(tmp_path / "a.json", tmp_path / "b.json").split())
    for words in ("peers 8 → 2", "time_s 0.1 → 0.04", "Fan-in and fan-out are not compared", "another size"):
        assert words in output


def test_a_loaded_network_is_not_compared_with_an_idle_one(tmp_path):
    first, second = report(matrix=True), report(matrix=True)
    assert second.matrix is not None
    second.matrix.facts["together"] = True
    write_json(first, tmp_path / "a.json")
    write_json(second, tmp_path / "b.json")
    done = CliRunner().invoke(bench, ["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    assert done.exit_code == 1
    assert "only the second run had all pairs at the same time" in done.output


def links(count: int, slow: int = -1, size: int = 1 << 20) -> Matrix:
    """Workers of as many hosts; one may be slow."""
    names = [f"w{number}" for number in range(count)]
    chance = random.Random(slow)
    made = []
    cells: list[list[float | None]] = [[None] * count for _ in names]
    for a, b in itertools.permutations(range(count), 2):
        cells[a][b] = value = 1e9 * chance.uniform(0.95, 1.05) / (10 if slow in (a, b) else 1)
        made.append(Link(source=a, target=b, bandwidth=value, by_size={size: value}))
    hosts = [f"h{number}" for number in range(count)]
    return Matrix(workers=names, hosts=hosts, links=made, bandwidth=cells, latency_us=[[None] * count] * count)


def test_whose_links_changed_is_said():
    said = list(compare_matrices(links(5), links(5, slow=3)))
    assert said[0].startswith("bandwidth of 20 links between workers")
    assert [line for line in said if "host h3: bandwidth became" in line and "slower" in line] == said[1:]
    said = list(compare_matrices(links(5, slow=3), links(5)))
    assert "host h3" in said[1]
    assert "faster" in said[1]
    assert len(list(compare_matrices(links(5), links(5)))) == 1


def test_workers_without_names_are_found_again_by_their_hosts():
    first, second = links(4), links(4, slow=2)
    for matrix, port in ((first, 34571), (second, 40000)):
        matrix.workers = [f"tcp://127.0.0.1:{port + number}" for number in range(4)]
    said = list(compare_matrices(first, second))
    assert "by their hosts only" in said[0]
    assert "host h2: bandwidth became" in said[2]


def test_matrices_with_nothing_in_common():
    other = links(3)
    other.workers = ["a", "b", "c"]
    assert list(compare_matrices(links(3), other)) == ["The runs have no links between workers in common."]
    said = list(compare_matrices(links(3), links(3, size=64 << 20)))
    assert "No size of values is in both runs" in said[0]
    assert "no links" in said[1]


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
