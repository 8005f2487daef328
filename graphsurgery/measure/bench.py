"""The workbench of one run: what was timed, what came of it."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from torch import fx

from graphsurgery.measure.cache import Timings, cache_file
from graphsurgery.measure.cut import Cut, cut
from graphsurgery.measure.errors import NotMeasured
from graphsurgery.measure.settings import MeasuredCost
from graphsurgery.measure.timing import OnnxTimer, Timing, clearly_faster, not_undone
from graphsurgery.report.model import Measurement
from graphsurgery.rewrite.contracts import Change

__all__ = ["Bench", "Candidate"]


@dataclass(frozen=True)
class Candidate:
    """Something that may be written.

    Attributes:
        pass_name: Who proposes it.
        kind: Its kind, as that of a change.
        modules: Where it is.
        before: Names of the calls that it would replace; None for the whole graph.
        after: Names of the calls in their place; None for the whole graph.
        changes: The changes it is made of; none where whole networks are compared.
    """

    pass_name: str
    kind: str
    modules: tuple[str, ...]
    before: frozenset[str] | None = None
    after: frozenset[str] | None = None
    changes: tuple[Change, ...] = ()


class Bench:
    """Times candidates and keeps the records.

    Args:
        settings: How to time.
    """

    def __init__(self, settings: MeasuredCost) -> None:
        """See the class."""
        self.settings = settings
        self._timer = settings.timer or OnnxTimer()
        self._timings = Timings(cache_file(settings.cache), settings.threads, settings.blocks)
        self._unmeasured: dict[tuple[str, str], str] = {}
        self._records: dict[tuple[object, ...], tuple[Measurement, Candidate]] = {}

    def try_out(self, candidate: Candidate, before: fx.GraphModule, after: fx.GraphModule) -> Measurement:
        """Time a candidate, or look its times up, and decide.

        Args:
            candidate: What is proposed.
            before: The graph as it is.
            after: The graph with it.
        """
        try:
            old, new = cut(before, candidate.before), cut(after, candidate.after)
            timing, cached = self._timing(old, new)
        except NotMeasured as error:
            found = Measurement(candidate.pass_name, candidate.kind, candidate.modules, reason=str(error))
        else:
            decide = clearly_faster if candidate.changes else not_undone
            found = Measurement(
                candidate.pass_name,
                candidate.kind,
                candidate.modules,
                before_ms=statistics.median(timing.before_ms),
                after_ms=statistics.median(timing.after_ms),
                ratio=timing.ratio,
                least=min(timing.ratios),
                most=max(timing.ratios),
                blocks=len(timing.ratios),
                faster_blocks=sum(ratio < 1 for ratio in timing.ratios),
                kept=decide(timing),
                cached=cached,
            )
        key = (candidate.pass_name, candidate.kind, candidate.before, candidate.modules)
        first = self._records.setdefault(key, (found, candidate))[0]
        self._records[key] = replace(found, cached=first.cached and found.cached), candidate
        return found

    def _timing(self, before: Cut, after: Cut) -> tuple[Timing, bool]:
        known = self._timings.get(before.key, after.key)
        if known is not None:
            return known, True
        pair = before.key, after.key
        if pair not in self._unmeasured:
            try:
                timing = self._timer(before, after, self.settings.threads, self.settings.blocks)
            except NotMeasured as error:
                self._unmeasured[pair] = str(error)
            else:
                self._timings.put(*pair, timing)
                return timing, False
        raise NotMeasured(self._unmeasured[pair])

    def measurements(self, changes: Collection[Change]) -> tuple[Measurement, ...]:
        """All records in order; kept are those that are among the changes of the result."""
        made = {(change.pass_name, change.kind, change.before) for change in changes}
        return tuple(
            replace(found, kept=found.kept and _written(candidate.changes, made))
            for found, candidate in self._records.values()
        )


def _written(changes: Sequence[Change], made: Collection[tuple[object, ...]]) -> bool:
    return all((change.pass_name, change.kind, change.before) in made for change in changes)
