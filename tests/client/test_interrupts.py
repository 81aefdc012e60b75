"""Ctrl-C at any moment of a call: the client goes on, and so do its futures."""

from __future__ import annotations

import gc
import signal
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
from interrupting import Interrupt

from zmqtasks import Client, as_completed, sessions, wait
from zmqtasks.nodes.client.gate import LOOK_S, closed_gate, in_slices, open_gate, pass_gate
from zmqtasks.nodes.client.lock import UninterruptedLock

CALLS: dict[str, Callable[[Client], Any]] = {
    "submit": lambda client: client.submit(abs, -1),
    "submit keyed": lambda client: client.submit(abs, -1, pure=True),
    "result": lambda client: client.submit(abs, -1).result(timeout=30),
    "map": lambda client: client.map(abs, range(5)),
    "map keyed": lambda client: client.map(abs, range(5), pure=True),
    "gather": lambda client: client.gather(client.map(abs, range(5))),
    "scatter": lambda client: client.scatter([1, 2]),
    "wait": lambda client: wait(client.map(abs, range(3))),
    "as_completed": lambda client: list(as_completed(client.map(abs, range(3)))),
    "cancel": lambda client: client.cancel(client.map(abs, range(3))),
    "get": lambda client: client.get({"x": (abs, -1), "y": (abs, "x")}, "y"),
    "who_has": lambda client: client.who_has(),
    "run": lambda client: client.run(abs, -1),
    "executor": lambda client: client.get_executor().submit(abs, -1).result(timeout=30),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_the_client_goes_on(client: Client, call: Callable[[Client], Any]) -> None:
    kept = client.submit(abs, -7)
    number, interrupted = 1, True
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        while interrupted:
            interrupt = Interrupt(number)
            with interrupt.armed():
                call(client)
            interrupted = interrupt.happened
            assert sessions.receiving.client is None, interrupt.where
            told: list[Any] = []
            # in another thread: what waits for a lock that is held for ever can't be interrupted
            asking = threading.Thread(target=lambda told=told: told.append(client.submit(abs, -2).result(timeout=30)))
            asking.daemon = True
            asking.start()
            asking.join(30)
            assert told == [2], f"the client is stuck after an interrupt at {interrupt.where}"
            number += 1
        gc.collect()
    assert number > 20
    assert kept.result(timeout=30) == 7
    assert [str(warning.message) for warning in caught] == []


def test_the_lock_puts_an_interrupt_off() -> None:
    lock = UninterruptedLock()
    steps = []
    former = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        with lock:
            signal.raise_signal(signal.SIGINT)
            steps.append(lock.locked())
        steps.append(True)  # never
    assert steps == [True]
    assert not lock.locked()
    assert signal.getsignal(signal.SIGINT) is former


def test_handlers_of_others_are_called_once() -> None:
    lock = UninterruptedLock()
    called: list[int] = []
    former = signal.signal(signal.SIGINT, lambda number, frame: called.append(number))
    try:
        with lock:
            signal.raise_signal(signal.SIGINT)
            assert called == []
        assert called == [signal.SIGINT]
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with lock:
            signal.raise_signal(signal.SIGINT)
        assert called == [signal.SIGINT]
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, former)


def test_other_threads_leave_signals_alone() -> None:
    lock = UninterruptedLock()
    former = signal.getsignal(signal.SIGINT)
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    assert entered.wait(10)
    assert signal.getsignal(signal.SIGINT) is former
    threading.Timer(0.05, leave.set).start()
    with lock:  # waits for the other one
        assert signal.getsignal(signal.SIGINT) is not former
    thread.join()
    assert signal.getsignal(signal.SIGINT) is former


def test_an_interrupt_just_before_the_wait() -> None:
    """It does not wake the wait, and its handler has not run yet: as it is when another thread takes over in between."""
    waits = 0

    def wait_unwoken(slice_s: float) -> bool:
        nonlocal waits
        waits += 1
        assert waits == 1, "the interrupt was not heard after the first wait"
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            signal.pthread_kill(threading.get_ident(), signal.SIGINT)
            return closed_gate().acquire(timeout=slice_s)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    with pytest.raises(KeyboardInterrupt):
        in_slices(wait_unwoken, None)


def test_slices_of_a_wait() -> None:
    slices: list[float] = []

    def wait_and_tell(slice_s: float) -> bool:
        slices.append(slice_s)
        return closed_gate().acquire(timeout=slice_s)

    assert not in_slices(wait_and_tell, 3 * LOOK_S)
    assert len(slices) >= 3
    assert max(slices) <= LOOK_S
    gate = closed_gate()
    assert not pass_gate(gate, 0.0)
    assert not pass_gate(gate, -1.0)
    start = time.monotonic()
    assert not pass_gate(gate, 1.5 * LOOK_S)
    assert time.monotonic() - start >= 1.5 * LOOK_S
    threading.Timer(1.5 * LOOK_S, open_gate, (gate,)).start()
    assert pass_gate(gate, None)
    open_gate(gate)
    open_gate(gate)
    assert pass_gate(gate, 0.0)
