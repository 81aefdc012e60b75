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
        self.device = f"zt{os.getpid()}"
        """Its ends are called this and `a` here, this and `b` there."""

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
    device = made.device
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


class Host:
    """A namespace of its own, on a switch with others; `address` is its IPv4 address, `device` its interface."""

    device = "eth0"

    def __init__(self, name: str, address: str, port: str) -> None:
        self.name = name
        self.address = address
        self._port = port

    @property
    def prefix(self) -> tuple[str, ...]:
        """What to put before a command so that it runs there."""
        return ("ip", "netns", "exec", self.name)

    def limit(self, rate: str) -> None:
        """From now on it sends and receives no faster than `rate`, as `tc` writes it: "100mbit"."""
        bucket = f"root tbf rate {rate} burst 64kb latency 50ms"
        _run(f"ip netns exec {self.name} tc qdisc replace dev {self.device} {bucket}")
        _run(f"tc qdisc replace dev {self._port} {bucket}")

    def redirect(self, port: int, mark: int) -> None:
        """TCP connections from and to other hosts go to a local `port` instead, but for those whose sockets have `mark`.

        What listens there finds out by SO_ORIGINAL_DST where they were meant to go.
        """
        rules = f"""
        table ip detour {{
            chain prerouting {{
                type nat hook prerouting priority -100;
                iifname "{self.device}" meta l4proto tcp redirect to :{port}
            }}
            chain output {{
                type nat hook output priority -100;
                oifname "{self.device}" meta l4proto tcp meta mark != {mark} redirect to :{port}
            }}
        }}
        """
        _run("nft -f -", prefix=self.prefix, stdin=rules)


class Switch:
    """Hosts that reach each other and this namespace, whose address is `here`."""

    def __init__(self, here: str, hosts: list[Host]) -> None:
        self.here = here
        self.hosts = hosts


@contextlib.contextmanager
def switch(count: int) -> Iterator[Switch]:
    """A bridge with `count` namespaces; all is removed in the end."""
    number = os.getpid()
    subnet, bridge = f"10.{150 + number % 50}.{number // 50 % 250}", f"zs{number}"
    hosts = [Host(f"ztasks-{number}-{i}", f"{subnet}.{i + 2}", f"{bridge}p{i}") for i in range(count)]
    made = Switch(f"{subnet}.1", hosts)
    try:
        _run(f"ip link add {bridge} type bridge")
        _run(f"ip addr add {made.here}/24 dev {bridge}")
        _run(f"ip link set {bridge} up")
        for i, host in enumerate(hosts):
            _run(f"ip netns add {host.name}")
            _run(f"ip link add {bridge}p{i} type veth peer name {host.device} netns {host.name}")
            _run(f"ip link set {bridge}p{i} master {bridge} up")
            _run(f"ip -n {host.name} addr add {host.address}/24 dev {host.device}")
            _run(f"ip -n {host.name} link set {host.device} up")
            _run(f"ip -n {host.name} link set lo up")
        yield made
    finally:
        for i, host in enumerate(hosts):
            subprocess.run(["ip", "link", "del", f"{bridge}p{i}"], check=False, capture_output=True)
            subprocess.run(["ip", "netns", "del", host.name], check=False, capture_output=True)
        subprocess.run(["ip", "link", "del", bridge], check=False, capture_output=True)


def _run(command: str, prefix: tuple[str, ...] = (), stdin: str = "") -> None:
    done = subprocess.run([*prefix, *command.split()], input=stdin, text=True, check=False, capture_output=True)
    if done.returncode:
        raise OSError(f"`{command}` failed: {done.stderr.strip() or done.returncode}")
