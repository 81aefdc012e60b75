"""Many submissions of one function as one op: a loop of `submit` costs the scheduler what a `map` costs."""

from __future__ import annotations

from zmqtasks.protocol.ops import Op, SubmitTasks

MAX_MERGED = 2_000
"""Tasks in a merged op: as `Config.submit_batch`, it bounds the time that one op holds the scheduler."""


def merge_submissions(ops: list[Op]) -> list[Op]:
    """`ops`, in which neighbouring `SubmitTasks` of one function and following keys have become one."""
    if len(ops) < 2 or (len(ops) == 2 and type(ops[1]) is not SubmitTasks):
        return ops
    merged: list[Op] = []
    run: list[SubmitTasks] = []
    count = 0
    for op in ops:
        if isinstance(op, SubmitTasks) and not op.keys and not op.references and not op.order:
            if run and _follows(run[-1], op) and count + op.count <= MAX_MERGED:
                run.append(op)
                count += op.count
                continue
            _flush(run, merged)
            run = [op]
            count = op.count
        else:
            _flush(run, merged)
            run = []
            merged.append(op)
    _flush(run, merged)
    return merged


def _follows(last: SubmitTasks, op: SubmitTasks) -> bool:
    return (
        op.function == last.function
        and op.first_key == last.first_key + last.count
        and op.name == last.name
        and (op.options is last.options or op.options == last.options)
    )


def _flush(run: list[SubmitTasks], merged: list[Op]) -> None:
    if len(run) < 2:
        merged.extend(run)
        return
    args_lengths: list[int] = []
    dep_counts: list[int] = []
    deps: list[int | str] = []
    for op in run:
        args_lengths += op.args_lengths or [0] * op.count
        dep_counts += op.dep_counts or [0] * op.count
        deps += op.deps
    first = run[0]
    merged.append(
        SubmitTasks(
            function=first.function,
            name=first.name,
            first_key=first.first_key,
            count=sum(op.count for op in run),
            args=b"".join([op.args for op in run]),
            args_lengths=args_lengths,
            dep_counts=dep_counts if deps else [],
            deps=deps,
            options=first.options,
        )
    )
