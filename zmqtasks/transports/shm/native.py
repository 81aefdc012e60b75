"""The few calls of the kernel that Python does not offer as they are needed: mappings by address, holes, file systems.

`mmap.mmap` keeps a descriptor per mapping and unmaps only what nobody looks at; leases are many, and come and go by the
thousand, so they are mapped and unmapped by address.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import mmap
import os
import stat
from typing import TYPE_CHECKING, Any, TypeAlias

from zmqtasks.errors import RemoteProtocolError
from zmqtasks.protocol.frames import Buffer

if TYPE_CHECKING:
    import numpy as np

    Owner: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]

PAGE_BYTES = mmap.PAGESIZE

_MAP_NORESERVE = 0x4000  # linux/mman.h, the same on x86 and arm
_MADV_POPULATE_WRITE = 23  # asm-generic/mman-common.h
_TMPFS_MAGIC = 0x01021994  # linux/magic.h; memory files made of huge pages have another
_KNOWN_TO_COLLECTOR = 1 << 14  # Py_TPFLAGS_HAVE_GC in CPython's object.h
_STATFS_BYTES = 256  # struct statfs has 120 bytes; its first word is the type

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.fstatfs.argtypes = (ctypes.c_int, ctypes.c_void_p)

_FAILED = ctypes.c_void_p(-1).value


def memory_file(name: str, size_bytes: int) -> int:
    """A descriptor of a new memory file that can neither shrink nor grow; it takes memory where it is written.

    Raises OSError.
    """
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, size_bytes)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def read_only(descriptor: int) -> int:
    """Another descriptor of the same file, good for reading only; raises OSError."""
    return os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)


def memory_file_size_untrusted(descriptor: int) -> int:
    """The size of a memory file that cannot shrink, so that reading it never ends in SIGBUS; else RemoteProtocolError."""
    try:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
        access = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
        status = os.fstat(descriptor)
    except OSError as exc:
        raise RemoteProtocolError(f"the peer offered a file that is no memory file as its arena: {exc}") from None
    if not stat.S_ISREG(status.st_mode) or _file_system(descriptor) != _TMPFS_MAGIC:
        raise RemoteProtocolError("the peer offered a file as its arena that does not lie in ordinary memory")
    if access == os.O_WRONLY:
        raise RemoteProtocolError("the peer offered an arena that cannot be read")
    if not seals & fcntl.F_SEAL_SHRINK:
        raise RemoteProtocolError("the peer offered an arena that it could shrink under its readers: it is not sealed")
    return status.st_size


def map_shared(descriptor: int, size_bytes: int) -> int:
    """The address of a writable mapping that others see; raises OSError."""
    return _map(descriptor, 0, size_bytes, mmap.MAP_SHARED)


def map_private(descriptor: int, offset: int, size_bytes: int) -> int:
    """The address of a mapping whose pages become this process's own when it writes to them; raises OSError."""
    return _map(descriptor, offset, size_bytes, mmap.MAP_PRIVATE)


def _map(descriptor: int, offset: int, size_bytes: int, kind: int) -> int:
    access = mmap.PROT_READ | mmap.PROT_WRITE
    address = _libc.mmap(None, size_bytes, access, kind | _MAP_NORESERVE, descriptor, offset)
    if address == _FAILED:
        raise _last_error()
    assert isinstance(address, int)
    return address


def unmap(address: int, size_bytes: int) -> None:
    """Ends a mapping."""
    _libc.munmap(address, size_bytes)


def has_own_pages(address: int, size_bytes: int) -> bool:
    """Whether any page of a private mapping has been written to, and so is this process's own; True where it is not told.

    proc(5), /proc/pid/pagemap: bit 63 says present, 62 swapped, 61 that the page is the file's.
    """
    import numpy as np

    count = size_bytes // PAGE_BYTES
    try:
        descriptor = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)  # of this process, also after a fork
    except OSError:
        return True
    try:
        told = os.pread(descriptor, count * 8, address // PAGE_BYTES * 8)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    if len(told) != count * 8:
        return True
    kinds = np.frombuffer(told, np.uint64) >> np.uint64(61)
    return bool(np.any((kinds >= 2) & (kinds % 2 == 0)))


def populate(address: int, size_bytes: int) -> bool:
    """Maps the pages behind a shared mapping for writing, without page faults; False: the kernel (before 5.14) cannot."""
    return not _libc.madvise(address, size_bytes, _MADV_POPULATE_WRITE)


def punch_hole(address: int, size_bytes: int) -> None:
    """Gives the memory behind a shared mapping back to the kernel; it reads as zeros again. Raises OSError."""
    if _libc.madvise(address, size_bytes, mmap.MADV_REMOVE):
        raise _last_error()


def memory_at(address: int, size_bytes: int) -> ctypes.Array[ctypes.c_ubyte]:
    """An object that stands for a piece of memory: every view of it keeps the object, which owns nothing itself."""
    return _bytes_type(size_bytes).from_address(address)


def owned_memory(address: int, size_bytes: int) -> Owner:
    """What stands below every view of a piece of memory, so that its end is the end of them all: an array.

    Its end must be known exactly, and a weak reference to most objects does not tell it: the collector calls those of
    objects in a cycle first, then finalizers, which may look at the memory and even save it. An array is not known to
    the collector, so nothing but its count of references ends it, when nobody has it; and a memoryview, which is known,
    is no part of a cycle for as long as an array stands on it. numpy shortens chains of arrays, but not below one that
    stands on another kind of object, as this does.
    """
    import numpy as np

    return np.frombuffer(memoryview(memory_at(address, size_bytes)).cast("B"), np.uint8)


@functools.cache
def ends_exactly() -> bool:
    """Whether arrays of this numpy are what `owned_memory` needs them to be: unknown to the collector."""
    import numpy as np

    return not np.ndarray.__flags__ & _KNOWN_TO_COLLECTOR


@functools.lru_cache(512)
def _bytes_type(size_bytes: int) -> type[ctypes.Array[ctypes.c_ubyte]]:
    # Making one takes 13 us, and they are part of cycles.
    return ctypes.c_ubyte * size_bytes


def address_of(buffer: Buffer) -> int:
    """Where the memory of a buffer lies, writable or not."""
    import numpy as np

    return int(np.frombuffer(buffer, np.uint8).ctypes.data)


def _file_system(descriptor: int) -> int:
    answer = (ctypes.c_long * (_STATFS_BYTES // ctypes.sizeof(ctypes.c_long)))()
    if _libc.fstatfs(descriptor, answer):
        raise RemoteProtocolError(f"the peer offered a descriptor that is no file as its arena: {_last_error()}")
    return int(answer[0])


def _last_error() -> OSError:
    number = ctypes.get_errno() or errno.ENOMEM
    return OSError(number, os.strerror(number))
