"""What a task may ask of its worker from inside: public names, re-exported by the package."""

from __future__ import annotations

from zmqtasks.nodes.worker.context import current_key, get_worker, is_cancelled, rejoin, secede, waiting, warn
from zmqtasks.nodes.worker.context import print as print  # noqa: A004

__all__ = ["current_key", "get_worker", "is_cancelled", "print", "rejoin", "secede", "waiting", "warn"]
