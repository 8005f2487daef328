"""The verdict: a candidate's outputs, matched and judged one by one against a baseline."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from graphsurgery.errors import GraphSurgeryError, RuntimeUnavailableError
from graphsurgery.verify.outputs import Outputs
from graphsurgery.verify.runners import (
    CompiledRunner,
    OnnxRunner,
    OnnxVariant,
    Runner,
    TorchRunner,
)
from graphsurgery.verify.verdict import Comparison, OutputVerdict, Verdict

if TYPE_CHECKING:
    from graphsurgery.verify.baseline import Baseline, Output

__all__ = ["judge"]

_WORTH_SAYING = 1e-3
"""Share of a channel's largest value above which a verdict names the errors not seen; it decides nothing."""


def judge(baseline: Baseline, candidate: Runner) -> Verdict:
    """Run `candidate` on the inputs of `baseline` and compare every output."""
    found: list[Outputs] = []
    structure: str | None = None
    for batch in baseline.batches:
        try:
            outputs = candidate.run(batch.inputs)
        except RuntimeUnavailableError:  # not run is no finding
            raise
        except Exception as error:  # noqa: BLE001 - a candidate that raises is a finding, whatever it raises
            text = str(error) if isinstance(error, GraphSurgeryError) else f"{type(error).__name__}: {error}"
            size = _batch_size(batch.inputs.tensors())
            return _verdict(
                baseline, candidate, False, f"it failed at batch {size} ({batch.cases[0]}): {text}"
            )
        if structure is None and isinstance(candidate, TorchRunner):
            structure = candidate.structure
        found.append(outputs)
    mismatch = _structure(baseline, candidate, found) or _containers(baseline, structure)
    if mismatch:
        return _verdict(baseline, candidate, False, mismatch)
    exact, notes = _exact(baseline, candidate)
    positions = range(len(baseline.outputs))
    values = [[list(outputs.values())[i] for outputs in found] for i in positions]
    doubles = [[list(outputs.values())[i] for outputs in exact] if exact else None for i in positions]
    verdicts = tuple(
        _judge_output(baseline, output, value, double)
        for output, value, double in zip(baseline.outputs, values, doubles, strict=True)
    )
    for verdict, output, value in zip(verdicts, baseline.outputs, values, strict=True):
        lost, nan = _overflown(output, value)
        if verdict.ok and verdict.nan > nan:
            notes.append(
                f"output {verdict.name!r} holds {verdict.nan - nan} NaN, which agree in place with the "
                "reference's but say nothing"
            )
        if verdict.ok and lost:
            notes.append(
                f"{lost} values of output {verdict.name!r} were not compared: the reference overflows "
                f"{verdict.dtype} there or next to it, and the candidate too"
            )
    notes += [
        f"output {output.name!r} is the same on every input that was tried (a last layer of zeros?): that it "
        "agrees says nothing of the layers before it"
        for output in baseline.outputs
        if _same_everywhere(baseline, output)
    ]
    ok = all(verdict.ok for verdict in verdicts)
    return _verdict(baseline, candidate, ok, _summary(verdicts), verdicts, tuple(notes))


def _verdict(
    baseline: Baseline,
    candidate: Runner,
    ok: bool,
    reason: str,
    outputs: tuple[OutputVerdict, ...] = (),
    notes: tuple[str, ...] = (),
) -> Verdict:
    return Verdict(
        ok=ok,
        reason=reason,
        reference=baseline.runner.name,
        candidate=candidate.name,
        anchor=baseline.anchor,
        outputs=outputs,
        cases=tuple(case for batch in baseline.batches if batch.kind == "battery" for case in batch.cases),
        batch_sizes=tuple(dict.fromkeys(_batch_size(b.inputs.tensors()) for b in baseline.batches)),
        seed=baseline.seed,
        notes=(*baseline.notes, *notes),
        sizes=tuple(batch.cases[0] for batch in baseline.batches if batch.kind == "sizes"),
        data_samples=baseline.data_samples,
    )


def _batch_size(tensors: list[Tensor]) -> int:
    return next((int(tensor.shape[0]) for tensor in tensors if tensor.ndim), 1)


