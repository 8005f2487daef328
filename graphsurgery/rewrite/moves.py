"""Permutes and reshapes, and two of them as one."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphsurgery.cost import op_name

__all__ = ["PERMUTES", "RESHAPES", "axis_order", "composed"]

PERMUTES = frozenset(("permute", "transpose", "t", "numpy_T"))
RESHAPES = frozenset(["reshape", "view", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze"])

_aten = torch.ops.aten


def axis_order(node: fx.Node) -> list[int] | None:
    """The order in which a permute reads the axes of its operand: output axis `i` is input axis `order[i]`.

    Returns:
        None if `node` is no permute.
    """
    name = op_name(node)
    if name not in PERMUTES or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    rank = node.meta["val"].dim()
    order = list(range(rank))
    if name in ("t", "numpy_T"):
        return order[::-1]
    arguments: tuple[Any, ...] = (*node.args[1:], *node.kwargs.values())
    if name == "transpose":
        a, b = (axis % rank if rank else 0 for axis in arguments)
        if rank:
            order[a], order[b] = order[b], order[a]
        return order
    return [axis % rank for axis in arguments[0]]


def composed(outer: fx.Node, inner: fx.Node) -> tuple[Any, list[Any]] | None:
    """The one move that does what `inner` and then `outer` do.

    Args:
        outer: Any node.
        inner: Its first operand.

    Returns:
        Target and second argument of a call on `inner`'s operand; None where there is no such call.
    """
    if outer.op != "call_function" or inner.op != "call_function" or outer.args[:1] != (inner,):
        return None
    if len(outer.all_input_nodes) > 1 and op_name(outer) not in RESHAPES:
        return None
    last, first = axis_order(outer), axis_order(inner)
    if last is not None and first is not None:
        return _aten.permute.default, [first[axis] for axis in last]
    if op_name(outer) not in RESHAPES or op_name(inner) not in RESHAPES:
        return None
    if not _keeps_dtype(inner) or not _keeps_dtype(outer):  # view.dtype reads the bits as another type
        return None
    shape = _shape_argument(outer)
    return None if shape is None else (_aten.reshape.default, shape)


def _keeps_dtype(node: fx.Node) -> bool:
    source = node.args[0]
    if not isinstance(source, fx.Node):
        return False
    return bool(source.meta["val"].dtype == node.meta["val"].dtype)


def _shape_argument(node: fx.Node) -> list[Any] | None:
    """The shape that a reshape asks for, as arguments; one free size is written -1."""
    if op_name(node) in ("reshape", "view", "_unsafe_view") and isinstance(node.args[1], (list, tuple)):
        return list(node.args[1])
    shape = list(node.meta["val"].shape)
    free = [axis for axis, size in enumerate(shape) if not isinstance(size, int)]
    if len(free) > 1 or (free and 0 in shape):
        return None
    return [-1 if axis in free else size for axis, size in enumerate(shape)]
