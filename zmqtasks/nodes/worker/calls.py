"""Functions that a client runs on a worker or nanny outside of any task (`Client.run`)."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable
from types import CoroutineType
from typing import Any

from zmqtasks.nodes.worker import context
from zmqtasks.protocol.failures import describe_exception
from zmqtasks.protocol.ops import CallFinished, CallFunction
from zmqtasks.protocol.serialize import deserialize_inline, serialize_inline

_OWN_FRAMES = 2


def call_in_thread(op: CallFunction, node: Any, argument: str, report: Callable[[CallFinished], None]) -> None:
    """Calls the function in a thread of its own; `report` gets the answer, in that thread.

    A parameter called `argument` (`dask_worker`, `dask_nanny`) gets the node, as in dask.distributed.
    """

    def run() -> None:
        if argument == "dask_worker":
            context.local.worker = node
        report(_answer(op, node, argument))

    threading.Thread(target=run, name=f"zmqtasks-call-{op.call}", daemon=True).start()


def _answer(op: CallFunction, node: Any, argument: str) -> CallFinished:
    try:
        return CallFinished(op.call, serialize_inline(_call(op.function, node, argument)), False)
    except BaseException as exc:  # as in tasks: SystemExit ends the call, not the node
        return CallFinished(op.call, describe_exception(exc, _OWN_FRAMES)[1], True)


def _call(data: bytes, node: Any, argument: str) -> Any:
    function, args, kwargs = deserialize_inline(data)
    if _has_parameter(function, argument):
        kwargs = {**kwargs, argument: node}
    result = function(*args, **kwargs)
    return asyncio.run(result) if type(result) is CoroutineType else result


def _has_parameter(function: Any, name: str) -> bool:
    try:
        return name in inspect.signature(function).parameters
    except (TypeError, ValueError):  # a builtin
        return False
