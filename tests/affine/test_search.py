"""The plan of the search against all plans: products of matrices, long enough that entries are dropped."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch
from torch import nn

from graphsurgery.affine.region import Scope
from graphsurgery.affine.search import _FEW, Search
from graphsurgery.capture import capture
from graphsurgery.cost import FLOPS


def least(sizes: list[int]) -> tuple[float, ...]:
    """The least score of a chain of Linear of these sizes without bias, over all ways to cut it."""

    def score(macs: int, params: int) -> tuple[float, ...]:
        return (2 * macs, 1, params)

    best: list[tuple[float, ...]] = [(0, 0, 0)]
    for stop in range(1, len(sizes)):
        ways = []
        for start in range(stop):
            product = sizes[start] * sizes[stop]
            apart = sum(a * b for a, b in zip(sizes[start:stop], sizes[start + 1 : stop + 1], strict=True))
            if start + 1 == stop or score(product, product) < (2 * apart, stop - start, apart):
                ways.append(tuple(a + b for a, b in zip(best[start], score(product, product), strict=True)))
        best.append(min(ways))
    return best[-1]


@pytest.mark.parametrize("seed", range(12))
def test_the_cheapest_cuts_of_a_long_product_of_matrices(seed: int) -> None:
    rng = random.Random(seed)
    length = rng.choice([6, 9, 14, 20])
    sizes = [rng.choice([2, 3, 5, 8, 13, 21, 34]) for _ in range(length + 1)]
    if seed % 4 == 0:
        sizes.sort(reverse=True)  # every entry consumes less than the one before
    model = nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in pairwise(sizes)))
    scope = Scope(capture(model.eval(), (torch.randn(2, sizes[0]),)))
    search = Search(scope, 2.0)
    inside = {node for fold in search.folds() for node in fold.region.nodes}
    chosen = [FLOPS.score(fold.option.cost) for fold in search.folds()]
    linears = [node for node in scope.gm.graph.nodes if node.op == "call_function"]
    chosen += [FLOPS.score(scope.tally(node).cost) for node in linears if node not in inside]
    assert tuple(map(sum, zip(*chosen, strict=True))) == least(sizes), sizes


def test_entries_that_an_earlier_one_makes_useless_are_dropped() -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(40))).eval()
    search = Search(Scope(capture(model, (torch.randn(2, 8),))), 2.0)
    assert max(len(entries) for entries in search.axes.values()) <= _FEW + 1
    (fold,) = search.folds()
    assert len(fold.region.nodes) == 40
