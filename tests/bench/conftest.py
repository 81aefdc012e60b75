"""For tests of the benchmark suite."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session", autouse=True)
def fonts_are_open(tmp_path_factory: pytest.TempPathFactory) -> None:
    """matplotlib keeps the files of the fonts that it has used: they are not a leak of the first test that draws."""
    from bench.network import drawing, plots
    from tests.bench.documents import report

    document = report(matrix=True)
    plots.write_pngs(document, tmp_path_factory.mktemp("fonts"))
    for plot in plots.plots(document):
        drawing.svg(plot)
