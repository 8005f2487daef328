"""Exchanging layers for layers of another kind with the same numbers: what both directions share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import fx
from torch.utils import _pytree as pytree

from graphsurgery.affine.certify import LIMIT
from graphsurgery.cost import graph_cost, node_cost, op_name
from graphsurgery.errors import PassError
from graphsurgery.graph import (
    annotate,
    copy_graph_module,
    delete_unused_attrs,
    get_attr_value,
    module_path,
    origin,
    set_attr,
)
from graphsurgery.layout.certify import apart, drawn, evaluator
from graphsurgery.layout.orders import Order
from graphsurgery.layout.settle import PREFERRED, permutes, settle
from graphsurgery.layout.write import Spelling, permute, sized_as
from graphsurgery.rewrite.aliases import newly_shared, reads_memory, same_layout
from graphsurgery.rewrite.contracts import Change, NodeRef, PassResult, Refusal
from graphsurgery.rewrite.moves import is_reshape
from graphsurgery.rewrite.sweep import erase_unread
from graphsurgery.values import Sizes, constant_nodes, is_tensor, tensor_meta

__all__ = ["SWAPPED", "UNBATCHED", "Exchange", "Layout", "Only", "Refused", "check_options", "priced"]

Layout = Literal["channels-first", "channels-last"]
Only = tuple[str, ...] | Literal["swapped"]

aten = torch.ops.aten

SWAPPED = "graphsurgery_swapped"
"""Key in the `meta` of layers that a swap wrote: the name of the pass."""

UNBATCHED = "graphsurgery_unbatched"
"""Key in the `meta` of a Linear: it was a convolution of a value without batch axis."""

_STORED = "graphsurgery_stored"  # in the meta of the reshapes of weights that were written here
_COPIED = "graphsurgery_copied"  # in the meta of copies that keep the layout of an output
_AT_HOME = 2.5  # what writing a norm for another layout costs where it should stay, in permutes


class Refused(Exception):
    """A layer that stays as it is: a code and a sentence."""

    def __init__(self, code: str, reason: str) -> None:
        """Keep both."""
        super().__init__(reason)
        self.code, self.reason = code, reason


def check_options(layout: str, only: Any) -> None:
    """Check the options of a swap.

    Raises:
        PassError: `layout` is neither of the two, or `only` is neither a tuple of patterns nor `"swapped"`.
    """
    if only == "swapped":
        only = ()
    if layout not in ("channels-first", "channels-last"):
        raise PassError(f"layout must be 'channels-first' or 'channels-last', got {layout!r}")
    if not isinstance(only, tuple) or not all(isinstance(pattern, str) for pattern in only):
        raise PassError(f"only must be a tuple of patterns of module paths, or 'swapped'; got {only!r}")


def priced(only: Only, prices: Mapping[str, float], at_home: Sequence[str]) -> dict[str, float]:
    """What writing norms for another layout costs, in permutes.

    Args:
        only: Which layers are exchanged. On the way back all norms are at home: those that the first network
            had between permutes of its own stay so.
        prices: Of the norms that may be written at all.
        at_home: The norms that are at home where the layers go. They leave it to save more than two permutes.
    """
    return dict.fromkeys((*prices, *at_home) if only == "swapped" else at_home, _AT_HOME) | {
        name: price for name, price in prices.items() if only != "swapped" and name not in at_home
    }


@dataclass
class Exchange:
    """One run of a swap on a copy of a graph.

    Attributes:
        gm: The graph as it was given.
        name: Name of the pass.
        only: Patterns of the module paths of the layers to exchange; none for all. `"swapped"` for those that
            another swap wrote.
        norm_prices: See `graphsurgery.layout.settle`.
    """

    gm: fx.GraphModule
    name: str
    only: Only
    norm_prices: Mapping[str, float]
    changes: list[Change] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Copy the graph."""
        self.work = copy_graph_module(self.gm)
        Spelling.of(self.work)  # of the model as it is before the first swap
        self.sizes = Sizes(self.work.graph)
        self.constant = constant_nodes(self.work.graph)
        self.new: list[fx.Node] = []

    # -- the layers

    def layers(self, names: Sequence[str]) -> list[fx.Node]:
        """Live calls of these ops that `only` asks for, in graph order."""
        found = []
        for node in self.work.graph.nodes:
            layer = node.op == "call_function" and op_name(node) in names and node not in self.constant
            if layer and self.asked(node):
                found.append(node)
        return found

    def asked(self, node: fx.Node) -> bool:
        """Whether `only` asks for a layer, by the path of its weight or that of the module that calls it."""
        if self.only == "swapped":
            return bool(node.meta.get(SWAPPED, self.name) != self.name)
        paths = {self.path(node), module_path(node)}
        return not self.only or any(fnmatchcase(path, pattern) for path in paths for pattern in self.only)

    def path(self, node: fx.Node) -> str:
        """The path of a layer: that of its weight, or of the module that calls it."""
        weight = node.args[1] if len(node.args) > 1 else None
        if isinstance(weight, fx.Node) and weight.op == "get_attr":
            return str(weight.target).removesuffix(".weight")
        return module_path(node)

    def swap(self, node: fx.Node, make: Callable[[fx.Node], fx.Node], kind: str) -> None:
        """Put what `make` writes in place of a layer, if it computes the same in float64."""
        if any(reads_memory(n) for n in self.work.graph.nodes):
            self.refuse(node, "reads-memory", "a call of the graph reads strides or raw memory")
            return
        if 0 in tensor_meta(node).shape:
            self.refuse(node, "empty", f"its value is empty, of shape {tuple(tensor_meta(node).shape)}")
            return
        start = list(self.new)
        cost = node_cost(node, self.sizes)
        try:
            with self.work.graph.inserting_before(node):
                new = make(node)
            residual = self.certify(node, new, self.new[len(start) :])
        except Refused as refused:
            self.undo(start)
            self.refuse(node, refused.code, refused.reason)
            return
        layer = next(n for n in self.new[len(start) :] if op_name(n) == kind)
        layer.meta[SWAPPED] = self.name
        layer.meta[UNBATCHED] = op_name(node).startswith("conv") and _unbatched(node)
        after = node_cost(layer, self.sizes)
        refs, made = (NodeRef.of(node),), (NodeRef.of(layer),)
        written = tuple(str(o.target) for o in _leaves(layer))
        detail = f"{op_name(node)} of {self.path(node)!r} as {kind}"
        change = Change(
            self.name, f"{op_name(node)}->{kind}", refs, made, written, cost, after, residual, detail
        )
        self.changes.append(change)
        node.replace_all_uses_with(new)
        operands = [o for o in node.all_input_nodes if o.op != "get_attr"]
        self.work.graph.erase_node(node)
        erase_unread(operands)

    def undo(self, start: list[fx.Node]) -> None:
        """Erase what was written since."""
        for node in reversed(self.new[len(start) :]):
            self.work.graph.erase_node(node)
        self.new = start

    def refuse(self, node: fx.Node, code: str, reason: str) -> None:
        """Record that a layer stays."""
        self.refusals.append(Refusal(self.name, code, (NodeRef.of(node),), reason))

    def certify(self, old: fx.Node, new: fx.Node, calls: Sequence[fx.Node]) -> float:
        """Deviation of the new calls from the layer, in float64 on random values of what they read.

        Raises:
            Refused: It is too large, or a weight is not finite.
        """
        read = (o for n in calls for o in n.all_input_nodes if is_tensor(o))
        entry = next(o for o in read if o not in calls and o not in self.constant)
        known: dict[fx.Node, Any] = {entry: drawn(entry, self.sizes, 0)}
        for seed, live in enumerate(old.all_input_nodes[1:], 1):
            if live not in self.constant:  # a bias that is computed
                known[live] = drawn(live, self.sizes, seed)
        with torch.no_grad():
            wanted = evaluator(self.work, self.sizes, dict(known))(old)
            got = evaluator(self.work, self.sizes, dict(known))(new)
            weights = [o for o in old.all_input_nodes if o in self.constant]
            values = [evaluator(self.work, self.sizes, {})(weight) for weight in weights]
        if not all(bool(torch.isfinite(value).all()) for value in values):
            raise Refused("not-finite", "its weights hold NaN or infinity")
        residual = apart(wanted, got)
        if not residual <= LIMIT:
            raise Refused(
                "certificate",
                f"both layers differ by {residual:.1e} in float64, expected at most {LIMIT:.0e}; "
                "please report this",
            )
        return residual

    # -- what they are written with

    def call(self, like: fx.Node, target: Any, *args: Any) -> fx.Node:
        """Write a call that takes part in the place of `like`."""
        return self.note(like, self.work.graph.call_function(target, args))

    def permute(self, like: fx.Node, value: fx.Node, order: Order) -> fx.Node:
        """Write a permute."""
        node = self.note(like, permute(self.work.graph, value, order))
        node.meta[PREFERRED] = True
        return node

    def note(self, like: fx.Node, node: fx.Node) -> fx.Node:
        """Record a new call."""
        node.meta.update(origin(like))
        annotate(self.work, node)
        self.new.append(node)
        return node

    def weight(self, like: fx.Node, value: fx.Node, shape: Sequence[int]) -> fx.Node:
        """A constant in another shape; a reshape that undoes another is none."""
        while is_reshape(value):
            value = value.args[0]  # type: ignore[assignment]  # a reshape reads one node
        if list(tensor_meta(value).shape) == list(shape):
            return value
        node = self.call(like, aten.reshape.default, value, list(shape))
        node.meta[_STORED] = True
        return node

    # -- the whole graph

    def result(self, finish: Callable[[fx.GraphModule], None] | None = None) -> PassResult:
        """Propagate the permutes, tidy up, and hand back."""
        if not self.changes:
            return PassResult(self.gm, (), tuple(self.refusals))
        self.propagate()
        if finish is not None:
            finish(self.work)
        self.store_weights()
        _cancel_views(self.work)
        _keep_layout(self.gm, self.work)
        for node in self.work.graph.nodes:
            for mark in (PREFERRED, _STORED):
                node.meta.pop(mark, None)
        delete_unused_attrs(self.work)
        self.work.graph.lint()
        self.work.recompile()
        return PassResult(self.work, tuple(self.changes), tuple(self.refusals))

    def propagate(self) -> None:
        """Let the permutes at the layers cancel."""
        before = [NodeRef.of(node) for node in permutes(self.work)]
        spent = graph_cost(self.work)
        apart = copy_graph_module(self.work)
        done = settle(apart, norm_prices=self.norm_prices)
        if not done.changed:
            return
        if not done.residual <= LIMIT:
            reason = (
                f"a call in another order differs by {done.residual:.1e} in float64, "
                f"expected at most {LIMIT:.0e}; the permutes stay; please report this"
            )
            self.refusals.append(Refusal(self.name, "certificate", tuple(before), reason))
            return
        self.work = apart
        after = [NodeRef.of(node) for node in permutes(self.work)]
        detail = f"{len(before)} permutes as {len(after)}; {len(done.turned)} calls work in the other layout"
        costs = spent, graph_cost(self.work)
        change = Change(self.name, "layout", tuple(before), tuple(after), (), *costs, done.residual, detail)
        self.changes.append(change)

    def store_weights(self) -> None:
        """Keep a parameter in its new shape where all its readers want that one."""
        wanted = {node for node in self.work.graph.nodes if _STORED in node.meta}
        by_tensor: dict[int, list[fx.Node]] = {}
        for node in self.work.graph.nodes:
            if node.op == "get_attr" and is_tensor(node):
                by_tensor.setdefault(id(get_attr_value(self.work, str(node.target))), []).append(node)
        for reads in by_tensor.values():
            users = [user for read in reads for user in read.users]
            shapes = {tuple(tensor_meta(user).shape) for user in users if user in wanted}
            if not users or not all(user in wanted for user in users) or len(shapes) != 1:
                continue
            old = get_attr_value(self.work, str(reads[0].target))
            value = old.detach().reshape(shapes.pop())
            parameter = isinstance(old, torch.nn.Parameter)
            new = torch.nn.Parameter(value, requires_grad=old.requires_grad) if parameter else value
            for read in reads:
                saved = str(read.target) in self.work.state_dict()
                set_attr(self.work, str(read.target), new, parameter=parameter, persistent=saved)
                annotate(self.work, read)
                for user in list(read.users):
                    user.replace_all_uses_with(read)
                    self.work.graph.erase_node(user)


