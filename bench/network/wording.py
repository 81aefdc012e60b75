"""How sizes, times and rates are written: the same in the terminal and in the report."""

from __future__ import annotations

from .figures import GIB, KIB, MIB

NOTHING = "–"  # noqa: RUF001


def size_text(size_bytes: int) -> str:
    """`64 KiB`."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if size_bytes >= unit:
            return f"{size_bytes / unit:.4g} {name}"
    return f"{size_bytes} B"


def bandwidth_text(bytes_per_s: float | None) -> str:
    """`2.31 GB/s`."""
    return NOTHING if bytes_per_s is None else f"{_scaled(bytes_per_s)}B/s"


def rate_text(per_s: float | None) -> str:
    """`1.2 M/s`."""
    return NOTHING if per_s is None else f"{_scaled(per_s)}/s"


def time_text(microseconds: float | None) -> str:
    """`21.3 µs`."""
    if microseconds is None:
        return NOTHING
    if microseconds >= 1e6:
        return f"{_digits(microseconds / 1e6)} s"
    if microseconds >= 1e3:
        return f"{_digits(microseconds / 1e3)} ms"
    return f"{_digits(microseconds)} µs"


def ratio_text(ratio: float | None) -> str:
    """`0.97 x`."""
    return NOTHING if ratio is None else f"{_digits(ratio)} ×"  # noqa: RUF001


def figure_text(name: str, value: float | None) -> str:
    """A rate in the unit that its name ends in."""
    return bandwidth_text(value) if name.endswith("bytes_per_s") else rate_text(value)


def _scaled(value: float) -> str:
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{_digits(value / unit)} {name}"
    return f"{_digits(value)} "


def _digits(value: float) -> str:
    """Three digits that count."""
    if value >= 100:
        return f"{value:.0f}"
    if value >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if value >= 0.01 or value == 0 else f"{value:.1g}"
