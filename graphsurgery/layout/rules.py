"""Calls that can work on values whose axes come in another order, and how they are written then.

A rule says what order a call makes when its operands come in one (`onward`), which order it needs to make a
given one (`back`), and writes it. Every call without a rule works in the natural order alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphsurgery.calls import arguments, is_random
from graphsurgery.cost import SPLITS, op_name
from graphsurgery.layout import norms
from graphsurgery.layout.orders import Order, regrouped
from graphsurgery.layout.write import Writer
from graphsurgery.rewrite.moves import is_reshape
from graphsurgery.values import Sizes, is_tensor, tensor_meta

__all__ = ["Mode", "Rule", "rule_of"]

aten = torch.ops.aten

# What acts on each element alike and is not tagged so in torch 2.14.
_ALIKE = frozenset(
    ["dropout", "feature_dropout", "alpha_dropout", "_to_copy", "hardswish", "log_sigmoid", "detach", "alias"]
)
_COPIES = frozenset(["clone", "contiguous"])
_ALONG = frozenset(
    ["softmax", "_softmax", "log_softmax", "_log_softmax", "slice", "cumsum", "glu", "flip", "roll", "narrow"]
)
_REDUCES = frozenset(["mean", "sum", "amax", "amin", "select", "unbind", "argmax", "argmin", "prod"])
_AXES = ("dim", "dims", "axis")


@dataclass(frozen=True)
class Mode:
    """A call in another order.

    Attributes:
        reads: The order of its operands.
        makes: The order of its value, or of each piece of it.
    """

    reads: Order
    makes: Order


@dataclass(frozen=True)
class Rule:
    """How one call works in other orders.

    Attributes:
        onward: The order made of operands in an order; None if it cannot be.
        back: The order of operands that makes an order; None if there is none.
        write: Writes the call in a mode.
        norm: Whether it is a norm, which is another program in another order.
    """

    onward: Callable[[Order], Order | None]
    back: Callable[[Order], Order | None]
    write: Callable[[Writer, Mode], fx.Node]
    norm: bool = False


def rule_of(node: fx.Node, constant: frozenset[fx.Node], sizes: Sizes) -> Rule | None:
    """The rule of a call; None where it works in the natural order alone.

    Args:
        node: A call on live values.
        constant: The constants of the graph.
        sizes: Its sizes.
    """
    name = op_name(node)
    live = [o for o in node.all_input_nodes if o not in constant and is_tensor(o)]
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    if is_random(node):  # its numbers would fall on other elements
        return None
    if name == "expand":
        return _expand(node, live)
    if not live or not all(is_tensor(o) or o in constant or _is_number(o) for o in node.all_input_nodes):
        return None
    rank = tensor_meta(live[0]).dim()
    if name in SPLITS - {"unbind"} or name in _ALONG:
        return _along(node, rank)
    if name in _REDUCES:
        return _reduces(node, rank)
    if name == "cat":
        return _cat(node, live)
    if name == "constant_pad_nd":
        return _same(lambda w, m: _pad(w, node, m))
    if is_reshape(node):
        return _view(node, sizes)
    if name in ("layer_norm", "rms_norm", "batch_norm"):
        written = norms.written(node, constant)
        if written is None:
            return None
        kept = lambda order: order if norms.fits(node, order) else None  # noqa: E731 (both ways)
        return Rule(kept, kept, written, norm=True)
    if not is_tensor(node):
        return None
    copies = name in _COPIES and node.kwargs.get("memory_format") in (
        *(None, torch.contiguous_format, torch.preserve_format),
    )
    tagged = torch.Tag.pointwise in node.target.tags and name not in _COPIES
    if not copies and not tagged and name not in _ALIKE and not _scalar_prelu(node):
        return None
    rank = tensor_meta(node).dim()
    if any(tensor_meta(operand).dim() not in (0, rank) for operand in live) or rank == 0:
        return None
    return _same(lambda w, m: _alike(w, node, m))


def _is_number(node: fx.Node) -> bool:
    return not isinstance(node.meta.get("val"), (torch.Tensor, tuple, list))


def _scalar_prelu(node: fx.Node) -> bool:
    if op_name(node) not in ("prelu", "_prelu_kernel") or not isinstance(node.args[1], fx.Node):
        return False
    return tensor_meta(node.args[1]).numel() == 1 and op_name(node) == "prelu"


def _same(write: Callable[[Writer, Mode], fx.Node]) -> Rule:
    return Rule(lambda order: order, lambda order: order, write)


def _alike(writer: Writer, node: fx.Node, mode: Mode) -> fx.Node:
    """A call on each element alike; constants are brought into the order of the values that they meet."""
    rank = len(mode.reads)

    def operand(value: fx.Node) -> fx.Node:
        if not is_tensor(value):
            return writer.made[value][0]
        if value not in writer.constants:
            return writer.read(value, mode.reads if tensor_meta(value).dim() else None)
        if tensor_meta(value).numel() == 1 or op_name(node) == "prelu":
            return writer.made[value][0]
        return writer.constant(value, rank, mode.reads)

    args: Any = fx.map_arg(node.args, operand)
    kwargs: Any = fx.map_arg(node.kwargs, operand)
    return writer.call(node.target, *args, **kwargs)


def _along(node: fx.Node, rank: int) -> Rule | None:
    """A call along one or several axes that keeps them."""
    named = _axes(node)
    if named is None or any(o.op != "get_attr" and not is_tensor(o) for o in _in_axes(node)):
        return None

    def write(writer: Writer, mode: Mode) -> fx.Node:
        return _with_axes(writer, node, mode, rank)

    return _same(write)


def _in_axes(node: fx.Node) -> list[fx.Node]:
    value = next((arguments(node)[name] for name in _AXES if name in arguments(node)), None)
    return [v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, fx.Node)]


def _axes(node: fx.Node) -> tuple[str, Any] | None:
    """Name and value of the argument that names axes; None where all are meant or none is named."""
    for name, value in arguments(node).items():
        if name in _AXES:
            return None if value is None or value == [] else (name, value)
    return None


def _with_axes(writer: Writer, node: fx.Node, mode: Mode, rank: int) -> fx.Node:
    """The call with its axes renamed; arguments stay where they are, by place or by name."""
    named = _axes(node)
    if named is None:
        raise TypeError(f"{node.name} names no axes")
    name, value = named
    place = list(arguments(node)).index(name)
    new: Any = (
        [mode.reads.index(axis % rank) for axis in value]
        if isinstance(value, (list, tuple))
        else mode.reads.index(value % rank)
    )
    args = [
        fx.map_arg(argument, lambda o: writer.read(o, mode.reads) if o is node.args[0] else writer.made[o][0])
        for argument in node.args
    ]
    kwargs = dict(node.kwargs)
    if place < len(args):
        args[place] = new
    elif name in kwargs or new != value:
        kwargs[name] = new
    return writer.call(node.target, *args, **kwargs)


def _reduces(node: fx.Node, rank: int) -> Rule | None:
    """A call that makes one of each axis that it names: an axis of size 1, or none."""
    given, named = arguments(node), _axes(node)
    if named is None:
        return None
    value = named[1] if isinstance(named[1], (list, tuple)) else [named[1]]
    if any(not isinstance(axis, int) for axis in value):
        return None
    gone = {axis % rank for axis in value}
    if given.get("keepdim"):
        return _along(node, rank)
    kept = [axis for axis in range(rank) if axis not in gone]

    def onward(order: Order) -> Order | None:
        return tuple(kept.index(axis) for axis in order if axis not in gone)

    def back(order: Order) -> Order | None:
        found = [kept[axis] for axis in order]
        for axis in sorted(gone):  # it stays behind the axis that it follows
            left = [a for a in range(axis) if a in found]
            found.insert(found.index(left[-1]) + 1 if left else 0, axis)
        return tuple(found)

    return Rule(onward, back, lambda w, m: _with_axes(w, node, m, rank))


def _cat(node: fx.Node, live: list[fx.Node]) -> Rule | None:
    rank = tensor_meta(node).dim()
    if any(tensor_meta(operand).dim() != rank for operand in node.all_input_nodes):
        return None  # an old-style empty tensor
    axis = arguments(node)["dim"] % rank

    def write(writer: Writer, mode: Mode) -> fx.Node:
        parts: Any = node.args[0]
        read = [
            writer.constant(part, rank, mode.reads, broadcast=False)
            if part in writer.constants
            else writer.read(part, mode.reads)
            for part in parts
        ]
        return writer.call(node.target, read, mode.reads.index(axis))

    return _same(write)


def _pad(writer: Writer, node: fx.Node, mode: Mode) -> fx.Node:
    given = arguments(node)
    rank, widths = len(mode.reads), list(given["pad"])
    pairs = [(0, 0)] * (rank - len(widths) // 2)
    pairs += [(widths[i], widths[i + 1]) for i in range(len(widths) - 2, -1, -2)]
    pairs = [pairs[axis] for axis in mode.reads]
    while pairs and pairs[0] == (0, 0):
        pairs.pop(0)
    flat = [width for pair in reversed(pairs) for width in pair]
    value = fx.map_arg(given["value"], lambda o: writer.made[o][0])
    return writer.call(node.target, writer.read(node.all_input_nodes[0], mode.reads), flat, value)


def _expand(node: fx.Node, live: list[fx.Node]) -> Rule | None:
    source: Any = node.args[0]
    rank = tensor_meta(node).dim()
    if not is_tensor(source) or tensor_meta(source).dim() != rank or len(live) > 1:
        return None

    def write(writer: Writer, mode: Mode) -> fx.Node:
        sizes: Any = node.args[1]
        operand = (
            writer.constant(source, rank, mode.reads, broadcast=False)
            if source in writer.constants
            else writer.read(source, mode.reads)
        )
        new = [fx.map_arg(sizes[axis], lambda o: writer.made[o][0]) for axis in mode.reads]
        return writer.call(node.target, operand, new)

    return _same(write)


def _view(node: fx.Node, sizes: Sizes) -> Rule | None:
    source: Any = node.args[0]
    before, after = ([sizes.prime(size) for size in tensor_meta(n).shape] for n in (source, node))

    def back(order: Order) -> Order | None:
        found = regrouped(after, before, order)
        return found if found is not None and regrouped(before, after, found) == order else None

    def write(writer: Writer, mode: Mode) -> fx.Node:
        shape = list(tensor_meta(node).shape)
        given = node.args[1] if op_name(node) == "reshape" else None
        if isinstance(given, (list, tuple)):
            asked = [fx.map_arg(size, lambda o: writer.made[o][0]) for size in given]
        else:
            asked = [size if isinstance(size, int) else -1 for size in shape]
        read = writer.read(source, mode.reads)
        return writer.call(aten.reshape.default, read, [asked[axis] for axis in mode.makes])

    free = sum(not isinstance(size, int) for size in tensor_meta(node).shape)
    if op_name(node) != "reshape" and free > 1:
        return None
    return Rule(lambda order: regrouped(before, after, order), back, write)
