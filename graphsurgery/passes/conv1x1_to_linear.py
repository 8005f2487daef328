"""Exchange 1x1 convolutions for Linear layers.

Rule:      the 1x1 convolution over axis 1  ->  W x + b of the same numbers over the last axis
Requires:  a convolution whose kernel is 1 and whose weight is constant (else no match), or with `patches` one
           whose kernel is its stride; refused with:
           `groups` it has more than one group;  `dtype` it works on complex numbers;
           `free-sizes` sizes of the picture that patches are cut from are free;
           `empty` its value has no elements;
           `reads-memory` a call of the graph depends on strides;
           `not-finite` weights hold NaN or infinity;  `certificate` both layers differ in float64
Preserves: signature, shapes, dtypes; values up to rounding; weights and their names, but for their shape
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
from torch import fx

from graphsurgery.calls import arguments
from graphsurgery.cost import op_name
from graphsurgery.layout.exchange import SWAPPED, Exchange, Layout, Only, Refused, check_options, priced
from graphsurgery.layout.settle import NORM_PRICES
from graphsurgery.layout.write import sized_as
from graphsurgery.rewrite.contracts import Pass, PassResult
from graphsurgery.rewrite.moves import is_reshape
from graphsurgery.rewrite.sweep import erase_unread
from graphsurgery.values import tensor_meta

__all__ = ["Conv1x1ToLinear"]

aten = torch.ops.aten

# The norms that are at home where the layers go.
_AT_HOME = ("layer_norm", "rms_norm")


@dataclass(frozen=True)
class Conv1x1ToLinear(Pass):
    """Exchanges 1x1 convolutions for Linear layers and moves the permutes to the ends of each stretch.

    1. A stride becomes slices before the layer, padding a pad.
    2. On a map of one position the layer reads `(B, C)`, without any permute.
    3. With `patches`, a convolution whose kernel is its stride (a patch embedding) becomes a Linear on
       patches.

    Attributes:
        layout: `"channels-last"` lets everything between the layers be channels last, and has batch norms
            work on `(N, C)` where that saves permutes; `"channels-first"` leaves batch norms as they are, so
            that only what lies between two of them is channels last.
        only: Patterns (as for file names) of the module paths of the layers to exchange; none for all.
            `"swapped"` exchanges the layers that the other swap wrote in this graph, and leaves norms where
            they are at home, so that the network comes back that there was.
        patches: Whether convolutions whose kernel is their stride are exchanged too.
    """

    layout: Layout = "channels-last"
    only: Only = ()
    patches: bool = False

    name: ClassVar[str] = "conv1x1-to-linear"
    summary: ClassVar[str] = "1x1 convolutions as Linear layers, with one layout per stretch"
    default: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            PassError: One of them is none of the known ones.
        """
        check_options(self.layout, self.only)

    def run(self, gm: fx.GraphModule) -> PassResult:
        """See `Pass.run`."""
        prices = priced(self.only, NORM_PRICES if self.layout == "channels-last" else {}, _AT_HOME)
        exchange = Exchange(gm, self.name, self.only, prices)
        for node in exchange.layers(("conv1d", "conv2d", "conv3d")):
            geometry = _Geometry.of(node)
            if node.args[1] not in exchange.constant:
                continue
            if geometry.pointwise or (self.patches and geometry.patches):
                exchange.swap(node, lambda n, g=geometry: _linear(exchange, n, g), "linear")  # type: ignore[misc]
        return exchange.result(_absorb_views)


