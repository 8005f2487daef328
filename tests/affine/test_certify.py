"""The certificate's unit: a channel's own variation, whatever its size and its shift."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from graphsurgery.affine.certify import LIMIT, SAMPLES, _batch, deviation, louder, residual
from graphsurgery.affine.choice import options
from graphsurgery.affine.coefficients import Coefficients, fill
from graphsurgery.affine.region import Region, Scope
from graphsurgery.capture import capture


def region_of(model: nn.Module, x: torch.Tensor) -> tuple[Region, Coefficients]:
    scope = Scope(capture(model.eval(), (x,)))
    entry = next(node for node in scope.gm.graph.nodes if node.op == "placeholder")
    exit_ = next(iter(scope.gm.graph.output_node().all_input_nodes))
    region = Region(scope, entry, exit_, scope.axes(entry, exit_))
    return region, fill(region, options(region)[0].form)


def two_linears(scale: float = 1.0, shift: float = 0.0) -> nn.Module:
    """16 -> 12 -> 8, the last channel's row scaled and all biases shifted."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12), nn.Linear(12, 8)).double()
    with torch.no_grad():
        model[1].weight[-1] *= scale
        model[1].bias[-1] *= scale
        model[1].bias += shift
    return model


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-8, 1e-15, 1e8])
@pytest.mark.parametrize("shift", [0.0, 1e6, -1e9])
def test_right_folds_pass_at_any_scale_and_shift(scale: float, shift: float) -> None:
    region, filled = region_of(two_linears(scale, shift), torch.randn(3, 16, dtype=torch.float64))
    assert residual(region, filled.form, filled.slots) <= LIMIT


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-8])
def test_one_coefficient_in_a_tiny_channel_is_caught(scale: float) -> None:
    region, filled = region_of(two_linears(scale), torch.randn(3, 16, dtype=torch.float64))
    weight = filled.slots["weight"].clone()
    weight[-1, 3] *= 1 + 1e-3
    assert residual(region, filled.form, {**filled.slots, "weight": weight}) > LIMIT


@pytest.mark.parametrize("shift", [0.0, 1e3, 1e6, 1e10, 1e13])
def test_one_coefficient_behind_a_large_shift_is_caught(shift: float) -> None:
    region, filled = region_of(two_linears(shift=shift), torch.randn(3, 16, dtype=torch.float64))
    weight = filled.slots["weight"].clone()
    weight[2, 3] *= 1 + 1e-3
    assert residual(region, filled.form, {**filled.slots, "weight": weight}) > LIMIT


class Faint(nn.Module):
    """A linear part of a given size beside a shift of three."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.first, self.second, self.size = nn.Linear(16, 12), nn.Linear(12, 8), size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x) * self.size) + 3


@pytest.mark.parametrize("size", [1.0, 1e-6, 1e-12, 1e-14, 1e-15, 1e-20, 1e-30])
def test_a_wrong_weight_is_caught_however_faint_beside_the_shift(size: float) -> None:
    torch.manual_seed(0)
    region, filled = region_of(Faint(size).double(), torch.randn(3, 16, dtype=torch.float64))
    assert residual(region, filled.form, filled.slots) <= LIMIT
    weight = filled.slots["weight"].clone()
    assert residual(region, filled.form, {**filled.slots, "weight": 2 * weight.flip(0)}) > LIMIT
    weight[2, 3] *= 1 + 1e-3
    assert residual(region, filled.form, {**filled.slots, "weight": weight}) > LIMIT


class Cancels(nn.Module):
    """Two branches that cancel but for a constant: what is left of the input is rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        return y / 3 - (y + 7) / 3


def test_rounding_beside_a_shift_is_not_made_louder() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 16, dtype=torch.float64)
    region, filled = region_of(Cancels().double(), x)
    assert residual(region, filled.form, filled.slots) <= LIMIT
    weight = filled.slots["weight"].clone()
    weight[2, 3] += 1e-3
    assert residual(region, filled.form, {**filled.slots, "weight": weight}) > LIMIT


def test_swapped_channels_are_caught() -> None:
    region, filled = region_of(two_linears(), torch.randn(3, 16, dtype=torch.float64))
    slots = {**filled.slots, "weight": filled.slots["weight"][[1, 0, *range(2, 8)]]}
    assert residual(region, filled.form, slots) > LIMIT


def test_a_value_that_is_not_finite_never_passes() -> None:
    region, filled = region_of(two_linears(), torch.randn(3, 16, dtype=torch.float64))
    slots = {**filled.slots, "weight": filled.slots["weight"] * torch.nan}
    assert residual(region, filled.form, slots) == float("inf")


def test_borders_are_compared_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)).double()
    region, filled = region_of(model, torch.randn(2, 3, 6, 6, dtype=torch.float64))
    step = filled.form.steps[0]

    shifted = replace(filled.form, steps=(replace(step, padding=(0, 1), out=step.out),))
    with pytest.raises(RuntimeError):  # another number of positions cannot even be compared
        residual(region, shifted, filled.slots)


def test_a_long_chain_whose_signal_dies_away_is_still_certified() -> None:
    """Fifty layers shrink the input by 1e-12 beside their biases: what is left is rounding of the biases."""
    torch.manual_seed(0)
    region, filled = region_of(
        nn.Sequential(*[nn.Linear(16, 16) for _ in range(50)]).double(), torch.randn(2, 16).double()
    )
    assert residual(region, filled.form, filled.slots) <= LIMIT
    bias = filled.slots["bias"].clone()
    bias[3] *= 1 + 1e-3
    assert residual(region, filled.form, {**filled.slots, "bias": bias}) > LIMIT


def test_the_unit_written_out() -> None:
    """A channel's variation, at least 1e-4 of the largest, and 2**-45 / 1e-11 of the largest value."""
    wanted = torch.tensor([[-1.0, 10.0, 0.0], [3.0, 10.0, 1e-6]], dtype=torch.float64)
    shift = 10.0 * 2.0**-45 / 1e-11
    for channel, unit in ((0, 4.0 + shift), (1, 4e-4 + shift), (2, 4e-4 + shift)):
        got = wanted.clone()
        got[1, channel] += 1e-3
        assert deviation(wanted, got, [0]) == pytest.approx(1e-3 / unit, rel=1e-9)
    assert deviation(wanted.T, got.T, [1]) == deviation(wanted, got, [0])


def test_a_channel_has_positions_enough_to_be_measured() -> None:
    """4 samples of a Linear; of 25 positions one picture is enough."""
    region, _ = region_of(two_linears(), torch.randn(3, 16, dtype=torch.float64))
    assert _batch(region) == SAMPLES
    convolutions = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Conv2d(3, 2, 3)).double()
    region, _ = region_of(convolutions, torch.randn(3, 2, 7, 7, dtype=torch.float64))
    assert _batch(region) == 1


def test_only_a_large_shift_makes_the_input_louder() -> None:
    """Of `x + shift` by 2**7: the shift over the linear part, which is as large as x."""
    x = torch.tensor([[-1.0], [0.5]], dtype=torch.float64)
    for shift, gain in ((100.0, 1.0), (1000.0, 1000.5), (-1000.0, 1001.0)):
        assert louder(x + shift, [0], lambda value, by=shift: value + by, x) == pytest.approx(gain)
    assert louder(x * 0 + 5.0, [0], lambda value: value * 0 + 5.0, x) == 1.0  # nothing reads the entry
