"""What the operators of an ONNX file round by themselves, where that is more than moved data show.

ONNX defines some functions by formulas that cancel: `Elu` is `alpha * (exp(x) - 1)`, which for an `x` of 1e-3
has three digits less than torch's `expm1`. Nothing of that is wrong in the file, and no nudge of the weights
shows it. The reference evaluator of the `onnx` package runs those formulas in the file's own dtype and in
float64; the difference is their rounding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from graphsurgery.errors import GraphSurgeryError
from graphsurgery.verify.outputs import Outputs
from graphsurgery.verify.runners import OnnxRunner

if TYPE_CHECKING:
    from graphsurgery.verify.baseline import Baseline

__all__ = ["OPERATORS_NOTE", "add_rounding_of_operators"]

OPERATORS_NOTE = (
    "by the noise of moved data alone the file differed; in float64 it agrees, so the rounding of its "
    "operators, as ONNX defines them, was measured on the ONNX reference evaluator and added"
)
"""What a verdict says where that was needed."""


def add_rounding_of_operators(baseline: Baseline, candidate: object) -> bool:
    """Take the rounding of a small file's operators into the noise; return whether that was done.

    It is not where the file, in float64, lies outside of the noise that is known already: then it is no
    rounding that parts it from the reference.
    """
    if not isinstance(candidate, OnnxRunner) or baseline.double:
        return False
    floats = [(i, output) for i, output in enumerate(baseline.outputs) if output.yardstick is not None]
    try:
        exact, own = (candidate.evaluated(double=double) for double in (True, False))
        runs = [(exact.run(batch.inputs), own.run(batch.inputs)) for batch in baseline.batches]
    except GraphSurgeryError:  # too large for plain numpy, or not known to it
        return False
    for i, output in floats:
        values = [_value(double, i) for double, _ in runs]
        if [v.shape for v in values] != [v.shape for v in output.native]:
            return False
        known = [baseline.canonical(value, run) for run, value in enumerate(values)]
        if output.yardstick is None or not output.yardstick.judge(known, "native").ok:
            return False
    for i, output in floats:
        moved = [
            anchor + (_value(low, i).to(anchor.dtype) - _value(double, i).to(anchor.dtype))
            for anchor, (double, low) in zip(output.anchor, runs, strict=True)
        ]
        if output.yardstick is not None:
            output.yardstick.add_draw([baseline.canonical(value, run) for run, value in enumerate(moved)])
    if OPERATORS_NOTE not in baseline.notes:
        baseline.notes.append(OPERATORS_NOTE)
    return True


def _value(outputs: Outputs, position: int) -> Tensor:
    return list(outputs.values())[position]
