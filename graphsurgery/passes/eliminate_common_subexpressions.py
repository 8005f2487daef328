"""Eliminate calls that compute what an earlier call has computed.

Rule:      f(x), f(x)  ->  one f(x), read by the readers of both
Requires:  the same operator, operands that are the same node (or reads of the same tensor: tied weights), and
           the same arguments to the bit, named or not, written or left to their default (else no match: 1,
           1.0 and True are three values, 0.0 and -0.0 two, a NaN is itself); refused with:
           `random` it draws random numbers, or hands out memory as it is found;  `side-effects` it may do
           more than it returns, as fx knows or because it is no operator of torch;  `aliases` two outputs
           would share memory, or be one object;  `symbols` the sizes of the two values are known by
           different symbols;
           `not-functional` (all of the graph) a call may write into its operand
Preserves: signature, shapes, dtypes; every value bit for bit
Source:    value numbering, Cocke and Schwartz 1970. torch has two: `torch.fx.passes.dialect.common.cse_pass`
           compares arguments by python's equality, which takes x * 1 for x * True and 0.0 for -0.0, lets
           outputs share memory, and does not know tied weights; `fx_graph_cse` of `torch._functorch` is
           private, leaves all that lies in an output's memory, and merges operators of unknown libraries.
           Neither tells what it merged. What fx knows of impure calls is used here (`Node.is_impure`).

`a + b` and `b + a` are not merged: a NaN of the first operand hides that of the second, and the result lies
in memory as the first operand does. Nor are two parameters with equal values, which may be loaded or trained
apart; buffers with equal bytes are one already (`eliminate-identity`).
"""

from __future__ import annotations

import math
import operator
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from graphsurgery.calls import arguments, is_random
from graphsurgery.cost import node_cost, op_name
from graphsurgery.graph import copy_graph_module, delete_unused_attrs, get_attr_value
from graphsurgery.rewrite.aliases import is_only_a_view, same_tensor_type, shown
from graphsurgery.rewrite.contracts import Change, NodeRef, Pass, PassResult, Preserves, Refusal
from graphsurgery.values import Sizes

__all__ = ["EliminateCommonSubexpressions"]

# fmt: off
_FUNCTIONS: frozenset[Callable[..., Any]] = frozenset((
    operator.getitem, operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv,
    operator.mod, operator.pow, operator.neg, operator.pos, operator.abs, operator.eq, operator.ne,
    operator.lt, operator.le, operator.gt, operator.ge, operator.and_, operator.or_, operator.not_,
    math.ceil, math.floor, math.trunc,
    torch.sym_float, torch.sym_int, torch.sym_max, torch.sym_min, torch.sym_not, torch.sym_ite,
))
"""Functions of numbers and tuples that stand in a captured graph beside its operators."""

_PLAIN = (bool, int, str, type(None), type(...), torch.dtype, torch.device, torch.layout, torch.memory_format)
# fmt: on


@dataclass(frozen=True)
class EliminateCommonSubexpressions(Pass):
    """Merges equal calls, and equal reads of parameters, into the first of them.

    1. `call`: an operator call; what it returns, pieces of tuples included, is read from the first call.
    2. `read`: a second `get_attr` node of one name.

    Of tied weights that only a merged call read under its own name, that name goes (`Change.parameters`).
    """

    name: ClassVar[str] = "eliminate-common-subexpressions"
    summary: ClassVar[str] = "the same calls on the same value, made twice"
    preserves: ClassVar[Preserves] = Preserves(values="exact")

    def run(self, gm: fx.GraphModule) -> PassResult:
        """See `Pass.run`."""
        writers = [node for node in gm.graph.nodes if _may_write(node)]
        if writers:
            names = ", ".join(repr(node.name) for node in writers[:3])
            reason = f"{names} may write into a value, so that equal calls before and after may differ"
            return PassResult(gm, (), (_refusal("not-functional", writers, reason),))
        merging = _Merging(copy_graph_module(gm))
        for node in list(merging.gm.graph.nodes):
            merging.visit(node)
        if not merging.twins:
            return PassResult(gm, (), tuple(merging.refusals))
        merging.sweep()
        merging.gm.recompile()
        return PassResult(merging.gm, tuple(merging.changes), tuple(merging.refusals))


