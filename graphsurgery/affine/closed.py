"""Closed forms: coefficients that need no probing, for regions of layers, scales, shifts and sums.

Every value of such a region is a convolution of the entry, and ops act on its kernel:

- a scale and shift along the channels: `diag(a) K`, `a b + c`;
- a layer V after K: for each tap of V, `V[tap] K` is added at the tap's offset (a Linear has one tap);
- a sum: kernels are added where their taps coincide.

The entry itself is the depthwise kernel of ones. Borders do not show: what a kernel reads outside is zero,
and where a shift meets a border the forms have a map of shifts, which is read off a run on zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import gcd, prod
from typing import Any

import torch
from torch import fx

from graphsurgery.affine import rules
from graphsurgery.affine.atoms import Axes, Window
from graphsurgery.affine.forms import Form
from graphsurgery.affine.program import Conv, Linear
from graphsurgery.affine.region import ELEMENTWISE, Region, Scope, is_heavy
from graphsurgery.affine.rules import ints
from graphsurgery.affine.rules_movement import permutation
from graphsurgery.affine.runner import runner
from graphsurgery.cost import op_name
from graphsurgery.values import tensor_meta

_PLAIN = frozenset({"dropout", "feature_dropout", "alias", "clone", "contiguous", "detach", "_to_copy", "to"})
_PARTS = frozenset({"slice", "select"})
_PERMUTES = frozenset({"permute", "movedim", "transpose"})
_CONVS = frozenset({"conv1d", "conv2d", "conv3d"})
_SUMS = {"add": (1.0, 1.0), "sub": (1.0, -1.0), "rsub": (-1.0, 1.0)}


@dataclass(frozen=True)
class Kernel:
    """A value of a region as a grouped convolution of the entry.

    Attributes:
        weight: (out, in/groups, *taps), float64.
        bias: (out), away from borders.
        groups: of the channels.
        reads: for each spatial axis (stride, offset of the first tap, distance of taps).
    """

    weight: torch.Tensor
    bias: torch.Tensor
    groups: int
    reads: tuple[tuple[int, int, int], ...]

    @classmethod
    def identity(cls, channels: int, rank: int) -> Kernel:
        """The entry itself."""
        ones = torch.ones(channels, 1, *[1] * rank, dtype=torch.float64)
        return cls(ones, torch.zeros(channels, dtype=torch.float64), channels, ((1, 0, 1),) * rank)

    @property
    def taps(self) -> tuple[int, ...]:
        """Number of taps of each axis."""
        return tuple(self.weight.shape[2:])

    def diagonal(self, scale: torch.Tensor, shift: torch.Tensor) -> Kernel:
        """After a scale and shift of each channel."""
        rows = scale.reshape(-1, *[1] * (self.weight.dim() - 1))
        return replace(self, weight=self.weight * rows, bias=self.bias * scale + shift)

    def regrouped(self, groups: int) -> Kernel:
        """The same with fewer groups, zeros between them. `groups` divides the present number."""
        if groups == self.groups:
            return self
        merged = self.groups // groups
        out, each = self.weight.shape[0] // self.groups, self.weight.shape[1]
        blocks = self.weight.reshape(groups, merged, out, each, *self.taps)
        wide = blocks.new_zeros(groups, merged, out, merged, each, *self.taps)
        index = torch.arange(merged)
        wide[:, index, :, index] = blocks.transpose(0, 1)
        return replace(
            self, weight=wide.reshape(groups * merged * out, merged * each, *self.taps), groups=groups
        )

    def plus(self, other: Kernel, left: float, right: float) -> Kernel | None:
        """`left * self + right * other`; None where their strides differ."""
        windows = []
        for (s, lo, step), n, (s2, lo2, step2), n2 in zip(
            self.reads, self.taps, other.reads, other.taps, strict=True
        ):
            if s != s2:
                return None
            distance = gcd(step if n > 1 else 0, step2 if n2 > 1 else 0, abs(lo - lo2)) or 1
            first, last = min(lo, lo2), max(lo + (n - 1) * step, lo2 + (n2 - 1) * step2)
            windows.append((s, first, distance, (last - first) // distance + 1))
        groups = gcd(self.groups, other.groups)
        a, b = (k.regrouped(groups).on(windows) for k in (self, other))
        scaled = a.weight if left == 1.0 else left * a.weight  # of a large matrix every copy counts
        return Kernel(
            torch.add(scaled, b.weight, alpha=right), left * a.bias + right * b.bias, groups, a.reads
        )

    def on(self, windows: Sequence[tuple[int, int, int, int]]) -> Kernel:
        """The same on wider windows (stride, first, distance, taps) that hold its own; zeros between."""
        reads = tuple((s, first, distance) for s, first, distance, _ in windows)
        taps = [n for *_, n in windows]
        if reads == self.reads and tuple(taps) == self.taps:
            return self
        wide = self.weight.new_zeros(*self.weight.shape[:2], *taps)
        wide[(slice(None), slice(None), *_places(self, windows))] = self.weight
        return replace(self, weight=wide, reads=reads)

    def then(
        self, weight: torch.Tensor, bias: torch.Tensor, groups: int, reads: Sequence[tuple[int, int, int]]
    ) -> Kernel:
        """After a layer of the given kernel (out, in/groups, *taps) and reads, as in `Kernel`."""
        windows = []
        for (s, lo, step), n, (s2, lo2, step2), n2 in zip(
            self.reads, self.taps, reads, weight.shape[2:], strict=True
        ):
            distance = gcd(step if n > 1 else 0, s * step2 if n2 > 1 else 0) or 1
            first = s * lo2 + lo
            last = first + s * step2 * (n2 - 1) + step * (n - 1)
            windows.append((s * s2, first, distance, (last - first) // distance + 1))
        if (
            set(self.taps) <= {1}
            and self.groups == self.weight.shape[0] == self.groups * self.weight.shape[1]
        ):
            return self._scaled_columns(weight, bias, groups, tuple(w[:3] for w in windows))
        common = gcd(self.groups, groups)
        inner = self.regrouped(common)
        outer = Kernel(weight, bias, groups, tuple(reads)).regrouped(common)
        out, middle, each = weight.shape[0] // common, outer.weight.shape[1], inner.weight.shape[1]
        blocks = inner.weight.reshape(common, middle, -1)
        rows = outer.weight.reshape(common, out, middle, *weight.shape[2:])
        result: torch.Tensor | None = None
        for tap in product(*(range(n) for n in weight.shape[2:])):
            index: tuple[Any, ...] = (..., *tap)
            part = (rows[index] @ blocks).reshape(common, out, each, *self.taps)
            moved = tuple(
                (s * s2, s * (lo2 + j * step2) + lo, step)
                for j, (s, lo, step), (s2, lo2, step2) in zip(tap, self.reads, reads, strict=True)
            )
            if result is None and list(part.shape[3:]) == [n for *_, n in windows]:
                result = part
                continue
            if result is None:
                result = weight.new_zeros(common, out, each, *(n for *_, n in windows))
            places = _places(replace(self, reads=moved), windows)
            result[(slice(None), slice(None), slice(None), *places)] += part
        if result is None:
            raise ValueError("the layer has no taps")
        summed = rows.reshape(common, out, middle, -1).sum(3)
        shift = (summed @ self.bias.reshape(common, middle, 1)).flatten()
        shape = (common * out, each, *result.shape[3:])
        return Kernel(result.reshape(shape), shift + bias, common, tuple(w[:3] for w in windows))

    def _scaled_columns(
        self, weight: torch.Tensor, bias: torch.Tensor, groups: int, reads: tuple[tuple[int, int, int], ...]
    ) -> Kernel:
        """`then` where each channel so far is one entry channel, scaled and shifted."""

        def columns(values: torch.Tensor) -> torch.Tensor:
            return values.reshape(groups, 1, weight.shape[1], *[1] * len(reads))

        parts = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
        shift = bias
        if bool(self.bias.any()):
            shift = (parts * columns(self.bias)).reshape(len(weight), -1).sum(1) + bias
        if bool((self.weight == 1).all()):
            return Kernel(weight, shift, groups, reads)
        return Kernel((parts * columns(self.weight)).reshape(weight.shape), shift, groups, reads)


def _places(kernel: Kernel, windows: Sequence[tuple[int, int, int, int]]) -> tuple[slice, ...]:
    places = []
    for (_, lo, step), n, (_, first, distance, _) in zip(kernel.reads, kernel.taps, windows, strict=True):
        start, stride = (lo - first) // distance, max(step // distance, 1)
        places.append(slice(start, start + (n - 1) * stride + 1, stride))
    return tuple(places)


def closed_form(region: Region, form: Form) -> dict[str, torch.Tensor] | None:
    """Weight and bias of a form in closed form, or None where kernels do not follow a call.

    They may be constants of the graph as they stand there, so nothing may be written into them. A map of
    shifts is not among them, nor a bias at the border: these are read off a run on zeros.
    """
    if "weight" not in form.slots or form.axes.gone != region.axes.gone or form.transposed:
        return None
    atoms = form.axes.atoms()
    features = {atom.axis for atom in atoms if atom.carried and atom.varied} | {
        a.axis for a in form.axes.gone
    }
    whole = len(form.axes.gone) <= 1 and sum(atom.fresh for atom in atoms) <= 1
    if len(features) != 1 or not whole or not any(is_heavy(node) for node in region.nodes):
        return None
    shape, (channel,) = region.scope.shape(region.entry), features
    walk = _Walk(region.scope, channel, len(shape))
    kernel = walk.kernel(region, region.scope.actual(shape[channel], 1))
    layer = next(step for step in form.steps if isinstance(step, (Linear, Conv)))
    groups = layer.groups if isinstance(layer, Conv) else 1
    windows = _windows(form.axes, walk.spatial)
    if kernel is None or windows is None or kernel.groups % groups or not _holds(windows, kernel):
        return None
    weight = kernel.regrouped(groups).on(windows).weight
    carried = [i for i, axis in enumerate(walk.spatial) if not _windowed(form.axes, axis)]
    weight = weight.squeeze([2 + i for i in carried])
    order = [which for which in form.spatial if which is not None]
    if order:
        weight = weight.permute(0, 1, *(2 + which for which in order))
    if weight.numel() != prod(form.slots["weight"]):
        return None
    weight = weight.reshape(form.slots["weight"])
    # At a single position the shift is one number even where its window reaches over a border.
    border = any(a.window is not None and a.window.outside and a.size == 1 for a in form.axes.atoms())
    if "bias" not in form.slots or border:
        return {"weight": weight}
    return {"weight": weight, "bias": kernel.bias}


def _windowed(axes: Axes, axis: int) -> Window | None:
    return next((a.window for a in axes.atoms() if a.axis == axis and a.window is not None), None)


def _windows(axes: Axes, spatial: Sequence[int]) -> list[tuple[int, int, int, int]] | None:
    """What the form reads along each spatial axis, as its axes say; None for transposed windows."""
    windows = []
    for axis in spatial:
        w = _windowed(axes, axis)
        ordinary = w.ordinary() if w else Window(1, 1, 0, 0, 0)
        if ordinary is None:
            return None
        windows.append((ordinary.s, ordinary.lo, max(ordinary.step, 1), ordinary.taps))
    return windows


def _holds(windows: Sequence[tuple[int, int, int, int]], kernel: Kernel) -> bool:
    for (s, lo, step), n, (s2, first, distance, taps) in zip(kernel.reads, kernel.taps, windows, strict=True):
        inside = first <= lo and lo + step * (n - 1) <= first + distance * (taps - 1)
        if s != s2 or not inside or (lo - first) % distance or (n > 1 and step % distance):
            return False
    return True


@dataclass(frozen=True)
class _Value:
    """A value on the walk: its kernel, and which entry axis each of its dimensions is."""

    kernel: Kernel
    layout: tuple[int, ...]


class _Walk:
    """Kernels of the values of a region, one call after the other.

    Attributes:
        channel: the entry axis that is mixed.
        spatial: all other entry axes; kernels have a tap axis for each.
    """

    def __init__(self, scope: Scope, channel: int, rank: int) -> None:
        self.scope, self.channel = scope, channel
        self.spatial = [axis for axis in range(rank) if axis != channel]

    def kernel(self, region: Region, channels: int) -> Kernel | None:
        """The kernel of the exit, or None where a call is not followed."""
        rank = len(self.spatial)
        known = {region.entry: _Value(Kernel.identity(channels, rank), tuple(range(rank + 1)))}
        uses = {o: node for node in region.nodes for o in rules.live_operands(node, self.scope.constant)}
        for node in region.nodes:
            live = rules.live_operands(node, self.scope.constant)
            found = self._step(node, [known[operand] for operand in live], live)
            if found is None:
                return None
            known[node] = found
            for operand in live:
                if uses[operand] is node:
                    known.pop(operand, None)
        return known[region.exit].kernel

    def _step(self, node: fx.Node, live: list[_Value], operands: list[fx.Node]) -> _Value | None:
        name = op_name(node)
        first = live[0]
        if len(live) == 2 and name in _SUMS:
            kernel = self._sum(node, live, operands)
            return None if kernel is None else _Value(kernel, first.layout)
        if len(live) != 1:
            return None
        if name in _PLAIN:
            return first
        if name in _PARTS:
            return self._part(node, first)
        if name in _PERMUTES:
            order = permutation(node, operands[0])
            return _Value(first.kernel, tuple(first.layout[i] for i in order))
        if name in ELEMENTWISE:
            found = self._diagonal(node, operands[0], first)
        elif name == "linear" and first.layout[-1] == self.channel:
            found = self._linear(node, first.kernel)
        elif name in _CONVS and first.layout[1] == self.channel:
            found = self._conv(node, first)
        else:
            return None
        return None if found is None else _Value(found, first.layout)

    def _part(self, node: fx.Node, value: _Value) -> _Value | None:
        """Some positions of an axis, or one, which drops it: the taps move."""
        args: tuple[Any, ...] = (*node.args, *(None,) * 5)
        dim = int(args[1] or 0) % len(value.layout)
        axis = value.layout[dim]
        single = op_name(node) == "select"
        size = self.scope.shape(node.all_input_nodes[0])[dim]
        start, step = args[2] or 0, 1 if single else args[4] or 1
        if axis == self.channel or node.kwargs or not isinstance(start, int) or not isinstance(step, int):
            return None
        start = start + size if start < 0 else start
        place = self.spatial.index(axis)
        s, lo, distance = value.kernel.reads[place]
        moved = list(value.kernel.reads)
        moved[place] = (s * step, lo + s * start, distance)
        layout = value.layout[:dim] + value.layout[dim + 1 :] if single else value.layout
        return _Value(replace(value.kernel, reads=tuple(moved)), layout)

    def _sum(self, node: fx.Node, live: list[_Value], operands: list[fx.Node]) -> Kernel | None:
        left, right = _SUMS[op_name(node)]
        alpha: Any = node.args[2] if len(node.args) > 2 else node.kwargs.get("alpha", 1)
        alike = live[0].layout == live[1].layout and len({self.scope.shape(o) for o in operands}) == 1
        if not alike or not isinstance(alpha, (int, float)):
            return None
        left, right = (left * alpha, right) if op_name(node) == "rsub" else (left, right * alpha)
        return live[0].kernel.plus(live[1].kernel, left, right)

    def _diagonal(self, node: fx.Node, operand: fx.Node, value: _Value) -> Kernel | None:
        """A call that scales and shifts along the channels: its value at zero and its derivative."""
        rank, channel = len(tensor_meta(node).shape), value.layout.index(self.channel)
        if rank != len(value.layout) or (op_name(node) == "batch_norm" and channel != 1):
            return None
        for other in node.all_input_nodes:
            if other in self.scope.constant and op_name(node) != "batch_norm":
                shape = self.scope.shape(other)
                if any(n != 1 and rank - len(shape) + i != channel for i, n in enumerate(shape)):
                    return None
        sizes = [1] * rank
        sizes[channel] = value.kernel.weight.shape[0]
        zero = torch.zeros(sizes, dtype=torch.float64, requires_grad=True)
        shift = runner(self.scope, operand, (node,), 1)(zero)
        (scale,) = torch.autograd.grad(shift.sum(), zero)  # a difference would lose it beside a large shift
        return value.kernel.diagonal(scale.flatten(), shift.detach().flatten())

    def _linear(self, node: fx.Node, kernel: Kernel) -> Kernel | None:
        weight = self._constant(node, 1, "weight")
        if weight is None or weight.dim() != 2:
            return None
        rank = len(self.spatial)
        return kernel.then(
            weight.reshape(*weight.shape, *[1] * rank), self._bias(node, len(weight)), 1, ((1, 0, 1),) * rank
        )

    def _conv(self, node: fx.Node, value: _Value) -> Kernel | None:
        weight = self._constant(node, 1, "weight")
        if weight is None:
            return None
        call = rules.Call()
        call.node, call.sizes = node, self.scope.sizes
        rank = weight.dim() - 2
        stride = ints(call.argument(3, "stride"), rank, 1)
        dilation = ints(call.argument(5, "dilation"), rank, 1)
        padding: Any = call.argument(4, "padding", 0)
        if padding == "same":
            zeros = tuple(d * (k - 1) // 2 for d, k in zip(dilation, weight.shape[2:], strict=True))
        else:
            zeros = ints(0 if padding == "valid" else padding, rank, 0)
        reads, taps = [(1, 0, 1)] * len(self.spatial), [1] * len(self.spatial)
        places = [self.spatial.index(axis) for axis in value.layout[2:]]
        for i, place in enumerate(places):
            reads[place], taps[place] = (stride[i], -zeros[i], dilation[i]), weight.shape[2 + i]
        order = sorted(range(rank), key=places.__getitem__)
        wide = weight.permute(0, 1, *(2 + i for i in order)).reshape(*weight.shape[:2], *taps)
        groups = int(call.argument(6, "groups", 1))
        return value.kernel.then(wide, self._bias(node, len(weight)), groups, reads)

    def _constant(self, node: fx.Node, index: int, name: str) -> torch.Tensor | None:
        value = node.args[index] if len(node.args) > index else node.kwargs.get(name)
        if not isinstance(value, fx.Node) or value not in self.scope.constant:
            return None
        return self.scope.constant_value(value)

    def _bias(self, node: fx.Node, size: int) -> torch.Tensor:
        bias = self._constant(node, 2, "bias")
        return torch.zeros(size, dtype=torch.float64) if bias is None else bias
