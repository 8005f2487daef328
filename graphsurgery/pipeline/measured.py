"""Passes whose changes are timed, and the last word: the whole network beside the one without them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import fx

from graphsurgery.measure import Bench, MeasuredCost, parted
from graphsurgery.measure.bench import Candidate
from graphsurgery.report import Report
from graphsurgery.rewrite import ManagerResult, Pass, PassManager, Refusal

__all__ = ["Trial"]

_ROUNDS = 32
"""Rounds at most: every timed pass that changes something takes one, and the others settle after it."""

_NETWORK = "the whole network"


class Trial:
    """One run of `optimize` with measured cost.

    Attributes:
        passes: All passes, those whose changes are timed last.
        max_rounds: Rounds that they may take.
    """

    def __init__(self, settings: MeasuredCost, chosen: Iterable[Pass]) -> None:
        """Part the passes.

        Args:
            settings: How to time.
            chosen: Passes as asked for.
        """
        self.bench = Bench(settings)
        self.as_they_are, self.timed = parted(chosen, self.bench)
        self.passes: tuple[Pass, ...] = (*self.as_they_are, *self.timed)
        self.max_rounds = _ROUNDS
        self._faster: fx.GraphModule | None = None
        self._undone = ""
        self._refusals: tuple[Refusal, ...] = ()

    def slower(self, captured: fx.GraphModule, result: ManagerResult) -> bool:
        """Whether what was timed piece by piece does not make the whole faster.

        Args:
            captured: The graph before all passes.
            result: What they made of it.
        """
        names = {item.name for item in self.timed}
        first = next((i for i, step in enumerate(result.steps) if step.pass_name in names), None)
        if first is None or result.graph_module is self._faster:
            return False
        before = result.steps[first - 1].graph_module if first else captured
        found = self.bench.try_out(Candidate("measured", _NETWORK, ()), before, result.graph_module)
        if found.kept:
            self._faster = result.graph_module
            return False
        undone = [step for step in result.steps[first:] if step.pass_name in names]
        count = sum(len(step.changes) for step in undone)
        self._undone = f"{count} changes that were faster by themselves are left out: {_NETWORK} "
        if found.ratio is None:
            self._undone += f"could not be timed ({found.reason})"
        else:
            self._undone += (
                f"with them is not clearly faster, {found.before_ms:.4g} ms without, {found.after_ms:.4g} ms "
                f"with, ratio {found.ratio:.3f} ({found.least:.3f} to {found.most:.3f})"
            )
        self._refusals = tuple(refusal for refusal in result.refusals if refusal.pass_name in names)
        self._refusals += tuple(
            Refusal(step.pass_name, "slower", change.before, self._undone)
            for step in undone
            for change in step.changes
        )
        return True

    def without(self, manager: PassManager) -> PassManager:
        """The manager of the passes that run as they are."""
        names = {item.name for item in self.timed}
        rest = [item for item in manager.passes if item.name not in names]
        sealed = {name: calls for name, calls in manager.sealed.items() if name not in names}
        return PassManager(rest, check=manager.check, on_event=manager.on_event, sealed=sealed)

    def told(self, report: Report, result: ManagerResult) -> Report:
        """The report with what was timed, and what was kept and why."""
        measured = self.bench.measurements(result.changes)
        parts = [found for found in measured if found.kind != _NETWORK]
        missed = sum(found.ratio is None for found in parts)
        known = sum(found.cached for found in parts)
        counts = {"timed": len(parts) - missed - known, "known from equal ones": known}
        counts |= {"that could not be timed": missed, "kept": sum(found.kept for found in parts)}
        threads = self.bench.settings.threads
        where = (
            f"on onnxruntime, {threads} threads" if threads else "on onnxruntime, its own choice of threads"
        )
        note = f"candidates {where}: " + ", ".join(
            f"{count} {what}" for what, count in counts.items() if count or what in ("timed", "kept")
        )
        notes = (*report.captured.notes, note, *([self._undone] if self._undone else []))
        captured = replace(report.captured, notes=notes)
        return replace(
            report, measured=measured, captured=captured, refusals=(*report.refusals, *self._refusals)
        )
