"""How the memory of a process counts while it lends some to another; `test_policies` runs this in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

from zmqtasks.nodes.nanny.memory import private_bytes
from zmqtasks.transports.shm.arena import Arena

SIZE = 32 << 20
READER = "import mmap, signal; m = mmap.mmap(0, 0, prot=mmap.PROT_READ); sum(m[::4096]); print('read', flush=True); signal.pause()"


def main() -> None:
    content = memoryview(bytes(SIZE))
    before = private_bytes(os.getpid())
    arena = Arena(2 * SIZE, 2 * SIZE)
    block = arena.take(SIZE)
    assert block is not None
    for mapped in (False, True):
        arena.fill(block, 0, content)
        grown = private_bytes(os.getpid()) - before
        assert 0.9 * SIZE < grown < 1.5 * SIZE, (mapped, grown)
        arena.filled(block)
        block.present = block.filled
    with subprocess.Popen([sys.executable, "-c", READER], stdin=arena.read_only, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"read\n"
            assert 0 < private_bytes(process.pid) < SIZE // 2
        finally:
            process.kill()


if __name__ == "__main__":
    main()
