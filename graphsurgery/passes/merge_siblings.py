"""Merge layers that read the same value into one, and split its output.

Rule:      (W1 x + b1, W2 x + b2)  ->  split([W1; W2] x + [b1; b2])
Requires:  two or more Linear, or convolutions with one group, of equal kernel, stride, padding and dilation
           that read one value (else no match); refused with:
           `shared-weights` a weight is tied to another or read elsewhere, so that it would stay;
           `different-inputs` layers side by side in one module read different values;
           `dtype` layers read one value in different dtypes;
           `geometry` kernels, strides, paddings, dilations or groups differ;
           `not-finite` weights hold NaN or infinity;  `certificate` the pieces differ in float64;
           `costs-more` the cost model that was given does not find the merged layer cheaper
Preserves: signature, shapes, dtypes; values up to rounding

It runs when it is named, or when a cost model is given that finds it cheaper. By FLOPs it never is: merged
layers take exactly the multiplications that they took apart, and the split copies every output once more. One
large product can still be faster than several small ones; measure it on the runtime it is meant for. Each
`Change` states both costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from operator import getitem
from typing import Any, ClassVar

import torch
from torch import fx

from graphsurgery.affine.certify import LIMIT, SAMPLES, deviation, draw
from graphsurgery.affine.pointwise import memory_readers
from graphsurgery.affine.region import Scope
from graphsurgery.affine.runner import runner
from graphsurgery.cost import Cost, CostModel, cost_model, node_cost, op_name
from graphsurgery.graph import (
    annotate,
    copy_graph_module,
    delete_unused_attrs,
    fresh_attr,
    get_attr_value,
    module_path,
    origin,
    set_attr,
)
from graphsurgery.rewrite.contracts import Change, NodeRef, Pass, PassResult, Refusal
from graphsurgery.rewrite.sweep import erase_unread
from graphsurgery.values import is_tensor, tensor_meta

__all__ = ["MergeSiblings"]

_LAYERS = ("linear", "conv1d", "conv2d", "conv3d")

aten = torch.ops.aten


@dataclass(frozen=True)
class MergeSiblings(Pass):
    """Merges all layers that read one value: q, k and v of an attention, sibling heads, parallel convs.

    Attributes:
        cost: what has to find the merged layer cheaper, "flops" or a `graphsurgery.cost.CostModel`; None asks
            nothing and merges all.
    """

    cost: str | CostModel | None = None

    name: ClassVar[str] = "merge-siblings"
    summary: ClassVar[str] = "layers that read the same value into one, with a split behind"
    default: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            PassError: `cost` is no cost model.
        """
        if self.cost is not None:
            cost_model(self.cost)

    def run(self, gm: fx.GraphModule) -> PassResult:
        """See `Pass.run`."""
        work = copy_graph_module(gm)
        scope = Scope(work)
        model = None if self.cost is None else cost_model(self.cost)
        changes: list[Change] = []
        refusals: list[Refusal] = []
        for layers in _families(scope, refusals):
            outcome = _merge(scope, layers, model)
            (changes if isinstance(outcome, Change) else refusals).append(outcome)  # type: ignore[arg-type]
        if not changes:
            return PassResult(gm, (), tuple(refusals))
        delete_unused_attrs(work)
        work.graph.lint()
        work.recompile()
        return PassResult(work, tuple(changes), tuple(refusals))


# -- who belongs together


def _families(scope: Scope, refusals: list[Refusal]) -> list[tuple[fx.Node, ...]]:
    """Layers to merge, in graph order; what stands in the way of others is recorded."""
    layers = [node for node in scope.gm.graph.nodes if _is_layer(scope, node)]
    readers = memory_readers(scope)
    families: list[tuple[fx.Node, ...]] = []
    for group in _grouped(layers, lambda node: _through_casts(node.args[0])):
        by_dtype = _grouped(group, lambda node: tensor_meta(node).dtype)
        if len(by_dtype) > 1:
            dtypes = ", ".join(sorted({str(tensor_meta(node).dtype) for node in group}))
            refusals.append(_refusal("dtype", group, f"they read one value as {dtypes}"))
        for siblings in _grouped(group, lambda node: node.args[0]):
            families += _of_one_value(readers, siblings, refusals)
    for group in _grouped(layers, lambda node: (_path(node).rpartition(".")[0], _geometry(node))):
        if _side_by_side(group):
            inputs = ", ".join(repr(str(node.args[0])) for node in group)
            refusals.append(_refusal("different-inputs", group, f"they read different values: {inputs}"))
    return families


