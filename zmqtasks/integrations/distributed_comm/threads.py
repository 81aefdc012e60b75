"""The one thread that stays when the last link of a process is gone."""

from __future__ import annotations

import zmq

_LENT_BYTES = 1 << 20


def start_threads() -> None:
    """Starts the thread by which pyzmq learns that ZeroMQ has sent what it was lent; it lives as long as the process.

    Else it starts with the first big message, which tests that count threads (those of `distributed.utils_test.gen_cluster`)
    take for a leak of theirs: call this where they are collected, in a `conftest.py`, say.
    """
    with zmq.Context() as context, context.socket(zmq.PAIR) as one, context.socket(zmq.PAIR) as other:
        one.bind("inproc://lending")
        other.connect("inproc://lending")
        one.send(bytes(_LENT_BYTES), copy=False)
        other.recv()
