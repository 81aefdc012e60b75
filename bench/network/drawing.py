"""How matplotlib draws the plots of a run: as SVG within the report, in the colours of its reader, and as PNG files.

Text and axes of the SVGs are `currentColor`, so the page decides, and one drawing is right in light and dark. A drawing is
as wide as a phone: there its text is as large as the page's, on a desktop larger.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

_WIDTH_IN = 4.5
_INK, _GRID = "#010203", "#040506"
"""Stand for the colours of the page until `_for_page` puts those in."""
_PNG_INK, _PNG_GRID = "#1c2024", "#d9d9e0"
_PNG_DPI = 160
_FEW_DECADES = 200
"""Below this ratio of the ends of an axis its powers of ten are too few marks."""


class Plot(NamedTuple):
    """A drawing that can be made when it is wanted."""

    name: str
    """Of its file, without the ending."""
    title: str
    about: str
    draw: Callable[[], Any]
    """Gives a figure of matplotlib."""


def svg(plot: Plot) -> str:
    """The drawing as an element of a page."""
    with _style(_INK, _GRID, plot.name):
        out = io.StringIO()
        plot.draw().savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _for_page(out.getvalue(), plot)


def write_png(plot: Plot, path: Path) -> None:
    """The drawing with its title, on white."""
    with _style(_PNG_INK, _PNG_GRID, plot.name):
        drawing = plot.draw()
        drawing.suptitle(plot.title, x=0.02, ha="left", fontsize=10, fontweight="bold")
        drawing.savefig(path, format="png", dpi=_PNG_DPI, facecolor="white")


def new_figure(height_in: float, width_in: float = _WIDTH_IN) -> Any:
    """An empty figure; without pyplot, which keeps figures and looks for a display."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width_in, height_in), layout="constrained")


def ink() -> str:
    """The colour of text, for what shall be seen on any page."""
    import matplotlib

    return str(matplotlib.rcParams["text.color"])


def mark(axis: Any, low: float, high: float) -> None:
    """Marks of a logarithmic axis that are neither too many nor too few."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0,) if high / low > _FEW_DECADES else (1.0, 2.0, 5.0)))
    axis.set_minor_formatter(NullFormatter())


def round_mark(text: str) -> str:
    """Marks of an axis are round numbers: `1.00 GB/s` is `1 GB/s`."""
    return "0" if text.startswith(("0 ", "0.00 ")) else re.sub(r"(\.\d*?)0+(?= )", r"\1", text).replace(". ", " ")


@contextmanager
def _style(ink: str, grid: str, salt: str) -> Iterator[None]:
    import matplotlib

    coloured = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    settings: Any = {
        **dict.fromkeys(coloured, ink),
        "grid.color": grid,
        "grid.linewidth": 0.6,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.linewidth": 0.6,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.major.width": 0.6,
        "ytick.major.width": 0.6,
        "xtick.minor.size": 0,
        "ytick.minor.size": 0,
        "font.family": "sans-serif",
        "font.size": 9.5,
        "legend.fontsize": 9,
        "legend.frameon": False,
        "lines.linewidth": 1.6,
        "lines.markersize": 4,
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
    }
    with matplotlib.rc_context(settings):
        yield


def _for_page(text: str, plot: Plot) -> str:
    text = text[text.index("<svg") :]
    text = text.replace(_INK, "currentColor").replace(_GRID, "var(--grid)")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px; font-family: inherit", text)
    # The page sets the size; every drawing numbers its groups from 1, and ids are of the whole page.
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r' id="(?:figure|axes|patch|text|line2d|matplotlib|xtick|ytick|legend|[A-Za-z]+)[._]\w*"', "", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{plot.title}"', 1)
