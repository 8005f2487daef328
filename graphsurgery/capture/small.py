"""Sizes of 0 and 1, which torch.export takes for special cases: where is the graph right all the same?

Tracing supposes that a free size is neither 0 nor 1, and asks the same of sizes that are computed: a strided
convolution leaves `(h - 1) // 2 + 1 != 1` behind, though neither model nor graph care. And a branch of the
model on such a size (`if a.shape[0] * b.shape[0] > 1`) leaves nothing, as that supposition decided it.
Neither tells what the model does there, so it is tried, in three steps:

1. For each free size that may be 0 or 1, and for each condition of the form `expression != 0` or `!= 1`: a
   few sizes at which the expression has that value, and which break as few other conditions as sizes can
   where it has (`h // 4 * (w // 4) != h // 4` where `w // 4` is 1). Model and graph are run there.
2. Where they agree, the conditions that were broken are lifted for that value of the expression. Where they
   differ, or the model fails, they stay, and a free size of that value is refused.
   A leading size beside the batch (that of a mask) may be 1 where it is not refused with the batch: then
   the condition is that all of them are.
3. Free sizes that may be 0 or 1 are tried so together.

Equations are conditions of the model, and never lifted; nor is the range of a `Dim`.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy  # type: ignore[import-untyped]  # ships no types

from graphsurgery.capture.expressions import evaluate

__all__ = ["Condition", "Settled", "Space", "settle"]

_SMALL = (1, 0)
_GRIDS = {1: 129, 2: 65, 3: 11}  # sizes below this are looked through, by how many are changed at once
_CANDIDATES = 64
_INEQUALITIES = frozenset({"!=", "<", "<=", ">", ">="})

Sizes = Mapping[sympy.Symbol, int]
"""A number for each free size."""


@dataclass(frozen=True)
class Condition:
    """A condition on the sizes of the inputs.

    Attributes:
        text: The condition in words.
        expression: For `graphsurgery.capture.expressions.evaluate`.
        fixed: Whether it is the caller's (the range of a `Dim`), and so never lifted.
    """

    text: str
    expression: Any
    fixed: bool = False

    @property
    def may_be_lifted(self) -> bool:
        """Whether it may be of tracing's own making: an inequality."""
        return not self.fixed and isinstance(self.expression, tuple) and self.expression[0] in _INEQUALITIES


@dataclass(frozen=True)
class Space:
    """The free sizes of a graph.

    Attributes:
        example: Their values in the example.
        ranges: The least and the greatest value (or None) that the caller allows.
        places: The expression that reads each of them.
        texts: The words for it.
        symbols_in: The free sizes that an expression depends on; None where others are among them.
        leaves: Objects with the shapes of the inputs at given sizes; None where there are no such inputs.
        beside: The batch and the leading sizes that are changed with it, though no condition ties them.
    """

    example: Sizes
    ranges: Mapping[sympy.Symbol, tuple[int, int | None]]
    places: Mapping[sympy.Symbol, Any]
    texts: Mapping[sympy.Symbol, str]
    symbols_in: Callable[[Any], set[sympy.Symbol] | None]
    leaves: Callable[[Sizes], Sequence[Any] | None]
    beside: frozenset[sympy.Symbol] = frozenset()

    def allows(self, sizes: Sizes) -> bool:
        """Return whether sizes are in the ranges."""
        return all(
            low <= sizes[symbol] and (high is None or sizes[symbol] <= high)
            for symbol, (low, high) in self.ranges.items()
        )


@dataclass(frozen=True)
class Settled:
    """What the trials found.

    Attributes:
        conditions: The conditions that remain, in order; `("or", ("==", expression, value), condition)` is
            one that is lifted for a value.
        refused: Which of 1 and 0 each free size may not have: neither, only 0, or both.
    """

    conditions: tuple[Condition, ...]
    refused: Mapping[sympy.Symbol, tuple[int, ...]]


def settle(space: Space, conditions: Sequence[Condition], agrees: Callable[[Sizes], bool]) -> Settled:
    """Return what holds of sizes of 0 and 1.

    Args:
        space: The free sizes.
        conditions: What is known of them.
        agrees: Whether the model runs, and the graph gives the same, at given sizes.
    """
    return _Trials(space, conditions, agrees).settled()


