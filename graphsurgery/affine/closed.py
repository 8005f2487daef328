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
from math import gcd
from typing import Any

import torch
from torch import fx

from graphsurgery.affine import rules
from graphsurgery.affine.atoms import Axes, Window
from graphsurgery.affine.forms import Form
from graphsurgery.affine.program import Conv, Linear, Permute, Reshape
from graphsurgery.affine.region import Region, Scope, is_heavy, runner
from graphsurgery.affine.rules import ints
from graphsurgery.cost import op_name
from graphsurgery.values import tensor_meta

_ELEMENTWISE = frozenset({"mul", "div", "neg", "add", "sub", "rsub", "batch_norm"})
_PLAIN = frozenset({"dropout", "feature_dropout", "alias", "clone", "contiguous", "detach", "_to_copy", "to"})
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
        return Kernel(left * a.weight + right * b.weight, left * a.bias + right * b.bias, groups, a.reads)

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
        result = weight.new_zeros(common, out, each, *(n for *_, n in windows))
        blocks = inner.weight.reshape(common, middle, -1)
        rows = outer.weight.reshape(common, out, middle, *weight.shape[2:])
        for tap in product(*(range(n) for n in weight.shape[2:])):
            index: tuple[Any, ...] = (..., *tap)
            part = (rows[index] @ blocks).reshape(common, out, each, *self.taps)
            moved = tuple(
                (s * s2, s * (lo2 + j * step2) + lo, step)
                for j, (s, lo, step), (s2, lo2, step2) in zip(tap, self.reads, reads, strict=True)
            )
            places = _places(replace(self, reads=moved), windows)
            result[(slice(None), slice(None), slice(None), *places)] += part
        summed = rows.reshape(common, out, middle, -1).sum(3)
        shift = (summed @ self.bias.reshape(common, middle, 1)).flatten()
        shape = (common * out, each, *result.shape[3:])
        return Kernel(result.reshape(shape), shift + bias, common, tuple(w[:3] for w in windows))

    def _scaled_columns(
        self, weight: torch.Tensor, bias: torch.Tensor, groups: int, reads: tuple[tuple[int, int, int], ...]
    ) -> Kernel:
        """`then` where each channel so far is one entry channel, scaled and shifted."""
        each, out = weight.shape[1], weight.shape[0] // groups

        def columns(values: torch.Tensor) -> torch.Tensor:
            rows = values.reshape(groups, 1, each).expand(groups, out, each)
            return rows.reshape(groups * out, each, *[1] * len(reads))

        shift = (weight * columns(self.bias)).reshape(len(weight), -1).sum(1)
        return Kernel(weight * columns(self.weight.flatten()), shift + bias, groups, reads)


def _places(kernel: Kernel, windows: Sequence[tuple[int, int, int, int]]) -> tuple[slice, ...]:
    places = []
    for (_, lo, step), n, (_, first, distance, _) in zip(kernel.reads, kernel.taps, windows, strict=True):
        start, stride = (lo - first) // distance, max(step // distance, 1)
        places.append(slice(start, start + (n - 1) * stride + 1, stride))
    return tuple(places)


def closed_form(region: Region, form: Form) -> dict[str, torch.Tensor] | None:
    """Weight and bias of a form in closed form, or None where kernels do not follow a call.

    A map of shifts is not among them.
    """
    if any(isinstance(step, (Reshape, Permute)) for step in form.steps) or form.axes.gone != region.axes.gone:
        return None
    layer = next((step for step in form.steps if isinstance(step, (Linear, Conv))), None)
    heavy = [node for node in region.nodes if is_heavy(node)]
    if layer is None or not heavy:
        return None
    rank = len(layer.kernel) if isinstance(layer, Conv) else 0
    shape = region.scope.shape(region.entry)
    channel = 1 if rank else len(shape) - 1
    if rank and len(shape) != rank + 2:
        return None
    kernel = _Walk(region.scope, channel, rank).kernel(region, region.scope.actual(shape[channel], 1))
    if kernel is None:
        return None
    groups = layer.groups if isinstance(layer, Conv) else 1
    windows = _windows(form.axes, rank)
    if windows is None or kernel.groups % groups or not _holds(windows, kernel):
        return None
    weight = kernel.regrouped(groups).on(windows).weight
    if tuple(weight.shape) != tuple(form.slots["weight"]):
        return None
    return {"weight": weight, "bias": kernel.bias} if "bias" in form.slots else {"weight": weight}


def _windows(axes: Axes, rank: int) -> list[tuple[int, int, int, int]] | None:
    """What the form reads along each spatial axis, as its axes say; None for transposed windows."""
    windows = []
    for dim in axes.dims[len(axes.dims) - rank :]:
        w = dim[0].window if dim else None
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


