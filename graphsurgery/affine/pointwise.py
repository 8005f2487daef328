"""Calls that act along some axes of a value and alike at every index of all others.

A *layer* is affine and acts on features: a 1x1 convolution, a Linear, a batch norm in evaluation, a constant
that scales or shifts. A *mover* is linear and acts on positions: a pool, a mean, an interpolation, a pad.
Two calls whose axes have nothing in common commute, up to the shift: see `Mover.keeps_constants`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import fx

from graphsurgery.affine.atoms import NoFold
from graphsurgery.affine.region import Scope, is_heavy
from graphsurgery.affine.rules import ints, normal
from graphsurgery.cost import op_name
from graphsurgery.graph import get_attr_value
from graphsurgery.values import is_tensor, tensor_meta

__all__ = ["Layer", "Mover", "memory_readers", "read_layer", "read_mover"]

aten = torch.ops.aten
_ELEMENTWISE = frozenset(
    overload
    for packet in (aten.mul, aten.div, aten.add, aten.sub, aten.rsub)
    for overload in (packet.Tensor, packet.Scalar)
)
_SHIFTING = ("add", "sub", "rsub")
_POOL = re.compile(r"(?P<adaptive>_?adaptive_)?avg_pool(?P<rank>[123])d")
_RESIZE = re.compile(
    r"_?upsample_(nearest|nearest_exact|linear|bilinear|bicubic|trilinear)(?P<rank>[123])d(_aa)?"
)


@dataclass(frozen=True)
class Layer:
    """An affine call, the same at every index of the axes that it does not act on.

    Attributes:
        node: the call.
        live: its one operand that is not constant.
        axes: the axes of `live` that it mixes, or along which its numbers differ.
        shifts: whether it adds a constant.
        trailing: how many of the last axes it tells apart; an axis before them may be taken away.
    """

    node: fx.Node
    live: fx.Node
    axes: frozenset[int]
    shifts: bool
    trailing: int

    @property
    def heavy(self) -> bool:
        """Whether it multiplies by weights."""
        return is_heavy(self.node)


@dataclass(frozen=True)
class Mover:
    """A linear call on positions, the same for every index of the axes that it does not act on.

    Attributes:
        nodes: the call; for a mean over positions that a view merged, the view and the mean.
        live: its operand.
        axes: the axes of `live` that it acts on.
        keeps_constants: whether it turns a map of one number into a map of that number, so that a shift may
            come before or after it.
        drops: whether the axes are gone afterwards.
    """

    nodes: tuple[fx.Node, ...]
    live: fx.Node
    axes: frozenset[int]
    keeps_constants: bool = True
    drops: bool = False

    @property
    def node(self) -> fx.Node:
        """The call whose value leaves it."""
        return self.nodes[-1]


def memory_readers(scope: Scope) -> dict[fx.Node, list[fx.Node]]:
    """For each `get_attr` node of a tensor the calls that read that tensor, under whatever name.

    Tensors that share memory (a weight tied to another, a slice of one) count as one.
    """
    nodes = [node for node in scope.gm.graph.nodes if node.op == "get_attr" and is_tensor(node)]
    readers: dict[int, list[fx.Node]] = {}
    for node in nodes:
        readers.setdefault(_memory(scope, node), []).extend(node.users)
    return {node: readers[_memory(scope, node)] for node in nodes}


def _memory(scope: Scope, node: fx.Node) -> int:
    tensor = get_attr_value(scope.gm, str(node.target))
    try:
        return int(tensor.untyped_storage()._cdata)
    except NotImplementedError:  # a tensor without memory of the plain kind is only itself
        return id(tensor)


def read_layer(scope: Scope, node: fx.Node) -> Layer | None:
    """Read a call as a layer; None where it is none."""
    live = _live(scope, node)
    if live is None:
        return None
    value, operand = tensor_meta(node), tensor_meta(live)
    if value.dtype != operand.dtype or not value.is_floating_point():
        return None
    name, rank = op_name(node), operand.dim()
    if name in ("conv1d", "conv2d", "conv3d"):
        spatial = int(name[4])
        channel = rank - spatial - 1
        if node.args[0] is not live or channel not in (0, 1) or not _is_pointwise(node, spatial):
            return None
        return Layer(node, live, frozenset((channel,)), _argument(node, 2, "bias") is not None, rank)
    if name in ("linear", "matmul"):
        weight = _argument(node, 1, "weight")
        if node.args[0] is not live or rank < 2 or not isinstance(weight, fx.Node):
            return None
        if tensor_meta(weight).dim() != 2:
            return None
        shifts = name == "linear" and _argument(node, 2, "bias") is not None
        return Layer(node, live, frozenset((rank - 1,)), shifts, 1)
    if name == "batch_norm":
        if node.args[0] is not live or _argument(node, 5, "training") is not False or node.args[3] is None:
            return None
        return Layer(node, live, frozenset((1,)), True, rank) if rank >= 2 else None
    if node.target is aten.neg.default:
        return Layer(node, live, frozenset(), False, 0)
    return _elementwise(scope, node, live) if node.target in _ELEMENTWISE else None


def _live(scope: Scope, node: fx.Node) -> fx.Node | None:
    """The one operand that is not constant; None where there are more, or symbols among them."""
    if node.op != "call_function" or not is_tensor(node) or node in scope.constant:
        return None
    others = [operand for operand in node.all_input_nodes if operand not in scope.constant]
    if len(others) != 1 or not is_tensor(others[0]):
        return None
    reads: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), lambda n: reads.append(n) if n is others[0] else None)
    return others[0] if len(reads) == 1 else None


def _argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    return node.args[index] if index < len(node.args) else node.kwargs.get(name, default)


def _is_pointwise(node: fx.Node, rank: int) -> bool:
    """Whether a convolution has a kernel, a stride and a padding that read one position each."""
    weight = _argument(node, 1, "weight")
    if any(size != 1 for size in tensor_meta(weight).shape[2:]):
        return False
    padding = _argument(node, 4, "padding", 0)
    try:
        ends = (0,) if isinstance(padding, str) else ints(padding, rank, 0)
        return set(ints(_argument(node, 3, "stride"), rank, 1)) == {1} and set(ends) == {0}
    except NoFold:
        return False


def _elementwise(scope: Scope, node: fx.Node, live: fx.Node) -> Layer | None:
    if node.args[0] is not live and op_name(node) == "div":
        return None
    others = [argument for argument in node.args[:2] if argument is not live]
    if len(others) != 1:
        return None
    shifts = op_name(node) in _SHIFTING
    if not isinstance(others[0], fx.Node):
        return Layer(node, live, frozenset(), shifts, 0)
    shape = tensor_meta(others[0]).shape
    rank = tensor_meta(live).dim()
    if str(tensor_meta(node).shape) != str(tensor_meta(live).shape) or len(shape) > rank:
        return None  # the constant would make the value larger
    axes = frozenset(rank - len(shape) + i for i, size in enumerate(shape) if size != 1)
    return Layer(node, live, axes, shifts, len(shape))


def read_mover(scope: Scope, node: fx.Node) -> Mover | None:
    """Read a call, or a view and the mean that alone reads it, as a mover; None where it is none."""
    if node.op != "call_function" or not is_tensor(node) or not node.args or node in scope.constant:
        return None
    live = node.args[0]
    if not isinstance(live, fx.Node) or not is_tensor(live):
        return None
    value, operand = tensor_meta(node), tensor_meta(live)
    if value.dtype != operand.dtype or not value.is_floating_point():
        return None
    name, rank = op_name(node), operand.dim()
    try:
        if matched := _POOL.fullmatch(name):
            plain = bool(matched["adaptive"]) or _pools_evenly(node, int(matched["rank"]))
            return Mover((node,), live, _last(rank, int(matched["rank"])), plain)
        if matched := _RESIZE.fullmatch(name):
            return Mover((node,), live, _last(rank, int(matched["rank"])))
        if name in ("pad", "constant_pad_nd"):
            return _pad(node, live)
    except NoFold:
        return None
    if node.target in (aten.mean.dim, aten.sum.dim_IntList):
        return _reduction(scope, node, live)
    return None


def _last(rank: int, count: int) -> frozenset[int]:
    return frozenset(range(rank - count, rank))


def _pools_evenly(node: fx.Node, rank: int) -> bool:
    """Whether every window is divided by the number of positions of the map that it reads."""
    padding = ints(_argument(node, 3, "padding", 0), rank, 0)
    counted = bool(_argument(node, 5, "count_include_pad", True))
    return _argument(node, 6, "divisor_override") is None and (not any(padding) or not counted)


def _pad(node: fx.Node, live: fx.Node) -> Mover | None:
    rank = tensor_meta(live).dim()
    widths = ints(_argument(node, 1, "pad"), 1, 0)
    constant = op_name(node) == "constant_pad_nd" or _argument(node, 2, "mode", "constant") == "constant"
    value = _argument(node, 2 if op_name(node) == "constant_pad_nd" else 3, "value", 0)
    if constant and value not in (0, None):
        return None
    axes = frozenset(rank - 1 - i // 2 for i, width in enumerate(widths) if width)
    return Mover((node,), live, axes, not constant or max(widths) <= 0)


def _reduction(scope: Scope, node: fx.Node, live: fx.Node) -> Mover | None:
    dims, rank = _argument(node, 1, "dim"), tensor_meta(live).dim()
    if not dims or _argument(node, 3, "dtype") is not None:
        return None
    axes = frozenset(normal(d, rank) for d in dims)
    nodes: tuple[fx.Node, ...] = (node,)
    source = live
    merged = _merged(scope, live, axes)
    if merged is not None:
        axes, source, nodes = merged, live.all_input_nodes[0], (live, node)
    drops = merged is not None or not _argument(node, 2, "keepdim", False)
    return Mover(nodes, source, axes, op_name(node) == "mean", drops)


def _merged(scope: Scope, view: fx.Node, axes: frozenset[int]) -> frozenset[int] | None:
    """The axes that a view merges into the one axis that is reduced; None where it does something else."""
    if op_name(view) != "reshape" or len(axes) != 1 or len(view.users) != 1 or len(view.all_input_nodes) != 1:
        return None
    before, after = _primes(scope, view.all_input_nodes[0]), _primes(scope, view)
    if before is None or after is None or len(before) <= len(after):
        return None
    (axis,) = axes
    stop = axis + len(before) - len(after) + 1
    fits = before[:axis] == after[:axis] and before[stop:] == after[axis + 1 :]
    return frozenset(range(axis, stop)) if fits and prod(before[axis:stop]) == after[axis] else None


def _primes(scope: Scope, node: fx.Node) -> Sequence[int] | None:
    try:
        return scope.shape(node)
    except KeyError:  # a size that the graph did not have when it was read
        return None
