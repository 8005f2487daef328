"""Axes as atoms: splitting, merging, mixing, and what may not be done to a symbolic axis."""

from __future__ import annotations

import random
from math import prod

import pytest
import torch

from graphsurgery.affine.atoms import Atom, Axes, NoFold, Window

BATCH = 1_000_000_007


def coordinates(axes: Axes, shape: tuple[int, ...]) -> torch.Tensor:
    """For every element of a value with carried atoms only: which element of the entry it is."""
    strides = [prod(shape[i + 1 :]) for i in range(len(shape))]
    index = torch.zeros([1] * len(axes.atoms()) or [1], dtype=torch.long)
    atoms = axes.atoms()
    for position, atom in enumerate(atoms):
        along = torch.arange(atom.size) * atom.stride * strides[atom.axis]
        index = index + along.reshape([-1 if i == position else 1 for i in range(len(atoms))])
    return index.reshape(axes.shape)


@pytest.mark.parametrize("seed", range(60))
def test_views_and_permutes_carry_the_right_coordinates(seed: int) -> None:
    rng = random.Random(seed)
    shape = tuple(rng.choice([1, 2, 3, 4, 6]) for _ in range(rng.randint(1, 4)))
    axes = Axes.entry(shape, ())
    value = torch.arange(prod(shape)).reshape(shape)
    for _ in range(4):
        if rng.random() < 0.5:
            order = rng.sample(range(len(axes.dims)), len(axes.dims))
            axes, value = axes.with_dims(axes.dims[i] for i in order), value.permute(order)
        else:
            sizes = [rng.choice([d for d in range(1, 13) if value.numel() % d == 0])]
            sizes.append(value.numel() // sizes[0])
            axes, value = axes.reshape(sizes), value.reshape(sizes)
        if not all(atom.carried for atom in axes.atoms()):
            return  # sizes did not factor: nothing is claimed
        assert axes.shape == tuple(value.shape)
        assert torch.equal(coordinates(axes, shape), value)


def test_reshape_merges_neighbours_and_splits_them_again() -> None:
    axes = Axes.entry((BATCH, 6, 4), (BATCH,)).reshape((BATCH, 24))
    assert axes.dims[1] == (Atom(6, 1), Atom(4, 2))
    assert axes.reshape((BATCH, 3, 8)).dims[1:] == ((Atom(3, 1, 2),), (Atom(2, 1, 1), Atom(4, 2)))


def test_reshape_that_does_not_factor_mixes_the_axes_and_says_so() -> None:
    axes = Axes.entry((BATCH, 6, 4), (BATCH,)).reshape((BATCH, 8, 3))
    assert axes.dims[1:] == ((Atom(8),), (Atom(3),))
    assert set(axes.gone) == {Atom(6, 1), Atom(4, 2)}
    assert axes.causes[-1][0] == "scramble"


def test_reshape_that_moves_the_batch_between_axes_is_carried() -> None:
    axes = Axes.entry((BATCH, 6, 4), (BATCH,)).reshape((BATCH * 6, 4)).reshape((BATCH, 3, 2, 4))
    assert axes.dims[0] == (Atom(BATCH, 0),)
    assert axes.dims[1] == (Atom(3, 1, 2),)


def test_reshape_that_scrambles_the_batch_is_refused() -> None:
    axes = Axes.entry((4, BATCH, 6), (BATCH,)).with_dims(((Atom(BATCH, 1),), (Atom(4, 0),), (Atom(6, 2),)))
    with pytest.raises(NoFold) as refusal:
        axes.reshape((3, BATCH * 8))
    assert refusal.value.code == "batch-mixed"


@pytest.mark.parametrize(
    "act", [lambda a: a.consume(a.dims[0]), lambda a: a.vary(0), lambda a: a.shift_along([0])]
)
def test_the_batch_is_never_mixed_or_varied(act) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(NoFold) as refusal:
        act(Axes.entry((BATCH, 3), (BATCH,)))
    assert refusal.value.code in ("batch-mixed", "batch-varied")


def test_varying_a_windowed_axis_gives_up_its_window() -> None:
    window = Window(8, 1, 0, 2, 1)
    axes = Axes.entry((2, 8), ()).with_dim(1, (Atom(6, 1, window=window),))
    varied = axes.vary(1)
    assert varied.dims[1] == (Atom(6),)
    assert varied.gone == (Atom(8, 1),)


@pytest.mark.parametrize(
    ("first", "second"),
    [((2, -1, 1, 1), (1, 0, 2, 1)), ((3, 0, 4, 2), (2, 0, 3, 3)), ((1, 0, 0, 0), (2, -2, 2, 2))],
)
def test_windows_compose_to_the_positions_that_both_read(first, second) -> None:  # type: ignore[no-untyped-def]
    inner = Window(64, *first)
    composed = inner.then(*second, False)
    s, lo, hi, step = second

    def taps(s: int, lo: int, hi: int, step: int, p: int) -> set[int]:
        return {s * p + offset for offset in range(lo, hi + 1, step or 1)}

    for p in (0, 3, 5):
        read = set().union(*(taps(*first, q) for q in taps(s, lo, hi, step, p)))
        assert read <= taps(composed.s, composed.lo, composed.hi, composed.step, p)
        assert min(read) == composed.s * p + composed.lo
        assert max(read) == composed.s * p + composed.hi


def test_a_single_position_of_a_window_stays_known_when_its_dimension_is_dropped() -> None:
    single = Atom(1, 2, window=Window(5, 1, 0, 4, 1))
    axes = Axes.entry((BATCH, 6, 5), (BATCH,)).with_dim(2, (single,))
    dropped = axes.drop(2)
    assert dropped.dims == ((Atom(BATCH, 0), single), (Atom(6, 1),))
    assert dropped.pinned
    assert axes.reshape((BATCH, 2, 3)).dims[0] == (Atom(BATCH, 0), single)
    assert axes.reshape((BATCH, 6)).entry_digits() == axes.entry_digits()
    assert Axes.entry((5,), ()).with_dim(0, (single._replace(axis=0),)).drop(0).gone == (Atom(5, 0),)


def test_what_has_one_position_neither_varies_nor_differs_along_it() -> None:
    single = Atom(1, 1, window=Window(5, 1, 0, 4, 1))
    axes = Axes.entry((2, 5), ()).with_dim(1, (single,))
    assert axes.vary(1) == axes
    assert axes.shift_along([1]).dims == axes.dims


def test_shuffled_features_are_features_and_shuffled_positions_are_gone() -> None:
    cause = ("reordered", "why")
    features = Axes.entry((2, 5), ()).with_dim(1, (Atom(3), Atom(2))).shuffle(1, 4, cause)
    assert features.dims[1] == (Atom(4),)
    assert (features.gone, features.causes, features.pinned) == ((), (), False)
    positions = Axes.entry((2, 5), ()).shuffle(1, 4, cause)
    assert (positions.dims[1], positions.gone, positions.causes) == ((Atom(4),), (Atom(5, 1),), (cause,))


def test_sizes_that_cannot_be_compared_are_refused() -> None:
    """A symbolic size that is written in two ways has two primes."""
    with pytest.raises(NoFold, match="cannot be compared") as refusal:
        Axes.entry((2, 101), (101, 103)).reshape((2, 103))
    assert refusal.value.code == "dynamic-shape"
