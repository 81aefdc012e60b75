"""The baseline of users who come from dask: the comms of dask.distributed, with the same traffic.

`measure` has its own tcp, `measure_zmq` the same comms on the zmq transport (`zmqtasks.integrations.distributed_comm`).

Started as a module it is the other end: `python -m <this> ADDRESS`. A message is a dictionary with the data marked for
serialization, as distributed sends results; its comms know no pipelining but their own, so a write waits as it does there.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from typing import Any

from zmqtasks.security import KEY_FILE_VARIABLE

from .figures import BULK_BYTES, SMALL_BYTES, Burst, Figures, Plan, Quantiles, Trips
from .gil import holding_gil
from .placement import apart
from .processes import START_TIMEOUT_S, Child, live_with_parent
from .traffic import ANSWER, ECHO, LAST, SWALLOW, WAIT_S, filled

_MODULE = f"{__package__}.baseline_dask"


def measure(plan: Plan) -> Figures:
    """Latency, bandwidth, and the rate of single messages; ImportError when dask.distributed is not installed."""
    return _measure_at("tcp", "dask.distributed", plan)


def measure_zmq(plan: Plan) -> Figures:
    """The same over zmq; with a key of its own, which the other end reads from a file."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ[KEY_FILE_VARIABLE] = os.path.join(folder, "key")  # for this process, which measures nothing else
        return _measure_at("zmq", "dask.distributed on zmq", plan)


def _measure_at(scheme: str, name: str, plan: Plan) -> Figures:
    import distributed

    figures = Figures(name, {"version": distributed.__version__})
    with holding_gil(plan.hold_gil):
        asyncio.run(_measure(f"{scheme}://127.0.0.1:0", plan, figures))
    return figures


async def _measure(address: str, plan: Plan, figures: Figures) -> None:
    from distributed.comm import listen

    arrived: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    over = asyncio.Event()

    async def on_comm(comm: Any) -> None:
        arrived.set_result(comm)
        await over.wait()

    async with listen(address, on_comm) as listener:
        with Child(_MODULE, listener.contact_address, *(["--hold-gil"] if plan.hold_gil else [])):
            async with asyncio.timeout(START_TIMEOUT_S):
                comm = await arrived
            try:
                with apart():
                    for size in plan.latency_sizes:
                        figures.latency_us[size] = await _round_trips(comm, size, plan)
                for size in plan.sizes:
                    figures.bandwidth[size] = (await _bandwidth(comm, size, plan.time_s)).bandwidth
                if "messages_per_s" in plan.rates:
                    burst = await _bandwidth(comm, SMALL_BYTES, plan.time_s)
                    figures.rates["messages_per_s"] = burst.messages_per_s
            finally:
                comm.abort()
                over.set()


async def _round_trips(comm: Any, size: int, plan: Plan) -> Quantiles:
    message = _message(ECHO, size)
    trips = Trips(plan.round_trips, plan.latency_s(size))
    async with asyncio.timeout(WAIT_S):
        while trips.going:
            trips.began()
            await comm.write(message)
            await comm.read()
            trips.ended()
    return trips.quantiles


async def _bandwidth(comm: Any, size: int, time_s: float) -> Burst:
    burst = Burst(size, time_s)
    message, last = _message(SWALLOW, size), _message(LAST, size)
    while burst.going:
        burst.began()
        async with asyncio.timeout(WAIT_S):
            for _ in range(burst.count - 1):
                await comm.write(message)
            await comm.write(last)
            await comm.read()
        burst.ended()
    return burst


def _message(kind: int, size: int) -> dict[str, Any]:
    from distributed.protocol import to_serialize

    data = filled(size, kind)
    # Small data travels within the message, as distributed has it for small results.
    return {"kind": kind, "data": bytes(data) if size < BULK_BYTES // 64 else to_serialize(data)}


async def _answer(address: str) -> None:
    from distributed.comm import CommClosedError, connect
    from distributed.protocol import to_serialize

    comm = await connect(address, timeout=START_TIMEOUT_S)
    try:
        while True:
            message = await comm.read()
            if message["kind"] == ECHO:
                data = message["data"]
                await comm.write({"kind": ECHO, "data": data if isinstance(data, bytes) else to_serialize(data)})
            elif message["kind"] == LAST:
                await comm.write({"kind": ANSWER})
    except CommClosedError:
        pass


def main() -> None:
    """The other end."""
    live_with_parent()
    with holding_gil("--hold-gil" in sys.argv):
        asyncio.run(_answer(sys.argv[1]))


if __name__ == "__main__":
    main()
