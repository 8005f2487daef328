"""Calls that give back one of their operands, read off the call alone.

Each rule names the operand that a node repeats if shape, dtype and device agree, which the caller checks.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import fx

from graphsurgery.cost import axis_order, op_name
from graphsurgery.rewrite.moves import is_reshape

__all__ = ["IDENTITIES", "turns_signed_zero"]

_NOTHING = frozenset(["alias", "detach", "lift_fresh", "lift_fresh_copy", "clone", "contiguous"])
_DROPOUT = frozenset(["dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"])
_CASTS = frozenset(["to", "_to_copy", "type_as", "convert_element_type"])
_SELECTIONS = frozenset(["expand", "expand_as", "slice", "narrow", "repeat"])
_PADS = frozenset(("constant_pad_nd", "pad"))
_PIECES = frozenset(["split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk"])


def _operand(node: fx.Node, index: int = 0) -> fx.Node | None:
    value = node.args[index] if len(node.args) > index else None
    return value if isinstance(value, fx.Node) else None


def _nothing(node: fx.Node) -> fx.Node | None:
    return _operand(node) if op_name(node) in _NOTHING else None


def _dropout(node: fx.Node) -> fx.Node | None:
    if op_name(node) not in _DROPOUT:
        return None
    arguments = dict(zip(("input", "p", "train"), node.args, strict=False)) | node.kwargs
    return _operand(node) if arguments.get("train") is False or arguments.get("p") == 0 else None


def _cast(node: fx.Node) -> fx.Node | None:
    return _operand(node) if op_name(node) in _CASTS else None


def _view(node: fx.Node) -> fx.Node | None:
    name = op_name(node)
    if is_reshape(node) or name in _SELECTIONS:
        return _operand(node)
    source = _operand(node)
    if name == "getitem" and source is not None and op_name(source) in _PIECES and node.args[1] == 0:
        return _operand(source)
    if name == "cat" and isinstance(node.args[0], (list, tuple)) and len(node.args[0]) == 1:
        only = node.args[0][0]
        return only if isinstance(only, fx.Node) else None
    return None


def _permute(node: fx.Node) -> fx.Node | None:
    order, source = axis_order(node), _operand(node)
    if order is None or source is None:
        return None
    shape = source.meta["val"].shape
    moved = [axis for axis in order if str(shape[axis]) != "1"]
    return source if moved == sorted(moved) else None


def _pad(node: fx.Node) -> fx.Node | None:
    if op_name(node) not in _PADS or len(node.args) < 2 or not isinstance(node.args[1], (list, tuple)):
        return None
    return _operand(node) if all(type(width) is int and width == 0 for width in node.args[1]) else None


def _neutral(node: fx.Node) -> fx.Node | None:
    name, source = op_name(node), _operand(node)
    if len(node.args) < 2 or source is None or not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    if node.meta["val"].is_complex() or node.kwargs.get("rounding_mode") is not None:
        return None
    literal = node.args[1]
    if not isinstance(literal, (int, float)):
        return None
    if name in ("mul", "div"):
        return source if literal == 1 else None
    if name in ("add", "sub") and node.kwargs.get("alpha", 1) == 1 and len(node.args) == 2:
        return source if literal == 0 else None
    return None


def turns_signed_zero(node: fx.Node) -> str | None:
    """Why it is not exact: x + 0.0 and x - (-0.0) turn a -0.0 into 0.0; x - 0.0 and x + (-0.0) do not."""
    name, literal = op_name(node), node.args[1]
    if name not in ("add", "sub") or not node.meta["val"].is_floating_point():
        return None
    negative = isinstance(literal, float) and math.copysign(1.0, literal) < 0
    if negative == (name == "add"):
        return None
    sign = "+" if name == "add" else "-"
    return f"x {sign} {literal} is not exactly x: it turns -0.0 into 0.0"


IDENTITIES: tuple[tuple[str, Callable[[fx.Node], fx.Node | None]], ...] = (
    ("nothing", _nothing),
    ("dropout", _dropout),
    ("cast", _cast),
    ("view", _view),
    ("permute", _permute),
    ("pad", _pad),
    ("neutral", _neutral),
)
