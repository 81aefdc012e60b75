"""The second socket of a shm link: descriptors, and the news of leases.

Theory of operation
-------------------
Each end of a link has one end of a pair of SEQPACKET sockets, which the calling side makes and hands over with its very
first byte (`greeting`). Every packet is a kind and a number:

    ARENA size (with a descriptor)   what follows on the stream may name blocks of this file
    TAKEN n                          the first n leases of the link have been delivered
    RETURNED number                  nobody looks at this lease any more
    END n                            the link is over; leases beyond the first n will never be mapped

Leases outlive their link: arrays that came over it may live for long after. So each direction of the channel ends by
itself: the *returning half* is held by the comm and by each live lease, and when the last of them goes, even by `kill
-9`, the other side reads the end of the file, and takes back whatever was left. The *lending half* is read by the comm
while it lives, then by a thread (`housekeeping`) for as long as leases are out.

Everything that is read comes from a peer and is checked; nothing here ever blocks.
"""

from __future__ import annotations

import array
import os
import socket
import struct
from collections import deque
from collections.abc import Iterator

from zmqtasks.errors import ConnectError, RemoteProtocolError
from zmqtasks.transports.shm import native
from zmqtasks.transports.shm.arena import Arena, Block
from zmqtasks.transports.shm.mappings import Mappings

GREETING = b"\xf5zlends\x01"
"""Comes with the descriptor of the channel, before the preamble of the stream; the last byte is the version."""

_ARENA, _TAKEN, _RETURNED, _END = 1, 2, 3, 4
_PACKET = struct.Struct("<QQ")
_PACKETS_PER_TURN = 256
_DESCRIPTOR_BYTES = array.array("i").itemsize
_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL


def greet(sock: socket.socket) -> socket.socket:
    """Hands one end of a new channel to the listener at the other end of `sock`, and returns the other. Raises OSError."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        with theirs:
            socket.send_fds(sock, [GREETING], [theirs.fileno()], _FLAGS)
        ours.setblocking(False)
    except BaseException:
        ours.close()
        raise
    return ours


def take_greeting_untrusted(sock: socket.socket) -> socket.socket | None:
    """The channel that the caller at the other end of `sock` has sent; None: nothing has come yet.

    Raises ConnectError when the caller speaks something else, OSError when it is gone.
    """
    try:
        said, descriptors, flags = _receive(sock, len(GREETING))
    except BlockingIOError:
        return None
    try:
        if not said:
            raise ConnectionResetError("the caller has left")
        if said[:-1] == GREETING[: len(said) - 1] and said != GREETING:
            raise ConnectError(
                f"a caller lends memory by version {said[-1]} of the protocol, this side by version {GREETING[-1]}: "
                f"run the same release of zmqtasks on both"
            )
        if said != GREETING or len(descriptors) != 1 or flags & socket.MSG_CTRUNC:
            raise ConnectError(f"a caller does not speak the protocol of shm: it began with {said!r}")
        channel = socket.socket(fileno=descriptors.pop())
        if channel.family != socket.AF_UNIX or channel.type != socket.SOCK_SEQPACKET:
            channel.close()
            raise ConnectError("a caller offered a descriptor as its channel that is none")
        channel.setblocking(False)
        return channel
    finally:
        _close_all(descriptors)


class _QuietSocket(socket.socket):
    """Closed by whoever drops it last, be that the collector."""

    def __del__(self) -> None:
        self.close()


class _Socket:
    """Closes the channel's socket when both halves are done with it, in whatever thread that is."""

    __slots__ = ("pid", "sock")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = _QuietSocket(fileno=sock.detach())
        self.sock.setblocking(False)
        self.pid = os.getpid()

    def __del__(self) -> None:
        self.sock.close()


class ReturningHalf:
    """Tells the peer which of its leases are taken and returned; the end of the object is the end of them all.

    `give_back` may be called from any thread, and from finalizers: it takes no lock, and does nothing after a fork.
    """

    __slots__ = ("__weakref__", "_backlog", "_owner", "_taken", "_told")

    def __init__(self, owner: _Socket) -> None:
        self._owner = owner
        self._backlog: deque[int] = deque()
        self._taken = 0
        self._told = 0

    def give_back(self, number: int) -> None:
        """The lease of that number is over."""
        self._backlog.append(number)
        self.flush()

    def taken(self, count: int) -> bool:
        """So many leases have been delivered up to now; says whether the peer has been told (else `flush` again)."""
        self._taken = count
        return self.flush()

    def end(self) -> None:
        """No more of the peer's leases will be mapped."""
        self.flush()
        self._send(_END, self._taken)

    def flush(self) -> bool:
        """Tells what could not be told yet; False: the socket is full again."""
        if self._told != (taken := self._taken):
            if not self._send(_TAKEN, taken):
                return False
            self._told = taken
        while self._backlog:
            try:
                number = self._backlog.popleft()
            except IndexError:  # another thread has taken it
                break
            if not self._send(_RETURNED, number):
                self._backlog.appendleft(number)
                return False
        return True

    def _send(self, kind: int, value: int) -> bool:
        if os.getpid() != self._owner.pid:
            return True  # the parent's leases are the parent's
        try:
            self._owner.sock.send(_PACKET.pack(kind, value), _FLAGS)
        except BlockingIOError:
            return False
        except OSError:
            pass  # nobody is there any more
        return True

    def __del__(self) -> None:
        if os.getpid() == self._owner.pid:
            try:
                self._owner.sock.shutdown(socket.SHUT_WR)
            except OSError:
                pass


