"""Rules for products with constants, scales, shifts and norms in evaluation."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import fx

from graphsurgery.affine.atoms import Atom, Axes, NoFold
from graphsurgery.affine.rules import Step, normal, pinned, rule
from graphsurgery.cost import op_name
from graphsurgery.values import is_tensor


def fresh(size: int) -> tuple[Atom, ...]:
    """A new feature dimension."""
    return (Atom(size),) if size != 1 else ()


def project(axes: Axes, index: int, size: int, bias: bool) -> Axes:
    """One dimension multiplied by a matrix: its atoms are consumed, `size` features take their place."""
    consumed = axes.consume(axes.dims[index]).with_dim(index, fresh(size))
    return replace(consumed, shifted=axes.shifted or bias, scaled=True)


@rule("linear")
def linear(step: Step) -> Axes:
    """`x @ weight.T + bias` over the last dimension."""
    weight = step.argument(1, "weight")
    if step.argument(0, "input") is not step.live:
        raise NoFold("not-affine", "the weight of the linear is not constant")
    bias = step.argument(2, "bias") is not None
    return project(step.axes, len(step.axes.dims) - 1, step.shape(weight)[0], bias)


@rule("matmul", "mm", "bmm")
def matmul(step: Step) -> Axes:
    """A product with a constant matrix, or with a stack of matrices along leading dimensions."""
    first, second = step.argument(0, "self"), step.argument(1, "other") or step.argument(1, "mat2")
    return _product(step, first, second, bias=False)


@rule("addmm", "baddbmm")
def addmm(step: Step) -> Axes:
    """`beta * bias + alpha * (x @ w)` with a constant bias."""
    name = "batch" if op_name(step.node) == "baddbmm" else "mat"
    first = step.argument(1, f"{name}1")
    second = step.argument(2, f"{name}2")
    bias = step.argument(0, "self")
    if bias is step.live or not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
        raise NoFold("not-affine", "the added matrix is not constant")
    axes = _product(step, first, second, bias=True)
    return _shift(axes, step.shape(bias))


def _product(step: Step, first: fx.Node, second: fx.Node, bias: bool) -> Axes:
    axes, left = step.axes, first is step.live
    constant = step.shape(second if left else first)
    rank = len(axes.dims)
    if rank < 2 or len(constant) < 2:
        raise NoFold("unsupported", "a product with a vector is not followed")
    if len(constant) > rank or len(step.shape()) != rank:
        raise NoFold("broadcast", "the constant has more dimensions than the value that it multiplies")
    for offset, size in enumerate(reversed(constant[:-2])):
        index = rank - 3 - offset
        if size != 1:
            if axes.shape[index] != size:
                raise NoFold("broadcast", "the constant repeats the value along a dimension")
            axes = pinned(axes.vary(index))
    if left:
        return project(axes, rank - 1, constant[-1], bias)
    return project(axes, rank - 2, constant[-2], bias)


@rule("mul", "div", "neg")
def scale(step: Step) -> Axes:
    """Multiplication by, or division by, a constant; the constant may differ along any dimension."""
    first = step.argument(0, "self")
    other = step.argument(1, "other")
    if op_name(step.node) == "div" and first is not step.live:
        raise NoFold("not-affine", "a constant divided by a value is not affine")
    if step.argument(2, "rounding_mode") is not None:
        raise NoFold("not-affine", "a rounded division is not affine")
    constant = other if first is step.live else first
    axes = replace(step.axes, scaled=True)
    for index in _differing(step, constant):
        axes = axes.vary(index)
        axes = _pin(axes, step, index)
    return axes


@rule("add", "sub", "rsub")
def shift(step: Step) -> Axes:
    """A constant added to or subtracted from the value, or the value subtracted from a constant."""
    first, other = step.argument(0, "self"), step.argument(1, "other")
    leads = first is step.live
    constant = other if leads else first
    alpha = step.argument(2, "alpha", 1)
    coefficient = {"add": (1, alpha), "sub": (1, -alpha), "rsub": (-alpha, 1)}[op_name(step.node)][not leads]
    axes = replace(step.axes, shifted=True, scaled=step.axes.scaled or coefficient != 1)
    differing = _differing(step, constant)
    for index in differing:
        axes = _pin(axes, step, index)
    return axes.shift_along(differing)


def _shift(axes: Axes, shape: tuple[int, ...]) -> Axes:
    rank = len(axes.dims)
    indices = [rank - len(shape) + i for i, size in enumerate(shape) if size != 1]
    return axes.shift_along(indices)


def _pin(axes: Axes, step: Step, index: int) -> Axes:
    """A constant that differs along positions fixes their number; along channels it does not matter."""
    positions = any(atom.window is not None for atom in step.axes.dims[index])
    return pinned(axes) if index != 1 or positions or len(step.axes.dims) < 3 else axes


def _differing(step: Step, constant: object) -> list[int]:
    """The dimensions of the value along which a constant operand differs.

    Raises:
        NoFold: the constant repeats the value along a dimension, or is not a number.
    """
    if isinstance(constant, (int, float)) or constant is None:
        if isinstance(constant, float) and not math.isfinite(constant):
            raise NoFold("not-finite", "the constant is not finite")
        return []
    if not isinstance(constant, fx.Node) or not is_tensor(constant):
        raise NoFold("unsupported", "the other operand is neither a number nor a tensor")
    shape, rank = step.shape(constant), len(step.axes.dims)
    if len(shape) > rank or step.shape() != step.axes.shape:
        raise NoFold("broadcast", "the constant repeats the value along a dimension")
    return [rank - len(shape) + i for i, size in enumerate(shape) if size != 1]


@rule("batch_norm")
def batch_norm(step: Step) -> Axes:
    """Batch norm with running statistics: a scale and a shift for each coordinate of axis 1."""
    if step.argument(0, "input") is not step.live:
        raise NoFold("not-affine", "a parameter of the norm is not constant")
    if step.argument(5, "training", False) or step.argument(3, "running_mean") is None:
        raise NoFold("batch-statistics", "the norm takes its statistics from the batch")
    axes = replace(step.axes, scaled=True)
    index = normal(1, len(axes.dims))
    return axes.vary(index).shift_along([index])
