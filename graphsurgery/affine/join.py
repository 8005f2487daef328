"""Where branches of one region meet: the axes of a sum or a concatenation of several values.

Two operands agree along an atom when both carry, or read through windows of one stride, the same entry
digit: windows join by union. Where they disagree (one mixes the channels, the other carries them) the atom
becomes a fresh feature and every entry digit behind it is consumed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import fx

from graphsurgery.affine.atoms import Atom, Axes, Dims, NoFold, Window
from graphsurgery.affine.rules import Meeting, meeting, normal
from graphsurgery.values import is_tensor

Row = tuple[Atom, ...]


@dataclass
class _Pair:
    """Atoms of both operands that stand for the same coordinates of the result."""

    left: Row
    right: Row
    size: int
    joined: Atom | None


@meeting("add", "sub", "rsub")
def total(step: Meeting) -> Axes:
    """The sum or difference of two values of one region."""
    (_, first), (_, second) = step.parts
    return join(first, second, step.shape())


@meeting("cat", "concat", "concatenate")
def concatenation(step: Meeting) -> Axes:
    """Values of one region, and constants, side by side along a dimension, which is mixed."""
    shape = step.shape()
    index = normal(int(step.argument(1, "dim", 0)), len(shape))
    return _side_by_side(step, shape, index, lambda axes: axes)


@meeting("stack")
def stack(step: Meeting) -> Axes:
    """Values of one region, and constants, side by side along a new dimension."""
    shape = step.shape()
    index = normal(int(step.argument(1, "dim", 0)), len(shape))
    return _side_by_side(
        step, shape, index, lambda axes: axes.with_dims((*axes.dims[:index], (), *axes.dims[index:]))
    )


def _side_by_side(step: Meeting, shape: tuple[int, ...], index: int, prepare: Callable[[Axes], Axes]) -> Axes:
    common = (*shape[:index], 1, *shape[index + 1 :])
    whole: Axes | None = None
    for _, axes in step.parts:
        axes = prepare(axes)
        part = axes.consume(axes.dims[index]).with_dim(index, ())
        whole = part if whole is None else join(whole, part, common)
    if whole is None:
        raise NoFold("unsupported", "there is nothing live to put side by side")
    operands = step.argument(0, "tensors")
    for operand in operands:
        if operand in {node for node, _ in step.parts}:
            continue
        if not isinstance(operand, fx.Node) or not is_tensor(operand):
            raise NoFold("unsupported", "an operand beside it is not a tensor")
        sizes = step.shape(operand)
        offset = 1 if len(sizes) < len(shape) else 0
        along = [i + (offset if i >= index else 0) for i, n in enumerate(sizes) if n != 1]
        whole = replace(whole.shift_along([i for i in along if i != index]), shifted=True)
    return replace(whole.with_dim(index, (Atom(shape[index]),) if shape[index] != 1 else ()), scaled=True)


def join(first: Axes, second: Axes, shape: Sequence[int]) -> Axes:
    """The axes of a sum of two values of one region; dimensions of size one broadcast.

    Args:
        first: axes of one value.
        second: axes of the other, from the same entry.
        shape: shape of the sum.

    Raises:
        NoFold: an axis of symbolic size would have to be mixed.
    """
    rows = [
        _pairs(left, right, size)
        for left, right, size in zip(_spread(first, shape), _spread(second, shape), shape, strict=True)
    ]
    single, parted = _singles(first, second)
    gone = [*first.gone, *second.gone, *parted]
    changed = True
    while changed:
        changed = False
        gone += [atom.digit() for atom in single if any(_overlap(atom.digit(), digit) for digit in gone)]
        single = [atom for atom in single if atom.digit() not in gone]
        for pair in (pair for row in rows for pair in row):
            if pair.joined is None or pair.joined.fresh:
                continue
            if any(_overlap(pair.joined.digit(), digit) for digit in gone):
                pair.joined = None
        for pair in (pair for row in rows for pair in row):
            if pair.joined is None:
                digits = [atom.digit() for atom in (*pair.left, *pair.right) if not atom.fresh]
                if any(first.symbolic(digit) for digit in digits) or first.symbolic(Atom(pair.size)):
                    raise NoFold(
                        "batch-mixed", "branches disagree along an axis of symbolic size, such as the batch"
                    )
                gone += digits
                pair.joined = Atom(pair.size)
                changed = True
    windows = [(p.left[0].window, p.right[0].window) for row in rows for p in row if _windowed(p)]
    # Positions counted by windows of other reach may part at another size where a stride rounds them down.
    rounded = any(a != b and (a or b or _ONE).s > 1 for a, b in windows)
    causes = [cause for cause in second.causes if cause not in first.causes]
    dims = [tuple(pair.joined for pair in row if pair.joined is not None) for row in rows]
    if single and dims:
        dims[0] = (*dims[0], *single)
    elif single:
        gone += [atom.digit() for atom in single]
    return Axes(
        tuple(dims),
        _merged(gone),
        first.shifted or second.shifted,
        True,
        first.pinned or second.pinned or rounded,
        first.symbols,
        (*first.causes, *causes),
    )


_ONE = Window(1, 1, 0, 0, 0)


def _windowed(pair: _Pair) -> bool:
    return pair.joined is not None and pair.joined.window is not None


def _spread(axes: Axes, shape: Sequence[int]) -> Dims:
    """The dims with those that are missing in front; dimensions of size one are empty."""
    dims = tuple(tuple(atom for atom in dim if atom.size != 1) for dim in axes.dims)
    return ((),) * (len(shape) - len(dims)) + dims


def _singles(first: Axes, second: Axes) -> tuple[list[Atom], list[Atom]]:
    """Single positions that both read alike, and the digits of those that they do not."""
    left, right = ([a for a in axes.atoms() if a.size == 1 and not a.fresh] for axes in (first, second))
    alike = [
        atom for atom in left if any((atom.digit(), atom.window) == (o.digit(), o.window) for o in right)
    ]
    digits = {atom.digit() for atom in alike}
    return alike, [atom.digit() for atom in (*left, *right) if atom.digit() not in digits]


def _pairs(left: Row, right: Row, size: int) -> list[_Pair]:
    """Both sides cut at the same sizes, major first; one pair of everything where they do not factor."""
    if size == 1:
        return []
    whole = [_Pair(left, right, size, None)]
    if not left or not right:  # one of them is broadcast
        return whole
    pairs: list[_Pair] = []
    a, b = list(left), list(right)
    while a and b:
        x, y = a.pop(0), b.pop(0)
        if x.size > y.size:
            if x.size % y.size or x.window is not None:
                return whole
            x, rest = x.split(y.size)
            a.insert(0, rest)
        elif y.size > x.size:
            if y.size % x.size or y.window is not None:
                return whole
            y, rest = y.split(x.size)
            b.insert(0, rest)
        pairs.append(_Pair((x,), (y,), x.size, _agreed(x, y)))
    return pairs


def _agreed(x: Atom, y: Atom) -> Atom | None:
    """The atom of the sum where both sides read the same entry digit alike; None where they do not."""
    if x.fresh and y.fresh:
        return Atom(x.size)
    if x.fresh or y.fresh or x.digit() != y.digit():
        return None
    uneven = x.uneven or y.uneven
    if x.window is None and y.window is None:
        return x._replace(varied=x.varied or y.varied, uneven=uneven)
    if x.varied or y.varied:
        return None
    window = (x.window or Window(x.size, 1, 0, 0, 0)).union(y.window or Window(y.size, 1, 0, 0, 0))
    if window is None:
        return None
    return x._replace(uneven=uneven, window=window)


def _overlap(x: Atom, y: Atom) -> bool:
    return x.axis == y.axis and x.stride < y.stride * y.size and y.stride < x.stride * x.size


def _merged(digits: Sequence[Atom]) -> Row:
    """Digits as a partition: those that overlap become one that covers them.

    Raises:
        NoFold: they overlap in a way that is no digit.
    """
    merged: list[Atom] = []
    for digit in sorted(set(digits), key=lambda d: (d.axis, d.stride, d.size)):
        if merged and _overlap(merged[-1], digit):
            last = merged.pop()
            end = max(last.stride * last.size, digit.stride * digit.size)
            if end % last.stride:
                raise NoFold("unsupported", "branches divide an axis in ways that do not factor")
            digit = Atom(end // last.stride, last.axis, last.stride)
        merged.append(digit)
    return tuple(merged)
