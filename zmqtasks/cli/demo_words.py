"""The first half of the demo: how often does each word occur in the source files of Python's standard library?

One task reads and counts one file; a tree of tasks adds the counts up, a few at a time, wherever they are. Only the
last count comes back to the program.
"""

from __future__ import annotations

import re
import sysconfig
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from zmqtasks.client import Client

Words: TypeAlias = "Counter[str]"

WORD = re.compile(r"[A-Za-z]{3,}")
FAN_IN = 8
SKIPPED = {"site-packages", "test", "tests", "__pycache__"}


def find_sources() -> list[str]:
    """Paths of the standard library's own source files."""
    library = Path(sysconfig.get_path("stdlib"))
    return sorted(
        str(path) for path in library.rglob("*.py") if not SKIPPED.intersection(path.relative_to(library).parts)
    )


def count_file(path: str) -> Words:
    """Word counts of one file."""
    return Counter(WORD.findall(Path(path).read_text(encoding="utf-8", errors="replace")))


def add_counts(counts: Sequence[Words]) -> Words:
    """The sum of word counts."""
    total: Words = Counter()
    for count in counts:
        total.update(count)
    return total


def submit(client: Client, paths: Sequence[str]) -> list[Any]:
    """Futures of all tasks; the last one has the counts of all files."""
    level = client.map(count_file, paths)
    futures = list(level)
    while len(level) > 1:
        groups = [level[first : first + FAN_IN] for first in range(0, len(level), FAN_IN)]
        level = client.map(add_counts, groups)
        futures += level
    return futures


def check(total: Words, paths: Sequence[str]) -> str:
    """Compares with a plain loop over the same files, and says what was found."""
    expected: Words = Counter()
    for path in paths:
        expected.update(count_file(path))
    if total != expected:
        raise AssertionError("the counts differ from those of a plain loop")
    (word, times), *_ = total.most_common(1)
    return f"{len(paths):,} files, {total.total():,} words; most frequent: {word!r}, {times:,} times"
