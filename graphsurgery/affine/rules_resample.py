"""Rules for ops that compute positions from all of an axis: interpolation, pads that repeat, running sums.

They treat everything beside those axes alike, and mix the axes themselves.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from graphsurgery.affine.atoms import Axes, NoFold
from graphsurgery.affine.rules import Step, ints, normal, pinned, rule
from graphsurgery.affine.rules_movement import stretch
from graphsurgery.cost import op_name

_NEAREST = tuple(f"{kind}{n}d" for kind in ("upsample_nearest", "_upsample_nearest_exact") for n in (1, 2, 3))
_SMOOTH = (
    *("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d"),
    *("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"),
)


@rule(*_NEAREST)
def nearest(step: Step) -> Axes:
    """Nearest neighbours: by two, four, ... every position repeats; by other factors the axis is mixed."""
    axes = step.axes
    for index, out, factor in _resized(step):
        size = axes.shape[index]
        times = out // size
        # The reciprocal of a power of two is exact, so that no dtype rounds to another neighbour.
        if out == times * size and times & (times - 1) == 0 and factor in (None, times):
            axes = stretch(axes, index, times)
        else:
            axes = axes.shuffle(index, out, _RESIZED)
    return pinned(axes)  # it may name sizes


@rule(*_SMOOTH)
def smooth(step: Step) -> Axes:
    """Linear and cubic interpolation: each position a fixed mean of others."""
    axes = replace(step.axes, scaled=True)
    for index, out, factor in _resized(step):
        if out != axes.shape[index] or factor not in (None, 1.0):
            axes = axes.shuffle(index, out, _RESIZED)
    return pinned(axes)


_RESIZED = ("resized", "it interpolates along an axis")


def _resized(step: Step) -> list[tuple[int, int, float | None]]:
    """Each position axis, its size afterwards and the factor that is written there, if any."""
    shape = step.shape()
    rank = len(shape) - 2
    schema = step.node.target._schema  # type: ignore[union-attr]  # an OpOverload by the registry
    names = [argument.name for argument in schema.arguments]
    if names[-1] == "scale_factors":
        written: Any = step.argument(len(names) - 1, names[-1]) or [None] * rank
    else:  # one argument for each axis
        written = [step.argument(len(names) - rank + i, names[i - rank]) for i in range(rank)]
    return [(2 + i, shape[2 + i], written[i]) for i in range(rank)]


@rule(
    *("pad", "_pad_circular"),
    *(f"{mode}_pad{n}d" for mode in ("reflection", "replication") for n in (1, 2, 3)),
)
def pad(step: Step) -> Axes:
    """A pad that repeats positions of the axis: reflected, the nearest one, or from the other end."""
    if op_name(step.node) == "pad" and step.argument(2, "mode", "constant") == "constant":
        raise NoFold("unsupported", "a pad with a constant is followed as constant_pad_nd only")
    pads = ints(step.argument(1, "pad") or step.argument(1, "padding"), 1, 0)
    axes, shape = step.axes, step.shape()
    for i in range(len(pads) // 2):
        index = len(shape) - 1 - i
        if (pads[2 * i], pads[2 * i + 1]) != (0, 0):
            axes = axes.shuffle(
                index, shape[index], ("pad-mode", "it pads with positions of the axis itself")
            )
    return axes


@rule("cumsum")
def cumsum(step: Step) -> Axes:
    """Running sums along a dimension."""
    axes = replace(step.axes, scaled=True)
    if not axes.dims:
        return axes
    index = normal(ints(step.argument(1, "dim"), 1, 0)[0], len(axes.dims))
    if axes.shape[index] == 1:
        return axes
    return axes.shuffle(index, axes.shape[index], ("cumulated", "it sums up along an axis"))
