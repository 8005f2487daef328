"""Split the features that a head reads into those that reach its outputs and those that cannot.

Rule:      logits = f' M, M = [weight | bias]^T = Q R, f' = [f, 1]
           ->  the same, and class_features = f' Q[:, :rank], residual_features = f' Q[:, rank:]
Requires:  a Linear, a 1x1 convolution of stride 1 or a product with a constant matrix; refused with:
           `no-head` there is none, or none of that name;  `not-a-head` the layer is of another kind;
           `grouped` a convolution of several groups;  `several-calls` the layer is called more than once;
           `several-heads` no head was named, and outputs have heads of their own;
           `bypassed` no head was named, and the last one is not all that reaches the output;
           `outputs-taken` the model has an output of one of the new names already;
           `zero-weights` nothing reaches the outputs;  `not-finite` weights hold NaN or infinity;
           `certificate` the parts do not make up the features or the logits in float64
Preserves: all outputs that were there, bit for bit (with `keep_head=False`, up to rounding); adds outputs
Source:    the complete QR decomposition (Golub and Van Loan, "Matrix Computations", section 5.2)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any, ClassVar

import torch
from torch import fx
from torch.utils import _pytree as pytree

from graphsurgery.affine.certify import LIMIT, SAMPLES, deviation, draw
from graphsurgery.affine.heads import Head, NoHead, find_head
from graphsurgery.affine.region import Scope
from graphsurgery.affine.runner import runner
from graphsurgery.affine.subspace import ORTHONORMAL, Subspace, off_orthonormal
from graphsurgery.cost import Cost, node_cost
from graphsurgery.graph import (
    INFO_KEY,
    CaptureInfo,
    annotate,
    copy_graph_module,
    delete_unused_attrs,
    fresh_attr,
    get_attr_value,
    origin,
    set_attr,
)
from graphsurgery.rewrite.contracts import Change, NodeRef, Pass, PassResult, Preserves, Refusal
from graphsurgery.rewrite.outputs import set_outputs
from graphsurgery.rewrite.sweep import erase_unread
from graphsurgery.values import tensor_meta

__all__ = ["CLASS_FEATURES", "LOGITS", "RESIDUAL_FEATURES", "SUBSPACE_KEY", "SplitHead"]

LOGITS, CLASS_FEATURES, RESIDUAL_FEATURES = "logits", "class_features", "residual_features"

SUBSPACE_KEY = "head_subspace"
"""Key of the `Subspace`, in float64, in `gm.meta` of a graph that was split."""

aten = torch.ops.aten


@dataclass(frozen=True)
class SplitHead(Pass):
    """Adds the class-specific and the residual features of a head to the outputs, which become a dictionary.

    The parts are two layers beside the head (`fc_class_features`, `fc_residual_features`), of the head's
    kind; the constant 1 of `f'` is in their biases. Where every dimension reaches the outputs (the rank is
    the width of `f'`, as with more classes than features) there is no residual output.

    Attributes:
        head: Dotted path of the head's module or name of its parameter; None finds the last one.
        keep_head: Whether the logits still come from the head itself, bit for bit. Else a layer `R` computes
            them from the class-specific features, up to the rounding of `Q` and `R` to the model's dtype.
    """

    head: str | None = None
    keep_head: bool = True

    name: ClassVar[str] = "split-head"
    summary: ClassVar[str] = "features of a head in two parts: what reaches its outputs, and what cannot"
    preserves: ClassVar[Preserves] = Preserves(signature=False, shapes=False, dtypes=False)
    default: ClassVar[bool] = False

    def run(self, gm: fx.GraphModule) -> PassResult:
        """See `Pass.run`."""
        names = _output_names(gm)
        if {LOGITS, CLASS_FEATURES} <= set(names):
            return PassResult(gm)  # split already
        taken = [name for name in (CLASS_FEATURES, RESIDUAL_FEATURES) if name in names]
        work = copy_graph_module(gm)
        scope = Scope(work)
        try:
            if taken:
                raise NoHead("outputs-taken", f"the model has an output {taken[0]!r} already")
            head = find_head(scope, self.head)
            subspace = head.subspace(scope)
            change = self._split(scope, head, subspace, names)
        except NoHead as no:
            refs = tuple(NodeRef.of(node) for node in no.nodes)
            return PassResult(gm, (), (Refusal(self.name, no.code, refs, no.reason),))
        work.meta[SUBSPACE_KEY] = subspace
        delete_unused_attrs(work)
        work.graph.lint()
        work.recompile()
        return PassResult(work, (change,))

    def _split(self, scope: Scope, head: Head, subspace: Subspace, names: tuple[str, ...]) -> Change:
        parts = _parts(head, subspace)
        off, residual = _residual(scope, head, parts)
        refs, before = (NodeRef.of(head.node),), _cost(scope, [head.node])
        path, dtype = head.path, tensor_meta(head.features).dtype
        detail = _describe(subspace, off, dtype, self.keep_head)
        written: list[str] = []
        made: dict[str, fx.Node] = {}
        with scope.gm.graph.inserting_before(head.node):
            for part, slots in parts.items():
                if part == LOGITS and self.keep_head:
                    continue
                source = made[CLASS_FEATURES] if part == LOGITS else head.features
                where = fresh_attr(scope.gm, f"{path}_{part}")
                made[part] = _layer(scope, head, source, where, slots, written)
        value = head.node
        if not self.keep_head:
            value = made.pop(LOGITS)
            head.node.replace_all_uses_with(value)
        _add_outputs(scope.gm, names, value, made)
        layers = [*made.values(), value]
        after = _cost(scope, [head.node, *made.values()] if self.keep_head else layers)
        new = tuple(NodeRef.of(node) for node in layers)
        if not self.keep_head:
            constants = head.node.all_input_nodes
            scope.gm.graph.erase_node(head.node)
            erase_unread(node for node in constants if node in scope.constant)
        return Change(self.name, "split-head", refs, new, tuple(written), before, after, residual, detail)


# -- the parts as layers


def _parts(head: Head, subspace: Subspace) -> dict[str, dict[str, torch.Tensor]]:
    """Float64 weights and biases of the layers: both parts of the features, and logits from the first."""
    rank, turn = subspace.rank, subspace.Q.T
    rows = {CLASS_FEATURES: turn[:rank], RESIDUAL_FEATURES: turn[rank:]}
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for part, found in rows.items():
        if len(found):  # a layer without outputs is none
            parts[part] = {"weight": _as_weight(head, found[:, : subspace.features])}
            if subspace.bias:
                parts[part]["bias"] = found[:, -1].contiguous()
    return {**parts, LOGITS: {"weight": _as_weight(head, subspace.R.T)}}


def _as_weight(head: Head, matrix: torch.Tensor) -> torch.Tensor:
    """A matrix (outputs, features) as the weight of a layer of the head's kind."""
    ones = [1] * (tensor_meta(head.node.args[1]).dim() - 2) if head.convolves else []  # type: ignore[arg-type]
    return matrix.reshape(*matrix.shape, *ones).contiguous()


