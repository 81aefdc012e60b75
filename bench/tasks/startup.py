"""What a user waits for before the first task: the import, the start and the end of a cluster."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from typing import Any

ROUNDS = 5
IMPORTS = {"import zmqtasks": "import zmqtasks", "import Client": "from zmqtasks import Client, LocalCluster"}


def run() -> list[dict[str, Any]]:
    """Rows for imports (in fresh interpreters) and for clusters of two processes."""
    rows = [{"workload": "startup", "what": name, "ms_median": _import_ms(code)} for name, code in IMPORTS.items()]
    for protocol in ("tcp", "unix", "zmq", "inproc"):
        starts, ends = zip(*(_cluster_ms(protocol) for _ in range(ROUNDS)), strict=True)
        rows += [
            {"workload": "startup", "what": "start", "protocol": protocol, "ms_median": statistics.median(starts)},
            {"workload": "startup", "what": "close", "protocol": protocol, "ms_median": statistics.median(ends)},
        ]
    return rows


def _import_ms(code: str) -> float:
    program = f"import time; t = time.perf_counter(); {code}; print(time.perf_counter() - t)"
    times = [
        float(subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout)
        for _ in range(ROUNDS)
    ]
    return statistics.median(times) * 1e3


def _cluster_ms(protocol: str) -> tuple[float, float]:
    from zmqtasks import Client, LocalCluster

    options: dict[str, Any] = {"processes": False} if protocol == "inproc" else {"protocol": protocol}
    began = time.perf_counter()
    cluster = LocalCluster(n_workers=2, threads_per_worker=1, **options)
    client = Client(cluster)
    started = time.perf_counter()
    client.close()
    cluster.close()
    return (started - began) * 1e3, (time.perf_counter() - started) * 1e3