def _of_one_value(
    readers: dict[fx.Node, list[fx.Node]], siblings: Sequence[fx.Node], refusals: list[Refusal]
) -> list[tuple[fx.Node, ...]]:
    found: list[tuple[fx.Node, ...]] = []
    alone: list[fx.Node] = []
    kin = _grouped(siblings, _geometry)
    for members in kin:
        own = [node for node in members if _sole_reader(readers, node)]
        if len(members) > 1 and len(own) < len(members):
            tied = [node for node in members if node not in own]
            refusals.append(
                _refusal("shared-weights", tied, "their weights are tied or read elsewhere and would stay")
            )
        if len(own) > 1 and _groups(own[0]) == 1:
            found.append(tuple(own))
        elif len(members) == 1 or _groups(own[0] if own else members[0]) != 1:
            alone += members
    if alone and len(siblings) > 1:
        shapes = "; ".join(_describe(node) for node in siblings)
        refusals.append(_refusal("geometry", siblings, f"they read one value in different ways: {shapes}"))
    return found


def _grouped(nodes: Sequence[fx.Node], key: Any) -> list[list[fx.Node]]:
    groups: dict[Any, list[fx.Node]] = {}
    for node in nodes:
        groups.setdefault(key(node), []).append(node)
    return list(groups.values())


def _is_layer(scope: Scope, node: fx.Node) -> bool:
    if op_name(node) not in _LAYERS or node in scope.constant or not isinstance(node.args[0], fx.Node):
        return False
    tensors = [value for value in node.args[1:3] if value is not None]
    named = all(isinstance(value, fx.Node) and value in scope.constant for value in tensors)
    return named and is_tensor(node) and tensor_meta(tensors[0]).dim() >= 2 and not node.kwargs  # type: ignore[arg-type]


def _through_casts(node: Any) -> Any:
    while op_name(node) in ("_to_copy", "to") and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _geometry(node: fx.Node) -> tuple[Any, ...]:
    """What siblings share: the op, the shape of the weight but for its outputs, and all options."""
    shape = tuple(tensor_meta(node.args[1]).shape)  # type: ignore[arg-type]  # checked to be a node
    options = [tuple(v) if isinstance(v, (list, tuple)) else v for v in node.args[3:]]
    defaults: list[Any] = [(1,), (0,), (1,), 1] if op_name(node) != "linear" else []
    options += defaults[len(options) :]
    rank = len(shape) - 2
    full = tuple(v * rank if isinstance(v, tuple) and len(v) == 1 else v for v in options)
    return (node.target, shape[1:], full, tensor_meta(node).dtype)


def _groups(node: fx.Node) -> int:
    return int(node.args[6]) if len(node.args) > 6 else 1  # type: ignore[arg-type]  # a plain number


def _describe(node: fx.Node) -> str:
    shape = " x ".join(str(size) for size in tensor_meta(node.args[1]).shape)  # type: ignore[arg-type]
    return f"{node.name} {op_name(node)} {shape}"


def _sole_reader(known: dict[fx.Node, list[fx.Node]], node: fx.Node) -> bool:
    """Whether nothing else reads the weight and bias of a layer, under any name."""
    stack = [value for value in node.args[1:3] if isinstance(value, fx.Node)]
    behind: set[fx.Node] = set()
    while stack:
        value = stack.pop()
        if value not in behind:
            behind.add(value)
            stack += value.all_input_nodes
    readers = {user for leaf in behind for user in known.get(leaf, ())}
    readers |= {user for value in behind for user in value.users}
    return readers <= behind | {node}


