"""Whether two programs compute one function: runs of both, judged by what rounding explains.

`verify` imports nothing of passes, the affine engine or rewriting: an oracle that shares the algebra shares
its bugs. The criterion is derived in `graphsurgery.verify.compare`.
"""

from __future__ import annotations

import dataclasses

from graphsurgery.verify.baseline import Baseline
from graphsurgery.verify.inputs import CASES, Inputs
from graphsurgery.verify.runners import OnnxRunner, Runner, TorchRunner, runner_for
from graphsurgery.verify.verdict import Comparison, OutputVerdict, Verdict

__all__ = [
    "CASES",
    "Baseline",
    "Comparison",
    "Inputs",
    "OnnxRunner",
    "OutputVerdict",
    "Runner",
    "TorchRunner",
    "Verdict",
    "verify",
]


def verify(
    reference: object,
    candidate: object,
    inputs: object,
    *,
    dynamic_batch: bool = False,
    samples: int | None = None,
    seed: int = 0,
) -> Verdict:
    """Run two programs on a battery of inputs and say whether they compute one function, up to rounding.

    To judge several candidates against one reference, make a `Baseline` once and call its `compare`.

    Args:
        reference: nn.Module, GraphModule, path of an .onnx file, or a `Runner`. Modules are run in eval
            semantics on copies; the caller's are not touched.
        candidate: The same. Where it is a torch module and the reference an ONNX file, the two change roles:
            the question is symmetric, and only a torch module gives a float64 anchor at any size.
        inputs: Example inputs: a tensor, a tuple of arguments, or a mapping of keyword arguments.
        dynamic_batch: Whether the leading dimension of the inputs is free; then batch 1 and a larger one are
            run.
        samples: Number of cases of the battery; None chooses 3 to 8 by the cost of one.
        seed: Seed of the battery.

    Raises:
        VerificationError: A program cannot be loaded, the reference fails on the example, or there is nothing
            to compare. A difference is not raised: see `Verdict.raise_if_failed`.
        RuntimeUnavailableError: onnxruntime has no kernel for an operator of a file.
    """
    first, second = runner_for(reference), runner_for(candidate)
    swapped = isinstance(first, OnnxRunner) and isinstance(second, TorchRunner)
    if swapped:
        first, second = second, first
    baseline = Baseline(first, inputs, dynamic_batch=dynamic_batch, samples=samples, seed=seed)
    verdict = baseline.compare(second)
    if not swapped:
        return verdict
    note = f"judged the other way round: the float64 anchor comes from {first.name}"
    return dataclasses.replace(verdict, notes=(note, *verdict.notes))
