"""Comparisons with the original model: after every pass, at the end, and to find who is to blame."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from graphsurgery.capture.program import quiet
from graphsurgery.capture.state import unwrap
from graphsurgery.errors import ExportError, GraphSurgeryError, VerificationError
from graphsurgery.export import export_onnx
from graphsurgery.graph import capture_info
from graphsurgery.report import PassCheck
from graphsurgery.restore import restore
from graphsurgery.rewrite import CheckResult, Event, ManagerResult, Pass, PassFailure, PassManager
from graphsurgery.rewrite.sealing import Attempt, Separated, separate
from graphsurgery.sharing import own_memory
from graphsurgery.verify import Baseline, Data, Inputs, Verdict, accepted_by, free_axes

__all__ = ["Proof"]


@dataclass(frozen=True)
class _Checked:
    ok: bool
    reason: str


class Trailing(nn.Module):
    """A model whose outputs have axes of size one behind their own."""

    def __init__(self, model: nn.Module, axes: tuple[int, ...]) -> None:
        super().__init__()
        self.model, self.axes = model, axes

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model gives, each flat output with its axes."""
        leaves, spec = pytree.tree_flatten(self.model(*args, **kwargs))
        shaped = [
            leaf.reshape(*leaf.shape, *[1] * count) if count else leaf
            for leaf, count in zip(leaves, self.axes, strict=True)
        ]
        return pytree.tree_unflatten(shaped, spec)