def _unbatched(conv: fx.Node) -> bool:
    x, weight = conv.all_input_nodes[:2]
    return tensor_meta(x).dim() == tensor_meta(weight).dim() - 1


def _leaves(layer: fx.Node) -> list[fx.Node]:
    """The attributes that a layer reads as its weight and bias."""
    found = []
    for value in layer.all_input_nodes[1:]:
        while is_reshape(value):
            value = value.args[0]  # type: ignore[assignment]  # a reshape reads one node
        if value.op == "get_attr":
            found.append(value)
    return found


def _cancel_views(gm: fx.GraphModule) -> None:
    """Read what a view of a view gives back as it was."""
    constant = constant_nodes(gm.graph)
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or node in constant or not is_reshape(node):
            continue
        inner: Any = node.args[0]
        if not is_reshape(inner):
            continue
        source: Any = inner.args[0]
        same = str(tensor_meta(source).shape) == str(tensor_meta(node).shape)
        if same and newly_shared(node, source) is None:
            node.replace_all_uses_with(source)
            erase_unread([node])


def _in_order(value: torch.Tensor) -> bool:
    """Whether a value lies in memory as its axes come, be it with gaps, as a slice does."""
    steps = [step for step, size in zip(value.stride(), value.shape, strict=True) if str(size) != "1"]
    hints = [step if isinstance(step, int) else int(step.node.hint or 2) for step in steps]
    return hints == sorted(hints, reverse=True)


