"""Which regions of a graph to fold, by dynamic programming over cuts.

A region runs from one live value, its entry, to one call, its exit; everything in between is affine and dies
with the exit. A value through which every affine path to a call runs is a *cut* of that call, and may be the
entry of a region that ends there: chains, branches that meet again and nests of both are one case. With
X(n) for all that lives for n alone (the subtree of n among the post-dominators),

    best(n) = min( cost(n) + sum of best(children of n),
                   min over entries e of  cost(form of e..n) + (best(e) if e lives for n alone) )

is the least cost of computing n and what lives for it. For a chain of matrices this is matrix-chain order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from math import prod

from torch import fx

from graphsurgery.affine import rules
from graphsurgery.affine.atoms import Axes, NoFold
from graphsurgery.affine.choice import Option, objection, options
from graphsurgery.affine.dominance import PostDominators
from graphsurgery.affine.preshift import preshifted
from graphsurgery.affine.region import Region, Scope, Tally
from graphsurgery.cost import Score
from graphsurgery.values import is_tensor, tensor_meta

_FEW = 4
"""Entries of one kind that a call may have before those are dropped that an earlier one makes useless."""

_MANY = 32
"""Entries of one kind that are followed at most; only chains whose sizes fall all the way have so many."""


@dataclass(frozen=True, eq=False)
class Fold:
    """A region to fold and the form chosen for it."""

    region: Region
    option: Option


class Search:
    """The best folds of a graph.

    Attributes:
        scope: the graph.
        growth: how many times the parameters a form may have (see `choice.objection`).
        axes: for each call, the axes of the region from each of its possible entries, earliest first.
        dominators: what dies with what.
    """

    def __init__(self, scope: Scope, max_param_growth: float) -> None:
        """Find the possible regions and the best choice among them."""
        self.scope, self.growth = scope, max_param_growth
        self.dominators = PostDominators(scope.gm.graph, scope.constant)
        self.axes: dict[fx.Node, dict[fx.Node, Axes]] = {}
        self._dying: dict[fx.Node, set[fx.Node]] = {}
        self._best: dict[fx.Node, Score] = {}
        self._tally: dict[fx.Node, Tally] = {}
        self._fold: dict[fx.Node, Fold] = {}
        self._children: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for node in scope.gm.graph.nodes:
            if node in self.dominators.parent:
                self._visit(node)

    def folds(self) -> list[Fold]:
        """The regions to fold, last exit first: no fold changes a call of one that comes after it."""
        chosen = []
        stack = [node for node, parent in self.dominators.parent.items() if parent is None]
        while stack:
            node = stack.pop()
            fold = self._fold.get(node)
            if fold is None:
                stack.extend(self._children[node])
                continue
            chosen.append(fold)
            if self.dominators.dies_with(fold.region.entry, node):
                stack.append(fold.region.entry)
        return sorted(chosen, key=lambda fold: -self.scope.position(fold.region.exit))

    def regions(self) -> Iterator[Region]:
        """Every region that the search may fold, one call or more."""
        for node, found in self.axes.items():
            for entry, axes in found.items():
                if is_tensor(node) and self.dies(entry, node):
                    yield self.region(entry, node, axes)

    def region(self, entry: fx.Node, node: fx.Node, axes: Axes) -> Region:
        """The region from an entry to a call."""
        summed = self._tally[node]
        if self.dominators.dies_with(entry, node):
            summed = summed - self._tally[entry]
        return Region(self.scope, entry, node, axes, summed)

    # -- one call after the other --------------------------------------------------------------------

    def _visit(self, node: fx.Node) -> None:
        children = self._children[node]
        tally = sum((self._tally[child] for child in children), self.scope.tally(node))
        best = self.scope.cost_model.score(self.scope.tally(node).cost)
        for child in children:
            best = _plus(best, self._best[child])
        self._tally[node] = tally
        self.axes[node] = self._entries(node)
        for entry, axes in reversed(self.axes[node].items()):  # of equals the one that changes least
            if not is_tensor(node) or not self.dies(entry, node):
                continue
            if set(rules.live_operands(node, self.scope.constant)) == {entry}:
                continue  # one call is what it is
            region = self.region(entry, node, axes)
            option = cheapest(region, self.growth)
            if option is None:
                continue
            whole = self.scope.cost_model.score(option.cost)
            if self.dominators.dies_with(entry, node):
                whole = _plus(whole, self._best[entry])
            if whole < best:
                best, self._fold[node] = whole, Fold(region, option)
        self._best[node] = best
        self._prune(node)
        parent = self.dominators.parent[node]
        if parent is not None:
            self._children[parent].append(node)

    def _entries(self, node: fx.Node) -> dict[fx.Node, Axes]:
        """The possible entries of regions that end in a call: those that all its live operands have."""
        operands = list(dict.fromkeys(rules.live_operands(node, self.scope.constant)))
        if node.op != "call_function" or not operands or not rules.has_rule(node, len(operands)):
            return {}
        if any(operand not in self.axes for operand in operands) or _empty(self.scope, node):
            return {}
        found: dict[fx.Node, Axes] = {}
        first = [*self.axes[operands[0]], operands[0]]
        for entry in first:
            if not all(entry is operand or entry in self.axes[operand] for operand in operands[1:]):
                continue
            if not is_entry(self.scope, entry):
                continue
            try:
                reach = partial(self.along, entry)
                found[entry] = rules.follow(node, reach, self.scope.constant, self.scope.sizes)
            except NoFold:
                continue
        self._dying[node] = {entry for entry in found if self._interior_dies(entry, node, operands)}
        return found

    def along(self, entry: fx.Node, node: fx.Node) -> Axes:
        """The axes from an entry to a value that it leads to; to itself they are its own."""
        return self.scope.entry_axes(entry) if entry is node else self.axes[node][entry]

    def dies(self, entry: fx.Node, node: fx.Node) -> bool:
        """Whether all that lies between an entry and a call dies with the call."""
        return entry in self._dying.get(node, ())

    def _interior_dies(self, entry: fx.Node, node: fx.Node, operands: list[fx.Node]) -> bool:
        """Whether nothing outside of a region reads what lies between its entry and its exit."""
        dies_with = self.dominators.dies_with
        if dies_with(entry, node):
            return True
        inner = [operand for operand in operands if operand is not entry]
        if not all(dies_with(operand, node) for operand in inner):
            return False
        if len(operands) == 1:
            return not inner or entry in self._dying[inner[0]]
        return all(dies_with(member, node) for member in self.scope.between(entry, node))

    def _prune(self, node: fx.Node) -> None:
        """Drop entries that an earlier one makes useless: whatever follows, its form is no dearer.

        Rules look at the dims of a value, not at what was consumed for it. Of two entries with equal dims,
        the earlier one therefore stays the better one if it has consumed no more; so a long chain of equal
        layers is searched in linear time.
        """
        found = self.axes[node]
        if len(found) <= _FEW:
            return
        groups: dict[object, list[tuple[fx.Node, int]]] = defaultdict(list)
        for entry, axes in found.items():
            if not self.dominators.dies_with(entry, node):
                continue  # a branch: the call where it ends decides
            key = (axes.dims, axes.pinned, axes.shifted, tuple(atom.axis for atom in axes.gone))
            groups[key].append((entry, prod(atom.size for atom in axes.gone)))
        for members in groups.values():
            kept: list[tuple[fx.Node, int]] = []
            for entry, size in members:
                if len(members) <= _FEW or not kept or size < kept[-1][1]:
                    kept.append((entry, size))
            kept = kept if len(kept) <= _MANY else [kept[0], *kept[1 - _MANY :]]
            for entry, _ in members:
                if all(entry is not other for other, _ in kept):
                    del found[entry]


def cheapest(region: Region, growth: float | None) -> Option | None:
    """The cheapest form of a region, if there is one.

    Args:
        region: the region.
        growth: how many times the parameters the form may have; it has to pay then. None: whatever it costs.
    """
    try:
        found = list(options(region))
    except NoFold:
        found = []
    found += preshifted(region)
    if growth is not None:
        found = [option for option in found if objection(region, option, growth) is None]
    return min(found, key=lambda option: region.scope.cost_model.score(option.cost), default=None)


def is_entry(scope: Scope, node: fx.Node) -> bool:
    """Whether a region may begin with a value: a tensor of floating-point numbers, at least one."""
    return is_tensor(node) and tensor_meta(node).is_floating_point() and not _empty(scope, node)


def _empty(scope: Scope, node: fx.Node) -> bool:
    return is_tensor(node) and 0 in scope.shape(node)


def _plus(a: Score, b: Score) -> Score:
    return tuple(x + y for x, y in zip(a, b, strict=True))