def _side_by_side(group: Sequence[fx.Node]) -> bool:
    """Whether layers of one module read different values and none of them feeds another."""
    if len(group) < 2 or len({node.args[0] for node in group}) < 2 or not _path(group[0]).count("."):
        return False
    members = set(group)
    first = {node: i for i, node in enumerate(group[0].graph.nodes)}
    oldest = min(first[node] for node in group)
    for node in group:
        stack, seen = list(node.all_input_nodes), set[fx.Node]()
        while stack:
            operand = stack.pop()
            if operand in members:
                return False
            if operand not in seen and first[operand] > oldest:
                seen.add(operand)
                stack += operand.all_input_nodes
    return True


def _path(node: fx.Node) -> str:
    """The module path of a layer: that of its weight; a bare parameter is a path of its own."""
    weight = node.args[1]
    if isinstance(weight, fx.Node) and weight.op == "get_attr":
        return str(weight.target).removesuffix(".weight")
    return module_path(node) or node.name


def _refusal(code: str, nodes: Sequence[fx.Node], reason: str) -> Refusal:
    return Refusal(MergeSiblings.name, code, tuple(NodeRef.of(node) for node in nodes), reason)


# -- making one of them


def _merge(scope: Scope, members: tuple[fx.Node, ...], model: CostModel | None) -> Change | Refusal:
    gm, graph, first = scope.gm, scope.gm.graph, members[0]
    slots = _slots(scope, members)
    if not all(bool(torch.isfinite(value).all()) for value in slots.values()):
        return _refusal("not-finite", members, "their weights hold NaN or infinity")
    before = sum((node_cost(node, scope.sizes) for node in members), Cost(params=scope.params(members)[0]))
    after = _merged_cost(scope, members, slots, before)
    if model is not None and not model.score(after) < model.score(before):
        return _refusal("costs-more", members, f"by {model.name!r}, apart {before}; merged {after}")
    sizes = [int(tensor_meta(node.args[1]).shape[0]) for node in members]  # type: ignore[arg-type]
    axis = tensor_meta(first).dim() - (1 if op_name(first) == "linear" else int(op_name(first)[4]) + 1)
    residual = _residual(scope, members, slots, sizes, axis)
    if not residual <= LIMIT:
        reason = f"the pieces deviate by {residual:.1e} in float64, expected at most {LIMIT:.0e}"
        return _refusal("certificate", members, f"{reason}; please report this")
    refs, kind = tuple(NodeRef.of(node) for node in members), "+".join(op_name(node) for node in members)

    path = _fresh_path(gm, members)
    held = [
        get_attr_value(gm, str(v.target)) for n in members for v in n.all_input_nodes if v.op == "get_attr"
    ]
    reads: dict[str, fx.Node] = {}
    with graph.inserting_before(first):
        for slot, value in slots.items():
            stored = value.to(tensor_meta(first).dtype)
            stored.requires_grad_(any(tensor.requires_grad for tensor in held))
            set_attr(gm, f"{path}.{slot}", stored, parameter=True)
            reads[slot] = graph.get_attr(f"{path}.{slot}")
        arguments = (first.args[0], reads["weight"], reads.get("bias"), *first.args[3:])
        merged = graph.call_function(first.target, arguments)  # type: ignore[arg-type]  # an op
        pieces = graph.call_function(aten.split_with_sizes.default, (merged, sizes, axis))
        items = [graph.call_function(getitem, (pieces, i)) for i in range(len(members))]
    for node in (*reads.values(), merged, pieces, *items):
        node.meta.update(origin(first))
        annotate(gm, node)
    made = [merged, pieces]
    for node, item in zip(members, items, strict=True):
        item.meta.update(origin(node))
        piece = _compact(gm, node, item)
        made += [piece] if piece is not item else []
        node.replace_all_uses_with(piece)
        constants = [value for value in node.all_input_nodes if value in scope.constant]
        graph.erase_node(node)
        erase_unread(constants)
    written = tuple(f"{path}.{slot}" for slot in slots)
    detail = f"one layer of {' + '.join(map(str, sizes))} outputs; apart {before}; merged {after}"
    new = tuple(NodeRef.of(node) for node in made)
    return Change(MergeSiblings.name, kind, refs, new, written, before, after, residual, detail)


