"""What the operators of an ONNX file round by themselves, where that is more than moved data show.

ONNX defines some functions by formulas that cancel: `Elu` is `alpha * (exp(x) - 1)`, which for an `x` of 1e-3
has three digits less than torch's `expm1`. Nothing of that is wrong in the file, and no nudge of the weights
shows it. The reference evaluator of the `onnx` package runs the file in its own dtype with these formulas and
with functions that do not cancel; the difference is their rounding, and that of nothing else in the file: a
cast to float16 and back rounds alike in both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from graphsurgery.errors import GraphSurgeryError
from graphsurgery.verify.outputs import Outputs
from graphsurgery.verify.runners import OnnxRunner

if TYPE_CHECKING:
    from graphsurgery.verify.baseline import Baseline

__all__ = ["OPERATORS_NOTE", "add_rounding_of_operators", "as_before"]

OPERATORS_NOTE = (
    "by the noise of moved data alone the file differed; in float64 it agrees, so the rounding of its "
    "operators, as ONNX defines them, was measured on the ONNX reference evaluator and added"
)
"""What a verdict says where that was needed."""


def add_rounding_of_operators(baseline: Baseline, candidate: object) -> bool:
    """Take the rounding of a small file's operators into the noise; return whether that was done.

    It is not where the file, in float64, lies outside of the noise that is known already: then it is no
    rounding that parts it from the reference. Nor is it where formulas make no difference.
    """
    if not isinstance(candidate, OnnxRunner) or baseline.double:
        return False
    from graphsurgery.export.formulas import FORMULAS
    from graphsurgery.export.sessions import node_counts

    if node_counts(candidate.path).keys().isdisjoint(item.__name__ for item in FORMULAS):
        return False  # nothing that the evaluator, plain numpy, would have to be asked about
    floats = [(i, output) for i, output in enumerate(baseline.outputs) if output.yardstick is not None]
    try:
        exact = candidate.evaluated(double=True)
        sound, written = (candidate.evaluated(double=False, by_formula=formula) for formula in (False, True))
        runs = [tuple(run.run(batch.inputs) for run in (exact, sound, written)) for batch in baseline.batches]
    except GraphSurgeryError:  # too large for plain numpy, or not known to it
        return False
    for i, output in floats:
        values = [_value(double, i) for double, *_ in runs]
        if [v.shape for v in values] != [v.shape for v in output.native]:
            return False
        known = [baseline.canonical(value, run) for run, value in enumerate(values)]
        if output.yardstick is None or not output.yardstick.judge(known, "native").ok:
            return False
    if all(torch.equal(_value(low, i), _value(formula, i)) for _, low, formula in runs for i, _ in floats):
        return False
    for i, output in floats:
        moved = [
            anchor + (_value(formula, i).to(anchor.dtype) - _value(low, i).to(anchor.dtype))
            for anchor, (_, low, formula) in zip(output.anchor, runs, strict=True)
        ]
        if output.yardstick is not None:
            output.yardstick.add_draw([baseline.canonical(value, run) for run, value in enumerate(moved)])
    if OPERATORS_NOTE not in baseline.notes:
        baseline.notes.append(OPERATORS_NOTE)
    return True


@contextmanager
def as_before(baseline: Baseline) -> Iterator[None]:
    """Take back afterwards what was added to the noise: it is one file's, not that of the next program."""
    notes = list(baseline.notes)
    yardsticks = [output.yardstick for output in baseline.outputs]
    for output, known in zip(baseline.outputs, yardsticks, strict=True):
        if known is not None:
            output.yardstick = replace(known, noise=dict(known.noise), moved=list(known.moved))
    try:
        yield
    finally:
        baseline.notes[:] = notes
        for output, known in zip(baseline.outputs, yardsticks, strict=True):
            output.yardstick = known


def _value(outputs: Outputs, position: int) -> Tensor:
    return list(outputs.values())[position]
