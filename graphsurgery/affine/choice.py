"""When a form is worth it: costs compared, with a veto.

Heavy multiplications never rise, unless a factor is stated by which they may. Among what does not raise them,
the sum of floating-point operations and moved elements decides, then nodes, then parameters. A form must beat
what it replaces, so that a second run finds nothing. Parameters may grow by a bias; by more only where layers
and multiplications become fewer (or more of them are allowed), and within a stated factor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from graphsurgery.affine.atoms import NoFold
from graphsurgery.affine.forms import Form, candidates
from graphsurgery.affine.program import Pad, Permute, PixelShuffle, Reshape, Take
from graphsurgery.affine.program import cost as program_cost
from graphsurgery.affine.region import Region
from graphsurgery.cost import Cost

DEFAULT_PARAM_GROWTH = 2.0
"""How many times the parameters of what it replaces a form may have, where it saves heavy multiplications."""


@dataclass(frozen=True)
class Option:
    """A form of a region and what it costs, parameters included."""

    form: Form
    cost: Cost


def options(region: Region) -> tuple[Option, ...]:
    """All forms of a region with their costs, cheapest first; regions with equal axes have equal forms.

    Raises:
        NoFold: the region has no form.
    """
    scope = region.scope
    entry = scope.shape(region.entry)
    key = (region.axes, entry, region.tally.heavy > 0)
    found = scope.memory.get(key)
    if found is None:
        try:
            found = tuple(
                sorted(_options(region, entry), key=lambda option: scope.cost_model.score(option.cost))
            )
        except NoFold as refusal:
            found = refusal
        scope.memory[key] = found
    if isinstance(found, NoFold):
        raise NoFold(found.code, found.reason)
    return found


def _options(region: Region, entry: tuple[int, ...]) -> list[Option]:
    scope = region.scope
    found = []
    for form in candidates(region.axes, entry, region.tally.heavy > 0):
        if not _symbolic_views(region, form):
            cost = program_cost(form.steps, form.slots, scope.actual)
            found.append(Option(form, cost))
    if not found:
        raise NoFold("dynamic-shape", "its views would need more than one symbolic size")
    return found


def _symbolic_views(region: Region, form: Form) -> bool:
    primes: Sequence[int] = region.scope.primes
    views = [step.out for step in form.steps if isinstance(step, Reshape)]
    return any(sum(any(n % p == 0 for p in primes) for n in shape) > 1 for shape in views)


def movements(form: Form) -> int:
    """Number of views, slices, permutes and pads in a form's program."""
    return sum(isinstance(step, (Reshape, Permute, Pad, PixelShuffle, Take)) for step in form.steps)


def objection(region: Region, option: Option, max_param_growth: float) -> str | None:
    """Why a form does not pay, in one sentence with both costs; None where it does.

    Args:
        region: the region. A single layer is neither blown up nor wrapped in views to save its padding.
        option: the form.
        max_param_growth: how many times the parameters the form may have.
    """
    before, after, score = region.tally.cost, option.cost, region.scope.cost_model.score
    both = f"now {before}; as one {option.form.kind} {after}"
    if after.macs > region.scope.mac_growth * before.macs:
        return f"folding would take more multiplications: {both}"
    if score(after) >= score(before):
        return f"folding would not be cheaper: {both}"
    if region.tally.layers == 1 and movements(option.form) > region.tally.moving:
        return f"the layer would need more views and permutes around it: {both}"
    bias = option.form.slots.get("bias", (0,))[0]
    fewer = after.macs < before.macs or region.scope.mac_growth > 1
    if fewer and region.tally.layers > 1:
        if after.params > max_param_growth * before.params:
            return f"folding would take more than {max_param_growth:g} times the parameters: {both}"
    elif after.params > before.params + bias:
        return f"folding would take more parameters and save no layer or no multiplications: {both}"
    return None
