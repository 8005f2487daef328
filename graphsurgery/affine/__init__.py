"""The affine engine: which stretches of a graph compute `A x + b`, as which layer, and at what cost."""

from graphsurgery.affine import (  # imported for the rules that they register
    join,
    rules_einsum,
    rules_linear,
    rules_movement,
    rules_position,
    rules_resample,
    rules_select,
)

__all__ = [
    "join",
    "rules_einsum",
    "rules_linear",
    "rules_movement",
    "rules_position",
    "rules_resample",
    "rules_select",
]
