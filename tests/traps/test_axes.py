"""Which axis is which: layouts, sizes that coincide, views that move the batch, values broadcast back.

| case                                              | where                                                  |
|---------------------------------------------------|--------------------------------------------------------|
| Linear + BatchNorm1d over tokens                  | test_norms; passes/test_fold_affine                    |
| (W,) with W == C, (H, 1), full and batch shapes   | test_constants                                         |
| reshape(-1, C) -> Linear -> reshape back          | passes/test_fold_affine: the_batch_is_never_folded     |
| the batch at another axis                         | passes/test_fold_affine: where_the_batch_is_not        |
| a shift before pools and pads, padding modes      | test_padding                                           |
| norms over the batch, tiny variance, negative     | test_norms                                             |
|   scales before a max-pool, LayerNorm on columns  |                                                        |
| weight.t() elsewhere, a value returned twice      | test_shared                                            |
| a view before an operation in place               | test_constants                                         |
| everything else                                   | here                                                   |
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from folding import Of, assert_same, codes, fold, layers, ops, seeded
from random_chains import Call
from torch import Tensor, nn

import graphsurgery as gs
from graphsurgery.capture import capture
from graphsurgery.passes import FoldAffine

CUBE = (2, 4, 4, 4)  # height, width and channels alike


@pytest.mark.parametrize("axes", [(1, 2, 3), (2, 3, 1), (3, 1, 2), (1, 3, 2), (3, 2, 1), (2, 1, 3)], ids=str)
def test_a_linear_and_a_norm_between_permutes_of_a_cube(axes: tuple[int, ...]) -> None:
    """The norm is over the Linear's features only where the permute puts these on axis 1."""
    model = seeded(
        lambda: nn.Sequential(
            nn.Linear(4, 4), Call(lambda x: x.permute(0, *axes)), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        )
    )
    result = fold(model, torch.randn(CUBE))
    if axes[0] == 3:
        assert len(layers(result)) == 1


@pytest.mark.parametrize("size", [4, 5])
def test_a_conv_on_channels_last_data(size: int) -> None:
    """(N, H, W, C), with permutes around a padded conv and its norm, and with the norm outside of them."""

    def inside(m: Any, x: Tensor) -> Tensor:
        return m.norm(m.conv(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)

    def outside(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return m.norm(y.reshape(-1, 4)).reshape(y.shape)

    x = torch.randn(2, size, size, 4)
    first = seeded(lambda: Of(inside, conv=nn.Conv2d(4, 4, 3, padding=1), norm=nn.BatchNorm2d(4)))
    assert layers(fold(first, x)) == ["conv2d"]
    second = seeded(lambda: Of(outside, conv=nn.Conv2d(4, 4, 3, padding=1), norm=nn.BatchNorm1d(4)))
    assert layers(fold(second, x)) == ["conv2d"]


def test_a_norm_over_rows_is_not_one_over_channels() -> None:
    """A channels-last map given to BatchNorm2d as it is: the norm is over the rows."""

    def function(m: Any, x: Tensor) -> Tensor:
        return m.norm(m.conv(x).permute(0, 2, 3, 1))

    model = seeded(lambda: Of(function, conv=nn.Conv2d(4, 4, 1), norm=nn.BatchNorm2d(4)))
    result = fold(model, torch.randn(CUBE))
    assert "batch_norm" in ops(result)


def test_a_memory_format_is_no_axis() -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))
    model = model.to(memory_format=torch.channels_last)
    x = torch.randn(CUBE).to(memory_format=torch.channels_last)
    assert ops(fold(model, x)) == ["conv2d"]


@pytest.mark.parametrize("shape", [(4, 1), (1, 1), (1, 6)], ids=str)
def test_a_conv_and_its_norm_on_a_map_with_an_axis_of_one(shape: tuple[int, int]) -> None:
    """As behind a global pool."""
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    assert layers(fold(model, torch.randn(2, 3, *shape))) == ["conv2d"]


