"""Fold weight and bias of a norm into all the layers that follow it.

Rule:      A (w n(x) + b) + c = (A w) n(x) + (A b + c), for layer norm, group norm and RMS norm n
Requires:  every reader of the norm leads by affine calls to a layer (`not-affine`, `output`) that takes
           weight and bias in at no cost (`costs-more`, `shared-weights`); all do, or none
Preserves: signature, shapes, dtypes; values up to rounding
Source:    the same rule by which a batch norm folds into the layer after it
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from graphsurgery.affine.atoms import NoFold
from graphsurgery.affine.choice import DEFAULT_PARAM_GROWTH
from graphsurgery.affine.coefficients import DEFAULT_BUDGET
from graphsurgery.affine.dissolve import dissolved
from graphsurgery.affine.region import Scope, Tally, is_heavy
from graphsurgery.affine.search import Fold, Search
from graphsurgery.affine.write import Ready, prepare
from graphsurgery.cost import Cost, op_name
from graphsurgery.graph import annotate, copy_graph_module, delete_unused_attrs, module_path
from graphsurgery.rewrite.contracts import Change, NodeRef, Pass, PassResult, Refusal
from graphsurgery.values import constant_nodes, tensor_meta

_aten = torch.ops.aten
_PLACES = {"layer_norm": (2, 3), "group_norm": (2, 3), "rms_norm": (2, None)}
"""Where weight and bias stand among the arguments."""


@dataclass(frozen=True)
class FoldNormAffine(Pass):
    """Fold weight and bias of layer norms, group norms and RMS norms into all layers that follow.

    Attributes:
        memory_budget: bytes that one chunk of probes may take.
    """

    memory_budget: int = DEFAULT_BUDGET

    name: ClassVar[str] = "fold-norm-affine"
    summary: ClassVar[str] = (
        "fold weight and bias of LayerNorm, GroupNorm and RMSNorm into the layers that follow"
    )

    def run(self, gm: fx.GraphModule) -> PassResult:
        """Write every norm as a bare one with a scale and a shift, fold these, and undo what stays."""
        if not _norms(gm):
            return PassResult(gm)
        work = copy_graph_module(gm)
        parted = [_part(work, norm) for norm in _norms(work)]
        scope = Scope(work)
        for norm in parted:
            for node in norm.affine:  # part of the norm, which is there before and after
                scope.count_as(node, Tally(Cost(params=scope.params((node,))[0])))
        search = Search(scope, DEFAULT_PARAM_GROWTH)
        plan = dissolved(search, search.folds())
        objections = {norm: self._objection(norm, search) for norm in parted}
        changes: list[Change] = []
        refusals: list[Refusal] = []
        for norm in parted:
            folds = [fold for fold in plan if not norm.inner.isdisjoint(fold.region.nodes)]
            if not folds or not _whole(norm, folds):
                refusals.append(objections[norm])
                continue
            try:
                ready = [prepare(fold, self.memory_budget) for fold in folds]
            except NoFold as refusal:  # one reader that keeps the norm as it is keeps it for all
                refusals.append(Refusal(self.name, refusal.code, (NodeRef.of(norm.bare),), refusal.reason))
                continue
            found = [self._change(norm, fold, each) for fold, each in zip(folds, ready, strict=True)]
            changes.extend(reversed(found))  # folds come last exit first
        alive = set(work.graph.nodes)
        for norm in parted:
            norm.settle(work, alive)
        if not changes:
            return PassResult(gm, (), tuple(refusals))
        delete_unused_attrs(work)
        work.graph.lint()
        work.recompile()
        return PassResult(work, tuple(changes), tuple(refusals))

    def _change(self, norm: _Parted, fold: Fold, ready: Ready) -> Change:
        before, after = fold.region.tally.cost, fold.option.cost
        layers = [node for node in fold.region.nodes if node not in norm.inner]
        nodes = tuple(NodeRef.of(node) for node in (norm.bare, *layers))
        kind = "+".join(node.op for node in nodes)
        done = ready.write()
        new = (nodes[0], *(NodeRef.of(node) for node in done.emitted.nodes))
        detail = f"{done.detail}; the norm keeps no weight"
        return Change(self.name, kind, nodes, new, done.emitted.written, before, after, done.residual, detail)

    def _objection(self, norm: _Parted, search: Search) -> Refusal:
        """Why weight and bias stay, if they do."""
        layers, others = _reached(norm, search)
        if any(node.op == "output" for node in others):
            code, reason = "output", "they are part of an output"
        elif others:
            named = ", ".join(_called(node) for node in others[:3]) + (", ..." if len(others) > 3 else "")
            code, reason = "not-affine", f"not every reader leads to a layer that takes them in ({named})"
        elif any(search.scope.params((node,))[1] for node in (*norm.affine, *layers)):
            code, reason = "shared-weights", "other calls read these weights, or those of the layers, too"
        else:
            code, reason = "costs-more", "the layers that follow do not take them in without more work"
        return Refusal(self.name, code, (NodeRef.of(norm.bare),), f"its weight and bias stay: {reason}")


@dataclass(frozen=True)
class _Parted:
    """A norm written as a bare one, a scale and a shift.

    Attributes:
        bare: the norm without weight and bias.
        affine: the scale, and the shift where there is one.
        args: the arguments that the norm had.
    """

    bare: fx.Node
    affine: tuple[fx.Node, ...]
    args: tuple[Any, ...]

    @property
    def inner(self) -> frozenset[fx.Node]:
        """The scale and the shift."""
        return frozenset(self.affine)

    def settle(self, gm: fx.GraphModule, alive: Collection[fx.Node]) -> None:
        """Give the norm weight and bias back if something still reads them; `alive` are the graph's nodes."""
        last = self.affine[-1]
        if last.users:
            last.replace_all_uses_with(self.bare)
            self.bare.args = (
                self.bare.args[0],
                *self.args[1:],
            )  # what it reads may have been folded meanwhile
        for node in reversed(self.affine):
            if node in alive:
                gm.graph.erase_node(node)


