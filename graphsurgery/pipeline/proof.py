"""Comparisons with the original model: after every pass, at the end, and to find who is to blame."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import fx, nn
from torch.export import ExportedProgram

from graphsurgery.capture.program import quiet
from graphsurgery.capture.state import unwrap
from graphsurgery.errors import ExportError, GraphSurgeryError, VerificationError
from graphsurgery.export import export_onnx
from graphsurgery.graph import CaptureInfo
from graphsurgery.report import PassCheck
from graphsurgery.restore import restore
from graphsurgery.rewrite import Event, ManagerResult, Pass, PassFailure, PassManager
from graphsurgery.verify import Baseline, Inputs, Verdict

__all__ = ["EachPass", "baseline_of", "example_of", "reference_of", "verified"]


def example_of(info: CaptureInfo) -> Inputs:
    """The example inputs of a captured model, as verification takes them."""
    return Inputs(tuple(info.args), dict(info.kwargs))


def reference_of(model: nn.Module | ExportedProgram) -> nn.Module:
    """The model as it was given, as a module to run."""
    if isinstance(model, ExportedProgram):
        with quiet():
            return model.module(check_guards=False)
    return unwrap(model)


def baseline_of(model: nn.Module | ExportedProgram, info: CaptureInfo) -> Baseline:
    """The runs of the original model that everything is compared with."""
    return Baseline(reference_of(model), example_of(info), dynamic_batch=info.dynamic_batch)


@dataclass(frozen=True)
class _Checked:
    ok: bool
    reason: str


class EachPass:
    """The check of `verify="each-pass"`: torch, then ONNX on onnxruntime, both against the original model."""

    def __init__(self, baseline: Baseline, info: CaptureInfo, checks: list[PassCheck]) -> None:
        self.baseline = baseline
        self.info = info
        self.checks = checks

    def captured(self, gm: fx.GraphModule) -> None:
        """Make sure that the untouched graph can be exported and agrees, so that no pass is blamed for it."""
        self.baseline.compare(restore(gm)).raise_if_failed()
        self._on_onnxruntime(gm).raise_if_failed()

    def __call__(self, before: fx.GraphModule, after: fx.GraphModule, item: Pass) -> _Checked:
        """Compare `after` with the original, record it, and say whether it agrees."""
        in_torch = self.baseline.compare(after)
        on_onnx: Verdict | None = None
        reason = in_torch.reason
        if in_torch.ok:
            try:
                on_onnx = self._on_onnxruntime(after)
                reason = on_onnx.reason
            except GraphSurgeryError as error:  # the captured graph did not raise, so the pass is to blame
                reason = str(error)
        ok = on_onnx is not None and on_onnx.ok
        self.checks.append(PassCheck(item.name, ok, in_torch, on_onnx))
        return _Checked(ok, reason)

    def _on_onnxruntime(self, gm: fx.GraphModule) -> Verdict:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "graph.onnx"
            done = export_onnx(restore(gm), self.info, path, baseline=self.baseline)
        if done.verdict is None:
            raise ExportError("the exported graph was not compared, expected a verdict of onnxruntime")
        return done.verdict


def verified(
    gm: fx.GraphModule,
    manager: PassManager,
    result: ManagerResult,
    module: nn.Module,
    baseline: Baseline,
    inputs: Any,
) -> tuple[ManagerResult, nn.Module, Verdict]:
    """Compare the result with the original; leave out culprits until it agrees.

    Raises:
        VerificationError: No pass is to blame: what was captured, or what is restored from it, differs
            already.
    """
    failures = list(result.failures)
    remaining = manager.passes
    while not (verdict := baseline.compare(module)).ok:
        index, reason = _culprit(gm, result, verdict, baseline)
        step = result.steps[index]
        failures.append(PassFailure(step.pass_name, "verification", reason, step.round))
        if manager.on_event is not None:
            position = [item.name for item in manager.passes].index(step.pass_name)
            event = Event(
                "pass-failed", step.pass_name, position, len(manager.passes), step.round, reason=reason
            )
            manager.on_event(event)
        failed = {failure.pass_name for failure in failures}
        remaining = tuple(item for item in remaining if item.name not in failed)
        result = PassManager(remaining, check=manager.check, on_event=manager.on_event)(gm, inputs)
        failures += result.failures
        module = restore(result.graph_module)
    return replace(result, failures=tuple(failures)), module, verdict


def _culprit(
    gm: fx.GraphModule, result: ManagerResult, verdict: Verdict, baseline: Baseline
) -> tuple[int, str]:
    """Find the first step whose graph differs from the original, by halving.

    Returns:
        Its index and the reason of the verdict on its graph.
    """
    captured = baseline.compare(gm)
    if not captured.ok:
        raise VerificationError(
            f"the captured graph differs from the model before any pass: {captured.reason}"
        )
    reason = verdict.reason
    good, bad = -1, len(result.steps) - 1
    last = baseline.compare(result.graph_module)
    if bad < 0 or last.ok:
        raise VerificationError(
            f"the module restored from the graph differs from the model, though the graph agrees: {reason}; "
            "please report this"
        )
    reason = last.reason
    while bad - good > 1:
        middle = (good + bad) // 2
        found = baseline.compare(result.steps[middle].graph_module)
        if found.ok:
            good = middle
        else:
            bad, reason = middle, found.reason
    return bad, reason
