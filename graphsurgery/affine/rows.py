"""A large Linear is filled some rows at a time: with fewer features a region is the same one, only smaller.

What a region holds in float64 while its form is filled and certified is several times the form's weight.
Where the region ends in Linears and what acts on each of their features alone, the weights are cut along
these features, in views that take no memory, and each part is filled and certified for itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx, nn

from graphsurgery.affine.atoms import NoFold
from graphsurgery.affine.forms import Form, candidates
from graphsurgery.affine.program import Linear
from graphsurgery.affine.region import Region, Scope
from graphsurgery.affine.rules import live_operands
from graphsurgery.cost import op_name
from graphsurgery.graph import annotate, get_attr_value, set_attr

CHUNK_BYTES = 2**26
"""Bytes that the weight of one part may take in float64; some four times that are held meanwhile."""

_ALONG = frozenset({"add", "sub", "mul", "div", "neg", "dropout", "alias", "clone", "contiguous", "detach"})
"""Calls that do the same to each feature, apart from constants along the features."""


@dataclass(frozen=True)
class Rows:
    """Some features of a region.

    Attributes:
        start: the first of them.
        stop: behind the last.
        region: the region with no other features, in a graph of its own.
        form: its form.
    """

    start: int
    stop: int
    region: Region
    form: Form


def parts(region: Region, form: Form) -> Iterator[Rows] | None:
    """The parts in which a form is filled; None where it is to be filled as a whole.

    Args:
        region: the region.
        form: the form chosen for it.
    """
    if len(form.steps) != 1 or not isinstance(form.steps[0], Linear) or region.shared:
        return None
    features, inputs = form.slots["weight"]
    each = max(1, CHUNK_BYTES // (8 * inputs))
    cut = _cut(region, features) if each < features else None
    if cut is None or _rows(region, form, cut, 0, each) is None:
        return None
    return _parts(region, form, cut, features, each)


def _parts(region: Region, form: Form, cut: dict[fx.Node, int], features: int, each: int) -> Iterator[Rows]:
    for start in range(0, features, each):
        rows = _rows(region, form, cut, start, min(start + each, features))
        if rows is None:
            raise NoFold(
                "internal", f"rows from {start} on have another form than the first; please report this"
            )
        yield rows


def _cut(region: Region, features: int) -> dict[fx.Node, int] | None:
    """The constants that run along the features of the exit, with that dimension; and calls, with -1.

    None where features are not alone from the last Linears on.
    """
    scope, inside = region.scope, set(region.nodes)
    needed = set(_needed(region))
    tail, along = {region.exit}, set[fx.Node]()
    cut: dict[fx.Node, int] = {}
    for node in reversed(region.nodes):
        if node not in tail:
            continue
        if scope.shape(node)[-1:] != (features,) or (inside & set(node.users)) - along:
            return None
        cut[node] = -1
        if op_name(node) == "linear" and not node.kwargs:
            constants, live = list(node.args[1:]), []
        elif op_name(node) in _ALONG:
            along.add(node)
            live = live_operands(node, scope.constant)
            constants = [operand for operand in node.all_input_nodes if operand not in live]
        else:
            return None
        if any(operand not in inside or scope.shape(operand) != scope.shape(node) for operand in live):
            return None
        tail.update(live)
        for constant in constants:
            if not isinstance(constant, fx.Node):
                continue
            if constant.op != "get_attr" or (needed & set(constant.users)) - tail:
                return None
            shape = scope.shape(constant)
            dim = len(shape) - 1 if node in along else 0
            if node in along and shape[-1:] in ((), (1,)):
                continue
            if shape[dim] != features or cut.setdefault(constant, dim) != dim:
                return None
    return cut


def _rows(region: Region, form: Form, cut: dict[fx.Node, int], start: int, stop: int) -> Rows | None:
    """The region with the features from `start` to `stop` alone; None where its form is another one."""
    source = region.scope.gm
    gm = fx.GraphModule(nn.Module(), fx.Graph())
    values = {region.entry: gm.graph.placeholder("entry")}
    values[region.entry].meta["val"] = region.entry.meta["val"]
    for node in _needed(region):
        if node.op == "get_attr":
            tensor = get_attr_value(source, str(node.target)).detach()
            if node in cut:
                tensor = tensor.narrow(cut[node], start, stop - start)
            set_attr(gm, f"constant{len(values)}", tensor, parameter=False)
            values[node] = gm.graph.get_attr(f"constant{len(values)}")
        elif node.op == "call_function" and all(operand in values for operand in node.all_input_nodes):
            values[node] = gm.graph.node_copy(node, values.__getitem__)
        else:
            return None  # e.g. a size that is read elsewhere
        if node in cut:
            annotate(gm, values[node])
        else:
            values[node].meta["val"] = node.meta["val"]
    entry, exit_ = values[region.entry], values[region.exit]
    gm.graph.output((exit_,))
    scope = Scope(gm, region.scope.cost_model)
    axes = scope.axes(entry, exit_)
    wanted = {slot: (stop - start, *shape[1:]) for slot, shape in form.slots.items()}
    for found in candidates(axes, scope.shape(entry), heavy=True):
        if found.slots == wanted and [type(step) for step in found.steps] == [Linear]:
            return Rows(start, stop, Region(scope, entry, exit_, axes), found)
    return None


def _needed(region: Region) -> list[fx.Node]:
    """The calls of a region and all constants that they are computed from, in graph order."""
    found = set(region.nodes)
    stack = list(region.nodes)
    while stack:
        for operand in stack.pop().all_input_nodes:
            if operand is not region.entry and operand not in found:
                found.add(operand)
                stack += [operand] if operand in region.scope.constant else []
    return sorted(found, key=region.scope.position)


def gather(whole: dict[str, torch.Tensor], rows: Rows, slots: dict[str, torch.Tensor], form: Form) -> None:
    """Put what was filled for some features at its place among all of them.

    Args:
        whole: tensors by slot, made here with the first part, each of the shape that `form` gives it.
        rows: the part.
        slots: its tensors, in the dtype of the model.
        form: the form of all features.
    """
    for slot, value in slots.items():
        if slot not in whole:
            whole[slot] = value.new_empty(form.slots[slot])
        whole[slot][rows.start : rows.stop] = value
