"""Rules for ops that take a part of a value: slices, splits, and indices that are constant."""

from __future__ import annotations

import sys
from itertools import pairwise
from typing import Any

from torch import fx

from graphsurgery.affine.atoms import Atom, Axes, NoFold, size_of
from graphsurgery.affine.rules import Step, ints, normal, pinned, rule
from graphsurgery.affine.rules_linear import fresh
from graphsurgery.affine.rules_position import window
from graphsurgery.cost import SPLITS, op_name
from graphsurgery.values import is_tensor, tensor_meta

_OPEN = sys.maxsize  # how an open end of a slice is written


@rule("slice")
def slice_(step: Step) -> Axes:
    """Every `step`-th position from `start` to `end` of one dimension."""
    index = _dim(step, 1)
    start, end, stride = (step.argument(i, n) for i, n in ((2, "start"), (3, "end"), (4, "step")))
    if _symbolic(step.axes, index):
        if start in (None, 0) and stride in (None, 1) and (end is None or end == _OPEN):
            return step.axes
        raise _cut_symbol()
    size = step.axes.shape[index]
    start, end = _plain(start, 0), _plain(end, _OPEN)
    first = range(size)[start:end].start  # negative and too large bounds, as slices take them
    return cut(step.axes, index, first, step.shape()[index], _plain(stride, 1))


@rule("narrow")
def narrow(step: Step) -> Axes:
    """A run of positions of one dimension."""
    index = _dim(step, 1)
    if _symbolic(step.axes, index):
        raise _cut_symbol()
    start = normal(_plain(step.argument(2, "start"), 0), step.axes.shape[index])
    return cut(step.axes, index, start, step.shape()[index])


@rule("select")
def select(step: Step) -> Axes:
    """One position of a dimension, which is dropped."""
    return _pick(step.axes, _dim(step, 1), _plain(step.argument(2, "index"), 0))


@rule(*SPLITS)
def split(step: Step) -> Axes:
    """The operand as a whole: the calls that pick a piece cut it."""
    return step.axes


@rule("getitem")
def piece(step: Step) -> Axes:
    """One piece of a split value; its place follows from the sizes of the pieces before it."""
    source, which = step.live, step.node.args[1]
    if op_name(source) not in SPLITS or not isinstance(which, int):
        raise NoFold("not-affine", f"a part of the result of {op_name(source)} is not followed")
    pieces: list[Any] = list(source.meta["val"])
    which = normal(which, len(pieces))
    whole = Step(source, source.all_input_nodes[0], step.axes, step.sizes)
    if op_name(source) == "unbind":
        return _pick(step.axes, _dim(whole, 1), which)
    index = _dim(whole, 2)
    if step.shape() == step.axes.shape:
        return step.axes
    if _symbolic(step.axes, index):
        raise _cut_symbol()
    sizes = [_plain(tensor.shape[index], 0) for tensor in pieces]
    if sum(sizes) != step.axes.shape[index]:
        raise NoFold("unsupported", "the pieces of the split overlap")
    return cut(step.axes, index, sum(sizes[:which]), sizes[which])


@rule("index_select")
def index_select(step: Step) -> Axes:
    """Positions of one dimension by a constant vector: only which features it makes is known."""
    index = _dim(step, 1)
    return step.axes.shuffle(index, step.shape()[index], _INDEXED)


@rule("index")
def index(step: Step) -> Axes:
    """Positions by constant tensors of integers, which stand for dimensions side by side."""
    indices: Any = step.argument(1, "indices")
    named = [i for i, entry in enumerate(indices) if entry is not None]
    for entry in (indices[i] for i in named):
        if not isinstance(entry, fx.Node) or not is_tensor(entry) or tensor_meta(entry).dtype.itemsize == 1:
            raise NoFold("unsupported", "a mask as an index is not followed")
    if not named or any(b - a != 1 for a, b in pairwise(named)):
        raise NoFold("unsupported", "indices that do not stand side by side are not followed")
    first, after = named[0], named[-1] + 1
    axes, shape = step.axes, step.shape()
    for i in named:
        axes = axes.shuffle(i, axes.shape[i], _INDEXED)
    made = shape[first : len(shape) - (len(axes.dims) - after)]
    return axes.with_dims((*axes.dims[:first], *map(fresh, made), *axes.dims[after:]))


_INDEXED = ("indexed", "it picks positions by an index")


def cut(axes: Axes, index: int, start: int, count: int, step: int = 1) -> Axes:
    """Positions `start`, `start + step`, ... of a dimension, `count` of them.

    Where the cut falls on whole coordinates of the leading atoms, the others are carried. A single shared or
    windowed atom is read through a window of one tap.

    Raises:
        NoFold: the dimension holds a symbolic size, or nothing is left.
    """
    dim = _merged(axes.dims[index])
    if count == size_of(dim):
        return axes
    if _symbolic(axes, index):
        raise _cut_symbol()
    if count == 0:
        raise NoFold("empty", "it works on a tensor without elements")
    head, tail = (tuple(atom for atom in dim if (atom.size == 1) == single) for single in (False, True))
    while len(head) > 1 and step == 1 and start % head[-1].size == 0 and count % head[-1].size == 0:
        start, count = start // head[-1].size, count // head[-1].size
        head, tail = head[:-1], (head[-1], *tail)
    axes = axes.with_dim(index, head)
    if count == size_of(head):
        pass
    elif len(head) == 1 and (head[0].shared or head[0].window is not None):
        # What an end is depends on the size, so coefficients are read at the real one.
        crop = (-start, start + step * (count - 1) + 1 - size_of(head))
        axes = pinned(window(axes, index, count, (step, start, start, 0), crop))
    else:
        axes = axes.shuffle(index, count, ("structure", "it cuts an axis that is already mixed or scaled"))
    return axes.with_dim(index, axes.dims[index] + tail)


def _merged(dim: tuple[Atom, ...]) -> tuple[Atom, ...]:
    """The same with neighbouring shared digits of one entry axis as one digit."""
    atoms: list[Atom] = []
    for atom in dim:
        last = atoms[-1] if atoms else None
        if (
            last is not None
            and (last.shared and atom.shared)
            and (last.axis, last.stride, last.uneven) == (atom.axis, atom.stride * atom.size, atom.uneven)
        ):
            atoms[-1] = atom._replace(size=last.size * atom.size)
        else:
            atoms.append(atom)
    return tuple(atoms)


def _pick(axes: Axes, index: int, position: int) -> Axes:
    """One position of a dimension, which is dropped."""
    if _symbolic(axes, index):
        raise _cut_symbol()
    return cut(axes, index, normal(position, axes.shape[index]), 1).drop(index)


def _dim(step: Step, position: int) -> int:
    return normal(_plain(step.argument(position, "dim"), 0), len(step.axes.dims))


def _plain(value: Any, default: int) -> int:
    """An option of a single number."""
    return ints(value, 1, default)[0]


def _symbolic(axes: Axes, index: int) -> bool:
    return any(axes.symbolic(atom) for atom in axes.dims[index])


def _cut_symbol() -> NoFold:
    return NoFold("dynamic-shape", "it cuts an axis of symbolic size, such as the batch")
