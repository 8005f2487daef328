"""Operators with a body of their own that says nothing about values: the body in their place.

torch.export writes a stretch of a forward under `torch.no_grad()` or `torch.autocast(..., enabled=False)` as
one call with a graph inside. Gradients are no part of what is captured, and an autocast that is off leaves
every call as it stands. An autocast that is on changes dtypes and keeps its body.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

__all__ = ["inline_bodies"]

_GRADIENTS = torch.ops.higher_order.wrap_with_set_grad_enabled
_AUTOCAST = torch.ops.higher_order.wrap_with_autocast


def inline_bodies(gm: fx.GraphModule) -> None:
    """Put the bodies of such calls in their place, those inside of others too."""
    while found := [node for node in gm.graph.nodes if _body_place(node) is not None]:
        for node in found:
            _inline(gm, node)
    for name in [name for name, part in gm.named_children() if isinstance(part, fx.GraphModule)]:
        if not any(node.op == "get_attr" and node.target == name for node in gm.graph.nodes):
            delattr(gm, name)


def _body_place(node: fx.Node) -> int | None:
    """Where the body stands among the arguments; None of any other node."""
    if node.op != "call_function":
        return None
    if node.target is _GRADIENTS:
        return 1
    return 4 if node.target is _AUTOCAST and not node.args[2] else None


def _inline(gm: fx.GraphModule, node: fx.Node) -> None:
    place = _body_place(node)
    body = node.args[place] if place is not None else None
    if place is None or not isinstance(body, fx.Node):
        raise ValueError(f"{node.name!r} has no body")
    inner: fx.GraphModule = getattr(gm, str(body.target))
    given = iter(node.args[place + 1 :])
    values: dict[fx.Node, fx.Node] = {}
    results: tuple[fx.Node, ...] = ()
    with gm.graph.inserting_before(node):
        for part in inner.graph.nodes:
            if part.op == "placeholder":
                value = next(given)
                if not isinstance(value, fx.Node):
                    raise ValueError(f"{node.name!r} gives {value!r} to its body, expected a value")
                values[part] = value
            elif part.op == "output":
                results = fx.map_arg(part.args[0], values.__getitem__)
            else:
                values[part] = gm.graph.node_copy(part, values.__getitem__)
                if part.op == "get_attr":  # the body of a call inside
                    name = f"{body.target}_{part.target}"
                    setattr(gm, name, getattr(inner, str(part.target)))
                    values[part].target = name
    for reader in list(node.users):
        index = reader.args[1] if reader.target is operator.getitem else None
        if not isinstance(index, int):
            raise ValueError(f"{reader.name!r} reads {node.name!r} as a whole, expected one of its results")
        reader.replace_all_uses_with(results[index])
        gm.graph.erase_node(reader)
    gm.graph.erase_node(node)
    if not body.users:
        gm.graph.erase_node(body)
