"""How clients look: as a line, and in notebooks."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zmqtasks.client import Client

_UNITS = ("B", "kiB", "MiB", "GiB", "TiB", "PiB")


def format_bytes(size_bytes: float) -> str:
    """A size for people: `7.63 GiB`."""
    number = 0
    while size_bytes >= 1000 and number < len(_UNITS) - 1:
        size_bytes /= 1024
        number += 1
    return f"{size_bytes:.2f} {_UNITS[number]}" if number else f"{size_bytes:.0f} B"


def _facts(client: Client) -> dict[str, str]:
    node = getattr(client, "_node", None)
    if node is None:
        return {"status": client.status}
    size = node.cluster
    facts = {
        "scheduler": node.address,
        "workers": str(size.workers),
        "threads": str(size.threads),
        "memory": format_bytes(size.memory_bytes) if size.memory_bytes else "unlimited",
    }
    if not client.usable:
        facts["status"] = "closed" if client.status == "closed" else "disconnected"
    return facts


def client_text(client: Client) -> str:
    """`<Client: 'tcp://127.0.0.1:8786' workers=2 threads=2 memory=7.63 GiB>`."""
    facts = _facts(client)
    address = facts.pop("scheduler", None)
    first = f"{address!r} " if address else ""
    return f"<Client: {first}{' '.join(f'{name}={value}' for name, value in facts.items())}>"


def client_html(client: Client) -> str:
    """A small table."""
    rows = "".join(
        f'<tr><th style="text-align:left">{name.capitalize()}</th><td>{html.escape(value)}</td></tr>'
        for name, value in _facts(client).items()
    )
    return f"<div><b>Client</b> <code>{html.escape(client.name)}</code><table>{rows}</table></div>"