def _keep_layout(before: fx.GraphModule, after: fx.GraphModule) -> None:
    """Give outputs whose axes were in order back contiguous, and no copy that is not needed for it."""
    for node in after.graph.nodes:  # strides have changed on the way
        if node.op == "call_function" and is_tensor(node):
            sizes = list(tensor_meta(node).shape)
            annotate(after, node)
            sized_as(after, node, sizes)
    old, new = (pytree.tree_leaves(gm.graph.output_node().args[0]) for gm in (before, after))
    for was, node in zip(old, new, strict=True):
        if not isinstance(was, fx.Node) or not is_tensor(was) or node.op != "call_function":
            continue
        source: Any = node.args[0] if node.args else None
        if op_name(node) == "clone" and isinstance(source, fx.Node) and len(node.users) == 1:
            ours = _COPIED in node.meta and _in_order(tensor_meta(source))
            same = same_layout(tensor_meta(source), tensor_meta(was))
            if ours or (same and newly_shared(node, source) is None):
                node.replace_all_uses_with(source)
                after.graph.erase_node(node)
            continue
        # whether a reshape copies is not known for certain before it runs
        doubt = is_reshape(node) and not tensor_meta(source).is_contiguous()
        kept = same_layout(tensor_meta(was), tensor_meta(node)) and not doubt
        if not kept and _in_order(tensor_meta(was)):
            output = after.graph.output_node()
            with after.graph.inserting_before(output):
                copy = after.graph.call_function(
                    aten.clone.default, (node,), {"memory_format": torch.contiguous_format}
                )
            copy.meta.update(origin(node))
            copy.meta[_COPIED] = True
            annotate(after, copy)
            output.replace_input_with(node, copy)
