"""Where two programs begin to differ, and which step on the way from one to the other is to blame.

Like `verify` it imports nothing of passes, the affine engine or rewriting.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from graphsurgery.localize.result import Localization, Place, Stage
from graphsurgery.localize.search import Found, search
from graphsurgery.localize.stages import Chain, Step, chain_of
from graphsurgery.localize.traces import trace_of
from graphsurgery.verify import (
    CASES,
    Baseline,
    Data,
    Inputs,
    OutputVerdict,
    Verdict,
    baseline_for,
    check_names,
    program_of,
)

__all__ = ["Localization", "Place", "Stage", "localize"]


def localize(
    reference: object,
    candidate: object,
    inputs: object,
    *,
    between: Sequence[object] = (),
    runtimes: Sequence[str] = (),
    dynamic_batch: bool = False,
    samples: int | None = None,
    seed: int = 0,
    data: Data | Iterable[Any] | None = None,
    data_limit: int | None = None,
    free_sizes: Mapping[Any, Mapping[int, Any]] | None = None,
) -> Localization:
    """Find the first value inside of a program that differs from a reference by more than rounding.

    Both are run on the case of the battery on which their outputs differ most; every inner value of the
    candidate that stands for one of the reference is judged by the reference's float64 anchor and rounding
    noise, as outputs are. An ONNX file is judged on the reference evaluator (where it is small), on
    onnxruntime without its optimisations and with them; the first of these that departs tells the runtime
    from the rewrite, and is the one that is searched.

    Args:
        reference: nn.Module, GraphModule or path of an .onnx file. A module that is no graph is captured, so
            that its calls have names and source lines.
        candidate: The same.
        inputs: Example inputs, as for `verify`.
        between: What the candidate was made from on the way, in order, as the optimised module of which it is
            the export: the first of them that departs is searched instead.
        runtimes: Runtimes of the candidate besides these, as for `verify`.
        dynamic_batch: As for `verify`.
        samples: As for `verify`.
        seed: As for `verify`.
        data: As for `verify`.
        data_limit: As for `verify`.
        free_sizes: As for `verify`.

    Raises:
        CaptureError: A module cannot be captured.
        VerificationError: A program cannot be loaded or run.
        RuntimeUnavailableError: No runtime could run the candidate.
        ValueError: A runtime has an unknown name.
    """
    if runtimes:
        check_names(runtimes)
    first, last = program_of(reference), program_of(candidate)
    if isinstance(first, Path) and isinstance(last, nn.Module) and not between:
        first, last = last, first  # as in `verify`: only a torch module gives an anchor at any size
    baseline = baseline_for(
        first,
        last,
        inputs,
        dynamic_batch=dynamic_batch,
        samples=samples,
        seed=seed,
        data=data,
        data_limit=data_limit,
        free_sizes=free_sizes,
    )
    chain = chain_of(baseline, [*(program_of(program) for program in between), last], runtimes)
    step = chain.departs
    if step is None:
        return Localization(
            False,
            "nothing differs by more than rounding, so there is nothing to localise",
            "",
            baseline.runner.name,
            chain.steps[-1].stage.name,
            stages=chain.stages,
        )
    case, batch = _failing(baseline, step.verdict)
    with tempfile.TemporaryDirectory() as folder:
        known = trace_of(first, batch, Path(folder))
        plain = "torch" if isinstance(step.program, nn.Module) else "onnxruntime-unoptimised"
        runtime = plain if step.rewrites else step.runtime
        searched = trace_of(step.program, batch, Path(folder), runtime)
        sample = trace_of(step.program, batch, Path(folder), step.runtime) if step.rewrites else None
        found = search(known, searched, batch, sample)
    return _told(baseline, chain, step, found, case)


def _failing(baseline: Baseline, verdict: Verdict | None) -> tuple[str, Inputs]:
    """Return the run in which a candidate differs most: the cases in it, and its inputs."""
    failed = [output for output in verdict.outputs if not output.ok] if verdict else []
    sides = [side for output in failed for side in (output.native, output.float64) if side and not side.ok]
    named = [side.worst_case for side in sides] + [
        output.differs_on for output in failed if output.differs_on
    ]
    case = named[0] if named else baseline.batches[0].cases[0]
    batch = next((batch for batch in baseline.batches if case in batch.cases), baseline.batches[0])
    return ", ".join(batch.cases), batch.inputs


def _on(verdict: OutputVerdict, case: str) -> OutputVerdict:
    """Return a verdict under the name of the run that it is about, which it calls the example."""
    return replace(
        verdict,
        reason=verdict.reason.replace(repr(CASES[0]), repr(case)),
        native=replace(verdict.native, worst_case=case) if verdict.native else None,
        float64=replace(verdict.float64, worst_case=case) if verdict.float64 else None,
        differs_on=case if verdict.differs_on else "",
    )


def _told(baseline: Baseline, chain: Chain, step: Step, found: Found, case: str) -> Localization:
    first = found.first
    error = None if found.error is None else _on(found.error, case)
    if first is None or error is None:
        reason = (
            f"{step.stage.name} differs from {baseline.runner.name}, but looked at from inside none of the "
            f"{found.compared} values with a counterpart does: {step.stage.reason}"
        )
    else:
        module = next((p.module for p in (found.stands_for, first) if p and p.module), "")
        where = f" in {module}" if module else ""
        reason = (
            f"{step.stage.name} departs from {baseline.runner.name} at {first.op} {first.name!r}{where}: "
            f"{error.reason}"
        )
        if found.before:
            reason += (
                "; the value that it is made of agrees"
                if len(found.before) == 1
                else f"; the {len(found.before)} values that it is made of agree"
            )
    return Localization(
        found=first is not None,
        reason=reason,
        blame=chain.blame,
        reference=baseline.runner.name,
        candidate=step.stage.name,
        first=first,
        stands_for=found.stands_for,
        among=found.among,
        error=error,
        before=tuple(_on(verdict, case) for verdict in found.before),
        case=case,
        values=found.values,
        compared=found.compared,
        agreed=found.agreed,
        stages=chain.stages,
    )