def _norms(gm: fx.GraphModule) -> list[fx.Node]:
    """Norms with a constant weight; without one there is nothing to fold."""
    constant = constant_nodes(gm.graph)
    found = []
    for node in gm.graph.nodes:
        places = _PLACES.get(op_name(node)) if node.op == "call_function" else None
        if places is None or node in constant or node.args[0] in constant:
            continue
        values = [_argument(node, place) for place in places if place is not None]
        if isinstance(values[0], fx.Node) and all(v is None or v in constant for v in values):
            found.append(node)
    return found


def _argument(node: fx.Node, place: int) -> Any:
    return node.args[place] if len(node.args) > place else None


def _part(gm: fx.GraphModule, norm: fx.Node) -> _Parted:
    args, last = norm.args, norm
    readers = list(norm.users)
    affine: list[fx.Node] = []
    places = _PLACES[op_name(norm)]
    for place, op in zip(places, (_aten.mul.Tensor, _aten.add.Tensor), strict=True):
        value = _argument(norm, place) if place is not None else None
        if not isinstance(value, fx.Node):
            continue
        with gm.graph.inserting_after(last):
            last = gm.graph.call_function(op, (last, value))
        if op_name(norm) == "group_norm":  # along axis 1
            ones = [1] * (tensor_meta(norm).dim() - 2)
            with gm.graph.inserting_before(last):
                column = gm.graph.call_function(_aten.reshape.default, (value, [-1, *ones]))
            annotate(gm, column)
            last.args = (last.args[0], column)
        last.meta = dict(norm.meta)
        affine.append(last)
    for reader in readers:
        reader.replace_input_with(norm, last)
    norm.args = tuple(None if i in places else value for i, value in enumerate(args))
    return _Parted(norm, tuple(affine), args)


def _whole(norm: _Parted, folds: Sequence[Fold]) -> bool:
    """Whether folds take scale and shift in on every path, each into one layer with nothing new beside it."""
    for fold in folds:
        slots = fold.option.form.slots
        if "weight" not in slots or not set(slots) <= {"weight", "bias"}:
            return False
        if fold.region.entry is not norm.bare or not norm.inner <= set(fold.region.nodes):
            return False
    members = {node for fold in folds for node in fold.region.nodes}
    dying = members - {fold.region.exit for fold in folds}
    return all(members.issuperset(node.users) for node in dying)


def _reached(norm: _Parted, search: Search) -> tuple[list[fx.Node], list[fx.Node]]:
    """The layers that weight and bias reach by affine calls, and whatever else they reach."""
    layers, others = [], []
    stack, seen = [norm.affine[-1]], set(norm.affine)
    while stack:
        for reader in stack.pop().users:
            if reader in seen:
                continue
            seen.add(reader)
            if norm.bare not in search.axes.get(reader, ()):
                others.append(reader)
            elif is_heavy(reader):
                layers.append(reader)
            else:
                stack.append(reader)
    return layers, others


def _called(node: fx.Node) -> str:
    path = module_path(node)
    return f"{op_name(node)} {path!r}" if path else op_name(node)
