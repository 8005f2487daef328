"""Permutes and reshapes, and two of them as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from graphsurgery.cost import axis_order, op_name

__all__ = ["composed", "is_reshape", "merged_axes"]

_RESHAPES = frozenset(["reshape", "view", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze"])

_aten = torch.ops.aten


def is_reshape(node: fx.Node) -> bool:
    """Whether `node` gives the elements of its operand in order, in the shape that its `meta["val"]` tells.

    A squeeze of an axis of symbolic size does not: the axis stays at a batch of two and goes at one.
    """
    source = node.args[0] if node.args else None
    if op_name(node) not in _RESHAPES or not isinstance(source, fx.Node):
        return False
    value = source.meta["val"]
    if value.dtype != node.meta["val"].dtype:  # view.dtype reads the bits as another type
        return False
    if op_name(node) != "squeeze":
        return True
    axes: Any = node.args[1] if len(node.args) > 1 else range(value.dim())
    return all(isinstance(value.shape[axis], int) for axis in ([axes] if isinstance(axes, int) else axes))


def merged_axes(before: Sequence[int], after: Sequence[int]) -> list[list[int]] | None:
    """The axes that a reshape merges into each new one.

    Args:
        before: sizes of the axes.
        after: sizes of the new axes, of the same product.

    Returns:
        For each new axis the axes that make it, in order; None where an axis is split.
    """
    groups: list[list[int]] = []
    axis = 0
    for wanted in after:
        group, size = [], 1
        while size < wanted and axis < len(before):
            group.append(axis)
            size *= before[axis]
            axis += 1
        if size != wanted:
            return None
        groups.append(group)
    if groups:
        groups[-1] += range(axis, len(before))  # of size 1
    return groups


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
    last, first = axis_order(outer), axis_order(inner)
    if last is not None and first is not None:
        return _aten.permute.default, [first[axis] for axis in last]
    if not is_reshape(outer) or not is_reshape(inner):
        return None
    shape = _shape_argument(outer)
    return None if shape is None else (_aten.reshape.default, shape)


def _shape_argument(node: fx.Node) -> list[Any] | None:
    """The shape that a reshape asks for, as arguments; one free size is written -1."""
    if op_name(node) in ("reshape", "view", "_unsafe_view") and isinstance(node.args[1], (list, tuple)):
        return list(node.args[1])
    shape = list(node.meta["val"].shape)
    free = [axis for axis, size in enumerate(shape) if not isinstance(size, int)]
    if len(free) > 1 or (free and 0 in shape):
        return None
    return [-1 if axis in free else size for axis, size in enumerate(shape)]
