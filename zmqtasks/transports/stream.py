"""Messages over a stream of bytes: what tcp and other streams share. No I/O in here.

The wire, all integers little-endian:

    stream  = PREAMBLE message*
    message = kind:u32 count:u32 length:u64 * count frame * count     (kind 1)
            | kind:u32 0:u32                                          (kind 2: the sender closes in good order)

Each side sends the preamble at once, before it has read the other's (but a listener that also takes encrypted links,
which begin otherwise, hears its caller first). A stream that ends without the closing message broke.
ENCRYPTION_NEEDED in place of the preamble, and the end of the stream: the listener takes encrypted links only from there.

`StreamReader` turns bytes into messages. It reads into a scratch buffer that all readers of a thread share (it is hot
in the cache, and 500 comms need no 500 buffers): `get_buffer`, the read and `received` must follow each other with no
other reader of the thread in between, which is how event loops call a `BufferedProtocol`. What is left over of the
scratch after parsing is kept by `keep_rest`. A frame of which much is still to come is read straight into its own
memory.
"""

from __future__ import annotations

import struct
import threading

from zmqtasks.errors import ConnectError, LimitExceededError, LocalProtocolError, RemoteProtocolError
from zmqtasks.protocol.frames import GIB, KIB, Frames, Limits, as_bytes_view
from zmqtasks.transports.memory import SmallFrameArena, allocate_aligned, allocate_zeroed

PREAMBLE = b"\xf5ztasks\x01"
"""First bytes of a stream: no text, no TLS record, no ZMTP greeting starts so; the last byte is the framing's
version.
"""

ENCRYPTION_NEEDED = b"\xf5ztcrypt"
"""A listener's answer to a preamble that should have come encrypted; as long as the preamble."""

_MESSAGE = 1
_GOODBYE = 2
_HEADER = struct.Struct("<II")
_ONE_FRAME_HEADER = struct.Struct("<IIQ")
_LENGTH_BYTES = 8

GOODBYE = _HEADER.pack(_GOODBYE, 0)

COALESCE_BYTES = 16 * KIB
"""Frames up to this are joined into one write: copying 16 KiB takes 0.6 us, one more element of a writev 0.3 to 1 us.
"""

DIRECT_BYTES = 32 * KIB
"""A frame (or table of lengths) over this that is not all there is read on into its own memory, past the scratch."""

_SCRATCH_BYTES = 256 * KIB
_WRITE_BYTES = 1 * GIB
"""Longest piece given to one write: several layers below count in 32-bit integers."""

_SHOWN_BYTES = 32
_TLS_RECORD = 0x16


class EncryptionFailedError(ConnectError):
    """No encrypted link came about; the message says why, of a peer called "it"."""


class EncryptionNeededError(RemoteProtocolError):
    """The listener does not talk in plain."""


class _ThreadScratch(threading.local):
    """Receive memory of one thread, for all its readers."""

    def __init__(self) -> None:
        self.buffer = allocate_zeroed(_SCRATCH_BYTES)
        self.arena = SmallFrameArena()


_scratch = _ThreadScratch()


def pack_message(frames: Frames) -> tuple[list[bytes | memoryview], int]:
    """One message as pieces to write, in order, and the sum of their sizes.

    Small frames and the header are joined; a frame over `COALESCE_BYTES` is a piece (or more) of its own, not copied.
    """
    if len(frames) == 1:
        frame = frames[0]
        size = frame.nbytes if isinstance(frame, memoryview) else len(frame)
        if size <= COALESCE_BYTES:
            return [b"".join((_ONE_FRAME_HEADER.pack(_MESSAGE, 1, size), frame))], size + _ONE_FRAME_HEADER.size
    elif not frames:
        raise LocalProtocolError("a message has at least one frame (which may be empty)")
    sizes = [frame.nbytes if isinstance(frame, memoryview) else len(frame) for frame in frames]
    message_bytes = sum(sizes) + _HEADER.size + _LENGTH_BYTES * len(sizes)
    run: list[bytes | bytearray | memoryview] = [struct.pack(f"<II{len(sizes)}Q", _MESSAGE, len(sizes), *sizes)]
    if max(sizes) <= COALESCE_BYTES:  # a batch, say: 100 ns for each frame in the general way, 60 here
        return [b"".join((*run, *frames))], message_bytes
    pieces: list[bytes | memoryview] = []
    for frame, size in zip(frames, sizes, strict=True):
        if size <= COALESCE_BYTES:
            run.append(frame)
            continue
        if run:
            pieces.append(b"".join(run))
            run = []
        view = as_bytes_view(frame)
        pieces += [view[start : start + _WRITE_BYTES] for start in range(0, size, _WRITE_BYTES)]
    if run:
        pieces.append(b"".join(run))
    return pieces, message_bytes


