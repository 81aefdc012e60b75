"""ZeroMQ: the conformance suite, and what is particular to it."""

from __future__ import annotations

from zmqtasks.testing.conformance import TransportConformance


class TestZeroMq(TransportConformance):
    scheme = "zmq"
