"""Which value of one program stands for which of another: by value, by what they are made of, by name.

Names cannot be relied on: a fold or an export numbers the calls anew. So every value is run once and reduced
to a few seeded random projections of its elements in their order (Johnson and Lindenstrauss, 1984: distances
between the values are those between the projections, up to a factor of about two), and of the values with
as many elements of the same dtype:

1. those whose projections agree to half of the dtype's digits stand for each other; where several do (the
   stream of a residual network barely changes from block to block), the one made of values that stand for
   each other, else one of the same name, else the nearest;
2. else, of those made of values that stand for each other and those that are nearer than half of their own
   length, the same preference, unless another is much nearer. What holds the same elements in another order
   (another layout) is no counterpart.

Pairs are guesses about what is to be compared, no verdicts: whether a pair agrees is judged element by
element.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graphsurgery.localize.result import Place
from graphsurgery.localize.traces import Trace
from graphsurgery.verify import Inputs

__all__ = ["Print", "pair_up", "prints_of"]

_PROJECTIONS = 16
_WIDTH = 1024
_AT_ONCE = 48
"""Values that are looked at in one run of the search for pairs."""

_RESEMBLES = 0.5


@dataclass(frozen=True)
class Print:
    """What is kept of one value.

    Attributes:
        shape: Its shape.
        dtype: Its dtype.
        projections: (16,) float64.
        centred: The same of its elements less their mean.
        ordered: The same of its elements in ascending order.
        finite: Whether any element is no NaN.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    projections: Tensor
    centred: Tensor
    ordered: Tensor
    finite: bool

    @classmethod
    def of(cls, value: Tensor) -> Print:
        """Reduce a tensor of any shape and dtype."""
        flat = torch.view_as_real(value) if value.is_complex() else value
        flat = torch.nan_to_num(flat.detach().double().flatten(), nan=0.0, posinf=1.0, neginf=-1.0)
        finite = not bool(value.isnan().all())
        return cls(
            shape=tuple(value.shape),
            dtype=value.dtype,
            projections=_project(flat),
            centred=_project(flat - flat.mean()),
            ordered=_project(flat.sort().values),
            finite=finite,
        )

    @property
    def numel(self) -> int:
        """Number of elements."""
        return int(torch.Size(self.shape).numel())

    def distance(self, other: Print) -> float:
        """Return how far apart two values of one size are, as a share of the length of `other`."""
        return _distance(self.projections, other.projections)

    def rearranges(self, other: Print, digits: float) -> bool:
        """Return whether both have the same elements in another order, and so are not the same value.

        Order counts where the elements, less their mean, do not resemble each other any more: an error in a
        few of many elements changes their ascending order by little as well.
        """
        same = _distance(self.ordered, other.ordered) <= digits
        return same and _distance(self.centred, other.centred) >= _RESEMBLES


def _distance(one: Tensor, other: Tensor) -> float:
    length, gap = float(other.norm()), float((one - other).norm())
    return gap / length if length else (0.0 if gap == 0.0 else float("inf"))


def _project(flat: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(_WIDTH, _PROJECTIONS, generator=generator, dtype=torch.float64)
    rows = -(-len(flat) // _WIDTH)
    padded = torch.nn.functional.pad(flat, (0, rows * _WIDTH - len(flat))).reshape(rows, _WIDTH)
    signs = torch.randint(0, 2, (rows, _PROJECTIONS), generator=generator).to(torch.float64) * 2 - 1
    return ((padded @ table) * signs).sum(0)


def prints_of(trace: Trace, inputs: Inputs) -> dict[str, Print]:
    """Run a program, as often as memory asks for, and reduce its inner values.

    Values that are no tensors, have no elements or are NaN throughout are left out.
    """
    found: dict[str, Print] = {}
    names = [place.name for place in trace.places]
    for start in range(0, len(names), _AT_ONCE):
        part = names[start : start + _AT_ONCE]
        for name, value in trace.exposed(part, part, {}).run(inputs).items():
            made = Print.of(value)
            if made.numel and made.finite:
                found[name] = made
    return found


def pair_up(
    places: Sequence[Place],
    prints: dict[str, Print],
    others: Sequence[Place],
    other_prints: dict[str, Print],
    known: dict[str, str],
) -> dict[str, str]:
    """Return, for values of one program, those of the other that they are to be held against.

    Args:
        places: The values of the candidate in its order.
        prints: What is known of them.
        others: The values of the reference.
        other_prints: What is known of these.
        known: Pairs that are given, as the outputs are.
    """
    of_size: dict[tuple[int, torch.dtype], list[Place]] = {}
    for other in others:
        if other.name in other_prints:
            made = other_prints[other.name]
            of_size.setdefault((made.numel, made.dtype), []).append(other)
    pairs: dict[str, str] = {}
    for place in places:
        if place.name in known:
            pairs[place.name] = known[place.name]
            continue
        own = prints.get(place.name)
        choices = of_size.get((own.numel, own.dtype), []) if own is not None else []
        if own is None or not choices:
            continue
        made_of = {pairs.get(name) for name in _weighty(place, prints)}
        found = _choose(place.name, own, made_of, choices, other_prints)
        if found is not None:
            pairs[place.name] = found
    return pairs


def _weighty(place: Place, prints: dict[str, Print]) -> list[str]:
    """Return the inputs of a value that are numbers and not sizes."""
    return [name for name in place.inputs if name in prints and prints[name].dtype.is_floating_point]


def _choose(
    name: str,
    own: Print,
    made_of: set[str | None],
    choices: list[Place],
    prints: dict[str, Print],
) -> str | None:
    digits = torch.finfo(own.dtype).eps ** 0.5 if own.dtype.is_floating_point else 0.0
    distances = {choice.name: own.distance(prints[choice.name]) for choice in choices}

    def preference(choice: Place) -> tuple[bool, bool, bool, float]:
        there = prints[choice.name]
        return (
            not alike_in_making(choice),
            choice.name != name,
            there.shape != own.shape,
            distances[choice.name],
        )

    def alike_in_making(choice: Place) -> bool:
        return bool(made_of) and made_of == set(_weighty(choice, prints))

    alike = [choice for choice in choices if distances[choice.name] <= digits]
    if alike:
        return min(alike, key=preference).name
    choices = [
        choice
        for choice in choices
        if (alike_in_making(choice) or distances[choice.name] < _RESEMBLES)
        and not own.rearranges(prints[choice.name], digits)
    ]
    if not choices:
        return None
    nearest = min(choices, key=lambda choice: distances[choice.name])
    likely = min(choices, key=preference)
    # A folded layer is made of what the first of its members was, and is like the last of them.
    clearer = distances[nearest.name] < _RESEMBLES * min(1.0, distances[likely.name])
    return nearest.name if clearer else likely.name