def test_tokens_merged_with_the_batch_around_addmm() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        rows = torch.addmm(m.bias, x.reshape(-1, 6), m.matrix).reshape(x.shape[0], -1, 8)
        return m.fc(rows)

    def build() -> nn.Module:
        return Of(function, bias=torch.randn(8), matrix=torch.randn(6, 8), fc=nn.Linear(8, 3))

    result = fold(seeded(build), torch.randn(2, 5, 6))
    assert len(layers(result)) == 1


def test_tokens_and_batch_swapped() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        return m.b(m.a(x.transpose(0, 1))).transpose(0, 1)

    model = seeded(lambda: Of(function, a=nn.Linear(6, 9), b=nn.Linear(9, 4)))
    assert layers(fold(model, torch.randn(2, 5, 6))) == ["linear"]


def test_a_batch_swapped_with_tokens_and_merged_the_other_way() -> None:
    """(T, N, C) merged to (T N, C) and split as (N, T, C): a scrambled batch, right or refused."""

    def function(m: Any, x: Tensor) -> Tensor:
        rows = m.a(x.transpose(0, 1).reshape(-1, 6))
        return m.b(rows.reshape(x.shape[0], -1, 9))

    model = seeded(lambda: Of(function, a=nn.Linear(6, 9), b=nn.Linear(9, 4)))
    assert layers(fold(model, torch.randn(2, 5, 6))) == ["linear"]


@pytest.mark.parametrize(
    ("groups", "left", "code"),
    [((3, 8), 2, "scramble"), ((8, 3), 1, None), ((2, 12), 1, None), ((24, 1), 2, "costs-more")],
    ids=str,
)
def test_views_that_scramble_features(groups: tuple[int, int], left: int, code: str | None) -> None:
    """4 x 6 features as rows of 8 mix two rows; of 3, halves of one; of 12, two whole rows."""
    model = seeded(
        lambda: nn.Sequential(
            nn.Linear(6, 6), Call(lambda x: x.reshape(-1, *groups)), nn.Linear(groups[1], 2), nn.Flatten()
        )
    )
    result = fold(model, torch.randn(2, 4, 6))
    assert layers(result) == ["linear"] * left
    assert code is None or code in codes(result)


@pytest.mark.parametrize(
    "pick",
    [
        lambda x: x[:, ::2],
        lambda x: x[:, :, 1::2],
        lambda x: x[..., [2, 0, 1]],
        lambda x: x.index_select(1, torch.tensor([3, 0, 3])),
        lambda x: x.flip(2),
        lambda x: x.roll(1, 3),
    ],
    ids=["channels-by-2", "rows-by-2", "columns-listed", "channels-listed", "flip", "roll"],
)
def test_positions_that_are_picked_or_moved(pick: Any) -> None:
    """Carried in shape only: a layer before and a norm after are right, whatever is picked."""
    model = seeded(
        lambda: (
            nn.Sequential(nn.Conv2d(4, 4, 1), Call(pick), nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3))
            if pick(torch.zeros(CUBE)).shape[1] == 4
            else nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), Call(pick))
        )
    )
    result = fold(model, torch.randn(CUBE))
    assert "batch_norm" not in ops(result)


