"""Values that only part paths: folded into every one of their readers, where that costs less in all.

A value that several calls read is computed once and is the entry of whatever follows. Where it is affine
itself, each reader may take it in: then the readers' forms replace the readers and the value together. For
one reader alone that never pays, so all are counted at once: a Linear in front of three heads, or the scale
and shift of a norm in front of queries, keys and values.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import fx

from graphsurgery.affine import rules
from graphsurgery.affine.choice import Option, movements
from graphsurgery.affine.region import Region, Tally
from graphsurgery.affine.search import Fold, Search, cheapest
from graphsurgery.cost import Cost, Score
from graphsurgery.values import is_tensor


@dataclass(frozen=True)
class _Branch:
    """What stands behind a value on one path, in the plan so far: up to a call, at a cost."""

    exit: fx.Node
    tally: Tally
    replaced: Fold | None


Covered = dict[fx.Node, list[Fold]]
"""The folds of a plan that a call is in: several, where it was dissolved."""


def dissolved(search: Search, folds: Sequence[Fold]) -> list[Fold]:
    """The plan of a search with values dissolved where that pays, last exit first."""
    plan = {fold.region.exit: fold for fold in folds}
    covered: Covered = defaultdict(list)
    for fold in folds:
        _cover(covered, fold)
    for node, readers in search.dominators.readers.items():  # last first
        if len(readers) < 2 or not search.axes.get(node) or not is_tensor(node):
            continue
        if _is_inside(covered, node):
            continue  # dead already
        found = _dissolve(search, node, covered)
        if found is None:
            continue
        entry = found[0].region.entry
        inner = set(search.scope.between(entry, node))
        for done in [*inner, *(fold.region.exit for fold in found)]:
            old = plan.pop(done, None)
            for member in old.region.nodes if old else ():
                covered[member] = [fold for fold in covered[member] if fold is not old]
        for fold in found:
            plan[fold.region.exit] = fold
            _cover(covered, fold)
    position = search.scope.position
    return sorted(plan.values(), key=lambda fold: -position(fold.region.exit))


def _cover(covered: Covered, fold: Fold) -> None:
    for node in fold.region.nodes:
        covered[node].append(fold)


def _is_inside(covered: Covered, node: fx.Node) -> bool:
    return any(fold.region.exit is not node for fold in covered.get(node, ()))


def _dissolve(search: Search, node: fx.Node, covered: Covered) -> list[Fold] | None:
    """The folds that take a value in, one for each path behind it; None where that does not pay."""
    branches: dict[fx.Node, list[_Branch]] = {}
    for reader in search.dominators.readers[node]:
        found = list(_branches(search, node, reader, covered))
        if not found:
            return None
        for path in found:
            branches[path[0].exit] = path
    score = search.scope.cost_model.score
    best: tuple[Score, list[Fold]] | None = None
    for entry in search.axes[node]:
        if _is_inside(covered, entry) or not search.dies(entry, node):
            continue
        inner = search.region(entry, node, search.axes[node][entry]).tally
        folds = _all(search, entry, node, inner, list(branches.values()))
        if folds is not None:
            total = score(_sum([f.option for f in folds]))
            if best is None or total < best[0]:
                best = (total, folds)
    return best[1] if best else None


def _branches(search: Search, node: fx.Node, reader: fx.Node, covered: Covered) -> Iterator[list[_Branch]]:
    """For each path behind a value through one reader, the stretches that may take it in, shortest first.

    Several paths run through a reader that has been taken into several folds itself.
    """
    if covered.get(reader):
        for fold in covered[reader]:
            if fold.region.entry is node:
                yield [_Branch(fold.region.exit, _written(fold), fold)]
        return
    found: list[_Branch] = []
    tally = Tally()
    live = node
    while rules.live_operands(reader, search.scope.constant) == [live] and node in search.axes[reader]:
        tally = tally + search.scope.tally(reader)
        if is_tensor(reader):  # a region does not end in the parts of a split
            found.append(_Branch(reader, tally, None))
        readers = search.dominators.readers[reader]
        if len(readers) != 1 or covered.get(readers[0]):
            break
        live, reader = reader, readers[0]
    if found:
        yield found


def _written(fold: Fold) -> Tally:
    """What a chosen fold consists of once it is written."""
    moving = movements(fold.option.form)
    heavy = int("weight" in fold.option.form.slots)
    return Tally(fold.option.cost, heavy, heavy, moving, 0)


def _all(
    search: Search, entry: fx.Node, node: fx.Node, inner: Tally, branches: list[list[_Branch]]
) -> list[Fold] | None:
    """The cheapest form from an entry for every path behind a value, if they pay together."""
    score = search.scope.cost_model.score
    shared = frozenset(search.scope.between(entry, node))
    before, chosen = inner, []
    for branch in branches:
        found: list[tuple[Score, _Branch, Region, Option]] = []
        for end in branch:
            axes = search.axes[end.exit].get(entry)
            if axes is None:
                continue
            also = end.replaced.region.shared if end.replaced else frozenset()
            region = Region(search.scope, entry, end.exit, axes, end.tally, shared | also)
            option = cheapest(region, None)
            if option is not None:
                gain = score(option.cost - end.tally.cost)
                found.append((gain, end, region, option))
        if not found:
            return None
        _, end, region, option = min(found, key=lambda item: item[0])
        before = before + end.tally
        chosen.append(Fold(region, option))
    after = _sum([fold.option for fold in chosen])
    biases = sum(fold.option.form.slots.get("bias", (0,))[0] for fold in chosen)
    dearer = after.macs > before.cost.macs or score(after) >= score(before.cost)
    if dearer or after.params > before.cost.params + biases:
        return None
    if sum(movements(fold.option.form) for fold in chosen) > before.moving:
        return None
    first = replace(chosen[0].region, summed=(chosen[0].region.summed or Tally()) + inner)
    return [Fold(first, chosen[0].option), *chosen[1:]]


def _sum(chosen: Sequence[Option]) -> Cost:
    return sum((option.cost for option in chosen), Cost())
