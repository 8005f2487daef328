"""Which stretches of a graph to fold: the best cuts of every straight chain of affine calls.

A chain is a maximal run of affine calls in which each value is read by the next call only. For every pair of
cuts the axes say which forms the stretch between has; dynamic programming over cuts finds the cheapest way
to write the whole chain (for products of matrices this is matrix-chain order).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from torch import fx

from graphsurgery.affine import rules, rules_linear, rules_movement, rules_position
from graphsurgery.affine.atoms import Axes, NoFold
from graphsurgery.affine.choice import Option, Score, objection, options, score
from graphsurgery.affine.region import Region, Scope, Tally, is_heavy
from graphsurgery.cost import Cost, op_name

_RULE_ROOMS = (rules_linear, rules_movement, rules_position)  # imported for what they register


@dataclass(frozen=True)
class Fold:
    """A stretch to fold and the form chosen for it."""

    region: Region
    option: Option


@dataclass(frozen=True)
class Declined:
    """Two neighbouring stretches that stay apart, and why.

    Attributes:
        nodes: the calls concerned.
        code: stable code of the reason.
        reason: one sentence.
        before: cost as it is, where cost was the question.
        after: cost of the best form, where there is one.
    """

    nodes: tuple[fx.Node, ...]
    code: str
    reason: str
    before: Cost | None = None
    after: Cost | None = None


@dataclass(frozen=True)
class Chain:
    """A straight run of affine calls."""

    nodes: tuple[fx.Node, ...]


def chains(scope: Scope) -> Iterator[Chain]:
    """All maximal straight chains of a graph, in graph order."""
    follows: dict[fx.Node, fx.Node] = {}
    starts: list[fx.Node] = []
    for node in scope.gm.graph.nodes:
        if not is_member(scope, node):
            continue
        live = rules.live_operand(node, scope.constant)
        if live is not None and is_member(scope, live) and len(live.users) == 1:
            follows[live] = node
        else:
            starts.append(node)
    for node in starts:
        run = [node]
        while run[-1] in follows:
            run.append(follows[run[-1]])
        yield Chain(tuple(run))


def is_member(scope: Scope, node: fx.Node) -> bool:
    """Whether a call may be part of a chain: it has a rule and exactly one live operand."""
    if node in scope.constant or not rules.has_rule(node):
        return False
    return rules.live_operand(node, scope.constant) is not None


class ChainSearch:
    """The best cuts of one chain."""

    def __init__(self, scope: Scope, chain: Chain, max_param_growth: float) -> None:
        """Prepare the search; see `folds` and `declined`."""
        self.scope, self.chain, self.growth = scope, chain, max_param_growth
        self.size = len(chain.nodes)
        self._sums = [Tally()]
        for node in chain.nodes:
            self._sums.append(self._sums[-1] + scope.tally(node))

    def region(self, start: int, stop: int, axes: Axes) -> Region:
        """The stretch of calls from `start` up to `stop`, exclusive."""
        summed = self._sums[stop] - self._sums[start]
        return Region(self.scope, self.chain.nodes[start:stop], axes, summed)

    def walk(self, start: int) -> Iterator[tuple[int, Axes]]:
        """The axes of every stretch that starts at a cut, shortest first.

        Raises:
            NoFold: the next call cannot be part of a stretch from this cut.
        """
        nodes = self.chain.nodes
        live = self.region(start, start + 1, _NO_AXES).entry
        shape = self.scope.shape(live)
        if 0 in shape or any(0 in self.scope.shape(node) for node in nodes[start:]):
            raise NoFold("empty", "it works on a tensor without elements")
        axes = Axes.entry(shape, self.scope.primes)
        for stop in range(start, self.size):
            axes = rules.apply(rules.Step(nodes[stop], live, axes, self.scope.sizes))
            live = nodes[stop]
            yield stop + 1, axes

    def axes(self, start: int, stop: int) -> Axes:
        """The axes of one stretch.

        Raises:
            NoFold: it is not affine as a whole.
        """
        return next(axes for end, axes in self.walk(start) if end == stop)

    def folds(self) -> list[Fold]:
        """The stretches to fold, in order."""
        best: list[tuple[Score, int, Fold | None]] = [((0, 0, 0), 0, None)]
        alone = [score(self.scope.tally(node).cost) for node in self.chain.nodes]
        table: dict[int, list[tuple[int, Fold]]] = {}
        for start in range(self.size):
            for fold in self._worthwhile(start):
                table.setdefault(start + len(fold.region.nodes), []).append((start, fold))
        for stop in range(1, self.size + 1):
            choices: list[tuple[Score, int, Fold | None]] = [
                (_plus(best[stop - 1][0], alone[stop - 1]), stop - 1, None)
            ]
            choices += [(_plus(best[i][0], score(f.option.cost)), i, f) for i, f in table.get(stop, [])]
            best.append(min(choices, key=lambda choice: choice[0]))
        found: list[Fold] = []
        stop = self.size
        while stop:
            _, start, chosen = best[stop]
            if chosen is not None:
                found.append(chosen)
            stop = start
        return found[::-1]

    def _worthwhile(self, start: int) -> Iterator[Fold]:
        try:
            for stop, axes in self.walk(start):
                if stop - start < 2:
                    continue
                region = self.region(start, stop, axes)
                try:
                    found = options(region)
                except NoFold:
                    continue
                option = next((o for o in found if objection(region, o, self.growth) is None), None)
                if option is not None:
                    yield Fold(region, option)
        except NoFold:
            return

    def declined(self) -> Iterator[Declined]:
        """Why neighbouring layers of a chain stay apart, pair by pair."""
        marks = [i for i, node in enumerate(self.chain.nodes) if is_layer(node)]
        for first, second in pairwise(marks):
            nodes = (self.chain.nodes[first], self.chain.nodes[second])
            try:
                region = self.region(first, second + 1, self.axes(first, second + 1))
                option = options(region)[0]
                reason = objection(region, option, self.growth)
                if reason is not None:
                    code, cause = self._cause(region)
                    whole = f"{cause}; {reason}" if cause else reason
                    yield Declined(nodes, code, whole, region.tally.cost, option.cost)
            except NoFold as refusal:
                yield Declined(nodes, refusal.code, refusal.reason)

    def _cause(self, region: Region) -> tuple[str, str]:
        """What lies behind a form that does not pay."""
        if region.axes.causes:
            return region.axes.causes[-1]
        if region.tally.shares:
            return "shared-weights", "some of the weights are read by other calls too and would stay"
        return "costs-more", ""


def is_layer(node: fx.Node) -> bool:
    """Whether a call is a layer of its own: it multiplies by weights, normalises, scales or pools."""
    name = op_name(node)
    return is_heavy(node) or name in ("batch_norm", "mul", "div", "add", "sub", "rsub") or "pool" in name


def _plus(a: Score, b: Score) -> Score:
    return (a[0] + b[0], a[1] + b[1], a[2] + b[2])


_NO_AXES = Axes(())