@pytest.mark.parametrize("dims", [(2, 3), (3,), (1,), (1, 2, 3)], ids=str)
def test_a_live_mean_taken_off_again(dims: tuple[int, ...]) -> None:
    """Affine, but neither pointwise nor windowed: every position reads all of them."""

    def function(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.b(y - y.mean(dims, keepdim=True))

    model = seeded(lambda: Of(function, a=nn.Conv2d(4, 8, 1), b=nn.Conv2d(8, 2, 1)))
    # A mean over channels is a matrix over them; one over positions makes every position read all.
    assert layers(fold(model, torch.randn(CUBE))) == ["conv2d"] * (1 if dims == (1,) else 2)


def test_a_mean_added_to_the_last_layer() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        return m.fc(x + x.mean(1, keepdim=True)) - m.fc(x)

    result = fold(seeded(lambda: Of(function, fc=nn.Linear(6, 6))), torch.randn(2, 6, 6))
    assert layers(result) == ["linear", "linear"]
    assert "costs-more" in codes(result)


@pytest.mark.parametrize("norm", ["group", "layer", "instance"])
@pytest.mark.parametrize("level", [0.0, 1.0], ids=["zeros", "ones"])
def test_a_norm_over_a_nearly_constant_map_behind_a_fold(norm: str, level: float) -> None:
    """1 / sqrt(eps) multiplies the rounding of the folded weights some 300 times: right, and accepted."""

    def build() -> nn.Module:
        last = {
            "group": lambda: nn.GroupNorm(4, 8),
            "layer": lambda: nn.LayerNorm([8, 6, 6]),
            "instance": lambda: nn.InstanceNorm2d(8),
        }[norm]()
        return nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), last)

    model = seeded(build)
    x = torch.randn(2, 3, 6, 6)
    result = gs.optimize(model, (x,))
    assert layers(result.graph_module) == ["conv2d"]
    verdict = gs.verify(model, result.module, (torch.full_like(x, level),))
    assert verdict.ok, str(verdict)


def test_one_wrong_coefficient_before_such_a_norm_is_not_accepted() -> None:
    """What rounding explains and no more: the same network with a weight off by a thousandth."""
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.GroupNorm(4, 8)))
    x = torch.randn(2, 3, 6, 6)
    module = gs.optimize(model, (x,)).module
    with torch.no_grad():
        module.get_parameter("0.weight")[0, 0] *= 1 + 1e-3
    assert not gs.verify(model, module, (x,)).ok


def test_branches_stacked_along_a_new_axis_and_pooled_over_it() -> None:
    """The pool sums three branches, which one conv can stand for; one run must find all there is."""

    def function(m: Any, x: Tensor) -> Tensor:
        return m.pool(torch.stack([m.b(m.a(x)), m.d(m.c(x)), m.e(x)], 3))

    def build() -> nn.Module:
        return Of(
            function,
            a=nn.Conv2d(4, 4, 1),
            b=nn.Conv2d(4, 4, 3, padding=1),
            c=nn.Conv2d(4, 4, 3, padding=1, groups=4),
            d=nn.Conv2d(4, 4, 1),
            e=nn.Conv2d(4, 4, 3, padding=2, dilation=2, bias=False),
            pool=nn.AvgPool3d(3, 1),
        )

    assert layers(fold(seeded(build), torch.randn(2, 4, 5, 6))) == ["conv2d"]


def test_a_view_with_the_batch_behind_other_axes() -> None:
    """(C, N, L) from (N, C, L), flattened to rows of one channel each."""

    def function(m: Any, x: Tensor) -> Tensor:
        rows = x.transpose(0, 1).reshape(3, -1)
        return (rows * m.scale).reshape(3, -1, 5).transpose(0, 1) + m.scale

    model = seeded(lambda: Of(function, scale=torch.tensor([[2.0], [-1.0], [0.5]])))
    result = fold(model, torch.randn(2, 3, 5))
    assert [name for name in ops(result) if name in ("mul", "add", "linear")] == ["mul", "add"]


def test_a_static_batch_is_not_mixed_up_with_a_size_that_equals_it() -> None:
    """Four samples of four tokens of four features, the batch fixed by a view."""

    def function(m: Any, x: Tensor) -> Tensor:
        return m.b(m.a(x).transpose(0, 1).reshape(4, 4, 4))

    model = seeded(lambda: Of(function, a=nn.Linear(4, 4), b=nn.Linear(4, 4))).double()
    x = torch.randn(4, 4, 4, dtype=torch.float64)
    result = FoldAffine().run(capture(model, (x,), dynamic_shapes=({},)))
    assert layers(result) == ["linear"]
    assert_same(result.graph_module, model, x + torch.arange(4.0))
    assert "certificate" not in codes(result)
