"""Unix domain sockets: the conformance suite, and what is particular to them."""

from __future__ import annotations

from zmqtasks.testing.conformance import TransportConformance


class TestUnix(TransportConformance):
    scheme = "unix"
