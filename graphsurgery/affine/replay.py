"""Calls of a graph run again in float64 on random inputs: the certificate of passes that move or join layers.

As in `graphsurgery.affine.certify`, agreement on random dense inputs proves two affine maps equal, with
probability 1, up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx

from graphsurgery.affine.region import Scope
from graphsurgery.cost import op_name
from graphsurgery.values import is_tensor, tensor_meta

__all__ = ["draw", "replay"]


def draw(scope: Scope, node: fx.Node, batch: int, seed: int) -> torch.Tensor:
    """A random dense float64 value of a node, at its real size.

    Args:
        scope: the graph.
        node: whose shape and device it takes.
        batch: what the batch symbols stand for; other symbols are as in the example.
        seed: of the random numbers.
    """
    value = tensor_meta(node)
    shape = [scope.sizes.at(size, batch) for size in value.shape]
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double().to(value.device)


def replay(
    scope: Scope, nodes: Iterable[fx.Node], values: Mapping[fx.Node, torch.Tensor], batch: int
) -> torch.Tensor:
    """Run calls in float64 and return the value of the last one.

    Constants are computed in float64 from their leaves, so that no rounding of theirs is hidden.

    Args:
        scope: the graph; it knows the constants.
        nodes: calls, each after its operands.
        values: the live values that they read, float64.
        batch: what the batch symbols stand for.
    """
    known: dict[fx.Node, Any] = dict(values)

    def operand(node: fx.Node) -> Any:
        if node not in known:
            if node in scope.constant and is_tensor(node):
                known[node] = scope.constant_value(node)
            else:
                known[node] = scope.sizes.at(node.meta["val"], batch)
        return known[node]

    last: Any = None
    with torch.no_grad():
        for node in nodes:
            if op_name(node) in ("_to_copy", "to"):
                last = known[node] = operand(node.all_input_nodes[0])  # no rounding in between
                continue
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), operand)
            last = known[node] = node.target(*args, **kwargs)  # type: ignore[operator]  # an op
    if not isinstance(last, torch.Tensor):
        raise TypeError("the last call does not give a tensor")
    return last