class _Walk:
    """Kernels of the values of a region, one call after the other."""

    def __init__(self, scope: Scope, channel: int, rank: int) -> None:
        self.scope, self.channel, self.rank = scope, channel, rank

    def kernel(self, region: Region, channels: int) -> Kernel | None:
        """The kernel of the exit, or None where a call is not followed."""
        known = {region.entry: Kernel.identity(channels, self.rank)}
        uses = {o: node for node in region.nodes for o in rules.live_operands(node, self.scope.constant)}
        for node in region.nodes:
            live = rules.live_operands(node, self.scope.constant)
            if not all(operand in known for operand in live):
                return None
            found = self._step(node, [known[operand] for operand in live], live)
            if found is None:
                return None
            known[node] = found
            for operand in live:
                if uses[operand] is node:
                    known.pop(operand, None)
        return known[region.exit]

    def _step(self, node: fx.Node, live: list[Kernel], operands: list[fx.Node]) -> Kernel | None:
        name = op_name(node)
        if len(live) == 2 and name in _SUMS:
            shapes = {self.scope.shape(operand) for operand in operands}
            left, right = _SUMS[name]
            alpha: Any = node.args[2] if len(node.args) > 2 else node.kwargs.get("alpha", 1)
            if len(shapes) > 1 or not isinstance(alpha, (int, float)):
                return None
            left, right = (left * alpha, right) if name == "rsub" else (left, right * alpha)
            return live[0].plus(live[1], left, right)
        if len(live) != 1:
            return None
        if name in _PLAIN:
            return live[0]
        if name in _ELEMENTWISE:
            return self._diagonal(node, operands[0], live[0])
        if name == "linear" and not self.rank:
            return self._linear(node, live[0])
        if name in _CONVS and self.rank:
            return self._conv(node, live[0])
        return None

    def _diagonal(self, node: fx.Node, operand: fx.Node, kernel: Kernel) -> Kernel | None:
        """A call that scales and shifts along the channels: seen on zeros and ones."""
        rank = len(tensor_meta(node).shape)
        if op_name(node) == "batch_norm" and self.channel != 1:
            return None
        for other in node.all_input_nodes:
            if other in self.scope.constant and op_name(node) != "batch_norm":
                shape = self.scope.shape(other)
                if any(n != 1 and rank - len(shape) + i != self.channel for i, n in enumerate(shape)):
                    return None
        sizes = [1] * rank
        sizes[self.channel] = kernel.weight.shape[0]
        with torch.no_grad():
            run = runner(self.scope, operand, (node,), 1)
            shift = run(torch.zeros(sizes, dtype=torch.float64))
            scale = run(torch.ones(sizes, dtype=torch.float64)) - shift
        return kernel.diagonal(scale.flatten(), shift.flatten())

    def _linear(self, node: fx.Node, kernel: Kernel) -> Kernel | None:
        weight = self._constant(node, 1, "weight")
        if weight is None or weight.dim() != 2:
            return None
        return kernel.then(weight, self._bias(node, weight.shape[0]), 1, ())

    def _conv(self, node: fx.Node, kernel: Kernel) -> Kernel | None:
        weight = self._constant(node, 1, "weight")
        if weight is None:
            return None
        call = rules.Call()
        call.node, call.sizes = node, self.scope.sizes
        stride = ints(call.argument(3, "stride"), self.rank, 1)
        dilation = ints(call.argument(5, "dilation"), self.rank, 1)
        padding: Any = call.argument(4, "padding", 0)
        if padding == "same":
            zeros = tuple(d * (k - 1) // 2 for d, k in zip(dilation, weight.shape[2:], strict=True))
        else:
            zeros = ints(0 if padding == "valid" else padding, self.rank, 0)
        reads = tuple((s, -zero, d) for s, zero, d in zip(stride, zeros, dilation, strict=True))
        bias = self._bias(node, weight.shape[0])
        return kernel.then(weight, bias, int(call.argument(6, "groups", 1)), reads)

    def _constant(self, node: fx.Node, index: int, name: str) -> torch.Tensor | None:
        value = node.args[index] if len(node.args) > index else node.kwargs.get(name)
        if not isinstance(value, fx.Node) or value not in self.scope.constant:
            return None
        return self.scope.constant_value(value)

    def _bias(self, node: fx.Node, size: int) -> torch.Tensor:
        bias = self._constant(node, 2, "bias")
        return torch.zeros(size, dtype=torch.float64) if bias is None else bias