class PeerArena:
    """The memory file that the peer lends from."""

    __slots__ = ("descriptor", "mappings", "size")

    def __init__(self, descriptor: int, size: int) -> None:
        self.descriptor = descriptor
        self.size = size
        self.mappings = Mappings()

    def __del__(self) -> None:
        self.mappings.end()
        os.close(self.descriptor)


class Channel:
    """The lending half of a channel, and what the peer has said on the other; belongs to one thread at a time."""

    def __init__(self, sock: socket.socket, arena: Arena | None) -> None:
        owner = _Socket(sock)
        self.returning: ReturningHalf | None = ReturningHalf(owner)
        self.peer_arena: PeerArena | None = None
        self.taken = 0
        """How many of our leases have been delivered."""
        self.lent = 0
        """How many leases have been made."""
        self.leases: dict[int, Block] = {}
        """Those that are out, by number."""
        self._owner = owner
        self._arena = arena
        self._offered = False

    def fileno(self) -> int:
        """Of the socket."""
        return self._owner.sock.fileno()

    def offer(self) -> bool:
        """Sees to it that the peer has our arena; False: not now."""
        if not self._offered and self._arena is not None:
            packet = _PACKET.pack(_ARENA, self._arena.size)
            try:
                socket.send_fds(self._owner.sock, [packet], [self._arena.read_only], _FLAGS)
            except OSError:
                return False
            self._offered = True
        return self._offered

    def lend(self, block: Block) -> None:
        """The next lease is of this block, and holds it from now on."""
        self.leases[self.lent] = block
        self.lent += 1

    def end(self) -> None:
        """The link is over: nothing of the peer's arena will be mapped any more; what is mapped lives on."""
        if self.returning is not None:
            self.returning.end()
            self.returning = None
        self.peer_arena = None

    def receive_untrusted(self) -> bool:
        """Takes what has come, or a part of it; False: nothing more will come, and all leases are back.

        Raises RemoteProtocolError.
        """
        for _ in range(_PACKETS_PER_TURN):
            try:
                packet, descriptors, flags = _receive(self._owner.sock, _PACKET.size)
            except BlockingIOError:
                return True
            except OSError:
                packet, descriptors, flags = b"", [], 0
            try:
                if not packet:
                    self._take_back(list(self.leases))
                    return False
                if flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC) or len(packet) != _PACKET.size:
                    raise RemoteProtocolError(f"the peer sent {packet!r} where news of leases should be")
                kind, value = _PACKET.unpack(packet)
                self._on_packet_untrusted(kind, value, descriptors)
            finally:
                _close_all(descriptors)
        return True

    def _on_packet_untrusted(self, kind: int, value: int, descriptors: list[int]) -> None:
        if descriptors and (kind != _ARENA or self.peer_arena is not None or len(descriptors) != 1):
            raise RemoteProtocolError(f"the peer sent {len(descriptors)} descriptors that nobody asked for")
        if kind == _RETURNED:
            if value not in self.leases:
                raise RemoteProtocolError(f"the peer returned lease {value}, which it does not have")
            self._take_back((value,))
        elif kind in (_TAKEN, _END):
            if value > self.lent:
                raise RemoteProtocolError(f"the peer says it took {value} of {self.lent} leases")
            self.taken = max(self.taken, value)  # finalizers of other threads may tell late what is known already
            if kind == _END:
                self._take_back([number for number in self.leases if number >= value])
        elif kind == _ARENA and descriptors:
            size = native.memory_file_size_untrusted(descriptors[0])
            if size != value:
                raise RemoteProtocolError(f"the peer offered an arena of {value} bytes that has {size}")
            if self.returning is not None:
                self.peer_arena = PeerArena(descriptors.pop(), size)
        else:
            raise RemoteProtocolError(f"the peer sent news of leases of the unknown kind {kind}")

    def _take_back(self, numbers: list[int] | tuple[int, ...]) -> None:
        assert self._arena is not None or not numbers
        for number in numbers:
            assert self._arena is not None
            self._arena.release(self.leases.pop(number))


def _receive(sock: socket.socket, size_bytes: int) -> tuple[bytes, list[int], int]:
    """What has come, with descriptors; raises BlockingIOError and OSError."""
    room = socket.CMSG_SPACE(_DESCRIPTOR_BYTES)
    said, ancillary, flags, _ = sock.recvmsg(size_bytes, room, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)
    return said, list(_descriptors_in(ancillary)), flags


def _descriptors_in(ancillary: list[tuple[int, int, bytes]]) -> Iterator[int]:
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found = array.array("i")
            found.frombytes(content[: len(content) - len(content) % _DESCRIPTOR_BYTES])
            yield from found


def _close_all(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
