"""The baselines of fan-in, fan-out, both directions at once and connecting: raw sockets to as many processes as `links` has.

One thread at each end serves all its sockets, as an event loop does: it waits until the kernel says which are ready, sends
each message by one system call, and receives into one warm buffer. Sizes, peers and bursts are those of `links`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import selectors
import socket
import struct
import sys
import time

from .figures import BULK_BYTES, KIB, SMALL_BYTES, Burst, Plan
from .processes import START_TIMEOUT_S, Child, children, live_with_parent, read_first_line
from .raw_sockets import accept, address_of, connect, receive, serve

_COMMAND = struct.Struct("<QQQ")  # size of a message, how many come, how many to send
_PIECE_BYTES = 256 * KIB
"""So much at a time is taken from one socket, or given to it, before the next has its turn."""
_TRIP, _LAST_TRIP = b".", b"!"


def rates(scheme: str, plan: Plan) -> dict[str, float]:
    """Those of `plan.rates` that this module knows, by sockets of `scheme` (`raw_sockets.serve`)."""
    measured = {}
    if "duplex_bytes_per_s" in plan.rates:
        with contextlib.ExitStack() as stack:
            socks = _links(stack, scheme, 1)
            measured["duplex_bytes_per_s"] = 2 * _together(socks, BULK_BYTES, plan, into=True, out=True).bandwidth
    if "connects_per_s" in plan.rates:
        measured["connects_per_s"] = _connects_per_s(scheme, plan.time_s)
    if any(name.startswith("fan_") for name in plan.rates):
        with contextlib.ExitStack() as stack:
            socks = _links(stack, scheme, plan.peers)
            for direction in ("in", "out"):
                ways = {"into": direction == "in", "out": direction == "out"}
                if f"fan_{direction}_bytes_per_s" in plan.rates:
                    bulk = _together(socks, BULK_BYTES, plan, **ways)
                    measured[f"fan_{direction}_bytes_per_s"] = bulk.bandwidth * plan.peers
                if f"fan_{direction}_messages_per_s" in plan.rates:
                    small = _together(socks, SMALL_BYTES, plan, **ways)
                    measured[f"fan_{direction}_messages_per_s"] = small.messages_per_s * plan.peers
    return measured


def _links(stack: contextlib.ExitStack, scheme: str, count: int) -> list[socket.socket]:
    with serve(scheme) as server:
        call = json.dumps({"address": address_of(server)})
        stack.enter_context(children(count, __name__, "exchange", first_line=call))
        return [stack.enter_context(accept(server)) for _ in range(count)]


def _together(socks: list[socket.socket], size: int, plan: Plan, *, into: bool, out: bool) -> Burst:
    """Bursts on all links at the same time; the figures are those of one link."""
    burst = Burst(size, plan.time_s)
    while burst.going:
        burst.began()
        sent, received = (burst.count if wanted else 0 for wanted in (out, into))
        for sock in socks:
            sock.sendall(_COMMAND.pack(size, sent, received))
        _exchange(socks, size, sent, received * size + (1 if out else 0))  # what was sent is answered by one byte
        burst.ended()
    return burst


class _Flow:
    """What is under way on one socket."""

    def __init__(self, sock: socket.socket, message: memoryview, sent: int, received_bytes: int) -> None:
        self._sock = sock
        self._message = message
        self._out_left = sent * len(message)
        self._in_left = received_bytes

    @property
    def wanted(self) -> int:
        """For the selector; 0 when all is done."""
        return (selectors.EVENT_WRITE if self._out_left else 0) | (selectors.EVENT_READ if self._in_left else 0)

    def send(self) -> None:
        """One system call for each message, as far as the kernel takes them."""
        stop = max(0, self._out_left - _PIECE_BYTES)
        with contextlib.suppress(BlockingIOError):
            while self._out_left > stop:
                self._out_left -= self._sock.send(self._message[-self._out_left % len(self._message) :])

    def receive(self, memory: memoryview) -> None:
        """What has come."""
        count = self._sock.recv_into(memory[: self._in_left])
        if not count:
            raise ConnectionError("the other end of the raw socket is gone")
        self._in_left -= count


def _exchange(socks: list[socket.socket], size: int, sent: int, received_bytes: int) -> None:
    """Sends `sent` messages on each socket, and receives so many bytes from each."""
    message, memory = _message(size), _memory()
    with selectors.DefaultSelector() as selector:
        for sock in socks:
            sock.setblocking(False)
            flow = _Flow(sock, message, sent, received_bytes)
            selector.register(sock, flow.wanted, flow)
        while selector.get_map():
            for key, ready in selector.select():
                flow, wanted = key.data, key.events
                if ready & selectors.EVENT_READ:
                    flow.receive(memory)
                if ready & selectors.EVENT_WRITE:
                    flow.send()
                if not flow.wanted:
                    selector.unregister(key.fileobj)
                elif flow.wanted != wanted:
                    selector.modify(key.fileobj, flow.wanted, flow)
    for sock in socks:
        sock.setblocking(True)


@functools.lru_cache(maxsize=1)
def _message(size: int) -> memoryview:
    return memoryview(bytearray(b"\xa5") * size)


@functools.lru_cache(maxsize=1)
def _memory() -> memoryview:
    return memoryview(bytearray(_PIECE_BYTES))


def _connects_per_s(scheme: str, time_s: float) -> float:
    with serve(scheme) as server:
        call = json.dumps({"address": address_of(server), "time_s": time_s})
        with Child(__name__, "connect", first_line=call) as child:
            said = b""
            while said != _LAST_TRIP:
                with accept(server) as sock:
                    said = sock.recv(1)
                    sock.sendall(said)
                    sock.recv(1)  # nothing more comes: the other end closes first, as it does in `peer`
            return float(child.read_line(START_TIMEOUT_S))


def _connect_for(address: int | str, time_s: float) -> float:
    """Links a second, each used for one round trip; the first one warms up, as in `peer`."""
    count, began = -1, 0.0
    while count < 2 or time.perf_counter() - began < time_s:
        if count == 0:
            began = time.perf_counter()
        _connect_once(address, _TRIP)
        count += 1
    per_s = count / (time.perf_counter() - began)
    _connect_once(address, _LAST_TRIP)
    return per_s


def _connect_once(address: int | str, message: bytes) -> None:
    with connect(address) as sock:
        sock.sendall(message)
        sock.recv(1)


def main() -> None:
    """The other end."""
    call = json.loads(read_first_line())
    live_with_parent()
    if sys.argv[1] == "connect":
        print(_connect_for(call["address"], call["time_s"]), flush=True)
        return
    command = memoryview(bytearray(_COMMAND.size))
    with connect(call["address"]) as sock:
        while receive(sock, command):
            size, coming, sent = _COMMAND.unpack(command)
            _exchange([sock], size, sent, coming * size)
            if coming:
                sock.sendall(b"!")


if __name__ == "__main__":
    main()
