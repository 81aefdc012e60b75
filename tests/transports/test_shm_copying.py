"""Copies by two threads: whole, and over when they are stopped."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from zmqtasks.protocol.frames import MIB
from zmqtasks.transports.shm import native
from zmqtasks.transports.shm.arena import Arena, Block
from zmqtasks.transports.shm.copying import HELP_FROM_BYTES, Copy

SIZE = 16 * MIB


@pytest.fixture
def arena() -> Iterator[Arena]:
    made = Arena(512 * MIB, 1024 * MIB)
    yield made
    os.close(made.read_only)
    os.close(made._file)
    native.unmap(made._address, made.size)


def warm_block(arena: Arena, size_bytes: int) -> Block:
    """A block of which all pages are there, full of zeros."""
    block = arena.take(size_bytes)
    assert block is not None
    arena.fill(block, 0, memoryview(bytes(size_bytes)))
    arena.filled(block)
    arena.release(block)
    arena.trim(0.0)  # maps them
    assert arena.take(size_bytes) is block
    assert arena.mapped(block, size_bytes) is not None
    return block


def content_of(arena: Arena, block: Block, size_bytes: int) -> bytes:
    mapped = arena.mapped(block, size_bytes)
    assert mapped is not None, "the pages were to be there"
    return bytes(mapped)


def finish(copy: Copy, budget: int) -> None:
    while not copy.is_complete():
        assert 0 <= copy.advance(budget) <= budget


@pytest.mark.parametrize(
    "size_bytes", [1, MIB, HELP_FROM_BYTES - 1, HELP_FROM_BYTES, HELP_FROM_BYTES + 1, 33 * MIB + 7]
)
@pytest.mark.parametrize("budget", [MIB, 8 * MIB])
@pytest.mark.parametrize("warm", [True, False], ids=["warm", "new"])
def test_content(arena: Arena, size_bytes: int, budget: int, warm: bool) -> None:
    content = os.urandom(size_bytes)
    block = warm_block(arena, size_bytes) if warm else arena.take(size_bytes)
    assert block is not None
    finish(Copy(arena, block, memoryview(content)), budget)
    arena.filled(block)
    arena.fill(block, 0, memoryview(content[:1]))
    assert os.pread(arena.read_only, size_bytes, block.offset) == content
    arena.release(block)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="a helper needs a second processor")
@pytest.mark.parametrize("extra_bytes", [-1, 0, 1, 128, 5 * MIB + 7, 32 * MIB - 1, 32 * MIB, 101 * MIB + 7])
@pytest.mark.parametrize("threshold", [5 * MIB + 1, 16 * MIB])
def test_content_in_large_pieces(
    arena: Arena, threshold: int, extra_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a process that copies past the caches; the least that goes so, and what is a little more or less."""
    monkeypatch.setenv("GLIBC_TUNABLES", f"glibc.cpu.x86_non_temporal_threshold={threshold}")
    size_bytes = 2 * threshold + extra_bytes
    content = os.urandom(size_bytes)
    copy = Copy(arena, warm_block(arena, size_bytes), memoryview(content))
    pieces = []
    while not copy.is_complete():
        pieces.append(copy.advance(MIB))
    assert content_of(arena, copy.block, size_bytes) == content
    assert copy._help is not None
    if extra_bytes < 0:
        assert not copy._help._large
    else:
        assert threshold - 64 <= copy._help._large < 2 * threshold
        assert all(copy._help._large <= piece < 2 * copy._help._large for piece in pieces if piece), (
            "a small rest was left"
        )
    arena.release(copy.block)


@pytest.mark.parametrize("threshold", [MIB, 17 * MIB])
def test_thresholds_for_which_pieces_stay_small(arena: Arena, threshold: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small ones go past the caches already, or large ones would hold the loop for too long."""
    monkeypatch.setenv("GLIBC_TUNABLES", f"glibc.cpu.x86_non_temporal_threshold={threshold:#x}")
    content = os.urandom(64 * MIB)
    block = warm_block(arena, len(content))
    finish(Copy(arena, block, memoryview(content)), 8 * MIB)
    assert content_of(arena, block, len(content)) == content
    arena.release(block)


def test_copies_in_turns(arena: Arena) -> None:
    """Those of several links go on side by side."""
    contents = [os.urandom(16 * MIB) for _ in range(4)]
    copies = [Copy(arena, warm_block(arena, len(content)), memoryview(content)) for content in contents]
    unfinished = copies
    while unfinished := [copy for copy in unfinished if not copy.is_complete()]:
        for copy in unfinished:
            copy.advance(MIB)
    for copy, content in zip(copies, contents, strict=True):
        assert content_of(arena, copy.block, len(content)) == content
        arena.release(copy.block)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="a helper needs a second processor")
def test_nothing_is_written_after_the_end(arena: Arena) -> None:
    """Neither of a copy that is complete, nor of one that was stopped, by the helper that has begun at its back."""
    block = warm_block(arena, SIZE)
    tail = SIZE - 2 * MIB
    ones, zeros = memoryview(b"\1" * SIZE), memoryview(bytes(SIZE))
    mapped = arena.mapped(block, SIZE)
    assert mapped is not None
    for number in range(300):
        copy = Copy(arena, block, ones)
        if number % 2:
            finish(copy, MIB // 4)
            assert copy._help is not None
            met = slice(copy._help._back, copy._help._back + 2 * MIB)  # the helper's last piece
            assert mapped[met] == ones[met], "it was not complete"
        else:
            for _ in range(number % 6 // 2):
                copy.advance(MIB)
            copy.stop()
        arena.fill(block, tail, zeros[tail:])
        assert mapped[tail:] == zeros[tail:]
        arena.fill(block, 0, zeros)
    assert mapped == zeros
    arena.release(block)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="a helper needs a second processor")
def test_a_child_copies_nothing_of_its_parent(arena: Arena) -> None:
    """What waits for the helper when the process forks would be written to memory that others have by then."""
    block, childs = warm_block(arena, SIZE), warm_block(arena, SIZE)
    finish(Copy(arena, block, memoryview(bytes(SIZE))), MIB)  # the helper runs
    queued = [Copy(arena, block, memoryview(b"\1" * SIZE)) for _ in range(8)]
    child = os.fork()
    if not child:
        try:
            finish(Copy(arena, childs, memoryview(b"\2" * SIZE)), MIB)
            os._exit(0 if content_of(arena, childs, SIZE) == b"\2" * SIZE else 1)
        finally:
            os._exit(2)
    for copy in queued:
        copy.stop()
    arena.fill(block, 0, memoryview(bytes(SIZE)))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert content_of(arena, block, SIZE) == bytes(SIZE)
    arena.release(block)
    arena.release(childs)
