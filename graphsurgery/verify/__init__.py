"""Whether two programs compute one function: runs of both, judged by what rounding explains.

`verify` imports nothing of passes, the affine engine or rewriting: an oracle that shares the algebra shares
its bugs. The criterion is derived in `graphsurgery.verify.compare`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, overload

from torch import nn

from graphsurgery.verify.baseline import Baseline
from graphsurgery.verify.data import Data
from graphsurgery.verify.free import accepted_by, baseline_for, batch_is_free, free_axes
from graphsurgery.verify.inputs import CASES, Inputs, as_inputs
from graphsurgery.verify.runners import OnnxRunner, Runner, TorchRunner, runner_for
from graphsurgery.verify.runtimes import RUNTIMES, check_names, program_of, runtime_runner, verdict_on
from graphsurgery.verify.verdict import Comparison, OutputVerdict, RuntimesVerdict, RuntimeVerdict, Verdict

__all__ = [
    "CASES",
    "RUNTIMES",
    "Baseline",
    "Comparison",
    "Data",
    "Inputs",
    "OnnxRunner",
    "OutputVerdict",
    "Runner",
    "RuntimeVerdict",
    "RuntimesVerdict",
    "TorchRunner",
    "Verdict",
    "accepted_by",
    "baseline_for",
    "check_names",
    "free_axes",
    "program_of",
    "runtime_runner",
    "verify",
]


@overload
def verify(
    reference: object,
    candidate: object,
    inputs: object,
    *,
    dynamic_batch: bool = False,
    samples: int | None = None,
    seed: int = 0,
    data: Data | Iterable[Any] | None = None,
    data_limit: int | None = None,
    free_sizes: Mapping[Any, Mapping[int, Any]] | None = None,
    runtimes: None = None,
) -> Verdict: ...


@overload
def verify(
    reference: object,
    candidate: object,
    inputs: object,
    *,
    dynamic_batch: bool = False,
    samples: int | None = None,
    seed: int = 0,
    data: Data | Iterable[Any] | None = None,
    data_limit: int | None = None,
    free_sizes: Mapping[Any, Mapping[int, Any]] | None = None,
    runtimes: Sequence[str],
) -> RuntimesVerdict: ...


def verify(
    reference: object,
    candidate: object,
    inputs: object,
    *,
    dynamic_batch: bool = False,
    samples: int | None = None,
    seed: int = 0,
    data: Data | Iterable[Any] | None = None,
    data_limit: int | None = None,
    free_sizes: Mapping[Any, Mapping[int, Any]] | None = None,
    runtimes: Sequence[str] | None = None,
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
            run. Else the example's alone is, and a note says so where a file or graph leaves it free.
        samples: Number of cases of the battery; None chooses 3 to 8 by the cost of one.
        seed: Seed of the battery.
        data: The caller's own inputs, run beside the battery: an iterable (a list, a DataLoader) of batches,
            each as `inputs` is. What an item holds behind the inputs of the example (a label) is left out,
            and a note says so.
        data_limit: The greatest number of samples of `data` that are run; None chooses 8 to 256 by the cost
            of one. The verdict says how many it were.
        free_sizes: Heights, widths or lengths that are free, by position or keyword of the input:
            `{0: {2: "height", 3: "width"}}`, equal names being equal sizes; both programs are run at two or
            three other values too. None takes them from the programs that tell: ONNX files, and graphs made
            by `capture`; `{}` stands for none.
        runtimes: Where the program that is judged is run: of an ONNX file any of `reference`,
            `onnxruntime-unoptimised`, `onnxruntime` and `openvino`, of a torch module `torch` and
            `torch-compile`. Each has a verdict of its own, or is "not run" with the reason, which is not
            passed. None stands for torch's eager mode, and for onnxruntime with its optimisations.

    Raises:
        VerificationError: A program cannot be loaded, the reference fails on the example, or there is nothing
            to compare; the data are empty, hold NaN or do not fit the example. A difference is not raised:
            see `Verdict.raise_if_failed`.
        RuntimeUnavailableError: onnxruntime has no kernel for an operator of a file; with `runtimes`, none of
            them could be run.
        ValueError: A runtime has an unknown name, or none is named; `data_limit` is below 1.
    """
    swapped = _is_file(reference) and _is_module(candidate)
    first, judged = (candidate, reference) if swapped else (reference, candidate)
    if runtimes is not None:
        check_names(runtimes)
    # Both are loaded before the first run: a file that is missing is said at once.
    runner = runner_for(judged) if runtimes is None else None
    program = program_of(judged) if runtimes is not None else None
    baseline = baseline_for(
        first,
        runner or judged,
        inputs,
        dynamic_batch=dynamic_batch,
        samples=samples,
        seed=seed,
        data=data,
        data_limit=data_limit,
        free_sizes=free_sizes,
    )
    verdict: Verdict
    if program is not None and runtimes is not None:
        verdict = verdict_on(baseline, program, runtimes)
    else:
        verdict = baseline.compare(runner)
    notes = verdict.notes
    if swapped:
        note = f"judged the other way round: the float64 anchor comes from {baseline.runner.name}"
        notes = (note, *notes)
    alone = len(verdict.batch_sizes) == 1 and not dynamic_batch
    if alone and batch_is_free(as_inputs(inputs), [first, judged]):
        notes = (*notes, _ONE_BATCH.format(verdict.batch_sizes[0]))
    return dataclasses.replace(verdict, notes=notes)


_ONE_BATCH = (
    "the batch is free, but {} was the only size that was run: "
    "dynamic_batch=True (--dynamic-batch) runs others"
)


def _is_file(program: object) -> bool:
    return isinstance(program, OnnxRunner | str | os.PathLike)


def _is_module(program: object) -> bool:
    return isinstance(program, TorchRunner | nn.Module)