def _op(head: Head) -> Any:
    return head.node.target if head.convolves else aten.linear.default


def _layer(
    scope: Scope,
    head: Head,
    source: fx.Node,
    path: str,
    slots: Mapping[str, torch.Tensor],
    written: list[str],
) -> fx.Node:
    """Write one layer of the head's kind at the graph's insertion point."""
    gm = scope.gm
    leaves = [node for node in head.node.all_input_nodes if node.op == "get_attr"]
    trained = any(get_attr_value(gm, str(node.target)).requires_grad for node in leaves)
    reads: list[fx.Node] = []
    for slot, value in slots.items():
        stored = value.to(tensor_meta(head.features).dtype).requires_grad_(trained)
        set_attr(gm, f"{path}.{slot}", stored, parameter=True)
        reads.append(gm.graph.get_attr(f"{path}.{slot}"))
        written.append(f"{path}.{slot}")
    options = head.node.args[3:] if head.convolves else ()
    arguments = (source, *reads, *([None] * (2 - len(reads)) if options else []), *options)
    layer = gm.graph.call_function(_op(head), arguments)
    for node in (*reads, layer):
        node.meta.update(origin(head.node))
        annotate(gm, node)
    return layer


def _cost(scope: Scope, nodes: list[fx.Node]) -> Cost:
    tensors = {
        str(operand.target): get_attr_value(scope.gm, str(operand.target)).numel()
        for node in nodes
        for operand in node.all_input_nodes
        if operand.op == "get_attr"
    }
    return sum((node_cost(node, scope.sizes) for node in nodes), Cost(params=sum(tensors.values())))


def _describe(subspace: Subspace, off: float, dtype: torch.dtype, kept: bool) -> str:
    rank, width = subspace.rank, subspace.width
    logits = "the head itself, bit for bit" if kept else "the class-specific features, up to rounding"
    empty = "" if rank < width else "; all dimensions reach the logits, nothing is residual"
    return (
        f"rank {rank} of {width} x {subspace.outputs}: {rank} class-specific and {width - rank} residual "
        f"features{empty}; Q is orthonormal to {off:.0e} in float64, rounded to {str(dtype)[6:]} "
        f"(unit {torch.finfo(dtype).eps:.0e}); logits from {logits}"
    )


