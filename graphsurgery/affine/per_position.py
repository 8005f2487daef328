"""Whether a call does the same at every position of a map, reading no more than a neighbourhood of it.

Convolutions, pools, norms in evaluation and activations do. A softmax over positions, attention, a mean over
the map, a norm with statistics of the map do not: on a larger map they give something else at each window.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from graphsurgery.cost import SPLITS, op_name
from graphsurgery.values import is_tensor, tensor_meta

__all__ = ["acts_per_position", "is_pointwise", "is_whole"]

# fmt: off
# What acts on each element alike, or gives all as they are, and is not tagged so in torch 2.14.
_ALIKE = frozenset((
    "dropout", "feature_dropout", "alpha_dropout", "clone", "contiguous", "_to_copy", "to", "detach", "alias",
    "hardswish", "log_sigmoid", "where", "absolute", "negative", "fix", "subtract", "multiply", "divide",
    "__and__", "__or__", "__xor__",
))
_LOCAL = frozenset((
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
    "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "max_pool2d_with_indices", "max_pool3d_with_indices", "prelu", "getitem",
    "constant_pad_nd", "pad", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d",
    "replication_pad1d", "replication_pad2d", "replication_pad3d", "pixel_shuffle", "pixel_unshuffle",
    "channel_shuffle", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d",
    "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d",
))
_MOVES = frozenset((
    "reshape", "permute", "transpose", "squeeze", "unsqueeze", "expand",
))
# Ops along axes that they name, and which argument names them.
_ALONG = {
    "softmax": 1, "log_softmax": 1, "_softmax": 1, "_log_softmax": 1, "mean": 1, "sum": 1, "amax": 1,
    "amin": 1,
    "var": 1, "std": 1, "cumsum": 1, "argmax": 1, "cat": 1, "stack": 1, "select": 1, "unbind": 1, "chunk": 2,
    "split": 2, "split_with_sizes": 2, "tensor_split": 2, "linalg_vector_norm": 2, "norm": 2, "glu": 1,
    "flip": 1,
}
# fmt: on
_LAST = frozenset(("glu", "linalg_vector_norm"))  # without a name, the last axis


def is_pointwise(node: fx.Node) -> bool:
    """Whether a call computes each element from the elements at the same place, or keeps all as they are."""
    if not isinstance(node.target, OpOverload):
        return False
    return torch.Tag.pointwise in node.target.tags or (op_name(node) in _ALIKE and is_tensor(node))


def acts_per_position(node: fx.Node, spatial: Callable[[fx.Node], tuple[int, ...]]) -> bool:
    """Whether a call that reads a map acts alike at every position.

    Args:
        node: the call.
        spatial: the axes of a value that are positions.
    """
    maps = [operand for operand in node.all_input_nodes if is_tensor(operand) and spatial(operand)]
    if not maps or not isinstance(node.target, OpOverload):
        return not maps or op_name(node) == "getitem"
    name, first = op_name(node), maps[0]
    if is_tensor(node) and len(spatial(node)) < max(len(spatial(operand)) for operand in maps):
        return False  # an axis of positions is gone
    if name == "batch_norm":
        return node.args[5] is False  # else it takes its statistics from the map
    if is_pointwise(node) or name in _LOCAL:
        return True
    if name in _MOVES:
        return _sizes(node, spatial) == _sizes(first, spatial)
    rank = tensor_meta(first).dim()
    if name in ("linear", "matmul"):
        return node.args[0] is first and len(maps) == 1 and rank - 1 not in spatial(first)
    if name in ("layer_norm", "rms_norm"):
        shape: Any = node.args[1]
        return all(axis < rank - len(shape) for axis in spatial(first))
    if name == "slice":
        axis, start, stop = _ends(node)
        # what is cut off at either end does not depend on the size
        ends = (start is None or _at_least(start, 0)) and (
            stop in (None, sys.maxsize) or not _at_least(stop, 0)
        )
        return ends or _normal(axis, rank) not in spatial(first)
    if name in _ALONG or name in SPLITS:
        index = _ALONG.get(name, 1)
        given = node.args[index] if len(node.args) > index else node.kwargs.get("dim")
        if given is None:
            given = -1 if name in _LAST else 0
        axes = given if isinstance(given, (list, tuple)) else [given]
        return bool(axes) and all(_normal(axis, rank) not in spatial(first) for axis in axes)
    return False


def _sizes(node: fx.Node, spatial: Callable[[fx.Node], tuple[int, ...]]) -> list[str]:
    """The sizes of the axes of positions, in order."""
    return [str(tensor_meta(node).shape[axis]) for axis in spatial(node)]


def is_whole(node: fx.Node) -> bool:
    """Whether a slice takes all of an axis."""
    start, stop = _ends(node)[1:]
    return start in (None, 0) and stop in (None, sys.maxsize) and (*node.args, 1)[4:5] in ((), (1,))


def _ends(node: fx.Node) -> tuple[Any, Any, Any]:
    """Axis, start and end of a slice."""
    given = node.args[1:4]
    return (*given, *(0, None, None)[len(given) :])  # type: ignore[return-value]  # three in all


def _at_least(value: Any, least: int) -> bool:
    """Whether an end of a slice is a number from `least` on; a symbol counts as one."""
    return not isinstance(value, int) or value >= least


def _normal(axis: Any, rank: int) -> Any:
    return axis % rank if isinstance(axis, int) else axis
