"""Two network namespaces joined by a cable that can be cut: this one, and one for peer processes. Linux, root.

Packets are dropped silently (nft), as by a switch that lost power: nobody is told anything.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator

_DROP_ALL = """
table inet cut {
    chain input { type filter hook input priority 0; iifname != "lo" drop; }
    chain output { type filter hook output priority 0; oifname != "lo" drop; }
}
"""


def can_make_namespaces() -> bool:
    """Whether this process may, and has the tools."""
    return os.geteuid() == 0 and shutil.which("ip") is not None and shutil.which("nft") is not None


class Cable:
    """A veth pair to a namespace `name`; hosts are IPv4 addresses."""

    def __init__(self, name: str, subnet: str) -> None:
        self.name = name
        self.here = f"{subnet}.1"
        self.there = f"{subnet}.2"

    @property
    def prefix(self) -> tuple[str, ...]:
        """What to put before a command so that it runs on the other side."""
        return ("ip", "netns", "exec", self.name)

    def cut(self) -> None:
        """From now on no packet passes, either way."""
        self._nft(_DROP_ALL)

    def mend(self) -> None:
        """Packets pass again."""
        self._nft("delete table inet cut")

    def _nft(self, rules: str) -> None:
        subprocess.run([*self.prefix, "nft", "-f", "-"], input=rules, text=True, check=True, capture_output=True)


@contextlib.contextmanager
def cable() -> Iterator[Cable]:
    """A cable to a new namespace; all is removed in the end."""
    number = os.getpid()
    made = Cable(f"ztasks-{number}", f"10.{200 + number % 50}.{number // 50 % 250}")
    device = f"zt{number}"
    commands = [
        f"ip netns add {made.name}",
        f"ip link add {device}a type veth peer name {device}b netns {made.name}",
        f"ip addr add {made.here}/24 dev {device}a",
        f"ip link set {device}a up",
        f"ip -n {made.name} addr add {made.there}/24 dev {device}b",
        f"ip -n {made.name} link set {device}b up",
        f"ip -n {made.name} link set lo up",
    ]
    try:
        for command in commands:
            subprocess.run(command.split(), check=True, capture_output=True)
        yield made
    finally:
        subprocess.run(["ip", "link", "del", f"{device}a"], check=False, capture_output=True)
        subprocess.run(["ip", "netns", "del", made.name], check=False, capture_output=True)
