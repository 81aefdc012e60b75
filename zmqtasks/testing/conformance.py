"""The conformance suite for transports: the contract of `zmqtasks.transports.base`, as tests.

Subclass `TransportConformance` in a file that pytest collects:

    class TestMyTransport(TransportConformance):
        scheme = "mine"

Tests that do not apply are skipped by what the transport declares in its `Capabilities`, and by nothing else; the suite
checks the declarations where it can. Hooks are in `ConformanceBase`. The tests of a cut link need root, `ip` and `nft`.
"""

from __future__ import annotations

from zmqtasks.testing.conformance_messages import FlowTests, MessageTests


class TransportConformance(MessageTests, FlowTests):
    """Everything that a transport promises."""
