"""The certificate of a fold: the region against its program, in float64, on random dense inputs.

Two affine maps that agree on one random dense input agree everywhere, with probability 1 (Freivalds,
"Probabilistic machines can use less running time", 1977). Inputs are drawn at the real sizes and at another
batch size than the captured one, so that borders and merged batches are covered.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch

from graphsurgery.affine.forms import Form, Roles
from graphsurgery.affine.program import run as run_program
from graphsurgery.affine.region import Region

LIMIT = 1e-11
"""Largest relative residual of a right fold. Right ones have 3e-16 in the median and 3e-14 at most."""

_ROUNDING = 2.0**-45  # of the value itself, which a large shift may dominate: 2**7 float64 roundings
_SAMPLES = 8  # least number of positions over which a channel's scale is taken


def residual(region: Region, form: Form, slots: Mapping[str, torch.Tensor], seed: int = 0) -> float:
    """Largest deviation of the program from the region, relative to each channel's own scale.

    Both the values and their differences between samples are compared: the second have no shift, which
    would hide an error of small coefficients behind a large constant.

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
    shape = [scope.actual(n, batch) for n in scope.shape(region.entry)]
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        wanted = _channels(region, region.runner(batch)(x), batch)
        got = run_program(form.steps, slots, x, lambda n: scope.actual(n, batch))
        got = _channels(region, got, batch)
    if not (torch.isfinite(wanted).all() and torch.isfinite(got).all()):
        return float("inf")
    scale = wanted.abs().amax(0)
    worst = _relative((got - wanted).abs().amax(0), scale, torch.zeros_like(scale))
    if wanted.shape[0] > 1:
        linear, found = wanted.diff(dim=0), got.diff(dim=0)
        worst = max(worst, _relative((found - linear).abs().amax(0), linear.abs().amax(0), scale))
    return worst


def _relative(error: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> float:
    """Largest error in units of the channel's scale; a channel of nearly nothing counts by the others."""
    floor = torch.clamp(scale, min=float(scale.max()) * 1e-4)
    excess = torch.clamp(error - _ROUNDING * shift, min=0.0)
    ratio = torch.where(excess > 0, excess / floor.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    return float(ratio.max())


def _batch(region: Region) -> int:
    """A batch size other than 1 that gives every channel enough positions."""
    roles = Roles(region.axes, len(region.scope.shape(region.entry)))
    positions = prod(region.scope.actual(roles.exit_sizes[a], 1) for a in roles.shared + roles.windowed)
    return max(2, -(-_SAMPLES // positions))


def _channels(region: Region, value: torch.Tensor, batch: int) -> torch.Tensor:
    """A value of the exit as [positions, channels]."""
    roles = Roles(region.axes, len(region.scope.shape(region.entry)))
    labels = [a for dim in roles.exit for a in dim]
    sizes = {a: region.scope.actual(roles.exit_sizes[a], batch) for a in labels}
    positions = [*roles.shared, *roles.windowed]
    order = [*positions, *roles.varied, *roles.fresh]
    value = value.reshape([sizes[a] for a in labels]).permute([labels.index(a) for a in order])
    return value.reshape(prod(sizes[a] for a in positions), -1)
