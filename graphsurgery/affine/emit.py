"""Write a filled form into a graph in place of its region: the one room that changes a graph."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import fx

from graphsurgery.affine.coefficients import Coefficients
from graphsurgery.affine.program import (
    Conv,
    ConvTranspose,
    Linear,
    Pad,
    Permute,
    PixelShuffle,
    Reshape,
    Scale,
    Shift,
    Step,
    Take,
)
from graphsurgery.affine.region import Region, is_heavy
from graphsurgery.cost import op_name
from graphsurgery.graph import annotate, fake_mode, fresh_attr, get_attr_value, module_path, origin, set_attr
from graphsurgery.values import tensor_meta

aten = torch.ops.aten
_CONVS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
_TRANSPOSED = (
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
)
_NAMED = (aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding)


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
    family = _family(kind)

    def rank(node: fx.Node) -> tuple[bool, bool, int]:
        same = is_heavy(node) and _family(op_name(node)) == family
        weights = (prod(region.scope.shape(o)) for o in node.all_input_nodes if o in region.scope.constant)
        return (same, is_heavy(node), max(weights, default=0))

    return max((node for node in reversed(region.nodes) if node not in region.shared), key=rank)


def _family(name: str) -> str:
    """The family of layers that a form or a heavy op belongs to."""
    return next((family for family in ("conv_transpose", "conv") if name.startswith(family)), "linear")


def emit(region: Region, filled: Coefficients) -> Emitted:
    """Replace a region by its form, under the name of the member it resembles most.

    The region's graph is changed: its calls, and the reads of constants that only they make, are erased.
    The constants themselves stay; the caller deletes what nothing reads when all is written.

    Args:
        region: the region, of a graph that may be changed.
        filled: a certified form of it, whose tensors become the graph's own, in the dtype of the exit.
    """
    gm, graph = region.scope.gm, region.scope.gm.graph
    member = resembled(region, filled.form.kind)
    dying = _dying(region)
    path = _path(region, member, dying, filled.slots)
    attributes: dict[str, fx.Node] = {}
    written: list[str] = []
    trainable = any(get_attr_value(gm, str(n.target)).requires_grad for n in dying if n.op == "get_attr")
    last: fx.Node = region.exit
    for slot, value in filled.slots.items():
        target = f"{path}.{slot}"
        set_attr(gm, target, value.requires_grad_(trainable), parameter=slot in ("weight", "bias"))
        with graph.inserting_after(last):
            last = attributes[slot] = graph.get_attr(target)
        annotate(gm, last)
        region.scope.reads(last)
        written.append(target)
    nodes: list[fx.Node] = []
    value_node = region.entry
    for index, step in enumerate(filled.form.steps):
        target_op, args = _call(step, value_node, attributes, region)
        with graph.inserting_after(last):
            last = value_node = graph.call_function(target_op, args)
        value_node.meta.update(origin(member))
        if index + 1 < len(filled.form.steps):
            value_node.meta["val"] = _value(region, step.out)
        else:
            value_node.meta["val"] = region.exit.meta["val"]
        nodes.append(value_node)
    region.exit.replace_all_uses_with(value_node)
    for node in sorted((*region.nodes, *dying), key=region.scope.position, reverse=True):
        if not node.users:
            graph.erase_node(node)
            region.scope.forget(node)
    return Emitted(tuple(nodes), tuple(written))


def _value(region: Region, shape: tuple[int, ...]) -> torch.Tensor:
    """A fake tensor of a shape that is written with primes for symbols, dtype and device as the exit's."""
    like = tensor_meta(region.exit)
    sizes = [_size(region, n) for n in shape]
    with fake_mode(region.scope.gm):
        return torch.empty(sizes, dtype=like.dtype, device=like.device)


