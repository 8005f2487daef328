"""Fold weight and bias of a norm into all the layers that follow it.

Rule:      A (w n(x) + b) + c = (A w) n(x) + (A b + c), for layer norm, group norm and RMS norm n
Requires:  every reader of the norm leads by affine calls to a layer that takes weight and bias in, at no cost
           (`not-affine`, `costs-more`); none is the model's output (`output`)
Preserves: signature, shapes, dtypes; values up to rounding
Source:    the same rule by which a batch norm folds into the layer after it
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from graphsurgery.affine.atoms import NoFold
from graphsurgery.affine.choice import DEFAULT_PARAM_GROWTH
from graphsurgery.affine.coefficients import DEFAULT_BUDGET
from graphsurgery.affine.dissolve import dissolved
from graphsurgery.affine.region import Scope, Tally
from graphsurgery.affine.search import Fold, Search
from graphsurgery.affine.write import write
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
        work = copy_graph_module(gm)
        parted = [_part(work, norm) for norm in _norms(work)]
        if not parted:
            return PassResult(gm)
        scope = Scope(work)
        for norm in parted:
            for node in norm.affine:  # part of the norm, which is there before and after
                scope.count_as(node, Tally(Cost(params=scope.params((node,))[0])))
        changes: list[Change] = []
        refusals: list[Refusal] = []
        inner = {node: norm for norm in parted for node in norm.affine}
        search = Search(scope, DEFAULT_PARAM_GROWTH)
        for fold in dissolved(search, search.folds()):
            members = [inner[node] for node in fold.region.nodes if node in inner]
            if not members or fold.region.exit in inner or not _takes_in(fold):
                continue
            outcome = self._fold(fold, members[0])
            if isinstance(outcome, Change):
                changes.insert(0, outcome)
            else:
                refusals.insert(0, outcome)
        alive = set(work.graph.nodes)
        for norm in parted:
            if norm.affine[-1].users:
                refusals.append(self._refusal(norm))
            norm.settle(work, alive)
        if not changes:
            return PassResult(gm, (), tuple(refusals))
        delete_unused_attrs(work)
        work.graph.lint()
        work.recompile()
        return PassResult(work, tuple(changes), tuple(refusals))

    def _fold(self, fold: Fold, norm: _Parted) -> Change | Refusal:
        region, before, after = fold.region, fold.region.tally.cost, fold.option.cost
        layers = [node for node in region.nodes if node not in norm.affine]
        nodes = tuple(NodeRef.of(node) for node in (norm.bare, *layers))
        kind = "+".join(node.op for node in nodes)
        try:
            done = write(fold, self.memory_budget)
        except NoFold as refusal:
            return Refusal(self.name, refusal.code, nodes, refusal.reason, before, after)
        new = (nodes[0], *(NodeRef.of(node) for node in done.emitted.nodes))
        detail = f"{done.detail}; the norm keeps no weight"
        return Change(self.name, kind, nodes, new, done.emitted.written, before, after, done.residual, detail)

    def _refusal(self, norm: _Parted) -> Refusal:
        readers = list(norm.affine[-1].users)
        named = ", ".join(_called(reader) for reader in readers[:3]) + (", ..." if len(readers) > 3 else "")
        code = "output" if any(reader.op == "output" for reader in readers) else "not-affine"
        reason = f"its weight and bias stay: not every reader ({named}) leads to a layer that takes them in"
        return Refusal(self.name, code, (NodeRef.of(norm.bare),), reason)


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

    def settle(self, gm: fx.GraphModule, alive: Collection[fx.Node]) -> None:
        """Give the norm weight and bias back if something still reads them; `alive` are the graph's nodes."""
        last = self.affine[-1]
        if last.users:
            last.replace_all_uses_with(self.bare)
            self.bare.args = self.args
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


def _takes_in(fold: Fold) -> bool:
    """Whether the form is one layer with a bias and nothing beside it that was not there."""
    slots = fold.option.form.slots
    return "weight" in slots and set(slots) <= {"weight", "bias"}


def _called(node: fx.Node) -> str:
    path = module_path(node)
    return f"{op_name(node)} {path!r}" if path else op_name(node)