@dataclass(frozen=True)
class _Geometry:
    """The options of a convolution, one number per axis of positions."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @classmethod
    def of(cls, node: fx.Node) -> _Geometry:
        given = arguments(node)
        kernel = tuple(int(size) for size in tensor_meta(given["weight"]).shape[2:])

        def full(value: Any) -> tuple[int, ...]:
            items = list(value) if isinstance(value, (list, tuple)) else [value]
            return tuple(items * len(kernel) if len(items) == 1 else items)

        # of a kernel of 1, "same" and "valid" both mean no padding; others are told by a negative one
        padding = given["padding"]
        named = (0,) if padding == "valid" or set(kernel) == {1} else (-1,)
        padding = full(named if isinstance(padding, str) else padding)
        return cls(kernel, full(given["stride"]), padding, full(given["dilation"]), int(given["groups"]))

    @property
    def pointwise(self) -> bool:
        return all(size == 1 for size in self.kernel)

    @property
    def patches(self) -> bool:
        whole = self.kernel == self.stride and not any(self.padding)
        return whole and all(step == 1 for step in self.dilation)


def _linear(exchange: Exchange, node: fx.Node, geometry: _Geometry) -> fx.Node:
    given = arguments(node)
    x: fx.Node = given["input"]
    if geometry.groups != 1:
        raise Refused("groups", f"it has {geometry.groups} groups, a Linear has one")
    if not tensor_meta(node).is_floating_point():
        raise Refused("dtype", f"it works on {tensor_meta(node).dtype}, expected floating point")
    weight = exchange.weight(node, given["weight"], (len(tensor_meta(given["weight"])), _inputs(given)))
    bias = () if given["bias"] is None else (given["bias"],)
    spatial = len(geometry.kernel)
    batched = tensor_meta(x).dim() == spatial + 2
    if not geometry.pointwise:
        return _on_patches(exchange, node, geometry, weight, bias)
    x = _sampled(exchange, node, x, geometry, lead=1 + int(batched))
    rank = tensor_meta(x).dim()
    sizes = tensor_meta(x).shape[1 + int(batched) :]
    if batched and all(isinstance(size, int) and size == 1 for size in sizes):
        flat = exchange.call(node, aten.reshape.default, x, [-1, _inputs(given)])
        y = exchange.call(node, aten.linear.default, flat, weight, *bias)
        return exchange.call(node, aten.reshape.default, y, [-1, tensor_meta(y).shape[1], *sizes])
    channels = int(batched)
    last = (*(axis for axis in range(rank) if axis != channels), channels)
    first = tuple(sorted(range(rank), key=last.__getitem__))
    y = exchange.call(node, aten.linear.default, exchange.permute(node, x, last), weight, *bias)
    return exchange.permute(node, y, first)


def _inputs(given: dict[str, Any]) -> int:
    return prod(int(size) for size in tensor_meta(given["weight"]).shape[1:])


def _sampled(exchange: Exchange, node: fx.Node, x: fx.Node, geometry: _Geometry, lead: int) -> fx.Node:
    """The positions that a 1x1 convolution reads."""
    if any(geometry.padding):
        widths = [width for width in reversed(geometry.padding) for _ in range(2)]
        sizes = list(tensor_meta(x).shape)
        for axis, width in enumerate(geometry.padding, lead):
            sizes[axis] = sizes[axis] + 2 * width
        x = exchange.call(node, aten.constant_pad_nd.default, x, widths, 0.0)
        sized_as(exchange.work, x, sizes)  # the fake kernel loses symbols
    for axis, step in enumerate(geometry.stride):
        if step != 1:
            x = exchange.call(node, aten.slice.Tensor, x, lead + axis, 0, sys.maxsize, step)
    return x


def _on_patches(
    exchange: Exchange, node: fx.Node, geometry: _Geometry, weight: fx.Node, bias: tuple[fx.Node, ...]
) -> fx.Node:
    x: Any = node.args[0]
    spatial = len(geometry.kernel)
    lead = tensor_meta(x).dim() - spatial
    if lead != 2:
        raise Refused("free-sizes", "it has no batch axis; add one to have patches cut")
    sizes = list(tensor_meta(x).shape)[lead:]
    if not all(isinstance(size, int) for size in sizes):
        raise Refused("free-sizes", f"the sizes {sizes} are free, expected plain numbers to cut patches from")
    counts = [int(size) // step for size, step in zip(sizes, geometry.stride, strict=True)]
    for axis, (size, count, step) in enumerate(zip(sizes, counts, geometry.stride, strict=True)):
        if size != count * step:  # what is left of a patch is read by none
            x = exchange.call(node, aten.slice.Tensor, x, lead + axis, 0, count * step)
    channels = int(tensor_meta(x).shape[1])
    pairs = [n for pair in zip(counts, geometry.kernel, strict=True) for n in pair]
    x = exchange.call(node, aten.reshape.default, x, [-1, channels, *pairs])
    positions, within = range(2, 2 + 2 * spatial, 2), range(3, 3 + 2 * spatial, 2)
    x = exchange.permute(node, x, (0, *positions, 1, *within))
    x = exchange.call(node, aten.reshape.default, x, [-1, *counts, channels * prod(geometry.kernel)])
    y = exchange.call(node, aten.linear.default, x, weight, *bias)
    return exchange.permute(node, y, (0, spatial + 1, *range(1, spatial + 1)))


def _absorb_views(gm: fx.GraphModule) -> None:
    """Let a swapped Linear read more axes than two, or one, where views around it only merge or add these."""
    for node in list(gm.graph.nodes):
        if SWAPPED not in node.meta or op_name(node) != "linear":
            continue
        inward, outward = [node.args[0]], [node]
        while is_reshape(inward[-1]) and len(inward[-1].users) == 1:
            inward.append(inward[-1].args[0])
        while len(outward[-1].users) == 1 and is_reshape(after := next(iter(outward[-1].users))):
            outward.append(after)
        pairs = ((source, made) for made in outward[:0:-1] for source in inward[:0:-1])
        source, made = next((pair for pair in pairs if _around(node, *pair)), (None, node))
        if source is None:
            continue
        node.replace_input_with(inward[0], source)
        made.replace_all_uses_with(node)
        node.meta["val"] = made.meta["val"]
        erase_unread([made, inward[0]])


def _around(linear: fx.Node, source: fx.Node, made: fx.Node) -> bool:
    """Whether a Linear can read one value and make the other, with nothing but its features in other axes."""
    *lead, features = tensor_meta(source).shape
    *kept, out = tensor_meta(made).shape
    read, written = (tensor_meta(n).shape[-1] for n in (linear.args[0], linear))  # type: ignore[arg-type]
    return str(lead) == str(kept) and (features, out) == (read, written)
