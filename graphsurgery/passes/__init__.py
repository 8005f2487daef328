"""The passes of graphsurgery, one per file; `ALL_PASSES` is the one list of them, in the order they run."""

from __future__ import annotations

if __name__ != "graphsurgery.passes":
    raise ImportError(
        f"imported as {__name__!r}, expected 'graphsurgery.passes': the directory `passes` at the top of the "
        "repository is a link for readers; write `import graphsurgery.passes`"
    )

import difflib
from collections.abc import Iterable
from typing import Any

from graphsurgery.cost import FLOPS, MEASURED, cost_model
from graphsurgery.errors import PassError
from graphsurgery.passes.commute_pointwise import CommutePointwise
from graphsurgery.passes.conv1x1_to_linear import Conv1x1ToLinear
from graphsurgery.passes.eliminate_common_subexpressions import EliminateCommonSubexpressions
from graphsurgery.passes.eliminate_identity import EliminateIdentity
from graphsurgery.passes.fold_affine import FoldAffine
from graphsurgery.passes.fold_embedding import FoldEmbedding
from graphsurgery.passes.fold_norm_affine import FoldNormAffine
from graphsurgery.passes.fully_convolutional import FullyConvolutional
from graphsurgery.passes.linear_to_conv1x1 import LinearToConv1x1
from graphsurgery.passes.merge_siblings import MergeSiblings
from graphsurgery.passes.split_head import SplitHead
from graphsurgery.rewrite.contracts import Pass, require_declared
from graphsurgery.rewrite.plugins import registered_passes

__all__ = [
    "ALL_PASSES",
    "CommutePointwise",
    "Conv1x1ToLinear",
    "EliminateCommonSubexpressions",
    "EliminateIdentity",
    "FoldAffine",
    "FoldEmbedding",
    "FoldNormAffine",
    "FullyConvolutional",
    "LinearToConv1x1",
    "MergeSiblings",
    "SplitHead",
    "available",
    "default_passes",
    "find",
    "select",
]

ALL_PASSES: tuple[type[Pass], ...] = (
    EliminateIdentity,
    EliminateCommonSubexpressions,
    CommutePointwise,
    FoldNormAffine,
    FoldAffine,
    FoldEmbedding,
    MergeSiblings,
    SplitHead,
    FullyConvolutional,
    LinearToConv1x1,
    Conv1x1ToLinear,
)


def available() -> dict[str, type[Pass]]:
    """All passes by name: graphsurgery's own in the order they run, then those that other packages register.

    Raises:
        PassError: A registered pass cannot be loaded or takes a name that is taken.
    """
    passes = {item.name: item for item in ALL_PASSES}
    for name, item in registered_passes().items():
        if name in passes:
            raise PassError(
                f"{item.__module__}.{item.__name__} registers the pass name {name!r}, which is taken already"
            )
        passes[name] = item
    return passes


def find(name: str) -> type[Pass]:
    """The pass of that name.

    Raises:
        PassError: There is none; the message suggests the nearest name.
    """
    for item in ALL_PASSES:  # a broken package of a third party must not stand in the way of these
        if item.name == name:
            return item
    names = available()
    if name in names:
        return names[name]
    near = difflib.get_close_matches(name.strip().lower().replace("_", "-"), names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(names)}"
    raise PassError(f"there is no pass named {name!r}; {hint}")


def default_passes(cost: Any = None) -> tuple[Pass, ...]:
    """New instances of the passes that run when none are named; registered passes run only when named.

    Args:
        cost: The cost model to use, by name or itself. One that is not by FLOPs brings in the passes that
            never pay by FLOPs; "measured", or settings of that name, those of which no count tells whether
            they pay.
    """
    found = tuple(item() for item in ALL_PASSES if item.default)
    if getattr(cost, "name", cost) == MEASURED:
        return (*found, MergeSiblings(), LinearToConv1x1(), Conv1x1ToLinear())
    if cost is not None and cost_model(cost) is not FLOPS:
        found += (MergeSiblings(cost=cost),)
    return found


def select(
    passes: Iterable[str | Pass | type[Pass]] | str | Pass | None, cost: Any = None
) -> tuple[Pass, ...]:
    """Instances of the passes asked for.

    Args:
        passes: Names, instances or classes of passes, in the order to run; None for the default ones.
        cost: What the default ones are chosen by, see `default_passes`.

    Raises:
        PassError: A name is unknown, or an item is no pass.
    """
    if passes is None:
        return default_passes(cost)
    if isinstance(passes, (str, Pass)):
        passes = (passes,)
    chosen: list[Pass] = []
    for item in passes:
        if isinstance(item, str):
            chosen.append(_made(find(item)))
        elif isinstance(item, Pass):
            chosen.append(item)
        elif isinstance(item, type) and issubclass(item, Pass):
            chosen.append(_made(item))
        else:
            raise PassError(
                f"expected the name, class or instance of a pass, got {type(item).__name__} {item!r}"
            )
    for item in chosen:
        require_declared(item)
    return tuple(chosen)


def _made(item: type[Pass]) -> Pass:
    """Return an instance with the default options.

    Raises:
        PassError: The class cannot be called without arguments, or lacks `run`.
    """
    try:
        return item()
    except Exception as error:  # foreign code
        raise PassError(
            f"the pass {item.__name__} cannot be made ({type(error).__name__}: {error}); expected a class "
            "with `run` and a default for every option, or give an instance"
        ) from error
