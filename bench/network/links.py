"""Measures links of our own transports: every kind of figure, for one transport with or without encryption."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator

import msgspec
import uvloop

from zmqtasks.transports import Comm, connect, get_transport, listen

from .figures import BULK_BYTES, READ_BYTES, SMALL_BYTES, Burst, Figures, Plan
from .gil import holding_gil
from .peer import Call, connects_per_s, link_settings
from .placement import apart
from .processes import START_TIMEOUT_S, Child, MeasuringError, children
from .traffic import Answerer, Caller, messages
from .turns import BANDWIDTH, LATENCY, each_in_turn

_PEER = f"{__package__}.peer"


def measure_link(scheme: str, encrypted: bool, plan: Plan) -> Figures:
    """One round of the transport `scheme`; raises errors of zmqtasks when there is no link."""
    figures = Figures(scheme, {"encryption": "on" if encrypted else "off", "compression": "off"})
    secret = secrets.token_bytes(32) if encrypted else None
    with holding_gil(plan.hold_gil):
        uvloop.run(_measure(scheme, secret, plan, figures))
    return figures


async def _measure(scheme: str, secret: bytes | None, plan: Plan, figures: Figures) -> None:
    async with _links(scheme, secret, plan, 1) as (caller,):
        if secret is not None and not caller.comm.encrypted:
            raise RuntimeError(f"a link by {scheme} was to be encrypted and is not")
        for size in each_in_turn(LATENCY, plan.latency_sizes):
            with apart():
                figures.latency_us[size] = await caller.round_trips(size, plan.round_trips, plan.latency_s(size))
        for size in each_in_turn(BANDWIDTH, plan.sizes):
            figures.bandwidth[size] = (await caller.bandwidth(size, plan.time_s)).bandwidth
        rates = figures.rates
        if "messages_per_s" in plan.rates:
            rates["messages_per_s"] = (await caller.bandwidth(SMALL_BYTES, plan.time_s)).messages_per_s
        if "batched_messages_per_s" in plan.rates:
            batches = await caller.bandwidth(SMALL_BYTES, plan.time_s, plan.batch)
            rates["batched_messages_per_s"] = batches.messages_per_s * plan.batch
        if "read_bytes_per_s" in plan.rates:
            size = min(READ_BYTES, max(plan.sizes))
            rates["read_bytes_per_s"] = (await caller.read(size, plan.time_s)).bandwidth
        if "duplex_bytes_per_s" in plan.rates:
            rates["duplex_bytes_per_s"] = 2 * (await _together([caller], BULK_BYTES, plan, both=True)).bandwidth
    if "connects_per_s" in plan.rates:
        rates["connects_per_s"] = await _connect_rate(scheme, secret, plan)
    if any(name.startswith("fan_") for name in plan.rates):
        await _measure_fans(scheme, secret, plan, rates)


async def _measure_fans(scheme: str, secret: bytes | None, plan: Plan, rates: dict[str, float]) -> None:
    async with _links(scheme, secret, plan, plan.peers) as callers:
        for direction in ("in", "out"):
            into = direction == "in"
            if f"fan_{direction}_bytes_per_s" in plan.rates:
                bulk = await _together(callers, BULK_BYTES, plan, into=into)
                rates[f"fan_{direction}_bytes_per_s"] = bulk.bandwidth * plan.peers
            if f"fan_{direction}_messages_per_s" in plan.rates:
                small = await _together(callers, SMALL_BYTES, plan, into=into)
                rates[f"fan_{direction}_messages_per_s"] = small.messages_per_s * plan.peers


async def _together(callers: list[Caller], size: int, plan: Plan, *, into: bool = False, both: bool = False) -> Burst:
    """Bursts on all links at the same time, out of this process or into it; the figures are those of one link."""
    burst = Burst(size, plan.time_s)
    message, last = messages(size)
    while burst.going:
        burst.began()
        async with asyncio.TaskGroup() as group:
            for caller in callers:
                if into or both:
                    group.create_task(caller.receive(size, burst.count))
                if both or not into:
                    group.create_task(caller.send(message, last, burst.count))
        burst.ended()
    return burst


async def _connect_rate(scheme: str, secret: bytes | None, plan: Plan) -> float:
    settings = link_settings(secret)
    answerers: list[Answerer] = []
    listener = await listen(_listen_address(scheme), lambda comm: answerers.append(Answerer(comm)), settings)
    try:
        if not get_transport(scheme).capabilities.crosses_processes:
            return await connects_per_s(listener.address, settings, plan.time_s)
        call = _call(listener.address, secret, plan, connects_s=plan.time_s)
        with Child(_PEER, first_line=call) as child:
            return float(await asyncio.to_thread(child.read_line, START_TIMEOUT_S + 10 * plan.time_s))
    finally:
        await listener.close()
        async with asyncio.timeout(START_TIMEOUT_S):
            await asyncio.gather(*(answerer.ended for answerer in answerers))
        await asyncio.gather(*(answerer.comm.close() for answerer in answerers))


@contextlib.asynccontextmanager
async def _links(scheme: str, secret: bytes | None, plan: Plan, count: int) -> AsyncIterator[list[Caller]]:
    """This side of links to so many other processes, or to this one when the transport does not leave it."""
    settings = link_settings(secret)
    arrivals: asyncio.Queue[Comm] = asyncio.Queue()
    async with contextlib.AsyncExitStack() as stack:
        listener = await listen(_listen_address(scheme), arrivals.put_nowait, settings)
        stack.push_async_callback(listener.close)
        if get_transport(scheme).capabilities.crosses_processes:
            stack.enter_context(children(count, _PEER, first_line=_call(listener.address, secret, plan)))
        else:
            for _ in range(count):
                other = Answerer(await connect(listener.address, settings))
                stack.push_async_callback(other.comm.close)
        callers: list[Caller] = []
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                while len(callers) < count:
                    comm = await arrivals.get()
                    stack.push_async_callback(_end, comm)
                    callers.append(Caller(comm))
        except TimeoutError as exc:
            message = f"{len(callers)} of {count} links by {scheme} came within {START_TIMEOUT_S:.0f} s"
            raise MeasuringError(message) from exc
        yield callers


async def _end(comm: Comm) -> None:
    comm.abort("the measurement has ended")
    await comm.close()


def _listen_address(scheme: str) -> str:
    return f"{scheme}://127.0.0.1:0" if get_transport(scheme).capabilities.uses_ip else f"{scheme}://"


def _call(address: str, secret: bytes | None, plan: Plan, connects_s: float = 0.0) -> str:
    hexadecimal = None if secret is None else secret.hex()
    call = Call(address=address, secret=hexadecimal, hold_gil=plan.hold_gil, connects_s=connects_s)
    return msgspec.json.encode(call).decode()
