"""Orders of axes, and how a reshape carries them."""

from __future__ import annotations

import itertools
from math import prod

import pytest
import torch

from graphsurgery.layout.orders import inverse, moves, natural, regrouped, relative, through


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_orders_are_those_of_permute(rank: int) -> None:
    x = torch.randn(*range(2, 2 + rank))
    for a, b in itertools.product(itertools.permutations(range(rank)), repeat=2):
        assert torch.equal(x.permute(a).permute(inverse(a)), x)
        assert torch.equal(x.permute(a).permute(b), x.permute(through(a, b)))
        assert torch.equal(x.permute(a).permute(relative(a, b)), x.permute(b))
        assert moves(x.shape, a, b) is (a != b)


def test_axes_of_size_one_do_not_move() -> None:
    assert not moves((2, 1, 3), (0, 1, 2), (1, 0, 2))
    assert moves((2, 1, 3), (0, 1, 2), (2, 1, 0))


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ((2, 3, 4), (2, 12)),
        ((2, 12), (2, 3, 4)),
        ((2, 4, 6, 5), (2, 2, 2, 3, 2, 5)),
        ((2, 2, 2, 3), (4, 6)),
        ((2, 3), (2, 1, 3, 1)),
        ((1, 2, 1, 3), (2, 3)),
        ((2, 1, 3), (1, 6, 1)),
        ((6, 4), (4, 6)),
    ],
)
def test_a_reshape_carries_an_order_or_refuses(source: tuple[int, ...], target: tuple[int, ...]) -> None:
    """Whatever it says is right; and it says something wherever some order would be right."""
    x = torch.arange(prod(source)).reshape(source)
    wanted = x.reshape(target)
    for order in itertools.permutations(range(len(source))):
        made = regrouped(source, target, order)
        flat = x.permute(order).flatten()
        right = [
            p
            for p in itertools.permutations(range(len(target)))
            if torch.equal(wanted.permute(p).flatten(), flat)
        ]
        if made is None:
            assert not right
        else:
            assert made in right
    assert regrouped(source, target, natural(len(source))) == natural(len(target))