class _Merging:
    """A copy of the graph under work, walked once from its inputs to its outputs, and the record of it."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.sizes = Sizes(gm.graph)
        self.shown = shown(gm.graph)
        self.returned = {value for node in gm.graph.find_nodes(op="output") for value in node.all_input_nodes}
        self.first: dict[Any, fx.Node] = {}
        self.reads: dict[int, fx.Node] = {}  # id of a tensor -> the first node that reads it
        self.tied: dict[fx.Node, fx.Node] = {}  # a read -> the first read of the same tensor
        self.twins: dict[fx.Node, fx.Node] = {}  # what goes -> what stands for it
        self.changes: list[Change] = []
        self.refusals: list[Refusal] = []

    def visit(self, node: fx.Node) -> None:
        """Merge `node` into the first that gives the same, whose operands are merged already."""
        if any(operand in self.twins for operand in node.all_input_nodes):
            node.args = fx.map_arg(node.args, self._twin)
            if node.kwargs:
                node.kwargs = fx.map_arg(node.kwargs, self._twin)
        if node.op == "get_attr":
            self._read(node)
        elif node.op == "call_function":
            first = self.first.setdefault(self._key(node), node)
            if first is not node:
                self._merge("call", first, node)

    def _read(self, node: fx.Node) -> None:
        first = self.first.setdefault(("read", node.target), node)
        if first is not node:
            self._merge("read", first, node)
            return
        try:
            value = get_attr_value(self.gm, str(node.target))
        except TypeError:  # a module or an object: known by its name alone
            return
        self.tied[node] = self.reads.setdefault(id(value), node)

    def _merge(self, kind: str, first: fx.Node, node: fx.Node) -> None:
        refusal = self._reason(first, node)
        if refusal is not None:
            self.refusals.append(_refusal(refusal[0], (first, node), refusal[1]))
            return
        refs = (NodeRef.of(first), NodeRef.of(node))
        cost = node_cost(first, self.sizes)
        detail = f"{node.name} gives what {first.name} gives"
        self.changes.append(
            Change(
                EliminateCommonSubexpressions.name, kind, refs, refs[:1], (), cost + cost, cost, detail=detail
            )
        )
        self.twins[node] = first
        if node in self.returned:
            self.returned.add(first)
        if node in self.shown:
            self.shown.setdefault(first, set()).update(self.shown[node])

    def _reason(self, first: fx.Node, node: fx.Node) -> tuple[str, str] | None:
        if isinstance(node.target, OpOverload):
            if node.target.namespace not in ("aten", "prims") or node.is_impure(impure_random=False):
                return "side-effects", f"{node.target} may do more than it returns"
            if is_random(node):
                return "random", f"{node.name!r} draws random numbers of its own"
            if op_name(node).startswith(("empty", "new_empty")):
                return "random", f"{node.name!r} is memory as it is found"
        if not same_tensor_type(first, node) and _type(first) != _type(node):
            return "symbols", f"{node.name!r} is {_type(node)}, {first.name!r} is {_type(first)}"
        if node.op == "call_function" and not is_only_a_view(node) and self._share(first, node):
            return "aliases", f"outputs show {first.name!r} and {node.name!r}; they would share memory"
        if first in self.returned and node in self.returned:
            return "aliases", f"{first.name!r} and {node.name!r} are outputs; they would be one object"
        return None

    def _share(self, first: fx.Node, node: fx.Node) -> bool:
        """Whether an output shows of `node` what another shows of `first`."""
        a, b = (self.shown.get(value, set()) for value in (first, node))
        return bool(a and b) and (None in a or None in b or bool(a & b))

    def _twin(self, node: fx.Node) -> fx.Node:
        return self.twins.get(node, node)

    def _key(self, node: fx.Node) -> Any:
        """What two calls that give the same have in common."""
        if isinstance(node.target, OpOverload):
            return node.target, tuple(self._token(value, True) for value in arguments(node).values())
        named = tuple((name, self._token(value, False)) for name, value in sorted(node.kwargs.items()))
        return node.target, tuple(self._token(value, False) for value in node.args), named

    def _token(self, value: Any, schema: bool) -> Any:
        """A hashable stand-in of an argument, the same for the same value and no other.

        Args:
            value: Any argument of a call.
            schema: Whether an operator takes it, to which lists and tuples are one.
        """
        if isinstance(value, fx.Node):
            return self.tied.get(value, value)
        kind = type(value)
        if kind is float:
            return kind, struct.pack("d", value)
        if kind is complex:
            return kind, struct.pack("dd", value.real, value.imag)
        if kind in _PLAIN:
            return kind, value
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return kind, str(value)
        if isinstance(value, (list, tuple)):
            sequence = list if schema or isinstance(value, list) else tuple
            return sequence, tuple(self._token(item, schema) for item in value)
        if isinstance(value, dict):
            return dict, tuple((key, self._token(item, schema)) for key, item in value.items())
        if isinstance(value, slice):
            return slice, tuple(self._token(item, schema) for item in (value.start, value.stop, value.step))
        return id, id(value)

    def sweep(self) -> None:
        """Erase what was merged, the reads that only it had, and the names that nothing reads any more."""
        targets = [{str(o.target) for o in node.all_input_nodes if o.op == "get_attr"} for node in self.twins]
        for node in reversed(self.twins):
            operands = node.all_input_nodes
            self.gm.graph.erase_node(node)
            for operand in operands:
                if operand.op == "get_attr" and not operand.users and operand not in self.twins:
                    self.gm.graph.erase_node(operand)
        gone = set(delete_unused_attrs(self.gm))
        self.changes = [
            replace(change, parameters=tuple(sorted(read & gone))) if read & gone else change
            for change, read in zip(self.changes, targets, strict=True)
        ]


def _may_write(node: fx.Node) -> bool:
    """Whether a node may write into its operands: it says so, or is nothing that is known not to."""
    if isinstance(node.target, OpOverload):
        return bool(node.target._schema.is_mutable)
    return node.op not in ("placeholder", "output", "get_attr") and node.target not in _FUNCTIONS


def _type(node: fx.Node) -> str:
    """Shape (symbols by name), dtype and device of each tensor that a node gives."""
    return ", ".join(_leaf(value) for value in pytree.tree_leaves(node.meta.get("val")))


def _leaf(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return str(value)
    sizes = ", ".join(str(size) for size in value.shape)
    return f"{str(value.dtype).removeprefix('torch.')}[{sizes}] on {value.device}"


def _refusal(code: str, nodes: Any, reason: str) -> Refusal:
    return Refusal(
        EliminateCommonSubexpressions.name, code, tuple(NodeRef.of(node) for node in nodes), reason
    )