# -- the outputs


def _output_names(gm: fx.GraphModule) -> tuple[str, ...]:
    """The names of the flat outputs; of a graph that capture did not make, its numbers."""
    info, leaves = gm.meta.get(INFO_KEY), pytree.tree_leaves(gm.graph.output_node().args[0])
    if isinstance(info, CaptureInfo) and len(info.output_names) == len(leaves):
        return info.output_names
    return ("output",) if len(leaves) == 1 else tuple(f"output_{i}" for i in range(len(leaves)))


def _add_outputs(
    gm: fx.GraphModule, names: tuple[str, ...], logits: fx.Node, made: Mapping[str, fx.Node]
) -> None:
    """Make the output a dictionary: what was there under its own names, the logits, and the new values."""
    node = gm.graph.output_node()
    leaves = pytree.tree_leaves(node.args[0])
    found: dict[str, Any] = dict(zip(names, leaves, strict=True))
    if names == ("output",) and leaves == [logits]:
        found = {LOGITS: logits}
    elif LOGITS not in found:
        found[LOGITS] = logits
        if logits in leaves:  # one value under two names: the second is a copy, no alias
            with gm.graph.inserting_before(node):
                found[LOGITS] = gm.graph.call_function(aten.clone.default, (logits,))
            found[LOGITS].meta.update(origin(logits))
            annotate(gm, found[LOGITS])
    found.update(made)
    set_outputs(gm, found)
    info = gm.meta.get(INFO_KEY)
    if isinstance(info, CaptureInfo):
        gm.meta[INFO_KEY] = replace(info, output_names=tuple(found))


# -- the certificate


def _residual(
    scope: Scope, head: Head, parts: Mapping[str, Mapping[str, torch.Tensor]]
) -> tuple[float, float]:
    """The certificate: the very layers in float64, on random features at the real size.

    Three things must hold. The rows of both parts are orthonormal; the parts, turned back, are the features
    and the constant; the logits from the class-specific part are the head's. Then the norms add up, and
    nothing residual reaches the logits.

    Returns:
        How far the rows are from orthonormal, and how far the values deviate.

    Raises:
        NoHead: `certificate`.
    """
    kinds = [part for part in (CLASS_FEATURES, RESIDUAL_FEATURES) if part in parts]
    turn = torch.cat([_rows(parts[part]) for part in kinds])
    off = off_orthonormal(turn.T)
    wanted: list[torch.Tensor] = []
    got: list[torch.Tensor] = []
    for seed in range(SAMPLES):
        x = draw(scope, head.features, 2, seed)
        with torch.no_grad():
            logits = runner(scope, head.features, (head.node,), 2)(x).movedim(head.axis, -1)
            values = [_apply(head, x, parts[part]) for part in kinds]
            again = _apply(head, values[0].movedim(-1, head.axis), parts[LOGITS])
        plain = x.movedim(head.axis, -1)
        whole = torch.cat([plain, torch.ones_like(plain[..., :1])], -1)[..., : turn.shape[1]]
        wanted.append(torch.cat([whole, logits], -1))
        got.append(torch.cat([torch.cat(values, -1) @ turn, again], -1))
        if (seed + 1) * prod(wanted[0].shape[:-1]) >= SAMPLES:
            break
    features = turn.shape[1]
    right, found = torch.stack(wanted), torch.stack(got)
    positions = list(range(right.dim() - 1))
    worst = max(
        deviation(right[..., :features], found[..., :features], positions),
        deviation(right[..., features:], found[..., features:], positions),
    )
    if not (off <= ORTHONORMAL and worst <= LIMIT):
        raise NoHead(
            "certificate",
            f"Q^T Q is off the identity by {off:.1e} (expected at most {ORTHONORMAL:.0e}), and the parts "
            f"deviate by {worst:.1e} (at most {LIMIT:.0e}) in float64; please report this",
            (head.node,),
        )
    return off, worst


def _rows(slots: Mapping[str, torch.Tensor]) -> torch.Tensor:
    weight = slots["weight"].flatten(1)
    return torch.cat([weight, slots["bias"].unsqueeze(1)], 1) if "bias" in slots else weight


def _apply(head: Head, x: torch.Tensor, slots: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """One of the layers on float64 features, its outputs along the last axis."""
    options = head.node.args[3:] if head.convolves else ()
    value: torch.Tensor = _op(head)(x, slots["weight"], slots.get("bias"), *options)
    return value.movedim(head.axis, -1)
