"""Passes in a permissive form, each change of which is timed before it is written.

Each runs once the passes before it change nothing any more. It lets its pass propose, times every proposal
beside what is there, seals the calls of what is not clearly faster (`graphsurgery.rewrite.sealing`), and lets
the pass propose again, until it proposes winners only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import fx

from graphsurgery.cost import Cost, Score
from graphsurgery.graph import copy_graph_module
from graphsurgery.measure.bench import Bench, Candidate
from graphsurgery.passes import Conv1x1ToLinear, FoldAffine, LinearToConv1x1, MergeSiblings
from graphsurgery.report.model import Measurement
from graphsurgery.rewrite.contracts import Change, NodeRef, Pass, PassResult, Preserves, Refusal
from graphsurgery.rewrite.sealing import seal, unseal

__all__ = ["Measured", "Promising", "parted"]

_TRIES = 8
"""Proposals in a row of one pass; each leaves out what lost before, so few are needed."""

_MAC_GROWTH = 4.0
"""How many times the multiplications a fold may take that is timed; parameters keep their own limit."""

_NODE = 50_000.0
"""What a call costs beside its work, in multiplications: five microseconds at ten billion a second."""

_BYTES = 4.0
"""What an element costs that is written or moved, in multiplications: memory is slower than arithmetic."""


@dataclass(frozen=True)
class Promising:
    """Roughly what a runtime pays, to choose what is worth timing; no decision is made by it.

    Attributes:
        name: Name for reports.
        per_node: What a call costs beside its work, in multiplications.
        per_element: What an element costs that is written or moved, in multiplications.
    """

    name: str = "promising"
    per_node: float = _NODE
    per_element: float = _BYTES

    def score(self, cost: Cost) -> Score:
        """(time in multiplications, nodes, parameters)."""
        moved = cost.elementwise + cost.moved
        return (cost.macs + self.per_element * moved + self.per_node * cost.nodes, cost.nodes, cost.params)


@dataclass(frozen=True)
class Measured(Pass):
    """Times what another pass proposes and keeps what is clearly faster.

    Attributes:
        proposer: The other pass.
        bench: Where the times are taken and recorded.
        whole: Time all changes as one, on the whole graph: they hang together.
    """

    proposer: Pass
    bench: Bench = field(repr=False, compare=False)
    whole: bool = False

    name: ClassVar[str] = "measured"
    summary: ClassVar[str] = "what another pass proposes, timed on onnxruntime"
    preserves: ClassVar[Preserves] = Preserves()
    default: ClassVar[bool] = False
    waits: ClassVar[bool] = True

    def run(self, gm: fx.GraphModule) -> PassResult:
        """See `Pass.run`."""
        as_it_is = copy_graph_module(gm)
        unseal(as_it_is)
        lost: frozenset[str] = frozenset()
        refusals: list[Refusal] = []
        for _ in range(_TRIES):
            given = copy_graph_module(gm)
            seal(given, lost)
            proposed = self.proposer.run(given)
            unseal(proposed.graph_module)
            changes = [replace(change, pass_name=self.name) for change in proposed.changes]
            losers: list[tuple[Change, ...]] = []
            for group in [tuple(changes)] if self.whole and changes else _together(changes):
                found = self._try_out(group, as_it_is, proposed.graph_module)
                if not found.kept:
                    losers.append(group)
                    refusals.append(self._refusal(group, found))
            if not losers:
                kept = tuple(changes)
                return PassResult(proposed.graph_module if kept else gm, kept, tuple(refusals))
            names = frozenset(ref.name for group in losers for change in group for ref in change.before)
            if self.whole or names <= lost:  # nothing is left, or the pass heeds no seal
                break
            lost |= names
        return PassResult(gm, (), tuple(refusals))

    def _try_out(
        self, group: tuple[Change, ...], before: fx.GraphModule, after: fx.GraphModule
    ) -> Measurement:
        refs = tuple(dict.fromkeys(ref for change in group for ref in change.before))
        modules = tuple(dict.fromkeys(ref.module for ref in refs if ref.module))
        kinds = list(dict.fromkeys(change.kind for change in group))
        kind = " and ".join(kinds) if len(kinds) < 4 else f"{len(kinds)} kinds of changes"
        if self.whole:
            return self.bench.try_out(Candidate(self.name, kind, modules, changes=group), before, after)
        names = {ref.name for ref in refs}, {ref.name for change in group for ref in change.after}
        replaced, new = (frozenset(part) for part in names)
        candidate = Candidate(self.name, kind, modules, replaced, new, group)
        return self.bench.try_out(candidate, before, after)

    def _refusal(self, group: Sequence[Change], found: Measurement) -> Refusal:
        nodes: tuple[NodeRef, ...] = tuple(dict.fromkeys(r for change in group for r in change.before))
        before = sum((change.cost_before for change in group), Cost())
        after = sum((change.cost_after for change in group), Cost())
        if found.ratio is None:
            reason = f"{found.kind} was not timed: {found.reason}"
            return Refusal(self.name, "not-measured", nodes, reason, before, after)
        reason = (
            f"{found.kind} is not clearly faster on onnxruntime: {found.before_ms:.4g} ms as it is, "
            f"{found.after_ms:.4g} ms rewritten, ratio {found.ratio:.3f} ({found.least:.3f} to "
            f"{found.most:.3f}), faster in {found.faster_blocks} of {found.blocks} blocks"
        )
        return Refusal(self.name, "slower", nodes, reason, before, after)


@dataclass(frozen=True)
class _MeasuredFold(Measured):
    name: ClassVar[str] = "measured-fold-affine"
    summary: ClassVar[str] = "folds with more multiplications in fewer calls, timed"


@dataclass(frozen=True)
class _MeasuredMerge(Measured):
    name: ClassVar[str] = "measured-merge-siblings"
    summary: ClassVar[str] = "layers that read the same value into one, timed"


@dataclass(frozen=True)
class _MeasuredConvs(Measured):
    name: ClassVar[str] = "measured-linear-to-conv1x1"
    summary: ClassVar[str] = "Linear layers as 1x1 convolutions, the whole network timed"


@dataclass(frozen=True)
class _MeasuredLinears(Measured):
    name: ClassVar[str] = "measured-conv1x1-to-linear"
    summary: ClassVar[str] = "1x1 convolutions as Linear layers, the whole network timed"


def parted(chosen: Iterable[Pass], bench: Bench) -> tuple[tuple[Pass, ...], tuple[Measured, ...]]:
    """Part passes into those that run as they are and those whose changes are timed.

    A fold that saves multiplications is made as always; what would take more of them in fewer calls is
    proposed besides. Mergers and swaps are proposed only.

    Args:
        chosen: Passes as asked for.
        bench: Where the times are taken.
    """
    as_they_are: list[Pass] = []
    timed: list[Measured] = []
    for item in chosen:
        if isinstance(item, FoldAffine):
            as_they_are.append(item)
            growth = max(item.max_mac_growth, _MAC_GROWTH)
            hopeful = replace(item, cost=Promising(), max_mac_growth=growth)
            timed.append(_MeasuredFold(hopeful, bench))
        elif isinstance(item, MergeSiblings):
            timed.append(_MeasuredMerge(replace(item, cost=None), bench))
        elif isinstance(item, LinearToConv1x1):
            timed.append(_MeasuredConvs(item, bench, whole=True))
        elif isinstance(item, Conv1x1ToLinear):
            timed.append(_MeasuredLinears(item, bench, whole=True))
        else:
            as_they_are.append(item)
    return tuple(as_they_are), tuple(timed)


def _together(changes: Sequence[Change]) -> list[tuple[Change, ...]]:
    """Changes in groups that share a call: one built on another, or both took one in."""
    groups: list[tuple[set[str], list[Change]]] = []
    for change in changes:
        names = {ref.name for ref in (*change.before, *change.after)}
        joined: list[Change] = []
        for group in [group for group in groups if group[0] & names]:
            groups.remove(group)
            names |= group[0]
            joined += group[1]
        groups.append((names, [*joined, change]))
    return [tuple(members) for _, members in groups]
