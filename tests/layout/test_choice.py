"""The cheapest choice of orders, against trying them all."""

from __future__ import annotations

import itertools
import random

import pytest
from torch import fx

from graphsurgery.layout.choice import Literal, Term, choose


def price(terms: list[Term], extra: dict[fx.Node, int], chosen: set[fx.Node]) -> int:
    def holds(literal: Literal) -> bool:
        return (literal[0] in chosen) is bool(literal[1])

    total = sum(extra[node] for node in chosen)
    for term in terms:
        needed = term.always or any(map(holds, term.readers))
        total += term.price if needed and not (term.maker and holds(term.maker)) else 0
    return total


def calls(count: int) -> list[fx.Node]:
    graph = fx.Graph()
    return [graph.placeholder(f"x{i}") for i in range(count)]


@pytest.mark.parametrize("seed", range(40))
def test_finds_the_cheapest_choice(seed: int) -> None:
    """Where each copy is asked for by readers on the same side as its maker, up to turning calls round."""
    rng = random.Random(seed)
    nodes = calls(7)
    turned = {node: rng.randint(0, 1) for node in nodes}
    extra = {node: rng.randint(0, 3) for node in nodes}
    terms = []
    for index, maker in enumerate(nodes):
        later = nodes[index + 1 :]
        for side in (0, 1):
            readers = tuple(
                (n, side ^ turned[n]) for n in rng.sample(later, min(len(later), rng.randint(0, 3)))
            )
            made = (maker, side ^ turned[maker]) if rng.random() < 0.8 else None
            # without a maker nothing ties readers to each other, and they may be priced apart
            readers = readers if made else readers[:1]
            always = not readers or rng.random() < 0.2
            terms.append(Term(rng.randint(1, 9), () if always else readers, always, made))
    best = min(
        price(terms, extra, set(subset))
        for size in range(len(nodes) + 1)
        for subset in itertools.combinations(nodes, size)
    )
    assert price(terms, extra, choose(terms, extra)) == best


def test_takes_a_choice_where_calls_cannot_agree() -> None:
    """`x + x.mT`: two readers want what the other has; any choice is right, none crashes."""
    a, b = calls(2)
    terms = [Term(5, ((b, 1),), False, (a, 1)), Term(5, ((b, 1),), False, (a, 0))]
    assert choose(terms, {a: 1, b: 1}) <= {a, b}


def test_prefers_what_is_there() -> None:
    a, b = calls(2)
    assert (
        choose([Term(5, ((b, 1),), False, (a, 1)), Term(5, ((b, 0),), False, (a, 0))], {a: 1, b: 1}) == set()
    )
