"""The registry of affine ops: for each, how it acts on the axes of its one live operand.

A rule is a function `Step -> Axes`. It refuses with `NoFold` when the call is not affine in its live
operand, or when nothing useful is known of its axes. Rules read shapes and literals only, never weights.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from graphsurgery.affine.atoms import Axes, NoFold
from graphsurgery.cost import SPLITS, kind_of, op_name
from graphsurgery.values import Sizes, is_tensor, tensor_meta


class Call:
    """What rules ask of a call."""

    node: fx.Node
    sizes: Sizes

    def argument(self, index: int, name: str, default: Any = None) -> Any:
        """An argument by position or name, or its default."""
        if index < len(self.node.args):
            return self.node.args[index]
        return self.node.kwargs.get(name, default)

    def shape(self, node: fx.Node | None = None) -> tuple[int, ...]:
        """The shape of a node (by default of the call's value), symbols as primes."""
        return tuple(self.sizes.prime(size) for size in tensor_meta(node or self.node).shape)


@dataclass(frozen=True)
class Step(Call):
    """One call in a region, as a rule sees it.

    Attributes:
        node: the call.
        live: its one live (not constant) tensor operand.
        axes: what the region does to the axes up to `live`.
        sizes: the graph's symbols.
    """

    node: fx.Node
    live: fx.Node
    axes: Axes
    sizes: Sizes


@dataclass(frozen=True)
class Meeting(Call):
    """One call that several values of a region may enter, as its rule sees it.

    Attributes:
        node: the call.
        parts: its live operands in order, each as often as it is read, with what the region does up to them.
        sizes: the graph's symbols.
    """

    node: fx.Node
    parts: tuple[tuple[fx.Node, Axes], ...]
    sizes: Sizes


Rule = Callable[[Step], Axes]
RULES: dict[str, Rule] = {}
MEETINGS: dict[str, Callable[[Meeting], Axes]] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for ops of the given names."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


def meeting(*names: str) -> Callable[[Callable[[Meeting], Axes]], Callable[[Meeting], Axes]]:
    """Register a rule for ops of the given names that several live values may enter."""

    def register(function: Callable[[Meeting], Axes]) -> Callable[[Meeting], Axes]:
        for name in names:
            MEETINGS[name] = function
        return function

    return register


def live_operands(node: fx.Node, constant: Collection[fx.Node]) -> list[fx.Node]:
    """The operands that are neither constant nor a size, in order, each as often as it is read."""
    return [o for o in _leaves((node.args, node.kwargs)) if o not in constant and not is_size(o)]


def live_operand(node: fx.Node, constant: Collection[fx.Node]) -> fx.Node | None:
    """The one live operand, if there is exactly one and it is read once."""
    live = live_operands(node, constant)
    return live[0] if len(live) == 1 else None


def has_rule(node: fx.Node, operands: int = 1) -> bool:
    """Whether the registry knows the op with that many live operands."""
    if node.op != "call_function" or not (is_tensor(node) or is_tuple(node)):
        return False
    name = op_name(node)
    return (operands == 1 and name in RULES) or (operands > 0 and name in MEETINGS)


def is_tuple(node: fx.Node) -> bool:
    """Whether the value is several tensors: the parts of a split."""
    return isinstance(node.meta.get("val"), (tuple, list))


def follow(
    node: fx.Node, axes_of: Callable[[fx.Node], Axes], constant: Collection[fx.Node], sizes: Sizes
) -> Axes:
    """The axes of the value of one call, from those of its live operands.

    Args:
        node: the call.
        axes_of: the axes of a live operand.
        constant: the constant nodes of the graph.
        sizes: its symbols.

    Raises:
        NoFold: the call is not affine in its live operands, or breaks an axis of symbolic size.
    """
    live = live_operands(node, constant)
    name = op_name(node)
    if len(live) == 1 and name in RULES:
        return apply(Step(node, live[0], axes_of(live[0]), sizes))
    if not live or name not in MEETINGS or not is_tensor(node):
        raise NoFold("not-affine", f"{name} is not an affine op of its operands")
    if any(not is_tensor(o) or tensor_meta(o).dtype != tensor_meta(node).dtype for o in live):
        raise NoFold("dtype", f"{name} brings together values of other dtypes")
    axes = MEETINGS[name](Meeting(node, tuple((o, axes_of(o)) for o in live), sizes))
    return _followed(node, axes, sizes)


def _followed(node: fx.Node, axes: Axes, sizes: Sizes) -> Axes:
    shape = tensor_meta(node).shape
    if len(axes.shape) != len(shape) or not all(map(sizes.same, axes.shape, shape)):
        raise NoFold("unsupported", f"{op_name(node)} changes the shape in a way that is not followed")
    return axes


def is_size(node: fx.Node) -> bool:
    """Whether the value is a size: a number, no tensor."""
    return isinstance(node.meta.get("val"), (torch.SymInt, int))


def apply(step: Step) -> Axes:
    """The axes of the value of one call; a split has those of its operand, and the call that picks cuts.

    Raises:
        NoFold: the call is not affine in its live operand, or breaks an axis of symbolic size.
    """
    name = op_name(step.node)
    function = RULES.get(name)
    if function is None:
        raise NoFold("not-affine", f"{name} is not an affine op")
    value, operand = _sample(step.node), _sample(step.live)
    if not value.is_floating_point() or value.dtype != operand.dtype:
        raise NoFold("dtype", f"it turns {operand.dtype} into {value.dtype}")
    written = tuple(map(step.sizes.prime, operand.shape))
    still = op_name(step.live) in SPLITS or kind_of(step.node) in ("norm", "elementwise")
    if step.axes.shape != written and not still:
        raise NoFold(
            "dynamic-shape", "it reads a size that is free, and a number by the ranges of the inputs"
        )
    axes = function(step)
    return axes if name in SPLITS else _followed(step.node, axes, step.sizes)


def _sample(node: fx.Node) -> torch.Tensor:
    """The recorded tensor of a call; of a split its first piece."""
    value = node.meta.get("val")
    if op_name(node) in SPLITS and isinstance(value, (tuple, list)) and value:
        value = value[0]
    if not isinstance(value, torch.Tensor):
        raise NoFold("unsupported", f"the result of {op_name(node)} is not a single tensor")
    return value


def pinned(axes: Axes) -> Axes:
    """The same, but only good at its real sizes."""
    return replace(axes, pinned=True)


def normal(index: int, rank: int) -> int:
    """A non-negative axis."""
    return index + rank if index < 0 else index


def _leaves(value: Any) -> list[Any]:
    leaves: list[Any] = []
    fx.node.map_arg(value, lambda n: leaves.append(n))
    return leaves


def ints(value: Any, rank: int, default: int) -> tuple[int, ...]:
    """A per-axis option as a tuple: an int, a list of one or of `rank`, or empty for the default.

    Raises:
        NoFold: the option is not a plain number.
    """
    if value is None:
        value = ()
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if not all(isinstance(v, int) and not isinstance(v, torch.SymInt) for v in values):
        raise NoFold("dynamic-shape", "an option of the op depends on a symbolic size")
    values = values or (default,)
    return values * rank if len(values) == 1 else values
