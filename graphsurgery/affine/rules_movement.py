"""Rules for ops that only move values: identities, views, permutes, repeats and shuffles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from graphsurgery.affine.atoms import Atom, Axes, Dims, NoFold, size_of
from graphsurgery.affine.rules import Step, ints, normal, pinned, rule
from graphsurgery.affine.rules_linear import fresh
from graphsurgery.cost import op_name
from graphsurgery.values import tensor_meta


@rule("alias", "clone", "contiguous", "detach", "lift_fresh_copy")
def identity(step: Step) -> Axes:
    """The value itself."""
    return step.axes


@rule("dropout", "feature_dropout", "alpha_dropout")
def dropout(step: Step) -> Axes:
    """Dropout in evaluation is the identity."""
    if step.argument(2, "train", False):
        raise NoFold("train-mode", "dropout is in training mode")
    return step.axes


@rule("_to_copy", "to")
def cast(step: Step) -> Axes:
    """A cast to the same dtype and device is the identity; others are refused by the dtype check."""
    if tensor_meta(step.node).device != tensor_meta(step.live).device:
        raise NoFold("device", "it moves the value to another device")
    return step.axes


@rule("reshape", "view", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze")
def view(step: Step) -> Axes:
    """A view in another shape: atoms are split and regrouped. The sizes it names hold for this size only."""
    shape = step.shape()
    if op_name(step.node) == "squeeze" and _may_squeeze_symbol(step):
        raise NoFold("dynamic-shape", "it drops an axis of symbolic size where that happens to be one")
    if shape == step.axes.shape and op_name(step.node) in ("flatten", "squeeze"):
        return step.axes
    return pinned(step.axes.reshape(shape))


@rule("permute", "movedim", "transpose", "t", "numpy_T", "mT")
def permute(step: Step) -> Axes:
    """A permutation of the dimensions."""
    dims = step.axes.dims
    return step.axes.with_dims(dims[i] for i in permutation(step.node, step.live))


@rule("expand", "expand_as")
def expand(step: Step) -> Axes:
    """The value repeated along dimensions of size one: a feature of equal coefficients."""
    if step.argument(0, "self") is not step.live:
        raise NoFold("not-affine", "only the shape of the value is read")
    shape = step.shape()
    dims = ((),) * (len(shape) - len(step.axes.dims)) + step.axes.dims
    repeats = [n if size_of(dim) == 1 else 1 for n, dim in zip(shape, dims, strict=True)]
    return pinned(_repeated(step, dims, repeats))  # it names sizes


@rule("repeat", "tile")
def repeat(step: Step) -> Axes:
    """The value repeated as a whole: the repetitions are a feature that leads each dimension."""
    repeats = ints(step.argument(1, "repeats" if op_name(step.node) == "repeat" else "dims"), 1, 1)
    dims = ((),) * (len(repeats) - len(step.axes.dims)) + step.axes.dims
    repeats = (1,) * (len(dims) - len(repeats)) + repeats
    return _repeated(step, dims, repeats)


@rule("repeat_interleave")
def repeat_interleave(step: Step) -> Axes:
    """Each coordinate of a dimension repeated: the repetitions are a feature behind it."""
    repeats, dim = step.argument(1, "repeats"), step.argument(2, "dim")
    if not isinstance(repeats, int) or dim is None:
        raise NoFold("unsupported", "only a fixed number of repetitions of one dimension is followed")
    return stretch(step.axes, normal(dim, len(step.axes.dims)), repeats)


def stretch(axes: Axes, index: int, times: int) -> Axes:
    """Each coordinate of a dimension repeated; the dimension may be of symbolic size."""
    if times == 0:
        raise NoFold("empty", "it works on a tensor without elements")
    return pinned(axes.with_dim(index, axes.dims[index] + fresh(times)))


def _repeated(step: Step, dims: Dims, repeats: Sequence[int]) -> Axes:
    """Dimensions with features that lead them, along which the value repeats."""
    if 0 in repeats:
        raise NoFold("empty", "it works on a tensor without elements")
    for times, dim in zip(repeats, dims, strict=True):
        if times != 1 and any(step.axes.symbolic(atom) for atom in (Atom(times), *dim)):
            raise NoFold("dynamic-shape", "it repeats the value along an axis of symbolic size")
    moved = step.axes.with_dims(fresh(times) + dim for times, dim in zip(repeats, dims, strict=True))
    return pinned(moved) if any(n != 1 for n in repeats) else moved


@rule("flip")
def flip(step: Step) -> Axes:
    """Dimensions read backwards: they are carried in shape only."""
    return _reordered(step, step.argument(1, "dims"), "it reads an axis backwards")


@rule("roll")
def roll(step: Step) -> Axes:
    """Dimensions turned round: they are carried in shape only. Without dimensions the value is one row."""
    return _reordered(step, step.argument(2, "dims"), "it turns an axis round")


def _reordered(step: Step, named: Any, reason: str) -> Axes:
    axes = step.axes
    rank = len(axes.dims)
    for index in [normal(d, rank) for d in ints(named, 1, 0)] if named else range(rank):
        if axes.shape[index] != 1:
            axes = axes.shuffle(index, axes.shape[index], ("reordered", reason))
    return axes


@rule("pixel_shuffle")
def pixel_shuffle(step: Step) -> Axes:
    """Channels as `(channels, r, r)`, whose last two go behind the two positions."""
    r = ints(step.argument(1, "upscale_factor"), 1, 1)[0]
    *lead, channels, height, width = step.axes.shape
    axes = step.axes.reshape((*lead, channels // r**2, r, r, height, width))
    c, down, across, h, w = axes.dims[len(lead) :]
    return pinned(axes.with_dims((*axes.dims[: len(lead)], c, h + down, w + across)))


@rule("pixel_unshuffle")
def pixel_unshuffle(step: Step) -> Axes:
    """Positions as `(position, r)`, whose last parts go behind the channels."""
    r = ints(step.argument(1, "downscale_factor"), 1, 1)[0]
    *lead, channels, height, width = step.axes.shape
    if height % r or width % r:
        raise NoFold("dynamic-shape", "it divides an axis of symbolic size")
    axes = step.axes.reshape((*lead, channels, height // r, r, width // r, r))
    c, h, down, w, across = axes.dims[len(lead) :]
    return pinned(axes.with_dims((*axes.dims[: len(lead)], c + down + across, h, w)))


@rule("channel_shuffle")
def channel_shuffle(step: Step) -> Axes:
    """Channels as `(groups, channels of a group)`, exchanged."""
    groups = ints(step.argument(1, "groups"), 1, 1)[0]
    batch, channels, *positions = step.axes.shape
    axes = step.axes.reshape((batch, groups, channels // groups, *positions))
    lead, group, within, *rest = axes.dims
    return pinned(axes.with_dims((lead, within + group, *rest)))


def _may_squeeze_symbol(step: Step) -> bool:
    """Whether a squeeze looks at an axis whose size is not fixed: at size one it gives another shape."""
    rank = len(step.axes.dims)
    named = step.argument(1, "dim")
    axes = range(rank) if named is None else [normal(d, rank) for d in ints(named, 1, 0)]
    return any(step.axes.symbolic(atom) for axis in axes for atom in step.axes.dims[axis])


def permutation(node: fx.Node, operand: fx.Node) -> tuple[int, ...]:
    """Which dimension of its operand each dimension of a permute is."""
    # Permutations act on positions alike whatever the tensor holds: let the op itself permute 1..rank.
    rank = tensor_meta(operand).dim()
    marker = torch.empty(tuple(range(2, rank + 2)), device="meta")
    target: Any = node.target
    moved = target(*(marker if a is operand else a for a in node.args), **dict(node.kwargs))
    return tuple(normal(int(size) - 2, rank) for size in moved.shape)
