"""ZeroMQ: the conformance suite, and what is particular to it."""

from __future__ import annotations

from zmqtasks.testing.conformance import TransportConformance
from zmqtasks.testing.conformance_base import ENCRYPTED


class TestZeroMq(TransportConformance):
    scheme = "zmq"


class TestZeroMqEncrypted(TransportConformance):
    scheme = "zmq"
    encryption = ENCRYPTED
    sends_huge_frames = False  # plain links do
