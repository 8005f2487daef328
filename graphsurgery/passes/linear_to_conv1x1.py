"""Exchange Linear layers for 1x1 convolutions.

Rule:      W x + b over the last axis  ->  the 1x1 convolution of the same numbers over axis 1
Requires:  a Linear with a constant weight (else no match); refused with:
           `dtype` it works on integers or complex numbers;  `free-sizes` more than three axes of positions of
           which several are free;  `empty` its value has no elements;
           `reads-memory` a call of the graph depends on strides;
           `not-finite` weights hold NaN or infinity;  `certificate` both layers differ in float64
Preserves: signature, shapes, dtypes; values up to rounding; weights and their names, but for their shape
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from graphsurgery.calls import arguments
from graphsurgery.cost import op_name
from graphsurgery.layout.exchange import (
    SWAPPED,
    UNBATCHED,
    Exchange,
    Layout,
    Only,
    Refused,
    check_options,
    priced,
)
from graphsurgery.layout.settle import NORM_PRICES
from graphsurgery.rewrite.contracts import Pass, PassResult
from graphsurgery.rewrite.moves import is_reshape
from graphsurgery.values import tensor_meta

__all__ = ["LinearToConv1x1"]

aten = torch.ops.aten

_CONVS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
_TO_THE_END = 2**62
# The norms that are at home where the layers go.
_AT_HOME = ("batch_norm",)


@dataclass(frozen=True)
class LinearToConv1x1(Pass):
    """Exchanges Linear layers for 1x1 convolutions and moves the permutes to the ends of each stretch.

    1. `(B, T, C)` becomes a conv1d, `(B, H, W, C)` a conv2d, `(B, D, H, W, C)` a conv3d, with the channels on
       axis 1; more axes are merged into one.
    2. `(B, C)` and `(C,)` become a conv1d on one position; a flattened `(B, C, 1, 1)` a conv2d.
    3. Slices by a stride before it become the stride of the convolution, a pad with zeros its padding.

    Attributes:
        layout: `"channels-first"` lets everything between the layers be channels first, and writes layer
            norms by hand where that saves permutes; `"channels-last"` leaves layer norms as they are, where
            the channels are last, so that only what lies between two of them is channels first.
        only: Patterns (as for file names) of the module paths of the layers to exchange; none for all.
            `"swapped"` exchanges the layers that the other swap wrote in this graph, and leaves norms where
            they are at home, so that the network comes back that there was.
    """

    layout: Layout = "channels-first"
    only: Only = ()

    name: ClassVar[str] = "linear-to-conv1x1"
    summary: ClassVar[str] = "Linear layers as 1x1 convolutions, with one layout per stretch"
    default: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            PassError: One of them is none of the known ones.
        """
        check_options(self.layout, self.only)

    def run(self, gm: fx.GraphModule) -> PassResult:
        """See `Pass.run`."""
        prices = priced(self.only, NORM_PRICES if self.layout == "channels-first" else {}, _AT_HOME)
        exchange = Exchange(gm, self.name, self.only, prices)
        for node in exchange.layers(("linear",)):
            weight: Any = node.args[1]
            if weight in exchange.constant and tensor_meta(weight).dim() == 2:
                spatial = _positions(node)
                exchange.swap(node, lambda n, s=spatial: _conv(exchange, n, s), f"conv{spatial}d")  # type: ignore[misc]
        return exchange.result(_absorb_slices)


def _positions(node: fx.Node) -> int:
    """Number of axes of positions of the convolution."""
    source: Any = node.args[0]
    rank = tensor_meta(source).dim()
    if node.meta.get(UNBATCHED):
        return rank - 1
    if rank == 2 and (flat := _flattened(source)) is not None:
        return tensor_meta(flat).dim() - 2
    return rank - 2 if 3 <= rank <= 5 else 1


def _flattened(node: fx.Node) -> fx.Node | None:
    """The value with axes of size 1 behind its two that a node is a view of."""
    source = node.args[0] if is_reshape(node) else None
    if not isinstance(source, fx.Node) or not 3 <= tensor_meta(source).dim() <= 5:
        return None
    full, two = tensor_meta(source).shape, tensor_meta(node).shape
    ones = all(isinstance(size, int) and size == 1 for size in full[2:])
    return source if ones and str(full[:2]) == str(two) else None


