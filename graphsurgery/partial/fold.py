"""Fold one part of a model: the sizes it is captured for, and the check on the calls it was seen in.

A graph takes no other sizes than it was captured for, and its model may call it with others tomorrow. So all
axes are left free that tracing can leave free (`Dim.AUTO`), on the largest of the recorded calls, sizes
of one made two, as tracing takes a one for a constant. Where that fails, those axes are free that differ
between the calls, and the batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from graphsurgery.capture.inputs import Inputs
from graphsurgery.capture.program import depends_on_values
from graphsurgery.cost import CostModel
from graphsurgery.errors import CaptureError, GraphSurgeryError
from graphsurgery.measure import MeasuredCost
from graphsurgery.partial.calls import size
from graphsurgery.partial.departure import departure, resized, runs
from graphsurgery.pipeline import OptimizeResult, Passes, VerifyMode, optimize
from graphsurgery.report import Report
from graphsurgery.report.parts import PartStatus

__all__ = ["Outcome", "Settings", "fold_part"]

_MOST_FREE = 10
"""Axes that are all left free; capture tries free sizes of 0 and 1 in pairs and triples."""


@dataclass(frozen=True)
class Settings:
    """The options of `optimize` that every part is optimised with."""

    passes: Passes = None
    verify: VerifyMode = "final"
    max_param_growth: float | None = None
    cost: str | CostModel | MeasuredCost | None = None
    fixed_sizes: bool = False

    def optimize(self, module: nn.Module, inputs: Inputs, shapes: Any) -> OptimizeResult:
        """Optimise a part on a call of its own."""
        return optimize(
            module,
            inputs,
            passes=self.passes,
            verify=self.verify,
            dynamic_shapes=shapes,
            max_param_growth=self.max_param_growth,
            cost=self.cost,
        )


@dataclass(frozen=True)
class Outcome:
    """What became of a part.

    Attributes:
        status: `"folded"`, `"unchanged"` or `"refused"`.
        code: Stable code of a refusal.
        reason: One sentence.
        result: The folded part.
        report: Its report, also where nothing was changed.
    """

    status: PartStatus
    code: str
    reason: str
    result: OptimizeResult | None = None
    report: Report | None = None


def fold_part(module: nn.Module, calls: Sequence[Inputs], settings: Settings) -> Outcome:
    """Optimise a module for the calls that it was seen in, and compare the two on each of them.

    Args:
        module: The part, in evaluation mode; it is not changed.
        calls: Calls of one form and of different sizes.
        settings: Options of `optimize`.
    """
    try:
        return _fold(module, calls, settings)
    except CaptureError as error:
        return Outcome("refused", "not-captured", str(error))
    except GraphSurgeryError as error:
        return Outcome("refused", "failed", str(error))
    except Exception as error:  # noqa: BLE001 - one part that fails leaves the others to be folded
        return Outcome("refused", "failed", f"{type(error).__name__}: {str(error).strip()[:300]}")


def _fold(module: nn.Module, calls: Sequence[Inputs], settings: Settings) -> Outcome:
    problem, report = ("", ""), None
    for inputs, shapes, needed in _attempts(module, calls):
        if needed and problem[0] != needed:
            continue
        try:
            result = settings.optimize(module, inputs, shapes)
        except CaptureError as error:
            problem = problem if problem[0] else ("not-captured", str(error))
            if depends_on_values(error.__cause__):
                break
            continue
        # The example may be larger than any call: see `_attempts`.
        result.count_at([tensor.shape for tensor in max(calls, key=size).tensors()])
        report = result.report
        idle = _idle(report, settings)
        if idle:
            return Outcome("unchanged", "", idle, report=report)
        found = departure(
            module,
            result.module,
            calls,
            compare=settings.verify != "off",
            fixed_sizes=settings.fixed_sizes,
        )
        if found is None:
            return Outcome("folded", "", _sizes(report), result, report)
        problem = found
        if found[0] == "differs":
            break
    return Outcome("refused", *problem, report=report)


def _idle(report: Report, settings: Settings) -> str:
    """Return why a part is not worth a graft, "" if it is."""
    if not report.changes:
        undone = next((failure.reason for failure in report.failures), "")
        return f"its folds were undone: {undone}" if undone else "there is nothing to fold"
    before, after = report.before, report.after
    if settings.passes is None and (after.flops, after.parameters) == (before.flops, before.parameters):
        return f"its {len(report.changes)} changes save no work: {before.flops:,} FLOPs before and after"
    if settings.passes is None and settings.cost is None and after.flops > before.flops:
        return f"its changes take more work in the calls: {before.flops:,} -> {after.flops:,} FLOPs"
    return ""


def _sizes(report: Report) -> str:
    taken = ", ".join(f"{spec.name} {'x'.join(spec.shape) or spec.dtype}" for spec in report.captured.inputs)
    return f"{len(report.changes)} changes; it takes {taken}"


def _attempts(
    module: nn.Module, calls: Sequence[Inputs]
) -> Iterator[tuple[Inputs, dict[str, Any] | None, str]]:
    """Example inputs, `dynamic_shapes` and the problem they are meant for, the most general ones first."""
    largest = max(calls, key=size)
    wide = _widened(module, largest)
    every = [range(tensor.ndim) for tensor in wide.tensors()]
    if sum(map(len, every)) <= _MOST_FREE:
        yield wide, _shapes(module, wide, every), ""
        # Maps that shrink to one position inside of it are taken for constants: once more, with larger ones.
        vast = _enlarged(module, wide)
        if vast is not wide:
            yield vast, _shapes(module, vast, every), "narrow"
        if wide is not largest:
            yield largest, _shapes(module, largest, every), ""
    shapes = zip(*([tensor.shape for tensor in call.tensors()] for call in calls), strict=True)
    varying = [
        [axis for axis, sizes in enumerate(zip(*own, strict=True)) if len({*sizes}) > 1] for own in shapes
    ]
    if not any(varying):
        yield largest, None, ""  # the batch alone
        return
    carriers = wide.carriers()
    for index, own in enumerate(varying):
        if index in carriers and 0 not in own:
            own.insert(0, 0)
    yield wide, _shapes(module, wide, varying), ""


def _widened(module: nn.Module, inputs: Inputs) -> Inputs:
    """Return a call with two of what there was one, the batch first, wherever the module takes that."""
    wide = inputs
    if inputs.batch() == 1:
        other = inputs.with_batch(2, inputs.carriers())
        wide = other if runs(module, other) else inputs
    for index, tensor in enumerate(wide.tensors()):
        for axis in range(tensor.ndim):
            if tensor.shape[axis] == 1:
                other = next(resized(wide, index, axis, 2))
                wide = other if runs(module, other) else wide
    return wide


def _enlarged(module: nn.Module, inputs: Inputs) -> Inputs:
    """Return a call with axes behind the first four times as large, wherever the module takes that."""
    vast = inputs
    for index, tensor in enumerate(inputs.tensors()):
        for axis in range(1, tensor.ndim):
            other = next(resized(vast, index, axis, 4 * tensor.shape[axis]))
            vast = other if runs(module, other) else vast
    return vast


def _shapes(module: nn.Module, inputs: Inputs, axes: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Return `dynamic_shapes` in which these axes of the tensors are free, but for those of size 0 and 1."""
    left = iter(axes)

    def leaf(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return None
        return {axis: Dim.AUTO for axis in next(left) if value.shape[axis] > 1}

    specs = pytree.tree_map(leaf, (inputs.args, inputs.kwargs))
    bound = inspect.signature(module.forward).bind(*specs[0], **specs[1])
    return dict(bound.arguments)
