"""Orders of axes: a value in order `p` has axis `p[i]` of the value as its axis `i`, as in `permute`."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["Order", "inverse", "moves", "natural", "regrouped", "relative", "through"]

Order = tuple[int, ...]


def natural(rank: int) -> Order:
    """The order in which the model has the axes."""
    return tuple(range(rank))


def inverse(order: Order) -> Order:
    """The order that undoes another."""
    return tuple(sorted(range(len(order)), key=order.__getitem__))


def through(alias: Order, order: Order) -> Order:
    """The order of a value that is `order` of its permute `alias`."""
    return tuple(alias[axis] for axis in order)


def relative(alias: Order, order: Order) -> Order:
    """The order of the permute `alias` of a value that is `order` of the value itself."""
    return through(inverse(alias), order)


def moves(shape: Sequence[int], have: Order, want: Order) -> bool:
    """Whether a value in one order has to be moved to be in another; axes of size 1 do not count."""
    return [a for a in have if shape[a] != 1] != [a for a in want if shape[a] != 1]


def regrouped(source: Sequence[int], target: Sequence[int], order: Order) -> Order | None:
    """The order that a reshape gives a value when its operand comes in `order`.

    Axes are parted into the least groups of equal size on both sides; a group moves as a whole.

    Args:
        source: shape of the operand, in natural order.
        target: shape of the result, in natural order.
        order: order of the operand.

    Returns:
        The order of the result; None if the reshape would mix elements in that order.
    """
    groups = _groups(source, target)
    if groups is None:
        return None
    owner = {axis: i for i, (axes, _) in enumerate(groups) for axis in axes}
    found: list[int] = []
    wide = [axis for axis in order if source[axis] != 1]
    while wide:
        axes = groups[owner[wide[0]]][0]
        if tuple(wide[: len(axes)]) != axes:
            return None
        found += groups[owner[wide[0]]][1]
        wide = wide[len(axes) :]
    for axis, size in enumerate(target):  # an axis of size 1 goes where its left neighbour is
        if size == 1:
            found.insert(found.index(axis - 1) + 1 if axis else 0, axis)
    return tuple(found)


def _groups(source: Sequence[int], target: Sequence[int]) -> list[tuple[Order, Order]] | None:
    """Least groups of axes, sizes of 1 left out, of equal product on both sides."""
    left = [axis for axis, size in enumerate(source) if size != 1]
    right = [axis for axis, size in enumerate(target) if size != 1]
    groups: list[tuple[Order, Order]] = []
    while left and right:
        a, b = [left.pop(0)], [right.pop(0)]
        m, n = source[a[0]], target[b[0]]
        while m != n:
            if m < n and left:
                a.append(left.pop(0))
                m *= source[a[-1]]
            elif n < m and right:
                b.append(right.pop(0))
                n *= target[b[-1]]
            else:
                return None
        groups.append((tuple(a), tuple(b)))
    return None if left or right else groups
