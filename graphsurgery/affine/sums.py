"""Sums of many values in another order, so that addends of one value stand side by side.

In `conv(x) + tanh(x) + conv1(x)` the two convolutions have one entry, but no call adds just them. Sums are
associative up to rounding: the addends that lead back to one value are added first. Whether that pays is for
the search to say; a sum whose new part is not folded is to be left as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from graphsurgery.affine.region import is_heavy
from graphsurgery.affine.search import Search
from graphsurgery.cost import op_name
from graphsurgery.values import is_tensor, tensor_meta

_aten = torch.ops.aten


@dataclass(frozen=True)
class Scattered:
    """A sum in which addends of one value stand apart.

    Attributes:
        total: the last addition.
        together: the addends that lead back to one value.
        others: the other addends.
    """

    total: fx.Node
    together: tuple[fx.Node, ...]
    others: tuple[fx.Node, ...]


def scattered(search: Search) -> Iterator[Scattered]:
    """Sums of three or more values of which some could be folded if they were added first."""
    for node in search.scope.gm.graph.nodes:
        if not _is_sum(search, node):
            continue
        readers = search.dominators.readers[node]
        if len(readers) == 1 and _is_sum(search, readers[0]):
            continue  # a part of a longer sum
        addends, parts = _addends(search, node)
        if len(addends) < 3 or len(set(addends)) < len(addends):
            continue
        together = _largest(search, addends)
        if len(together) > 1 and len(together) < len(addends) and set(together) not in parts:
            yield Scattered(node, tuple(together), tuple(a for a in addends if a not in together))


def regroup(gm: fx.GraphModule, found: Scattered) -> fx.Node:
    """Add first what belongs together; returns the new call that adds it. `gm` is changed."""
    old = [found.total]
    for node in old:
        old += [o for o in node.all_input_nodes if o not in (*found.together, *found.others)]
    last = found.together[0]
    partial = last
    with gm.graph.inserting_before(found.total):
        for count, addend in enumerate((*found.together[1:], *found.others), 2):
            last = gm.graph.call_function(_aten.add.Tensor, (last, addend))
            last.meta = dict(found.total.meta)
            if count == len(found.together):
                partial = last
    found.total.replace_all_uses_with(last)
    for node in old:
        gm.graph.erase_node(node)
    return partial


def _is_sum(search: Search, node: fx.Node) -> bool:
    """Whether a call adds two live values of the shape and dtype of the sum."""
    if node.op != "call_function" or op_name(node) != "add" or node not in search.dominators.readers:
        return False
    if (
        len(node.args) != 2
        or node.kwargs
        or not all(isinstance(o, fx.Node) and is_tensor(o) for o in node.args)
    ):
        return False
    shape, scope = search.scope.shape(node), search.scope
    return all(
        o not in scope.constant
        and scope.shape(o) == shape
        and tensor_meta(o).dtype == tensor_meta(node).dtype
        for o in node.all_input_nodes
    )


def _addends(search: Search, total: fx.Node) -> tuple[list[fx.Node], list[set[fx.Node]]]:
    """The values that a sum adds, in order, and which of them its calls add."""
    parts: list[set[fx.Node]] = []

    def collect(node: fx.Node) -> list[fx.Node]:
        inner = node is total or (_is_sum(search, node) and len(search.dominators.readers[node]) == 1)
        if not inner:
            return [node]
        found = [leaf for operand in node.args if isinstance(operand, fx.Node) for leaf in collect(operand)]
        parts.append(set(found))
        return found

    return collect(total), parts


def _largest(search: Search, addends: list[fx.Node]) -> list[fx.Node]:
    """The most addends that lead back to one value, a layer of their own among them."""
    groups: dict[fx.Node, list[fx.Node]] = {}
    for addend in addends:
        for entry in {*search.axes[addend], addend}:
            groups.setdefault(entry, []).append(addend)
    best: list[fx.Node] = []
    for entry, members in groups.items():
        layers = any(
            is_heavy(node) for a in members if a is not entry for node in search.scope.between(entry, a)
        )
        if layers and len(members) > len(best):
            best = members
    return best
