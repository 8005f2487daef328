"""Eliminate what computes nothing.

Rule:      op(x) == x, bit for bit  ->  x;  move(move(x)) -> one move or none;  nobody reads it -> gone
Requires:  same shape, dtype and device (else no match); refused with:
           `signed-zero` x + 0.0 turns -0.0 into 0.0;  `aliases` an output would share memory with an input, a
           parameter or another output;  `layout` strides of an output (or of what a stride-reading op sees)
           would change
Preserves: signature, shapes, dtypes; every value bit for bit. Layout in memory inside the graph may change,
           and kernels may round otherwise on another layout, so values are declared up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx
from torch.utils import _pytree as pytree

from graphsurgery.cost import Cost, kind_of, node_cost, op_name
from graphsurgery.graph import annotate, copy_graph_module, delete_unused_attrs, get_attr_value
from graphsurgery.rewrite.aliases import newly_shared, reads_memory, same_layout, same_tensor_type
from graphsurgery.rewrite.contracts import Change, NodeRef, Pass, PassResult, Preserves, Refusal
from graphsurgery.rewrite.fingerprint import same_bits, tensor_digest
from graphsurgery.rewrite.identities import IDENTITIES, turns_signed_zero
from graphsurgery.rewrite.moves import composed, is_reshape
from graphsurgery.values import Sizes

__all__ = ["EliminateIdentity"]


@dataclass(frozen=True)
class EliminateIdentity(Pass):
    """Eliminates identities, moves that cancel, duplicate constants and dead code.

    1. `nothing`: alias, detach, lift_fresh, clone, contiguous.
    2. `dropout`: not training, or with a probability of 0.
    3. `cast`: to the dtype and device it has.
    4. `view`: reshape, squeeze, expand, slice, repeat, split into one piece, cat of one: to the shape it has.
    5. `permute`: moves no axis (axes of size 1 do not count).
    6. `pad`: by zero on every side.
    7. `neutral`: times 1, divided by 1, minus 0; plus 0 for integers only, since -0.0 + 0.0 is 0.0.
    8. `compose`: permute of permute, reshape of reshape, when the inner one dies of it.
    9. `duplicate`: two buffers with equal bytes (parameters keep their names and ties).
    10. `dead`: nodes that no output needs, and the parameters and buffers that no node reads.
    """

    name: ClassVar[str] = "eliminate-identity"
    summary: ClassVar[str] = (
        "dropout in eval, no-op views and casts, permutes that cancel, duplicate constants, dead code"
    )
    preserves: ClassVar[Preserves] = Preserves(values="rounding")

    def run(self, gm: fx.GraphModule) -> PassResult:
        """See `Pass.run`."""
        keep_layout = any(reads_memory(node) for node in gm.graph.nodes)
        surgery = _Surgery(copy_graph_module(gm), keep_layout=keep_layout)
        surgery.operate()
        if surgery.layout_changed and not surgery.outputs_keep_layout(gm):
            surgery = _Surgery(copy_graph_module(gm), keep_layout=True)
            surgery.operate()
        if not surgery.changes:
            return PassResult(gm, (), tuple(surgery.refusals))
        surgery.gm.recompile()
        return PassResult(surgery.gm, tuple(surgery.changes), tuple(surgery.refusals))


class _Surgery:
    """A copy of the graph under work, and the record of it."""

    def __init__(self, gm: fx.GraphModule, *, keep_layout: bool) -> None:
        self.gm = gm
        self.sizes = Sizes(gm.graph)
        self.keep_layout = keep_layout
        self.layout_changed = False
        self.changes: list[Change] = []
        self.refusals: list[Refusal] = []

    def operate(self) -> None:
        """All cases, in one walk from the inputs to the outputs."""
        self.remove_dead_nodes()
        self.merge_constants()
        for node in list(self.gm.graph.nodes):
            if node.op == "call_function" and not self.remove_identity(node):
                self.compose(node)
        self.remove_dead_nodes()
        self.remove_dead_attributes()

    def outputs_keep_layout(self, original: fx.GraphModule) -> bool:
        """Work out all fake values anew; compare the strides of the outputs with those they had."""
        try:
            for node in self.gm.graph.nodes:
                if node.op == "call_function":
                    annotate(self.gm, node)
        except Exception:  # noqa: BLE001 (an op without a fake kernel raises anything)
            return False
        old, new = (pytree.tree_leaves(gm.graph.output_node().args[0]) for gm in (original, self.gm))
        values = (
            (a.meta["val"], b.meta["val"]) for a, b in zip(old, new, strict=True) if isinstance(a, fx.Node)
        )
        return all(same_layout(x, y) for x, y in values if isinstance(x, torch.Tensor))

    def remove_identity(self, node: fx.Node) -> bool:
        """Cases 1 to 7: read the operand instead of `node`."""
        for kind, rule in IDENTITIES:
            source = rule(node)
            if source is None or not same_tensor_type(node, source):
                continue
            moves = not same_layout(node.meta["val"], source.meta["val"])
            refusal = self._refusal(kind, node, source, moves)
            if refusal is not None:
                self.refusals.append(
                    Refusal(EliminateIdentity.name, refusal[0], (NodeRef.of(node),), refusal[1])
                )
                return False
            self._replaced(kind, (node,), (), f"{op_name(node)} gives its operand {source.name!r}")
            self.layout_changed |= moves
            node.replace_all_uses_with(source)
            self.gm.graph.erase_node(node)
            return True
        return False

    def _refusal(self, kind: str, node: fx.Node, source: fx.Node, moves: bool) -> tuple[str, str] | None:
        reason = turns_signed_zero(node) if kind == "neutral" else None
        if reason is not None:
            return "signed-zero", reason
        reason = newly_shared(node, source)
        if reason is not None:
            return "aliases", reason
        if moves and self.keep_layout:
            return (
                "layout",
                f"without {node.name!r} an output or an op that reads memory would see other strides",
            )
        return None

    def compose(self, node: fx.Node) -> None:
        """Case 8: make one move of two."""
        inner = node.args[0] if node.args else None
        if not isinstance(inner, fx.Node) or not all(composed(user, inner) for user in inner.users):
            return
        move = composed(node, inner)
        if move is None:
            return
        # a reshape copies or not, as its operand lies in memory; a permute never does
        reshapes = is_reshape(node)
        if reshapes and self.keep_layout:
            return
        before = (NodeRef.of(inner), NodeRef.of(node))
        cost = node_cost(inner, self.sizes) + node_cost(node, self.sizes)
        node.target, node.args, node.kwargs = move[0], (inner.args[0], move[1]), {}
        if not inner.users:
            self.gm.graph.erase_node(inner)
        self.layout_changed |= reshapes
        detail = f"{before[0].op} and {before[1].op} in one"
        self._add("compose", before, after=(node,), cost_before=cost, detail=detail)
        self.remove_identity(node)

    def merge_constants(self) -> None:
        """Case 9."""
        by_content: dict[bytes, fx.Node] = {}
        for node in list(self.gm.graph.nodes):
            if node.op != "get_attr" or not self._is_plain_buffer(node):
                continue
            known = by_content.setdefault(tensor_digest(self._value(node)), node)
            # Two reads of one name are one tensor already: nothing would be gained.
            if known.target == node.target or not same_bits(self._value(known), self._value(node)):
                continue
            detail = f"{node.target} holds what {known.target} holds"
            self._replaced("duplicate", (node,), (known,), detail)
            node.replace_all_uses_with(known)
            self.gm.graph.erase_node(node)

    def _value(self, node: fx.Node) -> torch.Tensor:
        return get_attr_value(self.gm, str(node.target))

    def _is_plain_buffer(self, node: fx.Node) -> bool:
        """A tensor that is no parameter and that no layer holds under a name of its own."""
        if not isinstance(node.meta.get("val"), torch.Tensor) or isinstance(
            self._value(node), torch.nn.Parameter
        ):
            return False
        return not any(kind_of(user) in ("conv", "linear", "norm", "embedding") for user in node.users)

    def remove_dead_nodes(self) -> None:
        """Case 10, nodes."""
        refs: list[NodeRef] = []
        cost = Cost()
        for node in reversed(list(self.gm.graph.nodes)):
            if node.op not in ("placeholder", "output") and not node.users and not node.is_impure():
                refs.append(NodeRef.of(node))
                cost += node_cost(node, self.sizes)
                self.gm.graph.erase_node(node)
        if refs:
            self._add("dead", tuple(reversed(refs)), cost_before=cost, detail="no output needs it")

    def remove_dead_attributes(self) -> None:
        """Case 10, parameters and buffers."""
        names = delete_unused_attrs(self.gm)
        if names:
            self._add("dead-parameter", (), parameters=names, detail="no node reads it")

    def _replaced(self, kind: str, nodes: Sequence[fx.Node], after: Sequence[fx.Node], detail: str) -> None:
        """Record that `after` stands for `nodes`; to be called while both are in the graph and unchanged."""
        refs = tuple(NodeRef.of(node) for node in nodes)
        cost = sum((node_cost(node, self.sizes) for node in nodes), Cost())
        self._add(kind, refs, after=after, cost_before=cost, detail=detail)

    def _add(
        self,
        kind: str,
        before: tuple[NodeRef, ...],
        *,
        after: Sequence[fx.Node] = (),
        parameters: tuple[str, ...] = (),
        cost_before: Cost | None = None,
        detail: str = "",
    ) -> None:
        refs = tuple(NodeRef.of(node) for node in after)
        cost_after = sum((node_cost(node, self.sizes) for node in after), Cost())
        name = EliminateIdentity.name
        change = Change(
            name, kind, before, refs, parameters, cost_before or Cost(), cost_after, detail=detail
        )
        self.changes.append(change)