def _conv(exchange: Exchange, node: fx.Node, spatial: int) -> fx.Node:
    given = arguments(node)
    source: fx.Node = given["input"]
    if not tensor_meta(node).is_floating_point():
        raise Refused("dtype", f"it works on {tensor_meta(node).dtype}, expected floating point")
    rank = tensor_meta(source).dim()
    out, features = tensor_meta(given["weight"]).shape
    weight = exchange.weight(node, given["weight"], (out, features, *[1] * spatial))

    def conv(x: fx.Node) -> fx.Node:
        options = (weight, given["bias"]) if given["bias"] is not None else (weight,)
        return exchange.call(node, _CONVS[spatial - 1], x, *options)

    if rank == spatial + 1 and rank > 2:
        x = exchange.permute(node, source, (rank - 1, *range(rank - 1)))
        return exchange.permute(node, conv(x), (*range(1, rank), 0))
    if rank == 1:
        x = exchange.call(node, aten.reshape.default, source, [1, features, 1])
        return exchange.call(node, aten.reshape.default, conv(x), [out])
    if rank == 2:
        flat = _flattened(source)
        if flat is not None:
            return exchange.call(node, aten.reshape.default, conv(flat), [-1, out])
        x = exchange.call(node, aten.unsqueeze.default, source, -1)
        return exchange.call(node, aten.squeeze.dim, conv(x), -1)
    first = (0, rank - 1, *range(1, rank - 1))
    last = (0, *range(2, rank), 1)
    x = exchange.permute(node, source, first)
    if rank <= 5:
        return exchange.permute(node, conv(x), last)
    sizes = list(tensor_meta(x).shape)
    free = [size for size in sizes if not isinstance(size, int)]
    if len(free) > 1 or (free and isinstance(sizes[0], int)):
        raise Refused("free-sizes", f"of its {rank - 2} axes of positions several are free: {sizes}")
    lead = -1 if free else sizes[0]
    positions = 1
    for size in sizes[2:]:
        positions *= int(size)
    y = conv(exchange.call(node, aten.reshape.default, x, [lead, features, positions]))
    y = exchange.call(node, aten.reshape.default, y, [lead, out, *sizes[2:]])
    return exchange.permute(node, y, last)


def _absorb_slices(gm: fx.GraphModule) -> None:
    """Write slices by a stride of all positions and a pad before them as options of the convolution."""
    for node in list(gm.graph.nodes):
        if SWAPPED not in node.meta or node.target not in _CONVS or len(node.args) > 3:
            continue
        weight: Any = node.args[1]
        spatial = tensor_meta(weight).dim() - 2
        lead = tensor_meta(node).dim() - spatial
        stride, source = [1] * spatial, node.args[0]
        while isinstance(source, fx.Node) and len(source.users) == 1 and (found := _step(source)):
            axis, step = found
            if axis < lead or stride[axis - lead] != 1:
                break
            stride[axis - lead] = step
            source = source.args[0]
        padding = [0] * spatial
        if isinstance(source, fx.Node) and len(source.users) == 1 and (widths := _widths(source, spatial)):
            padding, source = widths, source.args[0]
        if source is node.args[0]:
            continue
        old: Any = node.args[0]
        node.args = (source, weight, node.args[2] if len(node.args) > 2 else None, stride)
        if any(padding):
            node.args += (padding,)
        while old is not source:
            old, gone = old.args[0], old
            gm.graph.erase_node(gone)


def _widths(node: fx.Node, spatial: int) -> list[int] | None:
    """How far a call pads each axis of positions with zeros, if alike at both ends and nothing else."""
    if op_name(node) != "constant_pad_nd":
        return None
    given = arguments(node)
    flat = list(given["pad"])
    pairs = list(zip(flat[::2], flat[1::2], strict=True))[::-1]
    if given["value"] != 0 or len(pairs) > spatial:
        return None
    if any(not isinstance(a, int) or a < 0 or a != b for a, b in pairs):
        return None
    return [0] * (spatial - len(pairs)) + [a for a, _ in pairs]


def _step(node: fx.Node) -> tuple[int, int] | None:
    """Axis and step of a slice from the start to the end by more than one."""
    if op_name(node) != "slice":
        return None
    given = arguments(node)
    whole = given["start"] in (0, None) and (given["end"] is None or given["end"] >= _TO_THE_END)
    rank = tensor_meta(node).dim()
    return (given["dim"] % rank, given["step"]) if whole and given["step"] > 1 else None
