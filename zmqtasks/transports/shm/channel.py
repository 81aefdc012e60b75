"""The second socket of a shm link: descriptors, and the news of leases.

Theory of operation
-------------------
Each end of a link has one end of a pair of SEQPACKET sockets, which the calling side makes and hands over with its very
first byte (`greeting`). Every packet is a kind and a number:

    ARENA size (with a descriptor)   what follows on the stream may name blocks of this file
    TAKEN n                          the first n leases of the link have been delivered
    RETURNED number                  nobody looks at this lease any more
    END n                            nothing more is taken: leases beyond the first n will never be mapped

Leases outlive their link: arrays that came over it may live for long after. So each direction of the channel ends by
itself: the *returning half* is held by the comm and by each live lease, and when the last of them goes, even by `kill
-9`, the other side reads the end of the file, and takes back whatever was left. The *lending half* is read by the comm
while it lives, then by a thread (`housekeeping`) for as long as leases are out. What finds the socket full is told by
whoever the comm was last: its loop, then that thread.

Everything that is read comes from a peer and is checked; nothing here ever blocks.
"""

from __future__ import annotations

import array
import os
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterator

from zmqtasks.errors import CommBrokenError, ConnectError, RemoteProtocolError
from zmqtasks.transports.inheritance import keep_from_children
from zmqtasks.transports.shm import native
from zmqtasks.transports.shm.arena import Arena, Block
from zmqtasks.transports.shm.mappings import Mappings

GREETING = b"\xf5zlends\x01"
"""Comes with the descriptor of the channel, before the preamble of the stream; the last byte is the version."""

_ARENA, _TAKEN, _RETURNED, _END = 1, 2, 3, 4
_PACKET = struct.Struct("<QQ")
_PACKETS_PER_TURN = 256
_MOST_PACKETS = 1 << 16
"""More than a socket of the largest size holds."""
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
        if len(said) == len(GREETING) and said[:-1] == GREETING[:-1] and said != GREETING:
            raise ConnectError(
                f"a caller lends memory by version {said[-1]} of the protocol, this side by version {GREETING[-1]}: "
                f"run the same release of zmqtasks on both"
            )
        if said != GREETING or len(descriptors) != 1 or flags & socket.MSG_CTRUNC:
            raise ConnectError(f"a caller does not speak the protocol of shm: it began with {said!r}")
        try:
            channel = socket.socket(fileno=descriptors[0])
        except OSError as exc:
            raise ConnectError(f"a caller offered a descriptor as its channel that is none: {exc}") from None
        descriptors.clear()
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
        keep_from_children(self.sock)
        self.pid = os.getpid()

    def __del__(self) -> None:
        self.sock.close()


class ReturningHalf:
    """Tells the peer which of its leases are taken and returned; the end of the object is the end of them all.

    `give_back` may be called from any thread, and from finalizers: it takes no lock, and does nothing after a fork.
    """

    __slots__ = ("__weakref__", "_backlog", "_is_ended", "_is_full", "_owner", "_taken", "_told", "on_full")

    def __init__(self, owner: _Socket) -> None:
        self._owner = owner
        self._backlog: deque[int] = deque()
        self._taken = 0
        self._told = 0
        self._is_ended = False  # and the peer has not been told
        self._is_full = False
        self.on_full: Callable[[], None] | None = None
        """Called when something could not be told: `flush` is due when the socket takes more."""

    def give_back(self, number: int) -> None:
        """The lease of that number is over."""
        self._backlog.append(number)
        self.flush()

    def taken(self, count: int) -> None:
        """So many leases have been delivered up to now."""
        self._taken = count
        self.flush()

    def end(self) -> None:
        """No more of the peer's leases will be mapped."""
        self._is_ended = True
        self.flush()

    @property
    def has_news(self) -> bool:
        """There is something that the peer has not been told."""
        return bool(self._backlog) or self._is_ended or self._told != self._taken

    def flush(self) -> bool:
        """Tells what could not be told yet; False: the socket is full again."""
        is_told = self._flush()
        was_full, self._is_full = self._is_full, not is_told
        if self._is_full and not was_full and self.on_full is not None:
            self.on_full()
        return is_told

    def _flush(self) -> bool:
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
        if self._is_ended:
            if not self._send(_END, self._taken):
                return False
            self._is_ended = False
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
        self.peer_takes_no_more = False
        """The peer will map none beyond those that it has taken."""
        self._owner = owner
        self.arena = arena
        """What is lent from; None: nothing is."""
        self._offered = False

    def fileno(self) -> int:
        """Of the socket."""
        return self._owner.sock.fileno()

    def offer(self) -> bool:
        """Sees to it that the peer has our arena; False: not now."""
        if not self._offered and self.arena is not None:
            packet = _PACKET.pack(_ARENA, self.arena.size)
            try:
                socket.send_fds(self._owner.sock, [packet], [self.arena.read_only], _FLAGS)
            except OSError:
                return False
            self._offered = True
        return self._offered

    def lend(self, block: Block) -> None:
        """The next lease is of this block, and holds it from now on."""
        self.leases[self.lent] = block
        self.lent += 1

    def take_no_more(self, taken: int) -> None:
        """Beyond the first `taken` leases nothing of the peer's arena will be mapped; what is mapped lives on."""
        if self.returning is not None:
            self.returning.taken(taken)
            self.returning.end()

    def end(self) -> ReturningHalf | None:
        """The link is over; gives what live leases are returned by."""
        if self.returning is not None:
            self.returning.end()
        returning, self.returning = self.returning, None
        self.peer_arena = None
        return returning

    def receive_untrusted(self) -> bool:
        """Takes what has come, or a part of it; False: nothing more will come, and all leases are back.

        Raises RemoteProtocolError, and CommBrokenError when the system gives no descriptor for the peer's arena.
        """
        for _ in range(_PACKETS_PER_TURN):
            is_open = self._take_packet_untrusted()
            if is_open is not True:
                return is_open is None
        return True

    def find_arena_untrusted(self) -> None:
        """Takes what has come up to the peer's arena, which is sent before anything of it is lent."""
        packets = 0
        while self.peer_arena is None and packets < _MOST_PACKETS and self._take_packet_untrusted():
            packets += 1

    def _take_packet_untrusted(self) -> bool | None:
        """Takes one packet; False: nothing more will come, and all leases are back. None: there is none yet."""
        try:
            packet, descriptors, flags = _receive(self._owner.sock, _PACKET.size)
        except BlockingIOError:
            return None
        except OSError:
            packet, descriptors, flags = b"", [], 0
        try:
            if not packet:
                self._take_back(list(self.leases))
                return False
            if flags & socket.MSG_CTRUNC and not descriptors:
                raise CommBrokenError("this process has no descriptor left for the arena that the peer lends from")
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
                self.peer_takes_no_more = True
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
        assert self.arena is not None or not numbers
        for number in numbers:
            assert self.arena is not None
            self.arena.release(self.leases.pop(number))


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