def _structure(baseline: Baseline, candidate: Runner, found: list[Outputs]) -> str:
    """Return in what the outputs do not match in count, order, name, shape or dtype; "" if they do."""
    wanted = [output.name for output in baseline.outputs]
    same_kind = any(
        isinstance(baseline.runner, kind) and isinstance(candidate, kind)
        for kind in ((TorchRunner, CompiledRunner), (OnnxRunner, OnnxVariant))
    )
    for run, outputs in enumerate(found):
        names = list(outputs)
        if len(names) != len(wanted):
            expected = f"{len(wanted)} ({', '.join(wanted)})"
            return f"it has {len(names)} outputs ({', '.join(names)}), the reference {expected}"
        if same_kind and names != wanted:
            return f"its outputs are called {', '.join(names)}, expected {', '.join(wanted)} in this order"
        for output, got in zip(baseline.outputs, outputs.values(), strict=True):
            like = output.native[run]
            if got.shape != like.shape:
                return f"output {output.name!r} has shape {list(got.shape)}, expected {list(like.shape)}"
            if got.dtype != like.dtype:
                return f"output {output.name!r} is {_dtype(got)}, expected {_dtype(like)}"
    return ""


def _containers(baseline: Baseline, structure: str | None) -> str:
    """Return in what the containers and the None of two torch programs do not match; "" if they do."""
    if structure is None or baseline.structure is None or structure == baseline.structure:
        return ""
    return f"its output structure differs: it returns {structure}, the reference {baseline.structure}"


def _exact(baseline: Baseline, candidate: Runner) -> tuple[list[Outputs] | None, list[str]]:
    """Return the candidate's outputs in float64, if both sides can be run in it."""
    double = getattr(candidate, "float64", None)
    if double is None or not (isinstance(candidate, TorchRunner) or baseline.files_in_float64):
        return None, []
    try:
        runner = double()
        runs = None if runner is None else baseline.measure_stored()
        if runs is None:
            return None, []
        return [runner.run(batch.inputs) for batch in baseline.batches[:runs]], []
    except Exception as error:  # noqa: BLE001 - operators without a float64 kernel raise all kinds
        for output in baseline.outputs:
            output.stored = None  # a noise measured in part would judge the next candidate
        return None, [f"not compared in float64: {type(error).__name__}: {error}"]


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _judge_output(
    baseline: Baseline, output: Output, values: list[Tensor], doubles: list[Tensor] | None
) -> OutputVerdict:
    first = output.native[0]
    verdict = OutputVerdict(
        name=output.name,
        shape=tuple(first.shape),
        dtype=_dtype(first),
        elements=sum(value.numel() for value in values),
        ok=True,
        reason="",
    )
    if verdict.elements == 0:
        return dataclasses.replace(verdict, reason="no values: only shape and dtype were compared")
    if not output.is_float:
        return _judge_integers(baseline, verdict, output, values)
    yardstick = output.yardstick
    if yardstick is None:  # pragma: no cover - every float output has one
        raise RuntimeError(f"output {output.name!r} has no measured noise")
    verdict = dataclasses.replace(
        verdict, nan=sum(int(v.isnan().sum()) for v in values), inf=sum(int(v.isinf().sum()) for v in values)
    )
    misplaced, case = _misplaced(baseline, output, values)
    if misplaced:
        return dataclasses.replace(verdict, ok=False, reason=misplaced, differs_on=case)
    lost, _ = _overflown(output, values)
    if lost and lost == sum(int(anchor.isfinite().sum()) for anchor in output.anchor):
        reason = (
            f"inconclusive: the reference overflows {verdict.dtype} at every value, or next to it, and the "
            "candidate too; verify the model in a wider dtype or on smaller inputs"
        )
        return dataclasses.replace(verdict, ok=False, reason=reason)
    native = yardstick.judge([baseline.canonical(v, run) for run, v in enumerate(values)], "native")
    exact = None
    if doubles is not None and output.stored is not None:
        exact = output.stored.judge([baseline.canonical(v, run) for run, v in enumerate(doubles)], "float64")
    checked, agreed = _top1(output, values)
    verdict = dataclasses.replace(
        verdict, native=native, float64=exact, top1_checked=checked, top1_agreed=agreed
    )
    return _conclude(verdict, native, exact)


