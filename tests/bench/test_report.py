"""The HTML report: whole in itself, quiet in a browser, no wider than its window."""

from __future__ import annotations

import itertools
import re
from html.parser import HTMLParser

import pytest

from bench.network import plots
from bench.network.document import Matrix, Report, Series, Subject, to_dict
from bench.network.figures import KIB, MIB
from bench.network.heatmap import heat_maps
from bench.network.report import render
from bench.network.subjects import BASELINES
from bench.network.summary import findings
from bench.network.tables import Section, sections
from tests.bench.browser import CHROMIUM, Browser
from tests.bench.documents import report, series


class _Parser(HTMLParser):
    """Tags and the attributes that fetch something."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if (
                name in ("src", "href", "xlink:href", "action", "data")
                and value
                and not value.startswith(("#", "data:"))
            ):
                self.fetched.append(value)


def parsed(page: str) -> _Parser:
    parser = _Parser()
    parser.feed(page)
    return parser


def test_one_file_that_fetches_nothing_and_runs_nothing():
    page = render(to_dict(report(matrix=True)))
    found = parsed(page)
    assert not found.fetched
    assert "script" not in found.tags
    assert not re.findall(r"url\((?!#)", page)
    assert found.tags.count("svg") == len(plots.plots(report(matrix=True))) == 8


def test_what_comes_from_elsewhere_is_text():
    document = report(matrix=True)
    hostile = "<script>alert(1)</script><img src=x onerror=alert(1)>"
    document.subjects[1].name = document.title = document.command = hostile
    document.machine["processor"] = document.skipped[0].reason = hostile
    assert document.matrix is not None
    document.matrix.workers[0] = document.matrix.findings[0] = hostile
    found = parsed(render(to_dict(document)))
    assert "script" not in found.tags
    assert "img" not in found.tags


def test_a_run_with_next_to_nothing_has_a_report():
    document = report()
    document.subjects.clear()
    document.complete = False
    assert "interrupted" in render(to_dict(document))


def test_a_run_that_got_no_further_than_memcpy_has_a_report(tmp_path):
    """Ctrl-C after some seconds: of the figures with the GIL held, there are only those that have no plot."""
    document = report()
    figures = series(trip_us=1, bandwidth=4e10, rounds=1)
    only = Series(bandwidth=figures.bandwidth)
    document.subjects[:] = [Subject(id="memcpy", name="memcpy", kind="baseline", idle=only, gil=only)]
    page = render(to_dict(document))
    assert "could not be drawn" not in page
    assert parsed(page).tags.count("svg") == len(plots.write_pngs(document, tmp_path)) == 0


def test_a_plot_that_cannot_be_drawn_costs_nothing_else(tmp_path, capsys):
    document = report()
    document.subjects[1].idle.bandwidth[0] = [1e9, 1e9, 1e9]  # there is no place for 0 bytes on a logarithmic axis
    page = render(to_dict(document))
    assert page.count("could not be drawn") == 1
    assert "<h3>Bandwidth</h3>" in page
    assert parsed(page).tags.count("svg") == len(plots.write_pngs(document, tmp_path)) == 5
    assert "bandwidth-tcp.png could not be drawn" in capsys.readouterr().err


def test_the_most_bandwidth_is_that_of_messages_which_are_read():
    """shm sends faster than anybody reads."""
    document = report()
    shm = Subject(id="shm", name="shm", kind="transport", idle=series(trip_us=10, bandwidth=9e9))
    document.subjects.append(shm)
    (said,) = [sentence for sentence in findings(document) if "most bandwidth" in sentence]
    assert "64 MiB that nobody reads: shm, 9.18 GB/s" in said
    for subject, read in ((document.subjects[1], 2e9), (shm, 5e9)):
        subject.idle.rates["read_bytes_per_s"] = [read]
    (said,) = [sentence for sentence in findings(document) if "most bandwidth" in sentence]
    assert said == "The most bandwidth, sent and read: shm, 5.00 GB/s."


def test_names_with_commas_are_told_apart():
    document = report()
    document.subjects[1].name = "tcp, encrypted"
    other = Subject(
        id="x", name="x", kind="transport", idle=series(trip_us=9, bandwidth=1e9), gil=document.subjects[1].gil
    )
    document.subjects.append(other)
    assert any("; tcp, encrypted 408 MB/s (14%)." in sentence for sentence in findings(document))


def test_marks_say_which_figures_are_far_apart_and_which_are_of_one_round():
    document = report()
    raw, tcp = document.subjects
    tcp.idle.bandwidth[MIB] = [2e9, 1e9, 3.1e9]
    tcp.idle.bandwidth[KIB] = [4e8]
    bandwidth, messages = (table(document, title) for title in ("Bandwidth", "Rates of messages of 100 B"))
    assert bandwidth.rows[0][1:] == ["3.06 GB/s"] * 4
    assert bandwidth.rows[1] == ["tcp", "400 MB/s*", "2.96 GB/s", "~2.00 GB/s", "2.96 GB/s"]
    assert "~ the rounds differ" in bandwidth.about
    assert "* of one round" in bandwidth.about
    assert "~" not in messages.about + str(messages.rows)
    for subject in (raw, tcp):
        subject.idle.rates["messages_per_s"] = [1e6]
    messages = table(document, "Rates of messages of 100 B")
    assert [row[1] for row in messages.rows] == ["1.00 M/s"] * 2
    assert "Of one round" in messages.about


def table(document: Report, title: str) -> Section:
    return next(section for section in sections(document) if section.title == title)


def test_every_line_of_a_drawing_can_be_told_from_each_other():
    """As colours may look alike, and print has none."""
    shown = [Subject(id=each.id, name=each.name, kind="baseline") for each in BASELINES]
    for scheme in ("inproc", "shm", "unix", "tcp", "tcp+encryption", "zmq", "zmq+encryption", "ucx"):
        settings: dict[str, str | int | float | bool] = {"encryption": "on" if "+" in scheme else "off"}
        shown.append(Subject(id=scheme, name=scheme, kind="transport", settings=settings))
    for subject in shown:
        subject.idle = series(trip_us=20, bandwidth=1e9)
    document = Report(subjects=shown)
    families = [plot for plot in plots.plots(document) if plot.name.startswith(("bandwidth-", "latency-"))]
    assert len(families) == 2 * 4
    for plot in families:
        lines = [line for line in plot.draw().axes[0].get_lines() if line.get_label() != "_nolegend_"]
        assert 2 <= len(lines) <= 5
        assert len({line.get_color() for line in lines}) == len(lines)
        assert len({line.get_marker() for line in lines}) == len(lines)
        baselines = [line for line in lines if "raw" in line.get_label() or line.get_label() in ("memcpy", "dask")]
        assert all(line.get_linestyle() != "-" for line in baselines)


@pytest.mark.parametrize("count", [2, 5, 8, 40])
def test_figures_of_heat_maps_keep_to_their_cells(count, tmp_path):
    names = [f"tcp://10.0.0.1:40{number:03}" for number in range(count)]
    cells: list[list[float | None]] = [[10.53e9 + number] * count for number in range(count)]
    matrix = Matrix(workers=names, hosts=names, latency_us=cells, bandwidth=cells)
    for plot in heat_maps(matrix):
        drawn = plot.draw()
        drawn.savefig(tmp_path / "x.png")
        axes = drawn.axes[0]
        left, right = (axes.transData.transform((at, 0))[0] for at in (0, 1))
        for text in axes.texts:
            assert text.get_window_extent().width < right - left
        assert {label.get_text() for label in axes.get_yticklabels()} <= set(names)
        marks = [label.get_window_extent() for label in drawn.axes[1].get_xticklabels()]
        assert all(first.x1 < second.x0 for first, second in itertools.pairwise(marks))


def test_links_that_are_alike_have_like_colours():
    cells = [[None, 149e9], [188e9, None]]
    matrix = Matrix(workers=["a", "b"], hosts=["a", "b"], bandwidth=cells)
    (plot,) = heat_maps(matrix)
    image = plot.draw().axes[0].get_images()[0]
    assert image.norm.vmax / image.norm.vmin == pytest.approx(3)
    assert image.norm.vmin < 149e9
    assert image.norm.vmax > 188e9


def test_pngs(tmp_path):
    written = plots.write_pngs(report(matrix=True), tmp_path / "plots")
    assert len(written) == 8
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_a_browser_has_nothing_to_complain_about(tmp_path):
    path = tmp_path / "report.html"
    path.write_text(render(to_dict(report(matrix=True))), encoding="utf-8")
    with Browser(tmp_path / "profile") as browser:
        backgrounds = []
        for width, dark in ((390, False), (1280, False), (1280, True)):
            browser.open(path, width, dark)
            assert browser.complaints() == []
            assert browser.value("document.querySelectorAll('figure svg path').length") > 50
            assert browser.value("document.documentElement.scrollWidth") <= width
            backgrounds.append(browser.value("getComputedStyle(document.body).backgroundColor"))
            smallest = "Math.min(...[...document.querySelectorAll('figure svg text')].map(e => e.getBoundingClientRect().height))"
            assert browser.value(smallest) > 6, f"text of the plots at {width} px"
        assert backgrounds[0] == backgrounds[1] != backgrounds[2]


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_the_check_of_the_browser_can_fail(tmp_path):
    path = tmp_path / "bad.html"
    path.write_text("<html><script src='http://example.invalid/x.js'></script><p style='width:3000px'>x</p></html>")
    with Browser(tmp_path / "profile") as browser:
        browser.open(path, 390)
        assert any("example.invalid" in complaint for complaint in browser.complaints())
        assert browser.value("document.documentElement.scrollWidth") > 390
