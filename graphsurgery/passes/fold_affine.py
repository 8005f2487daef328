"""Fold every stretch of affine calls, branches included, into its cheapest exact form.

Rule:      A2 (A1 x + b1) + b2 = (A2 A1) x + (A2 b1 + b2) and A1 x + A2 x = (A1 + A2) x,
           written as a Linear, a convolution, a multiply-add or a view, whichever the axes allow and the
           costs favour
Requires:  every call affine in what it reads of one value (`not-affine`), nothing in between read elsewhere
           (`several-users`), no axis of symbolic size mixed (`batch-mixed`, `batch-varied`), borders that
           read nothing invented (`border`), finite weights (`not-finite`), a form that costs less
           (`costs-more`), and a certificate (`certificate`)
Preserves: signature, shapes, dtypes; values up to rounding
Source:    Freivalds 1977 for the certificate; adjoint probing as in matrix-free linear algebra
"""

from __future__ import annotations

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
from graphsurgery.affine.write import write
from graphsurgery.cost import CostModel, cost_model, op_name
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
            multiplications never rise.
    """

    max_param_growth: float = DEFAULT_PARAM_GROWTH
    memory_budget: int = DEFAULT_BUDGET
    cost: str | CostModel = "flops"

    name: ClassVar[str] = "fold-affine"
    summary: ClassVar[str] = (
        "fold linear chains and branches (conv, Linear, norm, scale, sum, pool, view) into one layer"
    )

    def run(self, gm: fx.GraphModule) -> PassResult:
        """Fold what pays in a copy of `gm`; say why the rest stays."""
        work = copy_graph_module(gm)
        model = cost_model(self.cost)
        changes: list[Change] = []
        while True:  # what was written may fold again: the scale of a norm, a view beside a view
            scope = Scope(work, model)
            search = Search(scope, self.max_param_growth)
            outcomes = [self._fold(fold) for fold in dissolved(search, search.folds())][::-1]
            made = [outcome for outcome in outcomes if isinstance(outcome, Change)]
            refusals = [outcome for outcome in outcomes if isinstance(outcome, Refusal)]
            changes += made
            if not made:
                break
            delete_unused_attrs(work)
        if changes:
            work.graph.lint()
            work.recompile()
        refusals.extend(self._refusal(declined) for declined in outlook(scope, self.max_param_growth))
        return PassResult(work if changes else gm, tuple(changes), tuple(refusals))

    def _fold(self, fold: Fold) -> Change | Refusal:
        """Fill, certify and write one fold; a fold that fails its certificate is dropped."""
        region, before, after = fold.region, fold.region.tally.cost, fold.option.cost
        nodes = tuple(NodeRef.of(node) for node in region.nodes)
        kind = "+".join(op_name(node) for node in region.nodes)
        try:
            done = write(fold, self.memory_budget)
        except NoFold as refusal:
            return Refusal(self.name, refusal.code, nodes, refusal.reason, before, after)
        new = tuple(NodeRef.of(node) for node in done.emitted.nodes)
        written = done.emitted.written
        return Change(self.name, kind, nodes, new, written, before, after, done.residual, done.detail)

    def _refusal(self, declined: Declined) -> Refusal:
        nodes = tuple(NodeRef.of(node) for node in declined.nodes)
        return Refusal(self.name, declined.code, nodes, declined.reason, declined.before, declined.after)
