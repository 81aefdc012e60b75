"""Large arrays travel without a copy in user space, as a tracer sees it from outside, and take no memory beyond their own."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from zmqtasks import Client, LocalCluster, wait
from zmqtasks.protocol.frames import KIB, MIB

SIZE_BYTES = 256 * MIB
SLACK_BYTES = SIZE_BYTES // 10


def transfer(scheme: str) -> dict[str, Any]:
    """What one array's way took; in a process of its own, as the tracer takes all children for its own."""
    command = [sys.executable, "-m", "bench.zero_copy", "--json", "--size-mib", str(SIZE_BYTES // MIB), scheme]
    found: dict[str, Any] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, timeout=120, check=True).stdout)
    assert found["size_bytes"] == SIZE_BYTES
    return found


@pytest.mark.parametrize("scheme", ["tcp", "unix"])
def test_sockets_copy_in_the_kernel_only(scheme: str) -> None:
    found = transfer(scheme)
    assert found["taken_bytes"] == SIZE_BYTES
    # What comes with the message's header, before anybody knows what is to come, is at most one scratch buffer.
    assert SIZE_BYTES - 256 * KIB <= found["filled_bytes"] <= SIZE_BYTES
    assert found["producer_peak_bytes"] < SLACK_BYTES
    assert found["consumer_peak_bytes"] < SIZE_BYTES + SLACK_BYTES


def test_shared_memory_is_written_once_by_the_kernel_and_then_mapped() -> None:
    found = transfer("shm")
    assert found["taken_bytes"] == SIZE_BYTES
    assert found["filled_bytes"] == 0
    assert found["producer_peak_bytes"] < SLACK_BYTES
    assert found["consumer_peak_bytes"] < SLACK_BYTES


def test_zmq_takes_no_memory_beyond_the_array() -> None:
    found = transfer("zmq")
    assert found["producer_peak_bytes"] < SLACK_BYTES
    assert found["consumer_peak_bytes"] < SIZE_BYTES + SLACK_BYTES


def test_within_a_process_nothing_is_copied() -> None:
    found = transfer("inproc")
    assert found["same_memory"]
    assert found["consumer_peak_bytes"] < SLACK_BYTES


def reset_peak() -> int:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return peak()


def peak() -> int:
    with open("/proc/self/status") as status:
        return 1024 * int(next(line.split()[1] for line in status if line.startswith("VmHWM:")))


def make(size_bytes: int) -> np.ndarray[Any, Any]:
    return np.full(size_bytes // 8, 0.5)


def look_at(array: np.ndarray[Any, Any]) -> tuple[bool, bool, int]:
    on_frame = array[0] == array[-1] == 0.5 and not array.flags.owndata and array.flags.writeable
    return bool(on_frame), array.ctypes.data % 64 == 0, peak()


def test_a_result_goes_from_worker_to_worker_without_a_copy() -> None:
    with LocalCluster(n_workers=2, threads_per_worker=1, protocol="tcp") as cluster, Client(cluster) as client:
        first, second = client.scheduler_info()["workers"]
        array = client.submit(make, SIZE_BYTES, workers=[first])
        wait([array])
        producer_base = client.submit(reset_peak, workers=[first], pure=False).result()
        consumer_base = client.submit(reset_peak, workers=[second], pure=False).result()
        on_frame, aligned, consumer_peak = client.submit(look_at, array, workers=[second]).result()
        producer_peak = client.submit(peak, workers=[first], pure=False).result()
        assert on_frame
        assert aligned
        assert producer_peak - producer_base < SLACK_BYTES
        assert consumer_peak - consumer_base < SIZE_BYTES + SLACK_BYTES
