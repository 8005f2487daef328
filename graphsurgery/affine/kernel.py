"""The canonical coefficients `K[v, f, g, *taps]` of a region themselves, whatever layer they would make."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch

from graphsurgery.affine.atoms import NoFold
from graphsurgery.affine.closed import closed_form
from graphsurgery.affine.coefficients import DEFAULT_BUDGET, Piece, Probe, facing
from graphsurgery.affine.forms import Form, candidates
from graphsurgery.affine.permuted import permuted_kernel
from graphsurgery.affine.region import Region
from graphsurgery.affine.roles import Roles


def kernel_pieces(region: Region, transposed: bool, budget: int = DEFAULT_BUDGET) -> Iterator[Piece]:
    """The canonical coefficients of a region piece by piece, so that they need not be held as a whole.

    Args:
        region: the region; its windows can all be read as ordinary ones, or all as transposed ones.
        transposed: as which they are read.
        budget: bytes that a chunk of probes may take.
    """
    roles = Roles(region.axes, len(region.scope.shape(region.entry)))
    axes = region.axes
    if not (axes.scaled or axes.gone or roles.fresh or roles.windowed):  # values only move
        yield Piece(1, 0, torch.ones(roles.sizes(roles.varied), 1, 1, dtype=torch.float64), True)
        return
    closed = _closed(region, transposed) if region.tally.heavy else None
    if closed is not None:
        yield Piece(1, 0, closed, True)
    else:
        yield from Probe(region, roles, transposed).pieces(budget)


def _closed(region: Region, transposed: bool) -> torch.Tensor | None:
    """The coefficients where the region is a layer for which they need no probing, else None."""
    try:
        forms = candidates(region.axes, region.scope.shape(region.entry), heavy=True)
    except NoFold:
        return None
    for form in forms:
        if form.axes == region.axes and "weight" in form.slots and form.transposed == transposed:
            return _of_layer(region, form)
    return None


def _of_layer(region: Region, form: Form) -> torch.Tensor | None:
    slots = closed_form(region, form)
    if slots is None or "weight" not in slots:
        return permuted_kernel(region, form)
    roles = Roles(form.axes, len(region.scope.shape(region.entry)))
    size = [roles.sizes(roles.varied), roles.sizes(roles.fresh)]
    size.insert(1 if form.transposed else 2, prod(roles.entry_sizes[a] for a in roles.gone))
    order = [which for which in form.spatial if which is not None] or list(range(len(roles.windowed)))
    windows = [facing(roles.atoms[label], form.transposed) for label in roles.windowed]
    weight = slots["weight"].clone()  # it may be the constant of the graph itself, and the caller's to keep
    kernel = weight.reshape(*size, *(windows[which].taps for which in order))
    back = (3 + order.index(which) for which in range(len(windows)))
    return kernel.permute(*((0, 2, 1) if form.transposed else (0, 1, 2)), *back)