def _conclude(verdict: OutputVerdict, native: Comparison, exact: Comparison | None) -> OutputVerdict:
    failed = next((c for c in (native, exact) if c is not None and not c.ok), None)
    if failed is not None:
        return dataclasses.replace(verdict, ok=False, reason=_difference(failed))
    if verdict.top1_agreed < verdict.top1_checked:
        missed = verdict.top1_checked - verdict.top1_agreed
        reason = f"{missed} of {verdict.top1_checked} rows have another greatest class by more than rounding"
        return dataclasses.replace(verdict, ok=False, reason=reason)
    if native.best_resolution >= 1.0 and (exact is None or exact.best_resolution >= 1.0):
        reason = (
            f"inconclusive: rounding alone explains errors of {native.best_resolution:.2g} times the "
            "output's own size on every input; verify the model in a higher precision"
        )
        return dataclasses.replace(verdict, ok=False, reason=reason)
    ratio = (
        "" if native.rounding_ratio is None else f", {native.rounding_ratio:.2g} times the reference's own"
    )
    reason = (
        f"max error {native.max_error:.2e}, mean {native.mean_error:.2e}{ratio}; needs factor "
        f"{native.factor_needed:.2g} of {native.factor:.3g} allowed"
    )
    if exact is not None:
        needs = f"factor {exact.factor_needed:.2g} of {exact.factor:.3g}"
        reason += f"; in float64 max error {exact.max_error:.2e}, {needs}"
    unseen = min(native.resolution, native.resolution if exact is None else exact.resolution)
    if unseen > _WORTH_SAYING:
        reason += f"; errors below {unseen:.0e} of a channel's largest value are not seen"
    if verdict.top1_checked:
        reason += f"; top-1 agrees on {verdict.top1_agreed} of {verdict.top1_checked} clear rows"
    return dataclasses.replace(verdict, reason=reason)


def _same_everywhere(baseline: Baseline, output: Output) -> bool:
    """Whether the reference gave one value for all cases, of which there are two at least."""
    first: dict[torch.Size, Tensor] = {}
    cases = 0
    for run, anchor in enumerate(output.anchor):
        rows = baseline.canonical(anchor, run)
        if not rows.numel():
            continue
        one = first.setdefault(rows.shape[1:], rows[0])
        if not torch.equal(torch.nan_to_num(rows), torch.nan_to_num(one.expand_as(rows))):
            return False
        cases += len(rows)
    return len(first) == 1 and cases > 1


def _difference(failed: Comparison) -> str:
    where = "" if failed.precision == "native" else " with both cast to float64"
    return (
        f"got {failed.worst_got:.9g}, expected {failed.worst_expected:.9g} at {list(failed.worst_index)} on "
        f"{failed.worst_case!r}{where}: {failed.factor_needed:.3g} times the rounding noise, allowed "
        f"{failed.factor:.3g} (max error {failed.max_error:.2e})"
    )


def _kinds(value: Tensor) -> Tensor:
    """Return 0 where finite, 1 where NaN, 2 and 3 where infinite (positive and negative)."""
    kinds = value.isnan().to(torch.int8)
    if value.is_complex():
        return kinds + 2 * (value.isinf() & ~value.isnan()).to(torch.int8)
    return kinds + 2 * value.isposinf().to(torch.int8) + 3 * value.isneginf().to(torch.int8)


_KIND_NAMES = ("a finite value", "NaN", "+inf", "-inf")


def _case(baseline: Baseline, value: Tensor, run: int, index: tuple[int, ...]) -> str:
    """Return the case that a place in the output of a run belongs to."""
    batch = baseline.batches[run]
    rows = batch.stacked and value.ndim > 0 and value.shape[0] == len(batch.cases)
    return batch.cases[index[0] if rows else 0]


