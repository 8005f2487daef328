"""A program: the few calls that a form stands for, runnable on tensors and countable before they exist.

The certificate runs the very program that is later written into the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

import torch
import torch.nn.functional as F

from graphsurgery.cost import Cost, copied

Shape = tuple[int, ...]
Layout = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Reshape:
    """A view in another shape; sizes may hold primes that stand for symbols."""

    out: Shape


@dataclass(frozen=True)
class Permute:
    """A permutation of dimensions."""

    order: tuple[int, ...]
    out: Shape


@dataclass(frozen=True)
class Pad:
    """Zeros before and after the last dimensions, first of them first; negative numbers crop."""

    pads: tuple[tuple[int, int], ...]
    out: Shape


@dataclass(frozen=True)
class PixelShuffle:
    """Channels (C r r) of (N, C r r, H, W) spread over r x r positions each."""

    factor: int
    out: Shape


@dataclass(frozen=True)
class Take:
    """Positions `start`, `start + step`, ... before `stop` of a dimension; a single one drops it."""

    dim: int
    start: int
    stop: int
    step: int
    single: bool
    out: Shape


@dataclass(frozen=True)
class Linear:
    """`x @ weight.T + bias` over the last dimension; slots `weight` (out, in) and `bias` (out)."""

    bias: bool
    features: int
    out: Shape


@dataclass(frozen=True)
class Conv:
    """A convolution over (N, C, *positions); slots `weight` (out, in/groups, *kernel) and `bias` (out)."""

    bias: bool
    kernel: Shape
    stride: Shape
    padding: Shape | str  # "same" puts the larger half of an odd number of zeros behind
    dilation: Shape
    groups: int
    features: int  # input channels per group
    out: Shape


@dataclass(frozen=True)
class ConvTranspose:
    """A transposed convolution; slots `weight` (in, out/groups, *kernel) and `bias` (out)."""

    bias: bool
    kernel: Shape
    stride: Shape
    padding: Shape
    output_padding: Shape
    dilation: Shape
    groups: int
    features: int  # output channels per group
    into: Shape  # shape that it reads
    out: Shape


@dataclass(frozen=True)
class Scale:
    """Multiplication by slot `scale`, which broadcasts."""

    out: Shape


@dataclass(frozen=True)
class Shift:
    """Addition of a slot, which broadcasts."""

    out: Shape
    slot: str = "shift"


Step = Reshape | Permute | Pad | PixelShuffle | Take | Linear | Conv | ConvTranspose | Scale | Shift
_CONVS = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


def run(
    steps: Sequence[Step], slots: Mapping[str, torch.Tensor], x: torch.Tensor, actual: Callable[[int], int]
) -> torch.Tensor:
    """Run a program.

    Args:
        steps: its calls.
        slots: weight, bias, scale and shift, in the dtype of `x`.
        x: the entry.
        actual: turns a size written with primes into a real one.
    """
    for step in steps:
        match step:
            case Reshape(out):
                x = x.reshape([actual(size) for size in out])
            case Permute(order, _):
                x = x.permute(order)
            case Pad(pads, _):
                x = F.pad(x, [n for pair in reversed(pads) for n in pair])
            case PixelShuffle(factor, _):
                x = F.pixel_shuffle(x, factor)
            case Take(dim, start, stop, stride, single, _):
                x = (
                    x.select(dim, start)
                    if single
                    else x[(slice(None),) * dim + (slice(start, stop, stride),)]
                )
            case Linear(bias, _, _):
                x = F.linear(x, slots["weight"], slots["bias"] if bias else None)
            case Conv():
                x = _CONVS[len(step.kernel) - 1](
                    x,
                    slots["weight"],
                    slots["bias"] if step.bias else None,
                    step.stride,
                    step.padding,
                    step.dilation,
                    step.groups,
                )
            case ConvTranspose():
                x = _TRANSPOSED[len(step.kernel) - 1](
                    x,
                    slots["weight"],
                    slots["bias"] if step.bias else None,
                    step.stride,
                    step.padding,
                    step.output_padding,
                    step.groups,
                    step.dilation,
                )
            case Scale(_):
                x = x * slots["scale"]
            case Shift(_, slot):
                x = x + slots[slot]
    return x


def cost(steps: Sequence[Step], slots: Mapping[str, Shape], actual: Callable[[int, int], int]) -> Cost:
    """What a program costs, per sample, parameters included.

    Args:
        steps: Its calls.
        slots: Shapes of weight, bias, scale and shift.
        actual: Turns a size written with primes into a real one, at a batch size.
    """
    total = Cost(params=sum(prod(shape) for shape in slots.values()))
    for step in steps:
        out = prod(actual(size, 1) for size in step.out)
        match step:
            case Reshape() | Take():
                total += Cost(nodes=1)
            case Permute(order, shape):
                sizes = dict(zip(order, (actual(size, 2) for size in shape), strict=True))
                total += Cost(moved=copied(out, order, [sizes[axis] for axis in range(len(order))]), nodes=1)
            case Pad() | PixelShuffle():
                total += Cost(moved=out, nodes=1)
            case Linear():
                total += Cost(macs=out * step.features, nodes=1)
            case Conv():
                total += Cost(macs=out * step.features * prod(step.kernel), nodes=1)
            case ConvTranspose():  # each element read meets out/groups * kernel weights
                read = prod(actual(size, 1) for size in step.into)
                total += Cost(macs=read * step.features * prod(step.kernel), nodes=1)
            case Scale() | Shift():
                total += Cost(elementwise=out, nodes=1)
    return total


def compact(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """The same moves, where a view, a permute and a view are a pixel shuffle as that."""
    match steps:
        case (Reshape(split), Permute((0, 1, 4, 2, 5, 3), _), Reshape(out)) if len(out) == 4:
            n, c, r, r2, h, w = split
            if r == r2 and out == (n, c, h * r, w * r):
                return (PixelShuffle(r, out),)
    return steps


def moves(source: Layout, target: Layout, sizes: Mapping[int, int]) -> tuple[Step, ...]:
    """The fewest views and permutes that bring one layout of labelled atoms into another.

    Args:
        source: labels of the atoms of each dimension, major first.
        target: the same labels in another order or grouping.
        sizes: the size of each label.
    """
    # A label of size one may lie anywhere.
    source, target = (
        tuple(tuple(a for a in dim if sizes[a] != 1) for dim in layout) for layout in (source, target)
    )
    flat, wanted = [a for dim in source for a in dim], [a for dim in target for a in dim]
    shape_in, shape_out = _shape(source, sizes), _shape(target, sizes)
    if flat == wanted:
        return () if shape_in == shape_out else (Reshape(shape_out),)
    blocks = _blocks(source, target)
    leader = {block[0]: i for i, block in enumerate(blocks)}
    order = tuple(leader[label] for label in wanted if label in leader)
    block_sizes = tuple(prod(sizes[a] for a in block) for block in blocks)
    permuted = tuple(block_sizes[i] for i in order)
    if block_sizes == shape_in and permuted == shape_out:
        return (Permute(order, permuted),)
    # Keep dimensions of size one in place where that spares a reshape.
    unit = _with_units(source, target, blocks, order)
    if unit is not None:
        return (Permute(unit, tuple(shape_in[i] for i in unit)),)
    steps: list[Step] = []
    if block_sizes != shape_in:
        steps.append(Reshape(block_sizes))
    steps.append(Permute(order, permuted))
    if permuted != shape_out:
        steps.append(Reshape(shape_out))
    return tuple(steps)


def _shape(layout: Layout, sizes: Mapping[int, int]) -> Shape:
    return tuple(prod(sizes[a] for a in dim) for dim in layout)


def _blocks(source: Layout, target: Layout) -> list[tuple[int, ...]]:
    """Longest runs of labels that stay together, in source order; no run crosses a dimension."""
    follows: dict[int, int] = {}
    for dim in target:
        follows.update(pairwise(dim))
    blocks: list[tuple[int, ...]] = []
    for dim in source:
        run_: list[int] = []
        for label in dim:
            if run_ and follows.get(run_[-1]) == label:
                run_.append(label)
            else:
                if run_:
                    blocks.append(tuple(run_))
                run_ = [label]
        if run_:
            blocks.append(tuple(run_))
    return blocks


def _with_units(
    source: Layout, target: Layout, blocks: list[tuple[int, ...]], order: tuple[int, ...]
) -> tuple[int, ...] | None:
    """A pure permute that also places dimensions of size one, if each dimension is at most one block."""
    if len(source) != len(target) or len(blocks) != sum(1 for dim in source if dim):
        return None
    if len(blocks) != sum(1 for dim in target if dim):
        return None
    where = {dim[0]: i for i, dim in enumerate(source) if dim}
    spare = [i for i, dim in enumerate(source) if not dim]
    return tuple(where[dim[0]] if dim else spare.pop(0) for dim in target)
