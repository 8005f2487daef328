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
    if len(step.shape(weight)) != 2:
        raise NoFold("unsupported", "a linear without a dimension of outputs is not followed")
    bias = step.argument(2, "bias") is not None
    return project(step.axes, len(step.axes.dims) - 1, step.shape(weight)[0], bias)


@rule("matmul", "mm", "bmm", "mv", "dot", "vdot")
def matmul(step: Step) -> Axes:
    """A product with a constant vector or matrix, or with a stack of matrices along leading dimensions."""
    names = ("other", "mat2", "vec", "tensor")
    second = next(v for name in names if (v := step.argument(1, name)) is not None)
    return _product(step, step.argument(0, "self"), second, bias=False)


@rule("addmm", "baddbmm", "addmv")
def addmm(step: Step) -> Axes:
    """`beta * bias + alpha * (x @ w)` with a constant bias."""
    first_name, second_name = {"baddbmm": ("batch1", "batch2"), "addmv": ("mat", "vec")}.get(
        op_name(step.node), ("mat1", "mat2")
    )
    first, second = step.argument(1, first_name), step.argument(2, second_name)
    bias = step.argument(0, "self")
    if bias is step.live or not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
        raise NoFold("not-affine", "the added matrix is not constant")
    axes = _product(step, first, second, bias=True)
    return _shift(axes, step.shape(bias))


def _product(step: Step, first: fx.Node, second: fx.Node, bias: bool) -> Axes:
    """The value times a constant, on either side, as `matmul` takes their dimensions."""
    axes, left = step.axes, first is step.live
    constant = step.shape(second if left else first)
    rank, depth = len(axes.dims), len(constant)
    lead: list[tuple[Atom, ...]] = []
    for offset in range(max(rank, depth, 2), 2, -1):
        index, copies = rank - offset, constant[-offset] if offset <= depth else 1
        size = axes.shape[index] if index >= 0 else 1
        if copies == size != 1:
            axes = pinned(axes.vary(index))
        dim = axes.dims[index] if index >= 0 else ()
        lead.append(dim if copies == size else dim + fresh(copies))
    summed = rank - 1 if left or rank == 1 else rank - 2
    axes = axes.consume(axes.dims[summed])
    kept = [axes.dims[i] for i in range(max(rank - 2, 0), rank) if i != summed]
    made = [fresh(constant[-1 if left else -2])] if depth > 1 else []
    axes = axes.with_dims((*lead, *(kept + made if left else made + kept)))
    return replace(axes, shifted=axes.shifted or bias, scaled=True)


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


@rule("addcmul", "addcdiv")
def addcmul(step: Step) -> Axes:
    """`self + value * first * second`, or `first / second`, where two of the three are constant."""
    added, first, second = (step.argument(i, n) for i, n in enumerate(("self", "tensor1", "tensor2")))
    if second is step.live and op_name(step.node) == "addcdiv":
        raise NoFold("not-affine", "a constant divided by a value is not affine")
    axes, constants = step.axes, [v for v in (added, first, second) if v is not step.live]
    factors = [] if added is step.live else [v for v in (first, second) if v is not step.live]
    for constant in constants:
        for index in _differing(step, constant):
            axes = _pin(axes, step, index)
            axes = axes.vary(index) if constant in factors else axes
    for constant in constants:
        if constant not in factors:
            axes = axes.shift_along(_differing(step, constant))
    return replace(axes, scaled=axes.scaled or bool(factors))


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
