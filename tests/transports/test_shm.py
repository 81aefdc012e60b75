"""Shared memory: the conformance suite, and what is particular to it."""

from __future__ import annotations

from zmqtasks.testing.conformance import TransportConformance


class TestShm(TransportConformance):
    scheme = "shm"
    frozen_heartbeat_s = 3.0  # a stopped process is not silent as long as its kernel answers
