"""A scale and shift before padding: `conv(a x + b) = conv_a(x + b / a)`.

A shift before zero padding gives a map that differs at the borders. Added to the entry instead, it is one
number for each channel again, and the scale goes into the layer: a normalised input, or a batch norm before
a padded convolution, becomes one addition and one layer.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from math import prod

import torch
from torch import fx

from graphsurgery.affine import rules
from graphsurgery.affine.atoms import Atom, Axes, NoFold
from graphsurgery.affine.choice import Option, options
from graphsurgery.affine.program import Shift
from graphsurgery.affine.region import ELEMENTWISE, Region
from graphsurgery.affine.runner import runner
from graphsurgery.cost import Cost, op_name

SLOT = "entry_shift"


def preshifted(region: Region) -> list[Option]:
    """The forms of a region with its leading shift added to the entry; none where it has no such shift."""
    if not region.axes.shifted or not any(_uneven_position(atom) for atom in region.axes.atoms()):
        return []
    leading = lead(region)
    if not leading or leading[-1] is region.exit:
        return []
    scope = region.scope
    try:
        before = scope.axes(region.entry, leading[-1])
        axes = scope.axes(region.entry, region.exit, {leading[-1]: _level(before)})
        found = options(Region(scope, region.entry, region.exit, axes, region.tally))
    except NoFold:
        return []
    shape = scope.shape(region.entry)
    differs = [any(a.varied or a.uneven for a in dim) for dim in before.dims]
    slot = tuple(n if along else 1 for n, along in zip(shape, differs, strict=True))
    elements = prod(scope.actual(n, 1) for n in shape)
    extra = Cost(elementwise=elements, params=prod(slot), nodes=1)
    return [
        Option(
            replace(o.form, steps=(Shift(shape, SLOT), *o.form.steps), slots={SLOT: slot, **o.form.slots}),
            o.cost + extra,
        )
        for o in found
        if not o.form.uneven and "weight" in o.form.slots
    ]


def lead(region: Region) -> tuple[fx.Node, ...]:
    """The leading calls of a region that only scale and shift."""
    scope, found = region.scope, []
    reads = Counter(o for node in region.nodes for o in set(rules.live_operands(node, scope.constant)))
    live = region.entry
    for node in region.nodes:
        if rules.live_operands(node, scope.constant) != [live] or op_name(node) not in ELEMENTWISE:
            break
        if reads[live] > 1:
            break  # a second branch reads the value too
        found.append(node)
        live = node
    return tuple(found)


def entry_shift(region: Region, shape: tuple[int, ...]) -> torch.Tensor:
    """The shift `b / a` of the leading calls `a x + b`, float64, in a shape that broadcasts over the entry.

    Raises:
        NoFold: a scale is zero.
    """
    run = runner(region.scope, region.entry, lead(region), 1)
    zero = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    b = run(zero)
    (a,) = torch.autograd.grad(b.sum(), zero)  # a difference would lose it beside a large shift
    if not bool((a != 0).all()):
        raise NoFold("zero-scale", "a scale of zero cannot be taken out of the shift before it")
    shift: torch.Tensor = b.detach() / a
    return shift


def _level(axes: Axes) -> Axes:
    """The axes without a shift."""
    dims = tuple(tuple(atom._replace(uneven=False) for atom in dim) for dim in axes.dims)
    return replace(axes, dims=dims, shifted=False)


def _uneven_position(atom: Atom) -> bool:
    return atom.uneven and not atom.fresh and not atom.varied
