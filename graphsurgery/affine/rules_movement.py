"""Rules for ops that only move values: identities, views and permutes."""

from __future__ import annotations

from typing import Any

import torch

from graphsurgery.affine.atoms import Axes, NoFold
from graphsurgery.affine.rules import Step, ints, normal, pinned, rule
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
    return step.axes.with_dims(dims[i] for i in _order(step, len(dims)))


def _may_squeeze_symbol(step: Step) -> bool:
    """Whether a squeeze looks at an axis whose size is not fixed: at size one it gives another shape."""
    rank = len(step.axes.dims)
    named = step.argument(1, "dim")
    axes = range(rank) if named is None else [normal(d, rank) for d in ints(named, 1, 0)]
    return any(step.axes.symbolic(atom) for axis in axes for atom in step.axes.dims[axis])


def _order(step: Step, rank: int) -> tuple[int, ...]:
    """Which dimension of the operand each dimension of the value is."""
    # Permutations act on positions alike whatever the tensor holds: let the op itself permute 1..rank.
    marker = torch.empty(tuple(range(2, rank + 2)), device="meta")
    target: Any = step.node.target
    args = tuple(marker if a is step.live else a for a in step.node.args)
    moved = target(*args, **dict(step.node.kwargs))
    return tuple(normal(int(size) - 2, rank) for size in moved.shape)
