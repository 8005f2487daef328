"""Fold every stretch of affine calls, branches included, into its cheapest exact form.

Rule:      A2 (A1 x + b1) + b2 = (A2 A1) x + (A2 b1 + b2) and A1 x + A2 x = (A1 + A2) x,
           written as a Linear, a convolution, a multiply-add or a view, whichever the axes allow and the
           costs favour
Requires:  every call affine in what it reads of one value (`not-affine`), nothing in between read elsewhere
           (`several-users`), no axis of symbolic size mixed or cut (`batch-mixed`, `batch-varied`,
           `dynamic-shape`, `position-bias`), borders that read nothing invented (`border`, `transposed`), no
           scale of zero in front of a shift that is taken out (`zero-scale`), finite weights that fit the
           dtype (`not-finite`, `overflow`), a form that costs less (`costs-more`), a certificate
           (`certificate`); what stands behind a form that does not pay is named (`scramble`, `structure`,
           `clipped-pool`, `shared-weights`, ...)
Preserves: signature, shapes, dtypes; values up to rounding
Source:    Freivalds 1977 for the certificate; adjoint probing as in matrix-free linear algebra
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from graphsurgery.affine.atoms import NoFold
from graphsurgery.affine.choice import DEFAULT_PARAM_GROWTH
from graphsurgery.affine.coefficients import DEFAULT_BUDGET
from graphsurgery.affine.dissolve import dissolved
from graphsurgery.affine.outlook import Declined, outlook
from graphsurgery.affine.region import Scope
from graphsurgery.affine.search import Fold, Search
from graphsurgery.affine.sums import Scattered, regroup, scattered
from graphsurgery.affine.write import Ready, prepare
from graphsurgery.cost import CostModel, cost_model, op_name
from graphsurgery.errors import PassError
from graphsurgery.graph import copy_graph_module, delete_unused_attrs
from graphsurgery.rewrite.contracts import Change, NodeRef, Pass, PassResult, Refusal


@dataclass(frozen=True)
class FoldAffine(Pass):
    """Fold linear chains and branches (layers, norms, scales, sums, views, pools) into one layer each.

    Attributes:
        max_param_growth: how many times the parameters of what it replaces a form may have, where it saves
            heavy multiplications.
        memory_budget: bytes that one chunk of probes may take.
        cost: what is cheaper than what; "flops" or a `graphsurgery.cost.CostModel`. Whatever it says, heavy
            multiplications never rise by more than `max_mac_growth`.
        max_mac_growth: how many times the heavy multiplications of the layers that it replaces a form may
            take, where `cost` finds it cheaper all the same; by default none more.
    """

    max_param_growth: float = DEFAULT_PARAM_GROWTH
    memory_budget: int = DEFAULT_BUDGET
    cost: str | CostModel = "flops"
    max_mac_growth: float = 1.0

    name: ClassVar[str] = "fold-affine"
    summary: ClassVar[str] = (
        "fold linear chains and branches (conv, Linear, norm, scale, sum, pool, view) into one layer"
    )

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            PassError: one of them makes no sense.
        """
        budget = self.memory_budget
        for option in ("max_param_growth", "max_mac_growth"):
            growth = getattr(self, option)
            if isinstance(growth, bool) or not isinstance(growth, (int, float)) or not growth >= 1:
                raise PassError(f"{option} of {self.name!r} is a number of at least 1, got {growth!r}")
        if isinstance(budget, bool) or not isinstance(budget, int) or budget <= 0:
            raise PassError(f"memory_budget of {self.name!r} is a positive number of bytes, got {budget!r}")
        cost_model(self.cost)

    def run(self, gm: fx.GraphModule) -> PassResult:
        """Fold what pays in a copy of `gm`; say why the rest stays."""
        work = copy_graph_module(gm)
        model = cost_model(self.cost)
        changes: list[Change] = []
        tried: set[str] = set()
        while True:  # what was written may fold again: the scale of a norm, a view beside a view
            scope = Scope(work, model, self.max_mac_growth)
            search = Search(scope, self.max_param_growth)
            plan = dissolved(search, search.folds())
            ready = self._together(plan)
            outcomes = [self._fold(fold, ready.get(fold)) for fold in plan][::-1]
            made = [outcome for outcome in outcomes if isinstance(outcome, Change)]
            refusals = [outcome for outcome in outcomes if isinstance(outcome, Refusal)]
            changes += made
            if made:
                delete_unused_attrs(work)
                continue
            reordered = self._reordered(search, tried)
            if reordered is None:
                break
            work = reordered
        if changes:
            work.graph.lint()
            work.recompile()
        refusals.extend(self._refusal(declined) for declined in outlook(scope, self.max_param_growth))
        return PassResult(work if changes else gm, tuple(changes), tuple(refusals))

    def _reordered(self, search: Search, tried: set[str]) -> fx.GraphModule | None:
        """The graph with one sum in an order in which a part of it folds; None where there is none."""
        for found in scattered(search):
            if found.total.name in tried:
                continue
            tried.add(found.total.name)
            trial = copy_graph_module(search.scope.gm)
            nodes = {node.name: node for node in trial.graph.nodes}
            same = Scattered(
                nodes[found.total.name],
                tuple(nodes[node.name] for node in found.together),
                tuple(nodes[node.name] for node in found.others),
            )
            partial = regroup(trial, same)
            folds = Search(
                Scope(trial, search.scope.cost_model, self.max_mac_growth), self.max_param_growth
            ).folds()
            if any(partial in fold.region.nodes for fold in folds):
                return trial
        return None

    def _together(self, plan: Sequence[Fold]) -> dict[Fold, Ready | NoFold]:
        """Folds that take in one value, filled and certified: one that fails keeps the value for all.

        Only together do they pay.
        """
        groups: dict[tuple[fx.Node, frozenset[fx.Node]], list[Fold]] = defaultdict(list)
        for fold in plan:
            if fold.region.shared:
                groups[fold.region.entry, fold.region.shared].append(fold)
        outcomes: dict[Fold, Ready | NoFold] = {}
        for folds in groups.values():
            try:
                outcomes.update({fold: prepare(fold, self.memory_budget) for fold in folds})
            except NoFold as refusal:
                outcomes.update(dict.fromkeys(folds, refusal))
        return outcomes

    def _fold(self, fold: Fold, ready: Ready | NoFold | None) -> Change | Refusal:
        """Fill, certify and write one fold; a fold that fails its certificate is dropped."""
        region, before, after = fold.region, fold.region.tally.cost, fold.option.cost
        nodes = tuple(NodeRef.of(node) for node in region.nodes)
        kind = "+".join(op_name(node) for node in region.nodes)
        try:
            if isinstance(ready, NoFold):
                raise ready
            done = (ready or prepare(fold, self.memory_budget)).write()
        except NoFold as refusal:
            return Refusal(self.name, refusal.code, nodes, refusal.reason, before, after)
        new = tuple(NodeRef.of(node) for node in done.emitted.nodes)
        written = done.emitted.written
        return Change(self.name, kind, nodes, new, written, before, after, done.residual, done.detail)

    def _refusal(self, declined: Declined) -> Refusal:
        nodes = tuple(NodeRef.of(node) for node in declined.nodes)
        return Refusal(self.name, declined.code, nodes, declined.reason, declined.before, declined.after)
