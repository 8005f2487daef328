"""Moves between layouts, against numpy-like reasoning on small tensors."""

from __future__ import annotations

import random
from math import prod

import pytest
import torch

from graphsurgery.affine.program import Layout, Permute, Reshape, moves, run


def value_in(layout: Layout, sizes: dict[int, int]) -> torch.Tensor:
    """A tensor whose element names the coordinates of all labels, laid out as asked."""
    labels = [a for dim in layout for a in dim]
    order = sorted(sizes)
    value = torch.arange(prod(sizes.values())).reshape([sizes[a] for a in order])
    value = value.permute([order.index(a) for a in labels])
    return value.reshape([prod(sizes[a] for a in dim) for dim in layout])


def random_layout(rng: random.Random, labels: list[int]) -> Layout:
    labels = rng.sample(labels, len(labels))
    dims: list[tuple[int, ...]] = []
    while labels:
        n = rng.randint(1, len(labels))
        dims.append(tuple(labels[:n]))
        labels = labels[n:]
    for _ in range(rng.choice([0, 0, 1])):
        dims.insert(rng.randint(0, len(dims)), ())
    return tuple(dims)


@pytest.mark.parametrize("seed", range(150))
def test_moves_bring_any_layout_into_any_other(seed: int) -> None:
    rng = random.Random(seed)
    sizes = {label: rng.choice([1, 2, 3, 4]) for label in range(rng.randint(1, 4))}
    source, target = random_layout(rng, list(sizes)), random_layout(rng, list(sizes))
    steps = moves(source, target, sizes)
    assert torch.equal(run(steps, {}, value_in(source, sizes), int), value_in(target, sizes))
    assert sum(isinstance(step, Permute) for step in steps) <= 1
    assert len(steps) <= 3


def test_no_move_where_nothing_moves() -> None:
    assert moves(((0,), (1, 2)), ((0,), (1, 2)), {0: 2, 1: 3, 2: 4}) == ()


def test_regrouping_is_one_view() -> None:
    assert moves(((0,), (1, 2)), ((0, 1), (2,)), {0: 2, 1: 3, 2: 4}) == (Reshape((6, 4)),)


def test_a_permutation_is_one_permute_also_around_a_dimension_of_one() -> None:
    assert moves(((0,), (), (1,)), ((0,), (1,), ()), {0: 2, 1: 3}) == (Reshape((2, 3, 1)),)
    assert moves(((0,), (1,), ()), ((1,), (0,), ()), {0: 2, 1: 3}) == (Permute((1, 0, 2), (3, 2, 1)),)


def test_labels_of_size_one_may_lie_anywhere() -> None:
    sizes = {0: 2, 1: 1, 2: 3}
    assert moves(((0, 1), (2,)), ((0,), (2,), (1,)), sizes) == (Reshape((2, 3, 1)),)
    assert moves(((0, 1), (2,)), ((2,), (1, 0)), sizes) == (Permute((1, 0), (3, 2)),)