def _merged_cost(
    scope: Scope, members: Sequence[fx.Node], slots: dict[str, torch.Tensor], apart: Cost
) -> Cost:
    """What the merged layer, its split, and the copies of pieces that leave the model will cost."""
    values = (prod(map(scope.sizes.per_sample, tensor_meta(node).shape)) for node in members)
    return Cost(
        macs=apart.macs,
        elementwise=apart.elementwise,
        moved=sum(values),
        params=sum(value.numel() for value in slots.values()),
        nodes=2 + sum(map(_leaves, members)),
    )


def _leaves(node: fx.Node) -> bool:
    """Whether a value is an output of the model."""
    return any(user.op == "output" for user in node.users)


def _compact(gm: fx.GraphModule, old: fx.Node, piece: fx.Node) -> fx.Node:
    """An output of the model keeps its layout in memory: a piece of a split has gaps."""
    if not _leaves(old):
        return piece
    with gm.graph.inserting_after(piece):
        copy = gm.graph.call_function(
            aten.clone.default, (piece,), {"memory_format": torch.contiguous_format}
        )
    copy.meta.update(origin(old))
    annotate(gm, copy)
    return copy


def _slots(scope: Scope, members: Sequence[fx.Node]) -> dict[str, torch.Tensor]:
    """Weight and bias of the merged layer, float64; a missing bias is zero, and none at all is left out."""
    weights = [scope.constant_value(node.args[1]) for node in members]  # type: ignore[arg-type]  # nodes
    biases = [node.args[2] if len(node.args) > 2 else None for node in members]
    slots = {"weight": torch.cat(weights)}
    if any(bias is not None for bias in biases):
        slots["bias"] = torch.cat(
            [
                scope.constant_value(bias) if isinstance(bias, fx.Node) else weight.new_zeros(weight.shape[0])
                for bias, weight in zip(biases, weights, strict=True)
            ]
        )
    return slots


def _residual(
    scope: Scope, members: Sequence[fx.Node], slots: dict[str, torch.Tensor], sizes: list[int], axis: int
) -> float:
    """The certificate: the pieces against the layers, in float64 on random inputs at the real size."""
    (source,) = (o for o in members[0].all_input_nodes if o not in scope.constant)
    target, options = members[0].target, members[0].args[3:]
    wanted: list[torch.Tensor] = []
    got: list[torch.Tensor] = []
    for seed in range(SAMPLES):
        x = draw(scope, source, 2, seed)
        with torch.no_grad():
            wanted.append(torch.cat([runner(scope, source, (node,), 2)(x) for node in members], axis))
            whole = target(x, slots["weight"], slots.get("bias"), *options)  # type: ignore[operator]  # an op
        got.append(torch.cat(whole.split_with_sizes(sizes, axis), axis))
        if (seed + 1) * prod(wanted[0].shape) >= SAMPLES * sum(sizes):
            break
    others = [i for i in range(wanted[0].dim() + 1) if i != axis + 1]
    return deviation(torch.stack(wanted), torch.stack(got), others)


def _fresh_path(gm: fx.GraphModule, members: Sequence[fx.Node]) -> str:
    """`attn.q_k_v` for `attn.q`, `attn.k` and `attn.v`; numbered where that is taken."""
    paths = [_path(node).split(".") for node in members]
    shared = 0
    while all(len(path) - 1 > shared and path[shared] == paths[0][shared] for path in paths):
        shared += 1
    leaf = "_".join("_".join(path[shared:]) for path in paths)
    return fresh_attr(gm, ".".join([*paths[0][:shared], leaf]))
