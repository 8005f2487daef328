"""Which values are held against each other: by value, by what they are made of, by name."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import Tensor

from graphsurgery.localize.pairing import Print, pair_up, prints_of
from graphsurgery.localize.result import Place
from graphsurgery.verify import Inputs, Runner


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def place(name: str, *inputs: str) -> Place:
    return Place(name, "op", inputs=inputs)


def paired(
    ours: dict[str, tuple[Tensor, tuple[str, ...]]],
    theirs: dict[str, tuple[Tensor, tuple[str, ...]]],
    known: dict[str, str] | None = None,
) -> dict[str, str]:
    """The pairs of two programs, each given as name, value and what that is made of."""
    places, others = ([place(name, *made) for name, (_, made) in side.items()] for side in (ours, theirs))
    prints, other_prints = (
        {name: Print.of(value) for name, (value, _) in side.items()} for side in (ours, theirs)
    )
    return pair_up(places, prints, others, other_prints, known or {})


@pytest.mark.parametrize("size", [50, 1024, 5000])
def test_distances_of_values_are_those_of_their_prints(size: int) -> None:
    a, b = numbers(size), numbers(size, seed=1)
    for share in (1e-3, 0.1, 1.0):
        found = Print.of(a + share * b).distance(Print.of(a))
        true = float((share * b).norm() / a.norm())
        assert 0.5 * true < found < 2.0 * true
    assert Print.of(a).distance(Print.of(a.clone())) == 0.0
    assert Print.of(2 * a).distance(Print.of(a)) == pytest.approx(1.0)
    zero = Print.of(torch.zeros(size))
    assert Print.of(a).distance(zero) == float("inf")
    assert zero.distance(zero) == 0.0


def test_a_print_tells_shape_dtype_and_whether_anything_is_a_number() -> None:
    made = Print.of(numbers(2, 3, 4).half())
    assert (made.shape, made.dtype, made.numel, made.finite) == ((2, 3, 4), torch.float16, 24, True)
    assert not Print.of(torch.full((3,), torch.nan)).finite
    assert Print.of(torch.tensor([torch.nan, 1.0])).finite
    both = torch.complex(numbers(6), numbers(6, seed=1))
    assert Print.of(both).distance(Print.of(both.conj().resolve_conj())) > 0.1
    infinite = torch.tensor([torch.inf, 2.0])
    assert Print.of(infinite).distance(Print.of(-infinite)) > 0.1


@pytest.mark.parametrize("size", [60, 3000])
def test_other_order_is_told_from_other_values(size: int) -> None:
    a = 5 + numbers(size)
    digits = 2.0**-12
    shuffled = Print.of(a[torch.randperm(size, generator=torch.Generator().manual_seed(2))])
    assert shuffled.rearranges(Print.of(a), digits)
    assert not Print.of(a).rearranges(Print.of(a), digits)
    assert not Print.of(numbers(size, seed=3)).rearranges(Print.of(a), digits)
    few = a.clone()
    few[:2] = few[:2].flip(0)  # the same elements, nearly all in their places
    assert not Print.of(few).rearranges(Print.of(a), digits)


def test_equal_values_stand_for_each_other_whatever_their_names() -> None:
    x, a, b = numbers(4, 5), numbers(4, 5, seed=1), numbers(4, 5, seed=2)
    ours = {"t0": (x, ()), "t1": (b * (1 + 1e-6), ("t0",)), "t2": (a, ("t1",))}
    theirs = {"x": (x, ()), "a": (a, ("x",)), "b": (b, ("a",))}
    assert paired(ours, theirs) == {"t0": "x", "t1": "b", "t2": "a"}


def test_of_several_equal_ones_what_they_are_made_of_decides_then_the_name_then_the_shape() -> None:
    x, y, a = numbers(4, 5), numbers(4, 5, seed=1), numbers(4, 5, seed=2)
    theirs = {"x": (x, ()), "y": (y, ()), "one": (a, ("x",)), "two": (a, ("y",))}
    assert paired({"x": (x, ()), "y": (y, ()), "one": (a, ("y",))}, theirs)["one"] == "two"
    assert paired({"x": (x, ()), "two": (a, ())}, theirs)["two"] == "two"
    flat = {"x": (x, ()), "one": (a.flatten(), ("x",)), "two": (a, ("x",))}
    assert paired({"x": (x, ()), "n": (a, ("x",))}, flat)["n"] == "two"
    near = {"p": (a * (1 + 1e-5), ()), "q": (a, ())}
    assert paired({"n": (a, ())}, near) == {"n": "q"}


def test_integers_are_equal_or_not() -> None:
    counts = torch.arange(20)
    off = counts + (counts == 7)
    assert paired({"n": (counts, ())}, {"n": (off, ()), "a": (counts, ())}) == {"n": "a"}
    assert paired({"n": (counts, ())}, {"n": (off, ()), "a": (off, ())}) == {"n": "n"}


def test_values_of_other_sizes_dtypes_or_far_from_all_have_no_counterpart() -> None:
    x = numbers(4, 5)
    theirs = {"x": (x, ()), "d": (x.double(), ()), "s": (x[:2], ())}
    assert paired({"n": (x[:3], ())}, theirs) == {}
    assert paired({"n": (x.double(), ())}, theirs) == {"n": "d"}
    assert paired({"n": (numbers(4, 5, seed=9), ())}, theirs) == {}


def test_a_wrong_value_stands_for_what_is_made_of_the_same_or_is_near() -> None:
    x, a, b = numbers(4, 5), numbers(4, 5, seed=1), numbers(4, 5, seed=2)
    theirs = {"x": (x, ()), "a": (a, ("x",)), "b": (b, ("a",))}
    gross = numbers(4, 5, seed=7) * 100
    assert paired({"t": (x, ()), "n": (gross, ("t",))}, theirs) == {"t": "x", "n": "a"}
    assert paired({"n": (b * 1.2, ())}, theirs) == {"n": "b"}
    # made of what `a` is, and much nearer to `b`: a fold of both
    assert paired({"t": (x, ()), "n": (b * 1.01, ("t",))}, theirs)["n"] == "b"
    # made of sizes alone says nothing
    counts = {"size": (torch.tensor(4), ()), "x": (x, ("size",))}
    assert "n" not in paired({"size": (torch.tensor(4), ()), "n": (gross, ("size",))}, counts)


def test_another_layout_is_no_counterpart() -> None:
    x = numbers(4, 4)
    theirs = {"x": (x, ()), "a": (x.t() * 3, ("x",))}
    ours = {"x": (x, ()), "n": ((x * 3).clone(), ("x",))}
    assert paired(ours, theirs) == {"x": "x"}


def test_pairs_that_are_given_are_kept() -> None:
    x, a = numbers(4, 5), numbers(4, 5, seed=1)
    theirs = {"x": (x, ()), "a": (a, ("x",))}
    assert paired({"x": (x, ())}, theirs, {"x": "a"}) == {"x": "a"}


class Many:
    """A program of a hundred values, of which two are no use: one has no elements, one is NaN throughout."""

    places = tuple(place(f"v{i}") for i in range(100))
    outputs = ("v99",)
    runs = 0

    def exposed(
        self, names: Sequence[str], called: Sequence[str], shapes: dict[str, tuple[int, ...]]
    ) -> Runner:
        assert tuple(names) == tuple(called)
        assert not shapes
        values = {name: torch.full((2,), float(name[1:])) for name in names}
        values |= {
            n: v for n, v in (("v7", torch.empty(0)), ("v60", torch.full((3,), torch.nan))) if n in names
        }
        self.runs += 1
        return cast(Runner, SimpleNamespace(name="many", run=lambda inputs: values))


def test_all_values_are_reduced_some_at_a_time() -> None:
    program = Many()
    found = prints_of(program, Inputs((numbers(1),)))
    assert sorted(found) == sorted({p.name for p in program.places} - {"v7", "v60"})
    assert program.runs == 3
    assert found["v80"].distance(Print.of(torch.full((2,), 80.0))) == 0.0