def _misplaced(baseline: Baseline, output: Output, values: list[Tensor]) -> tuple[str, str]:
    """Return where NaN or infinity do not agree with the reference, and in which case; "" if they do.

    Where only the reference's own dtype overflowed (the anchor is finite), the candidate may or may not, but
    not to the other side.
    """
    for run, value in enumerate(values):
        got, anchor, native = (_kinds(x) for x in (value, output.anchor[run], output.native[run]))
        free = output.overflowed[run]
        if not value.is_complex():
            aside = value.isinf() & (value.sign() != output.anchor[run].sign())
            free = free & (~aside | output.native[run].isnan())
        wrong = (got != anchor) & (got != native) & ~free
        if bool(wrong.any()):
            spot = tuple(int(i) for i in wrong.nonzero()[0])
            case = _case(baseline, value, run, spot)
            return (
                f"{int(wrong.sum())} values differ in kind: got {_KIND_NAMES[int(got[spot])]} where the "
                f"reference has {_KIND_NAMES[int(native[spot])]}, first at {list(spot)} on {case!r}"
            ), case
    return "", ""


def _overflown(output: Output, values: list[Tensor]) -> tuple[int, int]:
    """Count the values that only the dtype keeps from being finite on both sides; and the NaN among them."""
    if not output.is_float:
        return 0, 0
    pairs = list(zip(output.overflowed, values, strict=True))
    lost = sum(int((mask & ~value.isfinite()).sum()) for mask, value in pairs)
    return lost, sum(int((mask & value.isnan()).sum()) for mask, value in pairs)


def _judge_integers(
    baseline: Baseline, verdict: OutputVerdict, output: Output, values: list[Tensor]
) -> OutputVerdict:
    undecided = sum(int(mask.sum()) for mask in output.undecided)
    mismatches, first, case = 0, "", ""
    for run, value in enumerate(values):
        wrong = (value != output.anchor[run]) & ~output.undecided[run]
        mismatches += int(wrong.sum())
        if not first and bool(wrong.any()):
            index = tuple(int(i) for i in wrong.nonzero()[0])
            case = _case(baseline, value, run, index)
            first = f"got {value[index].item()}, expected {output.anchor[run][index].item()} at {list(index)}"
            first += f" on {case!r}"
    verdict = dataclasses.replace(verdict, mismatches=mismatches, undecided=undecided, differs_on=case)
    if mismatches:
        reason = f"{mismatches} of {verdict.elements} values differ that rounding does not decide: {first}"
        return dataclasses.replace(verdict, ok=False, reason=reason)
    if undecided == verdict.elements > 0:
        return dataclasses.replace(verdict, ok=False, reason="inconclusive: rounding decides every value")
    left = f", {undecided} left out because rounding decides them" if undecided else ""
    return dataclasses.replace(verdict, reason=f"{verdict.elements - undecided} values equal{left}")


def _top1(output: Output, values: list[Tensor]) -> tuple[int, int]:
    """Count the rows of (batch, classes) whose margin is over twice the allowed error; those that agree.

    A row in which the reference itself overflows has no class in its dtype, however clear it is in float64.
    """
    if any(v.ndim != 2 or v.shape[1] < 2 or v.is_complex() for v in values) or output.yardstick is None:
        return 0, 0
    checked = agreed = 0
    for value, anchor, allowed, overflowed in zip(
        values, output.yardstick.anchors, output.yardstick.allowed(), output.overflowed, strict=True
    ):
        rows = anchor.reshape(value.shape)
        top = rows.topk(2, dim=1).values
        bound = allowed.reshape(value.shape).amax(1) if allowed.numel() == value.numel() else allowed.max()
        clear = ((top[:, 0] - top[:, 1]) > 2.0 * bound) & rows.isfinite().all(1)
        clear &= ~overflowed.reshape(value.shape).any(1)
        checked += int(clear.sum())
        agreed += int((clear & (value.argmax(1) == rows.argmax(1))).sum())
    return checked, agreed


def _summary(verdicts: tuple[OutputVerdict, ...]) -> str:
    failed = [verdict for verdict in verdicts if not verdict.ok]
    if failed:
        more = f" (and {len(failed) - 1} more outputs)" if len(failed) > 1 else ""
        return f"output {failed[0].name!r}: {failed[0].reason}{more}"
    elements = sum(verdict.elements for verdict in verdicts)
    worst = max(verdicts, key=lambda v: v.native.factor_needed / v.native.factor if v.native else -math.inf)
    if len(verdicts) == 1:
        return f"1 output, {elements} values: {worst.reason}"
    return f"{len(verdicts)} outputs, {elements} values; nearest to its limit {worst.name!r}: {worst.reason}"
