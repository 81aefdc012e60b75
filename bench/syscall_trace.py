"""Which memory a process hands to the kernel to be sent, and has filled by it: seen by ptrace, from outside.

That tells copies apart that no counter of memory shows: a value that goes out in pieces through a small buffer takes no
memory, and is copied all the same. Linux only; the traced processes must be children (or the tracer root).
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import struct
from typing import NamedTuple

_SEIZE, _INTERRUPT, _SYSCALL, _GET_SYSCALL_INFO = 0x4206, 0x4207, 24, 0x420E
_TRACE_SYSGOOD, _TRACE_CLONE = 1, 8
_WALL = 0x40000000
_EVENT_STOP = 128
_ENTRY, _EXIT = 1, 2

_X86_64 = {
    0: "in",
    1: "out",
    18: "out",
    19: "in[]",
    20: "out[]",
    44: "out",
    45: "in",
    46: "out()",
    47: "in()",
    296: "out[]",
}
_AARCH64 = {
    63: "in",
    64: "out",
    68: "out",
    65: "in[]",
    66: "out[]",
    206: "out",
    207: "in",
    211: "out()",
    212: "in()",
    70: "out[]",
}
_NUMBERS = {"x86_64": _X86_64, "aarch64": _AARCH64}
"""read, write, pwrite64, readv, writev, sendto, recvfrom, sendmsg, recvmsg, pwritev: what moves bytes of streams, and what
fills shared memory."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)


class Moved(NamedTuple):
    """Bytes that one system call took from, or put into, one stretch of memory."""

    pid: int
    outwards: bool
    address: int
    size: int


def trace(pids: list[int], start: int) -> list[Moved]:
    """What the processes `pids` move until all of them have ended; a line to `start` sets them off.

    Raises OSError where tracing is not allowed, NotImplementedError on other machines.
    """
    numbers = _NUMBERS.get(platform.machine())
    if numbers is None:
        raise NotImplementedError(f"no table of system calls for {platform.machine()}")
    threads: dict[int, int] = {}
    for pid in pids:
        for name in os.listdir(f"/proc/{pid}/task"):
            _ptrace(_SEIZE, int(name), 0, _TRACE_SYSGOOD | _TRACE_CLONE)
            _ptrace(_INTERRUPT, int(name))
            threads[int(name)] = pid
    os.write(start, b"go\n")
    moved: list[Moved] = []
    entered: dict[int, tuple[str, int, int]] = {}
    while set(threads.values()):
        thread, status = os.waitpid(-1, _WALL)
        if os.WIFEXITED(status) or os.WIFSIGNALED(status):
            threads.pop(thread, None)
            continue
        if thread not in threads:
            threads[thread] = _process_of(thread)
        passed_on = 0
        number = os.WSTOPSIG(status)
        if number == signal.SIGTRAP | 0x80:
            _note(thread, threads[thread], numbers, entered, moved)
        elif status >> 16 == 0:
            passed_on = number
        _ptrace(_SYSCALL, thread, 0, passed_on)
    return moved


def _note(
    thread: int, pid: int, numbers: dict[int, str], entered: dict[int, tuple[str, int, int]], moved: list[Moved]
) -> None:
    info = ctypes.create_string_buffer(88)
    _ptrace(_GET_SYSCALL_INFO, thread, len(info), ctypes.addressof(info))
    if info.raw[0] == _ENTRY:
        number, _, memory, length = struct.unpack_from("<4Q", info, 24)
        if number in numbers:
            entered[thread] = (numbers[number], memory, length)
        return
    call = entered.pop(thread, None)
    (count,) = struct.unpack_from("<q", info, 24)
    if call is None or count <= 0:
        return
    kind, memory, length = call
    if kind.endswith("()"):  # struct msghdr: the vector and its length are its third and fourth word
        memory, length = struct.unpack("<2Q", _read(pid, memory + 16, 16))
    vector = [(memory, length)]
    if kind not in ("in", "out"):
        words = struct.unpack(f"<{2 * length}Q", _read(pid, memory, 16 * length))
        vector = list(zip(words[::2], words[1::2], strict=True))
    for address, size in vector:
        if count <= 0:
            break
        moved.append(Moved(pid, kind.startswith("out"), address, min(size, count)))
        count -= size


def _read(pid: int, address: int, size: int) -> bytes:
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        memory.seek(address)
        return memory.read(size)


def _process_of(thread: int) -> int:
    with open(f"/proc/{thread}/status") as status:
        return int(next(line.split()[1] for line in status if line.startswith("Tgid:")))


def _ptrace(request: int, thread: int, address: int = 0, data: int = 0) -> None:
    if _libc.ptrace(request, thread, address, data) < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"ptrace request {request:#x} of thread {thread}: {os.strerror(error)}")
