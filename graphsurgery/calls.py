"""What a call says of itself: its arguments by name, and whether it draws random numbers."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

__all__ = ["arguments", "is_random"]


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operator call by name, in the order of its schema, defaults included.

    Raises:
        TypeError: the node calls no operator.
    """
    target = node.target
    if not isinstance(target, OpOverload):
        raise TypeError(f"{node.name} calls {target}, expected an operator")
    given = node.args
    return {
        name: given[index] if index < len(given) else node.kwargs.get(name, default)
        for index, (name, default) in enumerate(_parameters(target))
    }


@functools.cache  # a schema is slow to read
def _parameters(target: OpOverload) -> tuple[tuple[str, Any], ...]:
    return tuple((parameter.name, parameter.default_value) for parameter in target._schema.arguments)


def is_random(node: fx.Node) -> bool:
    """Whether an operator call draws random numbers, as it is called: dropout in evaluation does not."""
    target = node.target
    if not isinstance(target, OpOverload) or torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    given = arguments(node)
    for flag in ("train", "training"):
        if flag in given:
            return bool(given[flag]) and bool(given.get("p") != 0)
    return "dropout_p" not in given or bool(given["dropout_p"] != 0)
