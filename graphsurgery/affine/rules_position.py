"""Rules for ops that read positions: convolutions, transposed ones, average pools and means over axes."""

from __future__ import annotations

from dataclasses import replace
from math import gcd

from graphsurgery.affine.atoms import Atom, Axes, NoFold, Window, size_of
from graphsurgery.affine.rules import Step, ints, normal, pinned, rule
from graphsurgery.affine.rules_linear import fresh


@rule("conv1d", "conv2d", "conv3d")
def conv(step: Step) -> Axes:
    """A convolution over the last dimensions of (N, C, *positions)."""
    weight = step.argument(1, "weight")
    if step.argument(0, "input") is not step.live:
        raise NoFold("not-affine", "the weight of the convolution is not constant")
    shape = step.shape(weight)
    kernel, rank = shape[2:], len(shape) - 2
    if len(step.axes.dims) != rank + 2:
        raise NoFold("unsupported", "a convolution without a batch dimension is not followed")
    stride = ints(step.argument(3, "stride"), rank, 1)
    dilation = ints(step.argument(5, "dilation"), rank, 1)
    pads = _pads(step.argument(4, "padding", 0), kernel, dilation)
    axes = step.axes
    for i in range(rank):
        low = pads[i][0]
        reads = (stride[i], -low, dilation[i] * (kernel[i] - 1) - low, dilation[i])
        axes = window(axes, 2 + i, step.shape()[2 + i], reads, pads[i])
    axes = _channels(axes, int(step.argument(6, "groups", 1)), shape[0])
    return replace(axes, shifted=axes.shifted or step.argument(2, "bias") is not None, scaled=True)


