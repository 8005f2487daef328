"""The certificate of a fold: the region against its program, in float64, on random dense inputs.

Two affine maps that agree on one random dense input agree everywhere, with probability 1 (Freivalds,
"Probabilistic machines can use less running time", 1977). Inputs are drawn at the real sizes, where a region
views or permutes also at another
batch size than the captured one, so that borders and merged batches are covered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod

import torch
from torch import fx

from graphsurgery.affine.forms import Form, Roles
from graphsurgery.affine.program import run as run_program
from graphsurgery.affine.region import Region, Scope
from graphsurgery.affine.runner import linear_part
from graphsurgery.values import tensor_meta

LIMIT = 1e-11
"""Largest relative residual of a right fold. Right ones have 3e-16 in the median and 3e-14 at most."""

_ROUNDING = 2.0**-45  # of the value itself, which a large shift may dominate: 2**7 float64 roundings
_NEGLIGIBLE = 1e-4  # of the largest variation: a channel of nearly nothing is measured by the others
_LOUD = 2.0**7  # a shift so many times the variation does no harm: ten digits are left
_ODD = 1.37  # no power of two: every product rounds otherwise
SAMPLES = 4  # least number of positions over which a channel's scale is taken


def residual(region: Region, form: Form, slots: Mapping[str, torch.Tensor], seed: int = 0) -> float:
    """Largest deviation of the program from the region, relative to each channel's own variation.

    The unit is how far a channel moves over the sample, not how large it is: a large shift would hide an
    error of small coefficients. What float64 rounding of the largest value explains is allowed on top, for
    sums that cancel in one channel were rounded at the size of the others.

    Args:
        region: the region.
        form: the form whose program is compared.
        slots: its float64 tensors.
        seed: of the random inputs.

    Returns:
        The residual; infinite where a value is not finite.
    """
    scope = region.scope
    batch = _batch(region)
    x = draw(scope, region.entry, batch, seed)
    run = region.runner(batch)
    with torch.no_grad():
        wanted, positions = _by_channel(region, run(x), batch)
        gain = louder(wanted, positions, run, x)
        if gain > 1:
            x = x * gain
            wanted, positions = _by_channel(region, run(x), batch)
        got, _ = _by_channel(
            region, run_program(form.steps, slots, x, lambda n: scope.actual(n, batch)), batch
        )
        return deviation(wanted, got, positions)


def draw(scope: Scope, node: fx.Node, batch: int, seed: int) -> torch.Tensor:
    """A random dense float64 value of a node, at its real size.

    Args:
        scope: the graph.
        node: whose shape and device it takes.
        batch: what the batch symbols stand for; other symbols are as in the example.
        seed: of the random numbers.
    """
    shape = [scope.actual(n, batch) for n in scope.shape(node)]
    generator = torch.Generator().manual_seed(seed)
    # drawn in float32, which is several times faster
    return torch.randn(shape, generator=generator).double().to(tensor_meta(node).device)


def deviation(wanted: torch.Tensor, got: torch.Tensor, positions: Sequence[int]) -> float:
    """Largest deviation of two float64 tensors of one shape, in the unit that `residual` describes.

    Args:
        wanted: what is right.
        got: what is compared with it.
        positions: the dimensions along which a channel varies; all others tell channels apart.

    Returns:
        The deviation; infinite where a value is not finite.
    """
    high, low = wanted.amax(list(positions)), wanted.amin(list(positions))
    error = (got - wanted).abs_().amax(list(positions))
    size = torch.maximum(high.abs(), low.abs())
    if not (torch.isfinite(size).all() and torch.isfinite(error).all()):
        return float("inf")
    variation = high - low
    floor = float(variation.max()) * _NEGLIGIBLE
    unit = torch.clamp(variation, min=floor) + float(size.max()) * (_ROUNDING / LIMIT)
    return float((error / unit.clamp(min=torch.finfo(torch.float64).tiny)).max())


def louder(
    value: torch.Tensor,
    positions: Sequence[int],
    run: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
) -> float:
    """How much larger the input has to be so that what it makes is no less than the shift beside it.

    Coefficients that are small beside the shift would else be compared below its rounding. A linear part that
    is no more than rounding itself, of branches that cancel, is not made larger: it comes out otherwise for
    another scale of the input.

    Args:
        value: float64, what a random input made.
        positions: the dimensions along which a channel varies.
        run: what made it, differentiable.
        x: the input.
    """
    largest = float(value.abs().max())
    variation = float((value.amax(list(positions)) - value.amin(list(positions))).max())
    if not _LOUD * variation < largest < float("inf"):
        return 1.0
    with torch.inference_mode(False):  # whatever the caller has switched off
        part, scaled = linear_part(run, x.clone()), linear_part(run, x * _ODD)
    size = float(part.abs().max())
    if not largest < size * torch.finfo(torch.float32).max:  # nothing reads the entry
        return 1.0
    genuine = float((scaled - part * _ODD).abs().max()) < _NEGLIGIBLE * size
    return max(1.0, largest / size) if genuine else 1.0


def _batch(region: Region) -> int:
    """A batch size that gives channels enough positions, and is not 1 where views may name the batch."""
    roles = Roles(region.axes, len(region.scope.shape(region.entry)))
    positions = prod(region.scope.actual(roles.exit_sizes[a], 1) for a in roles.shared + roles.windowed)
    return max(2 if region.axes.pinned or region.tally.moving else 1, -(-SAMPLES // positions))


def _by_channel(region: Region, value: torch.Tensor, batch: int) -> tuple[torch.Tensor, list[int]]:
    """A value of the exit with a dimension for each atom, and which of them are positions."""
    roles = Roles(region.axes, len(region.scope.shape(region.entry)))
    labels = [a for dim in roles.exit for a in dim]
    value = value.reshape([region.scope.actual(roles.exit_sizes[a], batch) for a in labels])
    along = {*roles.shared, *roles.windowed}
    positions = [i for i, a in enumerate(labels) if a in along]
    if not positions:  # no batch at all: one sample, every element a channel
        return value.unsqueeze(0), [0]
    return value, positions