def _size(region: Region, size: int) -> int | torch.SymInt:
    """A size with its symbols put back: read off the entry or the exit, which hold all that there are."""
    symbols: dict[int, int | torch.SymInt] = {}
    for node in (region.exit, region.entry):
        for number, known in zip(region.scope.shape(node), tensor_meta(node).shape, strict=True):
            symbols[number] = known
    if size in symbols:
        return symbols[size]
    for prime, symbol in symbols.items():
        if _symbolic(prime, region) and size % prime == 0:
            return symbol * (size // prime)
    return size


def _dying(region: Region) -> tuple[fx.Node, ...]:
    """Constants (and sizes) that nothing reads but the region, readers first."""
    gone: dict[fx.Node, None] = dict.fromkeys(region.nodes)
    dying: list[fx.Node] = []
    queue = deque(o for n in reversed(region.nodes) for o in n.all_input_nodes)
    while queue:
        node = queue.popleft()
        if node in gone or node is region.entry or node.op == "placeholder":
            continue
        if all(user in gone for user in node.users):
            gone[node] = None
            dying.append(node)
            queue.extend(node.all_input_nodes)
    return tuple(dying)


def _path(region: Region, member: fx.Node, dying: Collection[fx.Node], slots: Collection[str]) -> str:
    """A module path under which every slot is free, or held by constants that are dying and by no other."""
    gm = region.scope.gm
    wanted = module_path(member) or member.name
    weight = member.args[1] if is_heavy(member) and len(member.args) > 1 else None
    if isinstance(weight, fx.Node) and weight.op == "get_attr":
        target = str(weight.target)
        kind = "conv" if op_name(member).startswith("conv") else "linear"
        # A bare parameter becomes a layer, named as restore names it.
        wanted = target.removesuffix(".weight") if target.endswith(".weight") else f"{target}_{kind}"
    leaving = region.scope.attributes_read_by(dying)

    def free(path: str) -> bool:
        # A layer is read as one from its weight and bias: neither may be another's.
        names = [f"{path}.{slot}" for slot in {*slots, "weight", "bias"}]
        return all(name in leaving or fresh_attr(gm, name) == name for name in names)

    path, count = wanted, 0
    while not free(path):
        count += 1
        path = f"{wanted}_{count}"
    return path


def _call(
    step: Step, x: fx.Node, attributes: dict[str, fx.Node], region: Region
) -> tuple[Any, tuple[Any, ...]]:
    match step:
        case Reshape(out):
            return aten.reshape.default, (x, [-1 if _symbolic(n, region) else n for n in out])
        case Permute(order, _):
            return aten.permute.default, (x, list(order))
        case PixelShuffle(factor, _):
            return aten.pixel_shuffle.default, (x, factor)
        case Take(dim, start, stop, stride, single, _):
            if single:
                return aten.select.int, (x, dim, start)
            return aten.slice.Tensor, (x, dim, start, stop, stride)
        case Pad(pads, _):
            return aten.constant_pad_nd.default, (x, [n for pair in reversed(pads) for n in pair], 0.0)
        case Linear(bias, _, _):
            return aten.linear.default, (x, attributes["weight"], attributes["bias"] if bias else None)
        case Conv():
            rank, named = len(step.kernel) - 1, isinstance(step.padding, str)
            padding = step.padding if isinstance(step.padding, str) else list(step.padding)
            options = (list(step.stride), padding, list(step.dilation), step.groups)
            bias_node = attributes["bias"] if step.bias else None
            return (_NAMED if named else _CONVS)[rank], (x, attributes["weight"], bias_node, *options)
        case ConvTranspose():
            bias_node = attributes["bias"] if step.bias else None
            before = (list(step.stride), list(step.padding), list(step.output_padding))
            rank = len(step.kernel) - 1
            args = (x, attributes["weight"], bias_node, *before, step.groups, list(step.dilation))
            return _TRANSPOSED[rank], args
        case Scale(_):
            return aten.mul.Tensor, (x, attributes["scale"])
        case Shift(_, slot):
            return aten.add.Tensor, (x, attributes[slot])


def _symbolic(size: int, region: Region) -> bool:
    return any(size % prime == 0 for prime in region.scope.primes)
