"""Large frames come from warm blocks, and no block is anybody's while somebody else still sees it."""

from __future__ import annotations

import ctypes
import gc
import os
import pickle
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from zmqtasks.protocol.frames import KIB, MIB
from zmqtasks.transports.buffer_pool import MOST_BLOCKS, POOLED_FROM_BYTES, BufferPool, block_size, idle_bound
from zmqtasks.transports.host_memory import available_memory_bytes
from zmqtasks.transports.memory import allocate_aligned

_SIZE = 256 * KIB


def _through_pickle(view: memoryview) -> object:
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(np.frombuffer(view, np.uint8), protocol=5, buffer_callback=buffers.append)
    return pickle.loads(data, buffers=buffers)


class _Kept:
    """An object in a cycle with itself: only the collector frees it."""

    def __init__(self, view: object) -> None:
        self.view = view
        self.me = self


VIEWS: dict[str, Callable[[memoryview], Any]] = {
    "itself": lambda view: view,
    "slice": lambda view: view[5000:5001],
    "slice of slice": lambda view: view[64:][64:][: 64 * KIB][::2],
    "cast": lambda view: view.cast("d"),
    "cast to a shape": lambda view: view.cast("B", (256, KIB)),
    "view of a view": lambda view: memoryview(memoryview(view)[7:9]),
    "frombuffer": lambda view: np.frombuffer(view, np.uint8),
    "array of a slice": lambda view: np.frombuffer(view[64:128], np.uint8)[3:4],
    "asarray": lambda view: np.asarray(view)[1:2].view(np.int8).reshape(1, 1).T,
    "ndarray": lambda view: np.ndarray((4, 4), np.float64, view, 64)[1:, ::2],
    "array of an array's memory": lambda view: np.asarray(np.frombuffer(view, np.uint8)[9:10].data),
    "PickleBuffer": lambda view: pickle.PickleBuffer(view[1:2]),
    "pickled out of band": _through_pickle,
    "PickleBuffer.raw": lambda view: pickle.PickleBuffer(np.frombuffer(view, np.uint8).data).raw()[3:5],
    "ctypes from_buffer": lambda view: ctypes.c_int.from_buffer(view, 64),
    "ctypes array's item": lambda view: (ctypes.c_uint64 * 8).from_buffer(view[64:]),
    "ctypes cast": lambda view: ctypes.cast((ctypes.c_char * 8).from_buffer(view), ctypes.POINTER(ctypes.c_char)),
    "cycle": _Kept,
    "array in a cycle": lambda view: _Kept(np.frombuffer(view, np.uint8)[1:3]),
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_block_is_lent_again_only_when_its_last_view_is_gone(name: str) -> None:
    pool = BufferPool()
    view = pool.allocate(_SIZE)
    assert view is not None
    address = _address(view)
    kept = VIEWS[name](view)
    del view
    gc.collect()
    others = [pool.allocate(_SIZE) for _ in range(3)]
    assert address not in map(_address, others)
    assert pool.statistics().lent_blocks == 4
    del kept
    gc.collect()
    again = pool.allocate(_SIZE)
    assert _address(again) == address
    assert pool.statistics().reused == 1


def test_a_view_saved_from_the_collector_keeps_its_block() -> None:
    """Weak references to a thing in a cycle are told before the finalizers of the cycle run: those have it still."""
    pool = BufferPool()
    saved: list[memoryview] = []

    class Saving:
        def __init__(self, view: memoryview | None) -> None:
            self.view = view
            self.me = self

        def __del__(self) -> None:
            taken = pool.allocate(_SIZE)
            assert taken is not None
            assert self.view is not None
            taken[:1] = b"t"
            self.view[:1] = b"v"
            saved.extend((taken, self.view))

    Saving(pool.allocate(_SIZE))
    gc.collect()
    third = pool.allocate(_SIZE)
    assert third is not None
    third[:1] = b"3"
    assert [bytes(view[:1]) for view in saved] == [b"t", b"v"]
    assert pool.statistics().lent_blocks == 3
    saved.clear()
    assert pool.statistics().idle_blocks == 2


def test_threads_that_pass_views_on_never_see_another_s_bytes() -> None:
    pool = BufferPool(idle_bytes=8 * MIB)
    seed = random.randrange(1 << 30)
    print("seed", seed)
    failures: list[str] = []
    passed_on: list[tuple[int, Any]] = []
    ends_at = time.monotonic() + 3.0

    def work(number: int) -> None:
        rng = random.Random(seed + number)
        mine: list[tuple[int, Any]] = []
        count = 0
        while time.monotonic() < ends_at and not failures:
            count += 1
            mark = number << 24 | count
            view = pool.allocate(rng.choice((256 * KIB, 300 * KIB, MIB)))
            assert view is not None
            words = view[: 64 * KIB].cast("Q")
            words[0] = words[5] = words[-1] = mark
            kept = rng.choices((_itself, _words, _through_words, _Kept), (10, 10, 10, 1))[0](words)
            del view, words
            (passed_on if rng.random() < 0.3 else mine).append((mark, kept))
            del kept
            if len(passed_on) > 4:
                try:
                    mine.append(passed_on.pop(0))
                except IndexError:
                    pass
            while len(mine) > rng.randrange(12):
                mark, kept = mine.pop(rng.randrange(len(mine)))
                found: Any = kept.view if isinstance(kept, _Kept) else kept
                if not found[0] == found[5] == found[-1] == mark:
                    failures.append(f"{mark:x} became {found[0]:x} {found[5]:x} {found[-1]:x}")
                del kept, found
            if rng.random() < 0.003:
                gc.collect()
            if rng.random() < 0.01:
                pool.trim()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    passed_on.clear()
    gc.collect()
    statistics = pool.statistics()
    assert statistics.lent_blocks == 0
    assert statistics.reused > statistics.made > 0
    assert statistics.idle_bytes <= 8 * MIB


def _itself(view: memoryview) -> Any:
    return view


def _words(view: memoryview) -> Any:
    return np.frombuffer(view, np.uint64)


def _through_words(view: memoryview) -> Any:
    return np.frombuffer(pickle.PickleBuffer(view).raw(), np.uint64)


def test_a_block_wastes_an_eighth_at_most() -> None:
    rng = random.Random(3)
    for size in [POOLED_FROM_BYTES, 256 * MIB, *(rng.randrange(POOLED_FROM_BYTES, 1 << 33) for _ in range(500))]:
        assert size <= block_size(size) <= size * 1.125
        assert block_size(size) % 4096 == 0
        assert block_size(block_size(size)) == block_size(size)


def test_what_is_idle_is_bounded_and_the_longest_idle_goes_first() -> None:
    now = 0.0
    pool = BufferPool(idle_bytes=3 * MIB, idle_s=10.0, clock=lambda: now)
    views = {size: pool.allocate(size) for size in (MIB, 2 * MIB, MIB + MIB // 2)}
    for size in list(views):
        now += 1
        del views[size]
        pool.trim()
    assert pool.statistics().idle_bytes == MIB + MIB // 2
    keep = pool.allocate(4 * MIB)
    del keep
    assert pool.statistics().idle_bytes == MIB + MIB // 2  # over the bound by itself: not kept, and nothing for it
    pool.limit(0)
    assert pool.statistics().idle_blocks == 0
    view = pool.allocate(MIB)
    del view
    assert pool.statistics().idle_blocks == 0


def test_what_is_idle_for_long_goes_back_to_the_system() -> None:
    now = 0.0
    pool = BufferPool(idle_bytes=256 * MIB, idle_s=10.0, clock=lambda: now)
    before = _resident_bytes()
    view = pool.allocate(64 * MIB)
    assert view is not None
    view[:] = bytes(64 * MIB)
    del view
    pool.trim()
    assert _resident_bytes() - before > 60 * MIB
    now = 9.0
    pool.trim()
    assert pool.statistics().idle_bytes == 64 * MIB
    now = 10.0
    pool.trim()
    assert pool.statistics().idle_bytes == 0
    assert _resident_bytes() - before < 4 * MIB


def test_a_forked_child_has_memory_of_its_own() -> None:
    pool = BufferPool()
    view = pool.allocate(_SIZE)
    assert view is not None
    view[0] = 1
    read, write = os.pipe()
    child = os.fork()
    if not child:
        view[0] = 2
        del view
        again = pool.allocate(_SIZE)
        os.write(write, b"y" if again is not None and again[0] == 2 else b"n")
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read, 1) == b"y"
    assert view[0] == 1
    os.close(read)
    os.close(write)


def test_more_memory_than_there_is_is_refused() -> None:
    with pytest.raises(MemoryError):
        BufferPool().allocate(1 << 50)


def test_beyond_the_most_blocks_memory_is_taken_elsewhere() -> None:
    pool = BufferPool()
    views = [pool.allocate(POOLED_FROM_BYTES) for _ in range(MOST_BLOCKS)]
    assert all(view is not None for view in views)
    assert pool.allocate(POOLED_FROM_BYTES) is None
    views.clear()
    assert pool.allocate(POOLED_FROM_BYTES) is not None


@pytest.mark.parametrize("size", [1, 64 * KIB, POOLED_FROM_BYTES - 1, POOLED_FROM_BYTES, MIB + 1, 64 * MIB])
def test_frames_are_aligned_writable_and_of_the_size_asked_for(size: int) -> None:
    view = allocate_aligned(size)
    assert (view.nbytes, view.format, view.ndim, view.readonly, view.c_contiguous) == (size, "B", 1, False, True)
    assert _address(view) % 64 == 0


def _address(view: memoryview | None) -> int:
    assert view is not None
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def _resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_the_bound_is_an_eighth_of_the_memory_at_most() -> None:
    assert idle_bound(200 * MIB, memory_limit_bytes=800 * MIB) == 100 * MIB
    assert idle_bound(50 * MIB, memory_limit_bytes=800 * MIB) == 50 * MIB
    assert idle_bound(1 << 60) == available_memory_bytes() // 8