class StreamReader:
    """Parses what a peer sends; see the module's docstring for how it must be called.

    After any error the reader must not be used again.
    """

    __slots__ = (
        "_arena",
        "_data",
        "_direct",
        "_direct_filled",
        "_end",
        "_frames",
        "_lengths",
        "_limits",
        "_pos",
        "_rest",
        "_scratch",
        "_small_bytes",
    )

    def __init__(self, limits: Limits) -> None:
        self._small_bytes = 0
        self._limits = limits
        self.set_limits(limits)
        self._arena = _scratch.arena  # of this thread, whose loop is the only one that uses the reader
        self._scratch = _scratch.buffer
        self._data = memoryview(b"")  # what is being parsed: _data[_pos:_end]
        self._pos = 0
        self._end = 0
        self._rest = b""  # what was left over of the scratch
        self._lengths: tuple[int, ...] = ()
        self._frames: list[memoryview] | None = None  # the message being read, once its lengths are known
        self._direct: memoryview | None = None  # memory of a frame or table that is read past the scratch
        self._direct_filled = 0

    def set_limits(self, limits: Limits) -> None:
        """Bounds on messages, from the next one on."""
        self._limits = limits
        self._small_bytes = min(SmallFrameArena.LARGEST_BYTES, limits.frame_bytes, limits.message_bytes)

    def get_buffer(self) -> memoryview:
        """Where the next bytes are to be put; never empty."""
        if self._direct is not None:
            return self._direct[self._direct_filled :]
        buffer = self._scratch
        rest = self._rest
        if not rest:
            return buffer
        buffer[: len(rest)] = rest
        return buffer[len(rest) :]

    def received(self, size_bytes: int) -> None:
        """Tells that `size_bytes` have been put into the buffer."""
        if self._direct is not None:
            self._direct_filled += size_bytes
        else:
            self._data = self._scratch
            self._pos = 0
            self._end = len(self._rest) + size_bytes
            self._rest = b""

    def keep_rest(self) -> None:
        """Puts unparsed bytes aside, as the scratch is about to serve other readers."""
        if self._pos < self._end:
            self._rest = bytes(self._data[self._pos : self._end])
        self._pos = self._end = 0

    def take_rest(self) -> None:
        """Goes on with what `keep_rest` put aside, without new bytes."""
        if self._rest:
            self._data = memoryview(self._rest)
            self._pos = 0
            self._end = len(self._rest)
            self._rest = b""

    def next_preamble_untrusted(self) -> bool:
        """Whether the preamble is complete (then it is taken); raises `RemoteProtocolError` at the first wrong byte."""
        start = bytes(self._data[self._pos : min(self._end, self._pos + _SHOWN_BYTES)])
        if PREAMBLE.startswith(start[: len(PREAMBLE)]):
            if len(start) < len(PREAMBLE):
                return False
            self._pos += len(PREAMBLE)
            return True
        if ENCRYPTION_NEEDED.startswith(start[: len(ENCRYPTION_NEEDED)]):
            if len(start) < len(ENCRYPTION_NEEDED):
                return False
            raise EncryptionNeededError("the peer takes encrypted links only")
        if start[0] == _TLS_RECORD:
            raise RemoteProtocolError(
                f"the peer began a TLS handshake ({start!r}), and this side does not encrypt: "
                f"--encryption must be the same on all nodes"
            )
        if start[: len(PREAMBLE) - 1] == PREAMBLE[:-1]:
            raise RemoteProtocolError(
                f"the peer frames its messages by version {start[len(PREAMBLE) - 1]} of the stream protocol, "
                f"this side by version {PREAMBLE[-1]}: run the same release of zmqtasks on both"
            )
        raise RemoteProtocolError(f"the peer does not speak the zmqtasks stream protocol: it began with {start!r}")

    def next_message_untrusted(self) -> list[memoryview] | None:
        """The next whole message; None: more bytes are needed; an empty list: the peer closed in good order.

        Raises `RemoteProtocolError` and, before any memory is taken, `LimitExceededError`.
        """
        if self._frames is None:
            # Most messages are one small frame that has come whole: 1.7 us in the general way, 0.8 us here.
            start = self._pos + _ONE_FRAME_HEADER.size
            if start <= self._end and self._direct is None:
                kind, count, size = _ONE_FRAME_HEADER.unpack_from(self._data, self._pos)
                if count == 1 and kind == _MESSAGE and size <= self._small_bytes and start + size <= self._end:
                    self._pos = end = start + size
                    return [self._arena.copied_small(self._data, start, end)]
            if not self._begin_message():
                return None
        frames = self._frames
        if frames is None:
            return []
        if self._direct is not None and not self._finish_direct_frame(frames):
            return None
        lengths = self._lengths
        data, end = self._data, self._end
        while True:
            self._pos = self._arena.copy_small(data, self._pos, end, lengths, frames)
            if len(frames) == len(lengths):
                self._frames = None
                return frames
            size = lengths[len(frames)]
            stop = self._pos + size
            if stop > end:
                if size > DIRECT_BYTES:
                    self._start_direct(self._allocate_untrusted(size))
                return None
            frame = allocate_aligned(size)
            frame[:] = data[self._pos : stop]
            self._pos = stop
            frames.append(frame)

    def whole_message_untrusted(self, size_bytes: int, data: memoryview | None = None) -> list[memoryview] | None:
        """The message that the next `size_bytes` are, when a message begins there and is one small frame, as most are.

        None when it is anything else: then nothing has been taken of it. They are in the buffer, as before a call of
        `received`, or in `data`.
        """
        size = size_bytes - _ONE_FRAME_HEADER.size
        if self._rest or self._frames is not None or self._direct is not None or not 0 <= size <= self._small_bytes:
            return None
        if data is None:
            data = self._scratch
        if _ONE_FRAME_HEADER.unpack_from(data) != (_MESSAGE, 1, size):
            return None
        return [self._arena.copied_small(data, _ONE_FRAME_HEADER.size, size_bytes)]

    def _begin_message(self) -> bool:
        """Reads header and lengths; False: they are not complete. A goodbye leaves `_frames` None."""
        if self._direct is not None:
            if self._direct_filled < len(self._direct):
                return False
            table, self._direct = self._direct, None
            self._accept_lengths(struct.unpack(f"<{len(table) // _LENGTH_BYTES}Q", table))
            return True
        available = self._end - self._pos
        if available < _HEADER.size:
            return False
        kind, count = _HEADER.unpack_from(self._data, self._pos)
        if kind == _GOODBYE and count == 0:
            self._pos += _HEADER.size
            return True
        if kind != _MESSAGE or count == 0:
            start = bytes(self._data[self._pos : min(self._end, self._pos + _SHOWN_BYTES)])
            raise RemoteProtocolError(f"the peer sent {start!r} where a message should begin")
        if count > self._limits.frames:
            raise LimitExceededError(
                f"the peer announced a message of {count} frames, the limit is {self._limits.frames}"
            )
        table_bytes = count * _LENGTH_BYTES
        if available < _HEADER.size + table_bytes:
            if table_bytes > DIRECT_BYTES:
                self._pos += _HEADER.size
                self._start_direct(self._allocate_untrusted(table_bytes))
            return False
        lengths = struct.unpack_from(f"<{count}Q", self._data, self._pos + _HEADER.size)
        self._pos += _HEADER.size + table_bytes
        self._accept_lengths(lengths)
        return True

    def _accept_lengths(self, lengths: tuple[int, ...]) -> None:
        limits = self._limits
        if max(lengths) > limits.frame_bytes:
            raise LimitExceededError(
                f"the peer announced a frame of {max(lengths)} bytes, the limit is {limits.frame_bytes}"
            )
        if sum(lengths) > limits.message_bytes:
            raise LimitExceededError(
                f"the peer announced a message of {sum(lengths)} bytes, the limit is {limits.message_bytes}"
            )
        self._lengths = lengths
        self._frames = []

    def _start_direct(self, memory: memoryview) -> None:
        """Reads on into `memory`, after what the scratch has of it already."""
        available = self._end - self._pos
        memory[:available] = self._data[self._pos : self._end]
        self._pos = self._end
        self._direct = memory
        self._direct_filled = available

    def _finish_direct_frame(self, frames: list[memoryview]) -> bool:
        assert self._direct is not None
        if self._direct_filled < len(self._direct):
            return False
        frames.append(self._direct)
        self._direct = None
        return True

    @staticmethod
    def _allocate_untrusted(size_bytes: int) -> memoryview:
        try:
            return allocate_aligned(size_bytes)
        except (MemoryError, ValueError, OverflowError) as exc:
            raise LimitExceededError(
                f"the peer announced {size_bytes} bytes within the limits in force, but there is no memory for them"
            ) from exc