def _pads(padding: object, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> list[tuple[int, int]]:
    """Zeros before and after each axis."""
    if padding == "valid":
        return [(0, 0)] * len(kernel)
    if padding == "same":  # the smaller half in front
        spans = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return [(span // 2, span - span // 2) for span in spans]
    return [(n, n) for n in ints(padding, len(kernel), 0)]


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def conv_transpose(step: Step) -> Axes:
    """A transposed convolution over the last dimensions of (N, C, *positions)."""
    weight = step.argument(1, "weight")
    if step.argument(0, "input") is not step.live:
        raise NoFold("not-affine", "the weight of the convolution is not constant")
    shape = step.shape(weight)  # (in, out/groups, *kernel)
    kernel, rank = shape[2:], len(shape) - 2
    if len(step.axes.dims) != rank + 2:
        raise NoFold("unsupported", "a convolution without a batch dimension is not followed")
    stride = ints(step.argument(3, "stride"), rank, 1)
    padding = ints(step.argument(4, "padding"), rank, 0)
    extra = ints(step.argument(5, "output_padding"), rank, 0)
    groups = int(step.argument(6, "groups", 1))
    dilation = ints(step.argument(7, "dilation"), rank, 1)
    axes = step.axes
    for i in range(rank):
        lo = -padding[i]
        hi = dilation[i] * (kernel[i] - 1) + lo
        writes = (stride[i], lo, hi, dilation[i])
        axes = spread(axes, 2 + i, step.shape()[2 + i], writes, hi + lo + extra[i])
    axes = _channels(axes, groups, shape[1] * groups)
    return replace(axes, shifted=axes.shifted or step.argument(2, "bias") is not None, scaled=True)


def _channels(axes: Axes, groups: int, out: int) -> Axes:
    """The channel dimension of a (grouped) convolution."""
    lead, rest = _leading(axes.dims[1], groups)
    for atom in lead:
        if axes.symbolic(atom):
            raise NoFold("batch-varied", "its groups lie along an axis of symbolic size")
    varied = tuple(atom._replace(varied=True) for atom in lead)
    return axes.consume(rest).with_dim(1, varied + fresh(out // size_of(lead)))


def _leading(dim: tuple[Atom, ...], groups: int) -> tuple[tuple[Atom, ...], tuple[Atom, ...]]:
    """The leading carried atoms along which `groups` blocks stay apart, and the rest.

    Where sizes do not factor, or groups of features made inside of the region follow, coarser blocks do.
    """
    lead: list[Atom] = []
    need, queue = groups, list(dim)
    while queue and queue[0].carried:
        common = gcd(need, queue[0].size)
        if common == 1:
            break
        atom = queue.pop(0)
        whole = atom.size == common
        if not whole:
            atom, minor = atom.split(common)
            queue.insert(0, minor)
        lead.append(atom)
        need //= common
        if not whole:
            break
    return tuple(lead), tuple(queue)


def spread(axes: Axes, index: int, out: int, writes: tuple[int, int, int, int], tail: int) -> Axes:
    """One dimension written through a transposed window; what falls outside of the output is lost.

    Args:
        axes: the axes so far.
        index: the dimension.
        out: its number of positions afterwards.
        writes: `(stride, lo, hi, step)`: position p writes `stride * p + lo ... stride * p + hi` every
            `step`.
        tail: positions of the output behind `stride * (positions - 1)`.

    Raises:
        NoFold: an axis of symbolic size would have to be mixed.
    """
    s, lo, hi, step = writes
    if (s, lo, hi, tail) == (1, 0, 0, 0):
        return axes
    step = step if hi != lo else 0
    dim = axes.dims[index]
    if hi < 0 or tail < lo:  # what is left of a crop depends on the size, so that the real one is needed
        axes = pinned(axes)
    # How many taps an output position has differs between positions, but for a window of stride 1 inside.
    outside = s != 1 or hi > 0 or tail > lo
    if not dim:
        if out == 1:
            return axes
        dim = (_single(axes, index),)
    if len(dim) > 1 or dim[0].fresh or (dim[0].carried and dim[0].varied):
        cause = "a transposed convolution runs over an axis that is already mixed or scaled"
        return axes.mix(index, out, ("structure", cause))
    atom = dim[0]
    inner = atom.window
    if inner is None:
        through = Window(atom.size, s, lo, hi, step, outside, True, tail)
    elif inner.transposed and inner.complete:
        through = inner.spread(s, lo, hi, step, tail)
    elif s == 1:
        return window(axes, index, out, (1, -hi, -lo, step), (hi, tail - lo))
    else:
        cause = "a transposed convolution with strides runs over positions that were read through windows"
        return axes.mix(index, out, ("transposed", cause))
    uneven = atom.uneven or (axes.shifted and outside)
    if atom.uneven:  # a constant that differs along it fixes its size
        axes = pinned(axes)
    return axes.with_dim(index, (Atom(out, atom.axis, atom.stride, False, uneven, through),))


def _single(axes: Axes, index: int) -> Atom:
    """A digit of size one for a dimension of a single position, which no atom stands for."""
    taken = {digit.axis for digit in axes.entry_digits()}
    return Atom(1, index if index not in taken else max(taken) + 1)


def window(axes: Axes, index: int, out: int, reads: tuple[int, int, int, int], pads: tuple[int, int]) -> Axes:
    """One dimension read through a window; positions outside read zero.

    A windowed dimension read through another window composes, unless padding between them invents
    positions that would read from the entry: then the axis is mixed.

    Args:
        axes: the axes so far.
        index: the dimension.
        out: its number of positions afterwards.
        reads: `(stride, lo, hi, step)`: position p reads `stride * p + lo ... stride * p + hi` every `step`.
        pads: zeros that the op puts before and after this dimension.

    Raises:
        NoFold: an axis of symbolic size would have to be mixed.
    """
    s, lo, hi, step = reads
    padded = pads != (0, 0)
    if (s, lo, hi) == (1, 0, 0) and not padded:
        return axes
    dim = axes.dims[index]
    if not dim:  # a single position: features of a constant length
        return axes.with_dim(index, fresh(out))
    if len(dim) > 1 or dim[0].fresh or (dim[0].carried and dim[0].varied):
        return axes.mix(
            index, out, ("structure", "a window runs over an axis that is already mixed or scaled")
        )
    atom = dim[0]
    symbolic = axes.symbolic(atom)
    # Sizes that are symbols cannot be compared: with padding, reading outside is taken for granted.
    outside = padded and (symbolic or lo < 0 or s * (out - 1) + hi > atom.size - 1)
    if symbolic and pads[0] != pads[1]:
        raise NoFold("dynamic-shape", "padding that is not symmetric runs over an axis of symbolic size")
    step = step if hi != lo else 0
    inner = atom.window
    if inner is None:
        through = Window(atom.size, s, lo, hi, step, outside)
    elif (inner := inner.ordinary()) is None:
        cause = "a window runs over positions that a transposed convolution with strides wrote"
        return axes.mix(index, out, ("transposed", cause))
    else:
        low = lo < 0 and inner.hi - inner.s >= 0
        high = outside and (
            symbolic or (s * (out - 1) + hi > atom.size - 1 and inner.s * atom.size + inner.lo < inner.base)
        )
        if low or high:
            # The zeros that this op pads with are not what the layer before would compute there.
            return axes.mix(
                index, out, ("border", "the zeros padded between two windows are not what the first gives")
            )
        through = inner.then(s, lo, hi, step, outside)
    uneven = atom.uneven or (axes.shifted and outside)
    if atom.uneven:  # a constant that differs along it fixes its size
        axes = pinned(axes)
    return axes.with_dim(index, (Atom(out, atom.axis, atom.stride, False, uneven, through),))


@rule("avg_pool1d", "avg_pool2d", "avg_pool3d")
def avg_pool(step: Step) -> Axes:
    """Average pooling; where windows are clipped or their divisors differ, the axis is mixed."""
    rank = int(step.node.target._schema.name[-2])  # type: ignore[union-attr]  # an OpOverload by the registry
    if len(step.axes.dims) != rank + 2:
        raise NoFold("unsupported", "a pool without a batch dimension is not followed")
    kernel = ints(step.argument(1, "kernel_size"), rank, 1)
    stride = ints(step.argument(2, "stride") or kernel, rank, 1)
    padding = ints(step.argument(3, "padding", 0), rank, 0)
    counted = bool(step.argument(5, "count_include_pad", True))
    axes, shape = replace(step.axes, scaled=True), step.shape()
    for i in range(rank):
        size, out = step.axes.shape[2 + i], shape[2 + i]
        symbolic = any(step.axes.symbolic(atom) for atom in step.axes.dims[2 + i])
        clipped = stride[i] * (out - 1) + kernel[i] > size + 2 * padding[i]
        if symbolic:  # sizes cannot be compared; only rounding up can clip
            clipped = bool(step.argument(4, "ceil_mode", False))
        if clipped or (padding[i] and not counted):
            axes = axes.mix(
                2 + i, out, ("clipped-pool", "windows of the pool at the border have other divisors")
            )
        else:
            reads = (stride[i], -padding[i], kernel[i] - 1 - padding[i], 1)
            axes = window(axes, 2 + i, out, reads, (padding[i], padding[i]))
    return axes


@rule("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "_adaptive_avg_pool2d")
def adaptive_avg_pool(step: Step) -> Axes:
    """Adaptive pooling is a plain pool where the sizes divide; else the axis is mixed."""
    axes, shape = replace(step.axes, scaled=True), step.shape()
    for index in range(2, len(shape)):
        size, out = step.axes.shape[index], shape[index]
        if out == 1:
            axes = axes.consume(axes.dims[index]).with_dim(index, ())
        elif size % out == 0:
            kernel = size // out
            axes = pinned(window(axes, index, out, (kernel, 0, kernel - 1, 1), (0, 0)))
        else:
            axes = axes.mix(
                index, out, ("uneven-pool", f"{size} positions do not divide into {out} equal windows")
            )
    return axes


@rule("constant_pad_nd")
def pad(step: Step) -> Axes:
    """Zeros around positions: a window of one tap; a negative pad crops."""
    value = step.argument(2, "value", 0)
    if value != 0:
        raise NoFold("pad-value", f"it pads with {value}, not with zeros")
    pads = ints(step.argument(1, "pad"), 1, 0)
    axes, shape = step.axes, step.shape()
    for i in range(len(pads) // 2):
        index, low, high = len(shape) - 1 - i, pads[2 * i], pads[2 * i + 1]
        if (low, high) == (0, 0):
            continue
        if any(axes.symbolic(atom) for atom in axes.dims[index]):
            raise NoFold("dynamic-shape", "it pads an axis of symbolic size")
        # What a crop leaves depends on the size, so coefficients are read at the real one.
        axes = pinned(window(axes, index, shape[index], (1, -low, -low, 0), (low, high)))
    return replace(axes, scaled=True)


@rule("mean", "sum")
def reduce(step: Step) -> Axes:
    """The mean or sum over dimensions: their atoms are consumed."""
    dims = step.argument(1, "dim")
    if step.argument(3, "dtype") is not None:
        raise NoFold("dtype", "the reduction changes the dtype")
    rank = len(step.axes.dims)
    reduced = {normal(d, rank) for d in ints(dims, 1, 0)} if dims else set(range(rank))
    keep = bool(step.argument(2, "keepdim", False))
    axes = replace(step.axes, scaled=True)
    rest: list[tuple[Atom, ...]] = []
    for index, dim in enumerate(step.axes.dims):
        if index not in reduced:
            rest.append(dim)
            continue
        axes = axes.consume(dim)
        if keep:
            rest.append(())
    return axes.with_dims(rest)
