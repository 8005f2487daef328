"""A failing program made small: operations left out, sizes halved, choices made plain, while it fails."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from fuzz.generate import pruned
from fuzz.program import Misfit, Network, Op, Program

Fails = Callable[[Program], bool]


def shrunk(program: Program, fails: Fails, seconds: float = 120.0) -> Program:
    """The smallest program found for which `fails` still holds, by greedy deletion.

    Args:
        program: one that fails.
        fails: whether a program fails in the same way; one that cannot be written is not asked about.
        seconds: after which the best so far is taken.
    """
    end = time.monotonic() + seconds
    found = True
    while found and time.monotonic() < end:
        found = False
        for smaller in _smaller(program):
            if time.monotonic() > end:
                break
            if _runs(smaller) and fails(smaller):
                program, found = smaller, True
                break
    return program


def _runs(program: Program) -> bool:
    try:
        Network(program).build()
    except (Misfit, RuntimeError, NameError, KeyError):
        return False
    return bool(program.ops)


def _smaller(program: Program) -> Iterator[Program]:
    """Programs one step smaller, the largest steps first."""
    names = sorted(set(re.findall(r"\bv(\d+)\b", program.outputs)), key=int)
    if program.outputs not in [f"v{name}" for name in names]:
        for name in names:
            yield pruned(replace(program, outputs=f"v{name}"))
    for op in reversed(program.ops):  # the network cut off behind an operation
        if program.outputs != f"v{op.ident}":
            yield pruned(replace(program, outputs=f"v{op.ident}"))
    for i in range(len(program.ops)):
        for read in dict.fromkeys(program.ops[i].reads):
            yield _without(program, i, read)
    plain = {"numbers": "plain", "dtype": "float32", "keywords": False, "batch": 2}
    for key, value in plain.items():
        if getattr(program, key) != value:
            yield replace(program, **{key: value})
    for i, spec in enumerate(program.inputs):
        for axis, size in enumerate(spec.shape):
            for less in {size // 2, size - 1} - {0, size}:
                shape = (*spec.shape[:axis], less, *spec.shape[axis + 1 :])
                inputs = (*program.inputs[:i], replace(spec, shape=shape), *program.inputs[i + 1 :])
                yield replace(program, inputs=inputs)
    for i, op in enumerate(program.ops):
        for options in _plainer(op):
            ops = (*program.ops[:i], replace(op, options=options), *program.ops[i + 1 :])
            yield replace(program, ops=ops)
    if len(program.inputs) > 1:  # the last one, so that the others keep their numbers; unread or not to run
        yield replace(program, inputs=program.inputs[:-1])


def _without(program: Program, index: int, instead: int) -> Program:
    """The program without one operation, `instead` of whose values another one is read."""
    gone = program.ops[index]
    made = {gone.ident, gone.ident + 1}
    made -= {op.ident for op in program.ops if op is not gone}

    def other(read: int) -> int:
        return instead if read in made else read

    ops = tuple(
        replace(op, reads=tuple(map(other, op.reads)), options=dict(op.options))
        for op in program.ops
        if op is not gone
    )
    outputs = re.sub(r"\bv(\d+)\b", lambda found: f"v{other(int(found[1]))}", program.outputs)
    return pruned(replace(program, ops=ops, outputs=outputs))


_PLAIN = {"stride": 1, "dilation": 1, "groups": 1, "padding": 0, "mode": "zeros", "bias": False, "eps": 1e-5}


def _plainer(op: Op) -> Iterator[dict[str, object]]:
    for key, value in op.options.items():
        if key in _PLAIN and value != _PLAIN[key]:
            yield {**op.options, key: _PLAIN[key]}
        elif key in ("out", "count") and isinstance(value, int) and value > 1:
            yield {**op.options, key: value // 2}
        elif key.startswith("kernel") and value > 1:
            yield {**op.options, key: value - 2 if value > 2 else 1}
        elif key.startswith(("norm", "pad")) and value:
            yield {**op.options, key: type(value)(0)}
