"""Pools of a fixed number of positions, as `nn.AdaptiveAvgPool2d` and `nn.AdaptiveMaxPool2d` write them."""

from __future__ import annotations

from typing import Any

from torch import fx

from graphsurgery.cost import op_name
from graphsurgery.values import is_tensor, tensor_meta

__all__ = ["keeps_all", "pool_call", "pooled", "takes_whole_map"]

_REDUCTIONS = {"mean": "mean", "sum": "sum", "amax": "maximum", "amin": "minimum"}


def pooled(node: fx.Node) -> fx.Node | None:
    """The map that an adaptive pool reads of which `node` is the value; None if it is none.

    A maximum pool gives its places too; `node` is the call that takes the values then.
    """
    if op_name(node).startswith("adaptive_avg_pool"):
        return node.args[0]  # type: ignore[return-value]  # a pool reads a value
    call = node.args[0] if op_name(node) == "getitem" and node.args[1] == 0 else None
    if isinstance(call, fx.Node) and op_name(call).startswith("adaptive_max_pool"):
        return call.args[0]  # type: ignore[return-value]  # a pool reads a value
    return None


def pool_call(node: fx.Node) -> fx.Node:
    """The call that makes the value of a pool: the value itself, but for a maximum pool."""
    return node.args[0] if op_name(node) == "getitem" else node  # type: ignore[return-value]  # of a call


def _to_one(node: fx.Node) -> bool:
    """Whether the value of an adaptive pool has one position, whatever the size of the map."""
    sizes: Any = pool_call(node).args[1]
    return all(size == 1 for size in (sizes if isinstance(sizes, (list, tuple)) else [sizes]))


def keeps_all(node: fx.Node) -> bool:
    """Whether an adaptive pool to more than one position gives the example's map as it is."""
    source = pooled(node)
    if source is None or _to_one(node):
        return False
    before, after = tensor_meta(source).shape, tensor_meta(node).shape
    return [str(size) for size in before] == [str(size) for size in after]


def takes_whole_map(node: fx.Node) -> str:
    """What a call takes of all positions of a map `(B, C, *S)` at once ("mean"), in a word; else empty."""
    if pooled(node) is not None:
        return ("mean" if op_name(node) != "getitem" else "maximum") if _to_one(node) else ""
    source, given = (*node.args, None, None)[:2]
    if op_name(node) not in _REDUCTIONS or not isinstance(source, fx.Node) or not is_tensor(source):
        return ""
    axes: Any = given if isinstance(given, (list, tuple)) else [given]
    rank = tensor_meta(source).dim()
    whole = all(isinstance(axis, int) for axis in axes) and {axis % rank for axis in axes} == set(
        range(2, rank)
    )
    return _REDUCTIONS[op_name(node)] if whole and rank > 2 else ""
