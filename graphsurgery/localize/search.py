"""The first value of a program that differs from the reference by more than rounding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from graphsurgery.errors import VerificationError
from graphsurgery.localize.pairing import Print, pair_up, prints_of
from graphsurgery.localize.result import Place
from graphsurgery.localize.traces import Trace
from graphsurgery.verify import Baseline, Inputs, OutputVerdict

__all__ = ["Found", "search"]

_ELEMENTS_AT_ONCE = 2**24
"""Elements judged in one go: with anchor, draws and candidate some 600 MB."""

_DRAWS = 6
"""Runs that measure the noise: with two, some channel of some inner value has small ones by chance."""


@dataclass(frozen=True)
class Found:
    """What a search found; the fields are those of `Localization`."""

    first: Place | None
    stands_for: Place | None
    among: tuple[Place, ...]
    error: OutputVerdict | None
    before: tuple[OutputVerdict, ...]
    values: int
    compared: int
    agreed: int


def search(reference: Trace, candidate: Trace, inputs: Inputs, sample: Trace | None = None) -> Found:
    """Find the first value of `candidate` that differs, by running both on one input.

    Every value of the candidate that stands for one of the reference is judged like an output, by the
    reference's float64 anchor and rounding noise. Values without a counterpart say nothing by themselves: a
    fold leaves out some and makes others. What is to blame lies on a way from the inputs to a wrong output
    that no value which agrees cuts off; the first value on such a way that is known to differ is the answer,
    and all before it on the way, up to those that agree, may be the cause.

    Args:
        reference: The program that is right.
        candidate: The program that differs.
        inputs: What both are run on.
        sample: The candidate on a runtime that rewrites graphs, which leaves alone what is looked at: there
            one value is looked at a time, by halving. `candidate` is then the same on one that does not.

    Raises:
        VerificationError: One of the programs cannot be run with its values exposed.
    """
    other_prints = prints_of(reference, inputs)
    prints = prints_of(candidate, inputs)
    outputs = dict(zip(candidate.outputs, reference.outputs, strict=False))
    known = {
        name: other
        for name, other in outputs.items()
        if name in prints and other in other_prints and _comparable(prints[name], other_prints[other])
    }
    pairs = pair_up(candidate.places, prints, reference.places, other_prints, known)
    if sample is not None:
        return _halve(reference, sample, candidate, inputs, pairs, other_prints)
    verdicts: dict[str, OutputVerdict] = {}
    for part in _parts(pairs, other_prints):
        verdicts |= judge_pairs(reference, candidate, inputs, part, other_prints)
    return _first(candidate, reference, pairs, verdicts)


def _comparable(one: Print, other: Print) -> bool:
    return one.numel == other.numel and one.dtype == other.dtype


def _parts(pairs: dict[str, str], prints: dict[str, Print]) -> Iterator[dict[str, str]]:
    """Cut the pairs so that what is held at once has a bound; a value of the reference is once in a part."""
    waiting = dict(pairs)
    while waiting:
        part: dict[str, str] = {}
        elements = 0
        for name, other in waiting.items():
            elements += prints[other].numel
            if part and elements > _ELEMENTS_AT_ONCE:
                break
            if other not in part.values():
                part[name] = other
        yield part
        waiting = {name: other for name, other in waiting.items() if name not in part}


def judge_pairs(
    reference: Trace, candidate: Trace, inputs: Inputs, pairs: dict[str, str], prints: dict[str, Print]
) -> dict[str, OutputVerdict]:
    """Return the verdict on each value of the candidate, by its name.

    Raises:
        VerificationError: One of the programs cannot be run with these values exposed.
    """
    others = list(pairs.values())
    baseline = Baseline(reference.exposed(others, others, {}), inputs, samples=1, draws=_DRAWS)
    # Inside of a deep network an error may first exceed float32's rounding many layers behind its cause.
    baseline.files_in_float64 = True
    shapes = {other: prints[other].shape for other in others}
    verdict = baseline.compare(candidate.exposed(list(pairs), others, shapes))
    if len(verdict.outputs) != len(pairs):
        raise VerificationError(f"the values inside could not be compared: {verdict.reason}")
    return dict(zip(pairs, verdict.outputs, strict=True))


def agrees(verdict: OutputVerdict) -> bool:
    """Return whether nothing speaks against a value: one that rounding alone decides does not either."""
    sides = [side for side in (verdict.native, verdict.float64) if side is not None]
    return verdict.ok or (bool(sides) and all(side.ok for side in sides))


def _halve(
    reference: Trace,
    sample: Trace,
    candidate: Trace,
    inputs: Inputs,
    pairs: dict[str, str],
    prints: dict[str, Print],
) -> Found:
    """Look at one value at a time: halve the order, then go back while what the value reads differs."""
    verdicts: dict[str, OutputVerdict] = {}

    def good(name: str) -> bool:
        if name not in verdicts:
            verdicts.update(judge_pairs(reference, sample, inputs, {name: pairs[name]}, prints))
        return agrees(verdicts[name])

    order = [place.name for place in candidate.places if place.name in pairs]
    wrong = next((name for name in candidate.outputs if name in pairs and not good(name)), None)
    if wrong is not None:
        low, high = -1, order.index(wrong)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if good(order[middle]) else (low, middle)
        wrong = order[high]
    while wrong is not None:
        earlier = next((n for n in _read_by(candidate, wrong, pairs) if not good(n)), None)
        if earlier is None:
            break
        wrong = earlier
    return _first(candidate, reference, pairs, verdicts)


def _read_by(trace: Trace, name: str, pairs: dict[str, str]) -> list[str]:
    """Return the nearest values with a counterpart that a value is made of."""
    places = {place.name: place for place in trace.places}
    found: list[str] = []
    queue, seen = [name], {name}
    while queue:
        for source in places[queue.pop()].inputs:
            if source in seen or source not in places:
                continue
            seen.add(source)
            if source in pairs:
                found.append(source)
            else:
                queue.append(source)
    return found


def _first(
    candidate: Trace, reference: Trace, pairs: dict[str, str], verdicts: dict[str, OutputVerdict]
) -> Found:
    places = {place.name: place for place in candidate.places}
    good = {name for name, verdict in verdicts.items() if agrees(verdict)}
    wrong = {name for name in candidate.outputs if name in places and name not in good}
    queue = list(wrong)
    while queue:  # against the flow, from the wrong outputs to what agrees
        for name in places[queue.pop()].inputs:
            if name in places and name not in good and name not in wrong:
                wrong.add(name)
                queue.append(name)
    first = next((p for p in candidate.places if p.name in wrong and p.name in verdicts), None)
    counts = (len(places), len(pairs), len(good))
    if first is None:
        return Found(None, None, (), None, (), *counts)
    among: set[str] = set()
    edge: list[str] = []
    queue = [first.name]
    while queue:
        for name in places[queue.pop()].inputs:
            if name in good:
                edge.append(name)
            elif name in places and name not in among:
                among.add(name)
                queue.append(name)
    others = {place.name: place for place in reference.places}
    return Found(
        first,
        others.get(pairs[first.name]),
        tuple(place for place in candidate.places if place.name in among),
        verdicts[first.name],
        tuple(verdicts[name] for name in dict.fromkeys(edge)),
        *counts,
    )
