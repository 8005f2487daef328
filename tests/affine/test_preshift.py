"""A shift before padding, added to the entry instead: `conv(a x + b) = conv_a(x + b / a)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from folding import Of, assert_same, codes, fold, layers, ops, seeded
from one_region import region_of
from torch import Tensor, nn

from graphsurgery.affine.atoms import NoFold
from graphsurgery.affine.certify import LIMIT, residual
from graphsurgery.affine.coefficients import fill
from graphsurgery.affine.preshift import SLOT, entry_shift, lead, preshifted
from graphsurgery.affine.program import Shift
from graphsurgery.affine.region import Region
from graphsurgery.capture import capture
from graphsurgery.cost import op_name
from graphsurgery.passes import FoldAffine

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
SIZES = (6, 5, 4)


def image(rank: int, channels: int = 4) -> Tensor:
    return torch.randn(3, channels, *SIZES[:rank], generator=torch.Generator().manual_seed(rank)).double()


def region(build: Callable[[], nn.Module], x: Tensor) -> Region:
    return region_of(seeded(build).double(), x)


def certified(found: Region) -> list[tuple[int, ...]]:
    """The shapes of the entry's shift in every form there is, all of them right."""
    shapes = []
    for option in preshifted(found):
        assert isinstance(option.form.steps[0], Shift)
        done = fill(found, option.form)
        assert set(done.slots) == set(option.form.slots)
        assert residual(found, done.form, done.slots) <= LIMIT
        wrong = {**done.slots, SLOT: done.slots[SLOT] * (1 + 1e-3)}
        assert residual(found, done.form, wrong) > 1e3 * LIMIT
        shapes.append(option.form.slots[SLOT])
    return shapes


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2, 4], ids=["dense", "grouped", "depthwise"])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_norm_before_a_padded_convolution(rank: int, groups: int, stride: int) -> None:
    def build() -> nn.Module:
        return nn.Sequential(NORMS[rank](4), CONVS[rank](4, 8, 3, stride, 1, groups=groups))

    found = region(build, image(rank))
    assert [op_name(node) for node in lead(found)] == ["batch_norm"]
    shapes = certified(found)
    assert (1, 4, *[1] * rank) in shapes


def test_a_scale_of_one_number_needs_a_shift_of_one_number() -> None:
    def build() -> nn.Module:
        return Of(lambda self, x: self.conv(x / 255 * 2 - 1), conv=nn.Conv2d(4, 8, 3, padding=1))

    found = region(build, image(2))
    assert len(lead(found)) == 3
    assert (1, 1, 1, 1) in certified(found)


def test_a_shift_per_position_is_taken_along_its_axes() -> None:
    def build() -> nn.Module:
        conv = nn.Conv2d(4, 8, 3, padding=1)
        return Of(lambda self, x: self.conv(x + self.rows), conv=conv, rows=torch.randn(4, 6, 1))

    assert set(certified(region(build, image(2)))) == {(1, 4, 6, 1)}


def test_what_comes_behind_the_convolution_is_taken_in_too() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8))

    found = region(build, image(2))
    assert [node.name for node in lead(found)] == [found.nodes[0].name]
    assert certified(found)


def test_the_shift_is_b_over_a() -> None:
    torch.manual_seed(0)
    scale, shift = torch.rand(4, 1, 1).double() + 0.5, torch.randn(4, 1, 1).double()

    def build() -> nn.Module:
        conv = nn.Conv2d(4, 8, 3, padding=1)
        return Of(lambda self, x: self.conv(x * self.scale + self.shift), conv=conv, scale=scale, shift=shift)

    got = entry_shift(region(build, image(2)), (1, 4, 1, 1))
    # one division: a unit in the last place of float64 is 2.2e-16
    torch.testing.assert_close(got, (shift / scale).unsqueeze(0), rtol=1e-15, atol=0)


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3)),
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8)),
        lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 8, 3, padding=1)),
        lambda: nn.BatchNorm2d(4),
    ],
    ids=["unpadded", "behind", "a-layer-leads", "alone"],
)
def test_no_form_where_no_shift_leads_to_a_border(build: Callable[[], nn.Module]) -> None:
    assert not preshifted(region(build, image(2)))


def test_a_value_that_a_second_branch_reads_is_not_led_past() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = x + 1
        return self.conv(y * 2) + y

    found = region(lambda: Of(forward, conv=nn.Conv2d(4, 4, 3, padding=1)), image(2))
    assert [op_name(node) for node in lead(found)] == ["add"]
    assert certified(found)


# -- through the pass ------------------------------------------------------------------------------------


def normalised(deviation: Tensor) -> nn.Module:
    """An image network that takes its statistics out first."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return torch.relu(self.conv((x - self.mean) / self.deviation))

    mean = torch.tensor([0.485, 0.456, 0.406]).reshape(3, 1, 1)
    conv = nn.Conv2d(3, 16, 3, padding=1)
    return Of(forward, conv=conv, mean=mean, deviation=deviation.reshape(3, 1, 1))


def test_input_normalisation_becomes_one_addition() -> None:
    model = seeded(lambda: normalised(torch.tensor([0.229, 0.224, 0.225])))
    result = fold(model, torch.rand(2, 3, 8, 8))
    assert len(ops(result)) == 3, "an addition, the layer and the relu"
    assert layers(result) == ["conv2d"]
    (change,) = result.changes
    assert change.cost_after.elementwise < change.cost_before.elementwise
    assert change.cost_after.macs == change.cost_before.macs


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_refuses_a_scale_of_zero(rank: int) -> None:
    model = seeded(lambda: nn.Sequential(NORMS[rank](4), CONVS[rank](4, 8, 3, padding=1), nn.ReLU())).double()
    with torch.no_grad():
        model[0].weight[2] = 0
    x = image(rank)
    found = region_of(nn.Sequential(model[0], model[1]), x)
    (option, *_) = preshifted(found)
    with pytest.raises(NoFold) as refusal:
        fill(found, option.form)
    assert refusal.value.code == "zero-scale"

    result = FoldAffine().run(capture(model, (x,)))
    assert_same(result.graph_module, model, x)
    assert "zero-scale" in codes(result)
    assert "batch_norm" in ops(result)


def test_the_pass_says_that_a_scale_is_zero() -> None:
    model = seeded(lambda: normalised(torch.tensor([0.229, 0.224, 0.225]))).double()
    scaled = Of(
        lambda self, x: torch.relu(self.conv(x * self.scale + self.mean)),
        conv=model.conv,
        scale=torch.tensor([0.5, 0.0, 2.0]).double().reshape(3, 1, 1),
        mean=model.mean,
    )
    x = torch.rand(2, 3, 8, 8).double()
    result = FoldAffine().run(capture(scaled.eval(), (x,)))
    assert "zero-scale" in codes(result)
    assert not result.changes
    assert_same(result.graph_module, scaled, x)
