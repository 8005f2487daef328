"""Forms: which layers can stand for a region, read off its axes alone.

Shared positions and mixed features are a Linear or a 1x1 convolution; windows a convolution; varied axes
its groups; everything but the batch mixed a Linear on the flattened entry; only a scale and a shift a
multiply-add; only movement a view or a permute.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import prod

from graphsurgery.affine.atoms import Atom, Axes, NoFold
from graphsurgery.affine.forms_conv import grouped
from graphsurgery.affine.program import Layout, Linear, Scale, Shape, Shift, Step, Take, moves
from graphsurgery.affine.roles import Form, Roles, broadcast, differing, finish, has_bias

__all__ = ["Form", "Roles", "candidates"]


def candidates(axes: Axes, entry: Sequence[int], heavy: bool) -> list[Form]:
    """All forms of a region.

    Args:
        axes: the region's axes.
        entry: shape of its entry, symbols as primes.
        heavy: whether the region multiplies by weights; one without never gains a layer.

    Raises:
        NoFold: there is none.
    """
    rank = len(entry)
    if prod(_sizes(axes.entry_digits())) != prod(entry):
        raise NoFold("unsupported", "the entry is read more than once or not as a whole")
    roles = Roles(axes, rank)
    if not (roles.gone or roles.windowed or roles.fresh):
        return [_elementwise(roles)]
    if not heavy:
        raise NoFold("no-heavy", "a region without a layer does not gain one")
    forms: list[Form] = []
    reasons: list[NoFold] = []
    for variant in _variants(axes, roles):
        kept = Roles(variant, rank)
        for build in (_pointwise, grouped):
            try:
                forms.extend(build(kept))
            except NoFold as reason:
                reasons.append(reason)
    if not forms:
        # That a Linear cannot read windows says nothing; what kept the convolution from it does.
        raise next((reason for reason in reasons if reason.code != "structure"), reasons[0])
    return forms


def _sizes(atoms: Iterable[Atom]) -> list[int]:
    return [atom.size for atom in atoms]


def _variants(axes: Axes, roles: Roles) -> list[Axes]:
    """The axes as they are, with windows mixed, and with everything but the batch mixed."""
    variants = [axes]
    keeps = [[a for a in axes.atoms() if a.carried]] if roles.windowed else []
    keeps.append([a for a in axes.atoms() if a.shared and (axes.symbolic(a) or a.axis == 0)])
    for keep in keeps:
        try:
            variant = axes.mixed(keep)
        except NoFold:
            continue
        if variant not in variants:
            variants.append(variant)
    return variants


def _elementwise(roles: Roles) -> Form:
    axes = roles.axes
    steps = list(moves(roles.entry, roles.exit, roles.exit_sizes))
    slots: dict[str, Shape] = {}
    shape = axes.shape
    if axes.scaled:
        slots["scale"] = broadcast(roles, roles.exit, roles.varied)
        steps.append(Scale(shape))
    if axes.shifted:
        slots["shift"] = broadcast(roles, roles.exit, differing(roles))
        steps.append(Shift(shape))
    return Form("scale" if slots else "movement", axes, tuple(steps), slots, roles.exit)


def _pointwise(roles: Roles) -> list[Form]:
    """A Linear over the gone digits, one application for each shared position, some perhaps left out."""
    if roles.varied or not all(_taken(roles, label) for label in roles.windowed):
        raise NoFold("structure", "it reads windows or groups")
    entry, takes = _take(roles)
    forms = []
    shared = {*roles.shared, *roles.windowed}
    leads = [
        tuple(d for d in (tuple(a for a in dim if a in shared) for dim in grouping) if d)
        for grouping in (entry, roles.exit)
    ]
    if entry and entry[-1] == roles.gone:  # an axis of one stays where it is
        leads.append(entry[:-1])
    for lead in dict.fromkeys(leads):
        into, out = (*lead, roles.gone), (*lead, roles.fresh)
        form = finish(roles, "linear", into, out, _linear(roles, out), entry)
        forms.append(replace(form, steps=(*takes, *form.steps)))
    return forms


def _taken(roles: Roles, label: int) -> bool:
    """Whether a window is one tap that stays inside, over a dimension of the entry of its own."""
    w = roles.atoms[label].window
    alone = any(dim == (label,) for dim in roles.entry)
    return w is not None and not w.transposed and w.taps == 1 and w.lo >= 0 and not w.outside and alone


def _take(roles: Roles) -> tuple[Layout, list[Step]]:
    """The entry's layout with only the positions that are read, and the steps that take them."""
    layout: list[tuple[int, ...]] = list(roles.entry)
    steps: list[Step] = []
    sizes = [prod(roles.entry_sizes[a] for a in dim) for dim in layout]
    for dim in reversed(range(len(layout))):
        label = layout[dim][0] if len(layout[dim]) == 1 else -1
        w = roles.atoms[label].window if label in roles.atoms else None
        if w is None:
            continue
        count = roles.exit_sizes[label]
        sizes[dim : dim + 1] = [count] if count > 1 else []
        if count == 1:
            del layout[dim]
        stop = w.lo + w.s * (count - 1) + 1
        steps.append(Take(dim, w.lo, stop, w.s, count == 1, tuple(sizes)))
    return tuple(layout), steps


def _linear(roles: Roles, out: Layout) -> tuple[Linear, dict[str, Shape]]:
    features, size = roles.sizes(roles.gone), roles.sizes(roles.fresh)
    slots: dict[str, Shape] = {"weight": (size, features)}
    bias = has_bias(roles)
    if bias:
        slots["bias"] = (size,)
    return Linear(bias, features, tuple(roles.sizes(dim) for dim in out)), slots
