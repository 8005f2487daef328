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
from graphsurgery.cost import SPLITS, op_name
from graphsurgery.values import Sizes, is_tensor, tensor_meta


@dataclass(frozen=True)
class Step:
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

    def argument(self, index: int, name: str, default: Any = None) -> Any:
        """An argument by position or name, or its default."""
        if index < len(self.node.args):
            return self.node.args[index]
        return self.node.kwargs.get(name, default)

    def shape(self, node: fx.Node | None = None) -> tuple[int, ...]:
        """The shape of a node (by default of the call's value), symbols as primes."""
        return tuple(self.sizes.prime(size) for size in tensor_meta(node or self.node).shape)


Rule = Callable[[Step], Axes]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for ops of the given names."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


def live_operand(node: fx.Node, constant: Collection[fx.Node]) -> fx.Node | None:
    """The one tensor operand that is not constant, if there is exactly one and it is read once."""
    live = [o for o in node.all_input_nodes if o not in constant and is_tensor(o)]
    if len(live) != 1:
        return None
    reads = sum(1 for argument in _leaves((node.args, node.kwargs)) if argument is live[0])
    return live[0] if reads == 1 else None


def has_rule(node: fx.Node) -> bool:
    """Whether the registry knows the op."""
    return node.op == "call_function" and is_tensor(node) and op_name(node) in RULES


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
    axes = function(step)
    if name not in SPLITS and axes.shape != step.shape():
        raise NoFold("unsupported", f"{name} changes the shape in a way that is not followed")
    return axes


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
