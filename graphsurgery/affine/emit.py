"""Write a filled form into a graph in place of its region: the one room that changes a graph."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import fx

from graphsurgery.affine.coefficients import Coefficients
from graphsurgery.affine.program import Conv, Linear, Pad, Permute, Reshape, Scale, Shift, Step
from graphsurgery.affine.region import Region, is_heavy
from graphsurgery.cost import op_name
from graphsurgery.graph import annotate, fresh_module_path, get_attr_value, module_path, set_attr
from graphsurgery.values import tensor_meta

aten = torch.ops.aten
_CONVS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)


@dataclass(frozen=True)
class Emitted:
    """What was written.

    Attributes:
        nodes: the new calls.
        written: attribute names that hold new numbers.
    """

    nodes: tuple[fx.Node, ...]
    written: tuple[str, ...]


def resembled(region: Region, kind: str) -> fx.Node:
    """The member that a folded layer takes its name from: same kind, most parameters, last among equals."""
    family = "conv" if kind.startswith("conv") else "linear"

    def rank(node: fx.Node) -> tuple[bool, bool, int]:
        name = op_name(node)
        same = name.startswith("conv") if family == "conv" else is_heavy(node) and not name.startswith("conv")
        weights = (prod(region.scope.shape(o)) for o in node.all_input_nodes if o in region.scope.constant)
        return (same, is_heavy(node), max(weights, default=0))

    return max(reversed(region.nodes), key=rank)


def emit(region: Region, filled: Coefficients) -> Emitted:
    """Replace a region by its form, under the name of the member it resembles most.

    The region's graph is changed: its calls, and the reads of constants that only they make, are erased.
    The constants themselves stay; the caller deletes what nothing reads when all is written.

    Args:
        region: the region, of a graph that may be changed.
        filled: a certified form of it, float64; its numbers are cast to the dtype of the region's exit.
    """
    gm, graph, dtype = region.scope.gm, region.scope.gm.graph, tensor_meta(region.exit).dtype
    device = tensor_meta(region.exit).device
    member = resembled(region, filled.form.kind)
    dying = _dying(region)
    path = _path(gm, member, dying)
    attributes: dict[str, fx.Node] = {}
    written: list[str] = []
    trainable = any(get_attr_value(gm, str(n.target)).requires_grad for n in dying if n.op == "get_attr")
    last: fx.Node = region.exit
    for slot, value in filled.slots.items():
        target = f"{path}.{slot}"
        stored = value.to(dtype=dtype, device=device).contiguous().requires_grad_(trainable)
        set_attr(gm, target, stored, parameter=slot in ("weight", "bias"))
        with graph.inserting_after(last):
            last = attributes[slot] = graph.get_attr(target)
        annotate(gm, last)
        written.append(target)
    nodes: list[fx.Node] = []
    value_node = region.entry
    for index, step in enumerate(filled.form.steps):
        target_op, args = _call(step, value_node, attributes, region)
        with graph.inserting_after(last):
            last = value_node = graph.call_function(target_op, args)
        for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
            if key in member.meta:
                value_node.meta[key] = member.meta[key]
        if index + 1 < len(filled.form.steps):
            annotate(gm, value_node)
        else:
            value_node.meta["val"] = region.exit.meta["val"]
        nodes.append(value_node)
    region.exit.replace_all_uses_with(value_node)
    for node in (*reversed(region.nodes), *dying):
        if not node.users:
            graph.erase_node(node)
    return Emitted(tuple(nodes), tuple(written))


def _dying(region: Region) -> tuple[fx.Node, ...]:
    """Constants (and sizes) that nothing reads but the region, readers first."""
    gone: dict[fx.Node, None] = dict.fromkeys(region.nodes)
    dying: list[fx.Node] = []
    queue = [o for n in reversed(region.nodes) for o in n.all_input_nodes]
    while queue:
        node = queue.pop(0)
        if node in gone or node is region.entry or node.op == "placeholder":
            continue
        if all(user in gone for user in node.users):
            gone[node] = None
            dying.append(node)
            queue.extend(node.all_input_nodes)
    return tuple(dying)


def _path(gm: fx.GraphModule, member: fx.Node, dying: Collection[fx.Node]) -> str:
    """A module path for the new layer, free once the dying constants are gone."""
    wanted = module_path(member) or member.name
    weights = [str(o.target) for o in member.all_input_nodes if o.op == "get_attr"]
    own = next((target for target in weights if target.endswith(".weight")), "")
    if own:
        wanted = own.removesuffix(".weight")
    elif weights and is_heavy(member):  # a bare parameter, named as restore names it
        wanted = f"{weights[0]}_{'conv' if op_name(member).startswith('conv') else 'linear'}"
    readers = [n for n in gm.graph.nodes if n.op == "get_attr" and str(n.target).startswith(wanted + ".")]
    slots = [n for n in readers if str(n.target) in (f"{wanted}.weight", f"{wanted}.bias")]
    if slots and all(n in dying for n in slots):
        return wanted
    return fresh_module_path(gm, wanted)


def _call(
    step: Step, x: fx.Node, attributes: dict[str, fx.Node], region: Region
) -> tuple[Any, tuple[Any, ...]]:
    match step:
        case Reshape(out):
            return aten.reshape.default, (x, [-1 if _symbolic(n, region) else n for n in out])
        case Permute(order, _):
            return aten.permute.default, (x, list(order))
        case Pad(pads, _):
            return aten.constant_pad_nd.default, (x, [n for pair in reversed(pads) for n in pair], 0.0)
        case Linear(bias, _, _):
            return aten.linear.default, (x, attributes["weight"], attributes["bias"] if bias else None)
        case Conv():
            options = [list(o) for o in (step.stride, step.padding, step.dilation)]
            bias_node = attributes["bias"] if step.bias else None
            return _CONVS[len(step.kernel) - 1], (x, attributes["weight"], bias_node, *options, step.groups)
        case Scale(_):
            return aten.mul.Tensor, (x, attributes["scale"])
        case Shift(_):
            return aten.add.Tensor, (x, attributes["shift"])


def _symbolic(size: int, region: Region) -> bool:
    return any(size % prime == 0 for prime in region.scope.primes)
