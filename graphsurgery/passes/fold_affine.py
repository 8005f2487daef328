"""Fold every straight stretch of affine calls into its cheapest exact form.

Rule:      A2 (A1 x + b1) + b2 = (A2 A1) x + (A2 b1 + b2), written as a Linear, a convolution, a multiply-add
           or a view, whichever the axes allow and the costs favour
Requires:  every call affine in one live operand (`not-affine`), each value read by the next call only
           (`several-users`), no axis of symbolic size mixed (`batch-mixed`, `batch-varied`), borders that
           read nothing invented (`border`), finite weights (`not-finite`), a form that costs less
           (`costs-more`), and a certificate (`certificate`)
Preserves: signature, shapes, dtypes; values up to rounding
Source:    Freivalds 1977 for the certificate; adjoint probing as in matrix-free linear algebra
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from graphsurgery.affine.atoms import NoFold
from graphsurgery.affine.certify import LIMIT, residual
from graphsurgery.affine.choice import DEFAULT_PARAM_GROWTH
from graphsurgery.affine.coefficients import DEFAULT_BUDGET, Coefficients, fill
from graphsurgery.affine.dissolve import dissolved
from graphsurgery.affine.emit import emit
from graphsurgery.affine.outlook import Declined, outlook
from graphsurgery.affine.region import Scope
from graphsurgery.affine.search import Fold, Search
from graphsurgery.cost import op_name
from graphsurgery.graph import copy_graph_module, delete_unused_attrs
from graphsurgery.rewrite.contracts import Change, NodeRef, Pass, PassResult, Refusal
from graphsurgery.values import tensor_meta


@dataclass(frozen=True)
class FoldAffine(Pass):
    """Fold linear chains (layers, norms, scales, shifts, views, pools) into one layer each, where it pays.

    Attributes:
        max_param_growth: how many times the parameters of what it replaces a form may have, where it saves
            heavy multiplications.
        memory_budget: bytes that one chunk of probes may take.
    """

    max_param_growth: float = DEFAULT_PARAM_GROWTH
    memory_budget: int = DEFAULT_BUDGET

    name: ClassVar[str] = "fold-affine"
    summary: ClassVar[str] = (
        "fold linear chains (conv, Linear, norm, scale, shift, pool, view) into one layer"
    )

    def run(self, gm: fx.GraphModule) -> PassResult:
        """Fold what pays in a copy of `gm`; say why the rest stays."""
        work = copy_graph_module(gm)
        scope = Scope(work)
        changes: list[Change] = []
        refusals: list[Refusal] = []
        search = Search(scope, self.max_param_growth)
        for fold in dissolved(search, search.folds()):
            outcome = self._fold(fold)
            (changes if isinstance(outcome, Change) else refusals).insert(0, outcome)  # type: ignore[arg-type]
        if changes:
            delete_unused_attrs(work)
            work.graph.lint()
            work.recompile()
        left = Scope(work) if changes else scope
        refusals.extend(self._refusal(declined) for declined in outlook(left, self.max_param_growth))
        return PassResult(work if changes else gm, tuple(changes), tuple(refusals))

    def _fold(self, fold: Fold) -> Change | Refusal:
        """Fill, certify and write one fold; a fold that fails its certificate is dropped."""
        region, before = fold.region, fold.region.tally.cost
        nodes = tuple(NodeRef.of(node) for node in region.nodes)
        try:
            filled = fill(region, fold.option.form, self.memory_budget)
            deviation = residual(region, filled.form, filled.slots)
            self._check(fold, filled, deviation)
        except NoFold as refusal:
            return Refusal(self.name, refusal.code, nodes, refusal.reason, before, fold.option.cost)
        except Exception as error:  # noqa: BLE001 - nothing is written yet: a bug costs one fold, not all
            reason = f"the fold could not be computed ({type(error).__name__}: {error}); please report this"
            return Refusal(self.name, "internal", nodes, reason, before, fold.option.cost)
        kind = "+".join(op_name(node) for node in region.nodes)
        emitted = emit(region, filled)
        after = tuple(NodeRef.of(node) for node in emitted.nodes)
        detail = f"to {filled.form.kind}, coefficients by {filled.method}"
        return Change(
            self.name, kind, nodes, after, emitted.written, before, fold.option.cost, deviation, detail
        )

    def _check(self, fold: Fold, filled: Coefficients, deviation: float) -> None:
        dtype = tensor_meta(fold.region.exit).dtype
        for slot, value in filled.slots.items():
            largest = float(torch.linalg.vector_norm(value, torch.inf)) if value.numel() else 0.0
            if not largest < float("inf"):
                raise NoFold(
                    "not-finite", f"the folded {slot} holds NaN or infinity, as the weights it comes from do"
                )
            if largest > torch.finfo(dtype).max:
                raise NoFold(
                    "overflow", f"the folded {slot} reaches {largest:.1e}, which does not fit {dtype}"
                )
        if not deviation <= LIMIT:
            raise NoFold(
                "certificate",
                f"the folded form deviates from the original by {deviation:.1e} in float64, expected at most "
                f"{LIMIT:.0e}; please report this",
            )

    def _refusal(self, declined: Declined) -> Refusal:
        nodes = tuple(NodeRef.of(node) for node in declined.nodes)
        return Refusal(self.name, declined.code, nodes, declined.reason, declined.before, declined.after)