class _Trials:
    def __init__(
        self, space: Space, conditions: Sequence[Condition], agrees: Callable[[Sizes], bool]
    ) -> None:
        self._space = space
        self._conditions = list(conditions)
        self._soft = [i for i, condition in enumerate(conditions) if condition.may_be_lifted]
        self._hard = [i for i, condition in enumerate(conditions) if not condition.may_be_lifted]
        self._agrees = agrees
        self._known: dict[tuple[int, ...], bool] = {}

    def settled(self) -> Settled:
        lifted: dict[int, list[tuple[Any, int]]] = {index: [] for index in range(len(self._conditions))}
        refused: dict[sympy.Symbol, tuple[int, ...]] = {}
        tied: list[Condition] = []
        for symbol, place in self._space.places.items():
            for value in _SMALL:
                if value < self._space.ranges[symbol][0]:
                    continue
                # A range has no hole: where 1 is refused, so is 0.
                found = None if symbol in refused else self._try(place, value)
                if found is None and value == 1 and symbol in self._space.beside:
                    found = self._try_beside()
                    tied += self._only_beside(symbol) if found is not None else []
                if found is None:
                    refused[symbol] = (*refused.get(symbol, ()), value)
                for index in found or ():
                    lifted[index].append((place, value))
        special = (_special(self._conditions[index].expression) for index in self._soft)
        for expression, value in dict.fromkeys(case for case in special if case is not None):
            for index in self._try(expression, value) or ():
                lifted[index].append((expression, value))
        remaining = (_lift(condition, lifted[index]) for index, condition in enumerate(self._conditions))
        kept = [*(condition for condition in remaining if condition is not None), *tied]
        return Settled((*kept, *self._together(kept, refused)), refused)

    def _try(self, expression: Any, value: int) -> frozenset[int] | None:
        """Return the conditions that may be lifted where `expression == value`; None if it differs there."""
        points = list(self._points(expression, value))
        if not points:
            return None
        broken = [frozenset(index for index in self._soft if not self._holds(index, at)) for _, at in points]
        counts = Counter(broken)
        always = min(counts, key=lambda found: (len(found), -counts[found]))
        usable = [sizes for (sizes, _), found in zip(points, broken, strict=True) if found == always]
        ordered = sorted(usable, key=lambda sizes: sum(sizes.values()))
        chosen = (usable[0], ordered[0], ordered[-1])  # the first has most in common with the example
        return always if all(map(self._run, chosen)) else None

    def _try_beside(self) -> frozenset[int] | None:
        """The same as `_try`, where the batch and all the sizes beside it are 1."""
        sizes = {**self._space.example, **dict.fromkeys(self._space.beside, 1)}
        at = self._space.leaves(sizes) if self._space.allows(sizes) else None
        if at is None or not all(self._holds(index, at) for index in self._hard) or not self._run(sizes):
            return None
        return frozenset(index for index in self._soft if not self._holds(index, at))

    def _only_beside(self, symbol: sympy.Symbol) -> list[Condition]:
        """Return the conditions that a size is 1 only where the batch and the sizes beside it are."""
        places, texts = self._space.places, self._space.texts
        return [
            Condition(
                f"{texts[symbol]} != 1 or {texts[other]} == 1",
                ("or", ("!=", places[symbol], 1), ("==", places[other], 1)),
            )
            for other in places
            if other in self._space.beside and other != symbol
        ]

    def _points(self, expression: Any, value: int) -> Iterator[tuple[Sizes, Sequence[Any]]]:
        """Sizes at which the expression has the value and no equation is broken, evenly taken of all."""
        symbols = self._space.symbols_in(expression)
        if not symbols or len(symbols) not in _GRIDS:
            return
        order = [symbol for symbol in self._space.example if symbol in symbols]
        found: list[tuple[Sizes, Sequence[Any]]] = []
        single = expression in self._space.places.values()
        grid = [(value,)] if single else itertools.product(range(_GRIDS[len(order)]), repeat=len(order))
        for values in grid:
            for others in self._others():
                sizes = {**others, **dict(zip(order, values, strict=True))}
                if not self._space.allows(sizes):
                    continue
                at = self._space.leaves(sizes)
                if at is None or not _equals(expression, value, at):
                    break  # the others are not in it
                if all(self._holds(index, at) for index in self._hard):
                    found.append((sizes, at))
        yield from found[:: -(-len(found) // _CANDIDATES) or 1]

    def _others(self) -> list[Sizes]:
        """What the other sizes are meanwhile: as in the example, half of it, and 2, the least in tracing."""
        example = self._space.example
        low = {symbol: max(2, least) for symbol, (least, _) in self._space.ranges.items()}
        half = {symbol: max(low[symbol], size // 2) for symbol, size in example.items()}
        return list({tuple(sizes.values()): sizes for sizes in (example, half, low)}.values())

    def _together(
        self, conditions: Sequence[Condition], refused: Mapping[sympy.Symbol, tuple[int, ...]]
    ) -> list[Condition]:
        """Return conditions against sizes that are 0 or 1 at once and do not agree so."""
        allowed = {
            symbol: [
                value
                for value in _SMALL
                if value >= self._space.ranges[symbol][0] and value not in refused.get(symbol, ())
            ]
            for symbol in self._space.example
        }
        found: list[Condition] = []
        for count in range(2, len(allowed) + 1):
            if 3 < count < len(allowed):
                continue
            for symbols in itertools.combinations(allowed, count):
                for values in itertools.product(*(allowed[symbol] for symbol in symbols)):
                    if len(allowed) > 3 and count > 2 and len(set(values)) > 1:
                        continue
                    small = dict(zip(symbols, values, strict=True))
                    sizes = {**self._space.example, **small}
                    at = self._space.leaves(sizes) if self._space.allows(sizes) else None
                    if at is None or not all(_true(one.expression, at) for one in (*conditions, *found)):
                        continue
                    if not self._run(sizes):
                        found.append(self._not_at(small))
        return found

    def _not_at(self, small: Sizes) -> Condition:
        terms = tuple(("!=", self._space.places[symbol], value) for symbol, value in small.items())
        text = " or ".join(f"{self._space.texts[symbol]} != {value}" for symbol, value in small.items())
        return Condition(text, ("or", *terms))

    def _run(self, sizes: Sizes) -> bool:
        key = tuple(sizes[symbol] for symbol in self._space.example)
        if key not in self._known:
            self._known[key] = self._agrees(sizes)
        return self._known[key]

    def _holds(self, index: int, at: Sequence[Any]) -> bool:
        return _true(self._conditions[index].expression, at)


def _true(expression: Any, at: Sequence[Any]) -> bool:
    try:
        return bool(evaluate(expression, at))
    except ArithmeticError:
        return False


def _equals(expression: Any, value: int, at: Sequence[Any]) -> bool:
    try:
        return bool(evaluate(expression, at) == value)
    except ArithmeticError:
        return False


def _lift(condition: Condition, values: Sequence[tuple[Any, int]]) -> Condition | None:
    """Return a condition lifted where one of the expressions has its value; None if nothing of it remains."""
    if any(condition.expression in (("!=", left, right), ("!=", right, left)) for left, right in values):
        return None
    if not values:
        return condition
    terms = (("==", expression, value) for expression, value in values)
    return replace(condition, expression=("or", *terms, condition.expression))


def _special(condition: Any) -> tuple[Any, int] | None:
    """Return the expression and the value that a condition is against; None if it is not 0 or 1."""
    word, left, right = condition
    pairs = {"!=": [(left, right), (right, left)], "<": [(left, right)], ">": [(right, left)]}
    for part, whole in pairs.get(word, []):
        factors = _factors(whole)
        if len(factors) > 1 and part in factors:  # `a < a * b` speaks of b
            factors.remove(part)
            return functools.reduce(lambda a, b: ("*", a, b), factors), 1
    if isinstance(left, int):
        word, left, right = {"<": ">", "<=": ">="}.get(word, word), right, left
        if condition[0] in (">", ">="):
            return None
    if not isinstance(left, tuple) or not isinstance(right, int):
        return None
    value = {"!=": right, ">": right, ">=": right - 1}.get(word)
    return (left, value) if value in _SMALL else None


def _factors(expression: Any) -> list[Any]:
    if isinstance(expression, tuple) and expression[0] == "*":
        return [factor for operand in expression[1:] for factor in _factors(operand)]
    return [expression]
