"""Calls that a pass is kept away from, and which of its changes have to be kept away.

A sealed call runs what it ran before, under a function that no pass has a rule for. So every pass, whoever
wrote it, leaves it as it is, and all else remains open to it. That is how a single change is undone: the pass
runs again on a graph in which the calls that the change replaced are sealed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from graphsurgery.rewrite.contracts import Change

__all__ = ["Attempt", "Separated", "seal", "separate", "unseal"]

_MARK = "graphsurgery_sealed"
_MOST = 8
"""Wrong changes that are looked for one by one; a pass that makes more of them is not worth the runs."""


def seal(gm: fx.GraphModule, names: Collection[str]) -> None:
    """Seal the calls of these names, in place; names that are not in the graph do not count."""
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.name in names:
            node.target = _sealed(node.target, node.name)


def unseal(gm: fx.GraphModule) -> None:
    """Give every sealed call its function back, in place."""
    found = [node for node in gm.graph.nodes if hasattr(node.target, _MARK)]
    for node in found:
        node.target = getattr(node.target, _MARK)
    if found:
        gm.recompile()


def _sealed(target: Callable[..., Any], name: str) -> Callable[..., Any]:
    def sealed(*args: Any, **kwargs: Any) -> Any:
        return target(*args, **kwargs)

    sealed.__name__ = sealed.__qualname__ = f"sealed_{name}"
    setattr(sealed, _MARK, target)
    return sealed


@dataclass(frozen=True)
class Attempt:
    """One run of a pass on a graph with sealed calls.

    Attributes:
        changes: What it changed.
        reason: What is wrong with the result; None where nothing is.
    """

    changes: tuple[Change, ...]
    reason: str | None


@dataclass(frozen=True)
class Separated:
    """The wrong changes of a pass.

    Attributes:
        sealed: Names of the calls without which the pass does nothing wrong.
        wrong: Each wrong change, with those of the pass that built on it, and what was wrong.
    """

    sealed: frozenset[str]
    wrong: tuple[tuple[tuple[Change, ...], str], ...]


def separate(failed: Attempt, attempt: Callable[[frozenset[str]], Attempt]) -> Separated | None:
    """Find the wrong changes of a pass by halving.

    Args:
        failed: The run in which it was found wrong.
        attempt: Runs the pass with calls of these names sealed. Where wrong changes are found, its last run
            is the one without them.

    Returns:
        The wrong changes; None where leaving them out does not help: nothing right would be left, the pass is
        wrong beside its changes, heeds no seal, or makes too many wrong ones.
    """
    sealed: frozenset[str] = frozenset()
    wrong: list[tuple[tuple[Change, ...], str]] = []
    for _ in range(_MOST):
        groups = _groups(failed.changes)
        nothing = sealed | _names(groups)
        if not groups or not nothing > sealed or not _heeded(last := attempt(nothing), nothing):
            return None
        reason = failed.reason or ""
        good, bad = 0, len(groups)  # so many groups, from the first, are right and wrong together
        while bad - good > 1:
            middle = (good + bad) // 2
            found = attempt(sealed | _names(groups[middle:]))
            if found.reason is None:
                good = middle
            else:
                bad, reason = middle, found.reason
        culprit = groups[bad - 1]
        if _names([culprit]) <= sealed:
            return None
        wrong.append((culprit, reason))
        sealed |= _names([culprit])
        failed = last if len(groups) == 1 else attempt(sealed)  # of one group that run was the last
        if failed.reason is None:
            kept = failed.changes and _heeded(failed, sealed)
            return Separated(sealed, tuple(wrong)) if kept else None
    return None


def _heeded(found: Attempt, sealed: frozenset[str]) -> bool:
    """Whether the result is right and no change touches what is sealed."""
    return found.reason is None and sealed.isdisjoint(_names([found.changes]))


def _names(groups: Sequence[tuple[Change, ...]]) -> frozenset[str]:
    return frozenset(ref.name for group in groups for change in group for ref in change.before)


def _groups(changes: Sequence[Change]) -> list[tuple[Change, ...]]:
    """Changes in order, each with the later ones that replaced what it had made."""
    groups: list[list[Change]] = []
    maker: dict[str, list[Change]] = {}
    for change in changes:
        sources = list({id(g): g for ref in change.before if (g := maker.get(ref.name)) is not None}.values())
        group: list[Change] = sources[0] if sources else []
        for other in sources[1:]:
            group += other
            groups = [g for g in groups if g is not other]
            maker = {name: group if g is other else g for name, g in maker.items()}
        if not sources:
            groups.append(group)
        group.append(change)
        maker.update((ref.name, group) for ref in change.after)
    return [tuple(group) for group in groups]