class Proof:
    """Compares graphs and modules with one original model, whose own runs are made once, when first needed.

    Args:
        original: The model as it was given.
        captured: The graph that was captured of it.
        on_event: As for `optimize`.
        data: The caller's own inputs.
        shared: Whether the graph shares the memory of the original.

    Attributes:
        original: The model as it was given.
        captured: The graph that was captured of it.
        info: What capture recorded of it.
        pass_checks: The checks of single passes so far.
    """

    def __init__(
        self,
        original: nn.Module | ExportedProgram,
        captured: fx.GraphModule,
        on_event: Callable[[Event], None] | None = None,
        data: Data | None = None,
        *,
        shared: bool = False,
    ) -> None:
        self.original = original
        self.captured = captured
        self.info = capture_info(captured)
        self.pass_checks: list[PassCheck] = []
        self._last_checked: tuple[fx.GraphModule, str] | None = None
        self._on_event = on_event
        self._data = data
        self._shared = shared
        self._baselines: dict[tuple[int, ...], Baseline] = {}

    @property
    def example(self) -> Inputs:
        """The example inputs, as verification takes them."""
        return Inputs(tuple(self.info.args), dict(self.info.kwargs))

    @property
    def reference(self) -> nn.Module:
        """The original model as a module to run."""
        if isinstance(self.original, ExportedProgram):
            with quiet():
                return self.original.module(check_guards=False)
        return unwrap(self.original)

    @property
    def baseline(self) -> Baseline:
        """The runs of the original model that everything is compared with."""
        return self.baseline_of(self.captured)

    def baseline_of(self, gm: fx.GraphModule) -> Baseline:
        """The runs of the original model in the shapes that a graph made of it gives."""
        axes = capture_info(gm).trailing_axes
        axes = axes if any(axes) else ()
        if axes not in self._baselines:
            reference = Trailing(self.reference, axes) if axes else self.reference
            made = Baseline(
                reference,
                self.example,
                dynamic_batch=self.info.dynamic_batch,
                refused_batches=self.info.refused_batches,
                batch_axes=self.info.batch_axes,
                data=self._data,
                size_axes=free_axes(self.example, [self.captured]),
                accepts=accepted_by([self.captured]),
            )
            self._baselines[axes] = made
        return self._baselines[axes]

    def handed_out(self, result: ManagerResult) -> tuple[ManagerResult, nn.Module]:
        """Give a result memory of its own, apart from the original's; return it, and what is restored of it.

        Up to here graphs share the memory of the original, so that what no pass has changed is held once.
        """
        owned = own_memory(result.graph_module, self.captured) if self._shared else result.graph_module
        return replace(result, graph_module=owned), restore(owned)

    def check_captured(self) -> None:
        """Make sure that the untouched graph agrees, in torch and exported, so that no pass is blamed for it.

        Raises:
            ExportError: It cannot be exported to ONNX.
            VerificationError: It differs from the model.
        """
        self.baseline.compare(restore(self.captured)).raise_if_failed()
        self._on_onnxruntime(self.captured)

    def check_pass(self, before: fx.GraphModule, after: fx.GraphModule, item: Pass) -> CheckResult:
        """Compare what a pass made with the original: in torch, then exported, on onnxruntime; record it."""
        in_torch = self.baseline_of(after).compare(after)
        on_onnx: Verdict | None = None
        reason = in_torch.reason
        if in_torch.ok:
            try:
                on_onnx = self._on_onnxruntime(after)
                reason = on_onnx.reason
            except GraphSurgeryError as error:  # the captured graph did not raise, so the pass is to blame
                reason = str(error)
        ok = on_onnx is not None and on_onnx.ok
        if self._last_checked == (before, item.name):  # the same run of the pass, with some changes left out
            self.pass_checks.pop()
        self._last_checked = before, item.name
        self.pass_checks.append(PassCheck(item.name, ok, in_torch, on_onnx))
        return _Checked(ok, reason)

    def _on_onnxruntime(self, gm: fx.GraphModule) -> Verdict:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "graph.onnx"
            done = export_onnx(restore(gm), self.info, path, baseline=self.baseline_of(gm))
        if done.verdict is None:
            raise ExportError("the exported graph was not compared, expected a verdict of onnxruntime")
        return done.verdict

    def verified(
        self, manager: PassManager, result: ManagerResult, module: nn.Module
    ) -> tuple[ManagerResult, nn.Module, Verdict]:
        """Compare the result with the original; leave out culprits until it agrees.

        Args:
            manager: The manager that made `result` of the captured graph.
            result: What the passes made.
            module: What was restored of it.

        Returns:
            Result, module and verdict, of the first set of passes that agrees.

        Raises:
            VerificationError: No pass is to blame: what was captured, or what is restored from it, differs.
        """
        failures, seconds, sealed = list(result.failures), dict(result.seconds), dict(manager.sealed)
        while not (verdict := self.baseline_of(result.graph_module).compare(module)).ok:
            index, reason = self._culprit(result, verdict)
            step = result.steps[index]
            found = self._wrong_changes(manager, result, index, sealed, reason)
            if found is None:
                failures.append(PassFailure(step.pass_name, "verification", reason, step.round))
                self._tell(manager, failures[-1])
            else:
                sealed[step.pass_name] = sealed.get(step.pass_name, frozenset()) | found.sealed
                failures += [
                    PassFailure(step.pass_name, "verification", why, step.round, changes)
                    for changes, why in found.wrong
                ]
            whole = {f.pass_name for f in failures if f.code != "no-fixed-point" and not f.changes}
            remaining = tuple(item for item in manager.passes if item.name not in whole)
            manager = PassManager(
                remaining,
                check=manager.check,
                on_event=manager.on_event,
                max_rounds=manager.max_rounds,
                sealed=sealed,
            )
            result = manager(self.captured)
            failures += [failure for failure in result.failures if failure not in failures]
            for name, spent in result.seconds.items():
                seconds[name] = seconds.get(name, 0.0) + spent
            result, module = self.handed_out(result)
        return replace(result, failures=tuple(failures), seconds=seconds), module, verdict

    def _wrong_changes(
        self,
        manager: PassManager,
        result: ManagerResult,
        index: int,
        sealed: Mapping[str, frozenset[str]],
        reason: str,
    ) -> Separated | None:
        """The changes that make a step wrong; None where they cannot be told from the others."""
        step = result.steps[index]
        before = result.steps[index - 1].graph_module if index else self.captured
        item = manager.passes[step.index]
        known = sealed.get(step.pass_name, frozenset())

        def attempt(names: frozenset[str]) -> Attempt:
            again = PassManager([item], max_rounds=1, sealed={item.name: known | names})(before)
            found = self.baseline_of(again.graph_module).compare(again.graph_module)
            return Attempt(again.changes, None if found.ok else found.reason)

        return separate(Attempt(step.changes, reason), attempt)

    def _tell(self, manager: PassManager, failure: PassFailure) -> None:
        if self._on_event is not None:
            names = [item.name for item in manager.passes]
            index = names.index(failure.pass_name)
            round, reason = failure.round, failure.reason
            self._on_event(Event("pass-failed", names[index], index, len(names), round, reason=reason))

    def _culprit(self, result: ManagerResult, verdict: Verdict) -> tuple[int, str]:
        """Find the first step whose graph differs from the original, by halving; and how it differs."""
        captured = self.baseline.compare(self.captured)
        if not captured.ok:
            raise VerificationError(f"the captured graph differs before any pass: {captured.reason}")
        last = self.baseline_of(result.graph_module).compare(result.graph_module)
        if last.ok or not result.steps:
            raise VerificationError(
                "the module restored from the graph differs from the model, though the graph agrees: "
                f"{verdict.reason}; please report this"
            )
        good, bad, reason = -1, len(result.steps) - 1, last.reason
        while bad - good > 1:
            middle = (good + bad) // 2
            graph = result.steps[middle].graph_module
            found = self.baseline_of(graph).compare(graph)
            if found.ok:
                good = middle
            else:
                bad, reason = middle, found.reason
        return bad, reason
