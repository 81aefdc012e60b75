"""The conformance suite for transports: the contract of `zmqtasks.transports.base`, as tests.

Subclass `TransportConformance` in a file that pytest collects:

    class TestMyTransport(TransportConformance):
        scheme = "mine"

Tests that do not apply are skipped by what the transport declares in its `Capabilities`, and by nothing else; the suite
checks the declarations where it can. Hooks are in `ConformanceBase`. The tests of a cut link need root, `ip` and `nft`.
"""

from __future__ import annotations

from zmqtasks.testing.conformance_endings import AddressTests, EndingTests, NumberTests
from zmqtasks.testing.conformance_flow import FlowTests
from zmqtasks.testing.conformance_links import CutLinkTests, PeerProcessTests
from zmqtasks.testing.conformance_messages import MessageTests
from zmqtasks.testing.conformance_strangers import DeclarationTests, LimitTests, StrangerTests


class TransportConformance(
    MessageTests,
    FlowTests,
    EndingTests,
    AddressTests,
    NumberTests,
    DeclarationTests,
    LimitTests,
    StrangerTests,
    PeerProcessTests,
    CutLinkTests,
):
    """Everything that a transport promises."""
