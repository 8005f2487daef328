"""Zeros and other borders between layers, and pools that count them or do not.

| case                                              | where                                                  |
|---------------------------------------------------|--------------------------------------------------------|
| biased 1x1 before zeros of their own              | passes/test_fold_affine: folds_a_biased_1x1            |
| padded conv before padded conv                    | passes/test_fold_affine: refuses_a_padded_conv         |
| padding='same' with an even kernel                | passes/test_fold_affine: same_padding_and_even_kernel  |
| a norm behind reflect, replicate, circular        | passes/test_fold_affine: through_another_padding_mode  |
| asymmetric and negative pads before a conv        | passes/test_fold_affine: folds_zeros_around_a_conv     |
| a pad with a value between convs                  | passes/test_fold_affine: a_pad_with_another_value      |
| a padded pool, or one that excludes its pads      | passes/test_fold_affine: a_padded_pool, pools_with     |
| everything else                                   | here                                                   |
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from folding import Of, codes, fold, layers, ops, seeded
from random_chains import Call, Constant
from torch import Tensor, nn

IMAGE = (2, 4, 8, 7)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_a_1x1_before_a_padded_conv(bias: bool) -> None:
    """The zeros follow the bias: it is no bias of the whole, but a map."""
    model = seeded(
        lambda: nn.Sequential(nn.Conv2d(4, 64, 1, bias=bias), nn.Conv2d(64, 2, 3, padding=1, bias=False))
    )
    result = fold(model, torch.randn(IMAGE))
    assert ops(result) == (["conv2d", "add"] if bias else ["conv2d"])


def test_a_1x1_a_norm_and_a_padded_conv() -> None:
    """As in a DiverseBranchBlock: the norm's shift, too, is cut off at the border."""
    model = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(4, 64, 1, bias=False), nn.BatchNorm2d(64), nn.Conv2d(64, 2, 3, padding=1)
        )
    )
    assert ops(fold(model, torch.randn(IMAGE))) == ["conv2d", "add"]


def test_three_padded_convs_in_a_row() -> None:
    model = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 2, 3, padding=1)
        )
    )
    result = fold(model, torch.randn(IMAGE))
    assert layers(result) == ["conv2d"] * 3
    assert codes(result).count("border") == 2


@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("kernel", [2, 3])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch says that it copies
def test_same_padding_with_dilation(kernel: int, dilation: int) -> None:
    model = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(4, 6, kernel, padding="same", dilation=dilation), nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1)
        )
    )
    assert ops(fold(model, torch.randn(IMAGE))) == ["conv2d"]


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("before", ["norm", "1x1"])
def test_before_another_padding_mode(mode: str, before: str) -> None:
    """What is alike at all positions commutes with these pads, shift and all; two layers at most are left."""

    def build() -> nn.Module:
        first = nn.BatchNorm2d(4) if before == "norm" else nn.Conv2d(4, 6, 1)
        channels = 4 if before == "norm" else 6
        return nn.Sequential(first, nn.Conv2d(channels, 5, 3, padding=1, padding_mode=mode))

    result = fold(seeded(build), torch.randn(IMAGE))
    assert 1 <= len(layers(result)) <= 2


@pytest.mark.parametrize("pads", [(1, 0, 2, 0), (0, 3, 0, 1), (-1, 2, 1, -1)], ids=str)
def test_asymmetric_zeros_between_a_1x1_and_a_conv(pads: tuple[int, ...]) -> None:
    model = seeded(
        lambda: nn.Sequential(nn.Conv2d(4, 64, 1, bias=False), nn.ZeroPad2d(pads), nn.Conv2d(64, 2, 3))
    )
    assert layers(fold(model, torch.randn(IMAGE))) == ["conv2d"]


@pytest.mark.parametrize("value", [2.0, -1.0])
def test_a_pad_with_a_value_before_a_conv_and_its_norm(value: float) -> None:
    model = seeded(
        lambda: nn.Sequential(nn.ConstantPad2d((1, 0, 1, 2), value), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))
    )
    assert layers(fold(model, torch.randn(IMAGE))) == ["conv2d"]


def test_a_shift_before_a_pad_with_a_value() -> None:
    """The shift passes neither the value nor the zeros of the conv."""
    model = seeded(
        lambda: nn.Sequential(
            Constant("add", torch.randn(4, 1, 1)), nn.ConstantPad2d(1, 0.5), nn.Conv2d(4, 6, 3, padding=1)
        )
    )
    assert layers(fold(model, torch.randn(IMAGE))) == ["conv2d"]


def test_a_negative_pad_between_convs() -> None:
    """A crop behind the first conv, whose own padding it takes away again."""
    model = seeded(
        lambda: nn.Sequential(nn.Conv2d(4, 16, 3, padding=1), nn.ZeroPad2d(-1), nn.Conv2d(16, 2, 1))
    )
    assert layers(fold(model, torch.randn(IMAGE))) == ["conv2d"]


POOLS = {
    "count-zeros": lambda: nn.AvgPool2d(3, 2, 1),
    "leave-zeros-out": lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    "ceil": lambda: nn.AvgPool2d(3, 2, ceil_mode=True),
    "ceil-and-zeros": lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True),
    "divisor": lambda: nn.AvgPool2d(3, 2, divisor_override=5),
    "divisor-and-zeros": lambda: nn.AvgPool2d(3, 2, 1, divisor_override=7),
    "divisor-and-ceil": lambda: nn.AvgPool2d(2, 2, ceil_mode=True, divisor_override=3),
    "adaptive": lambda: nn.AdaptiveAvgPool2d((3, 2)),
    "adaptive-divides": lambda: nn.AdaptiveAvgPool2d((4, 1)),
    "adaptive-larger": lambda: nn.AdaptiveAvgPool2d((9, 8)),
}
every_pool = pytest.mark.parametrize("pool", POOLS)


@every_pool
def test_a_shift_before_a_pool(pool: str) -> None:
    """Where windows hold zeros that count, or a divisor of their own, the shift is another one there."""
    model = seeded(
        lambda: nn.Sequential(Constant("add", torch.randn(4, 1, 1)), POOLS[pool](), nn.BatchNorm2d(4))
    )
    result = fold(model, torch.randn(IMAGE))
    assert layers(result) == ["batch_norm"], "a stretch without a layer does not gain one"
    assert "no-heavy" in codes(result)


@every_pool
def test_a_biased_1x1_before_a_pool_and_a_norm(pool: str) -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(4, 5, 1), POOLS[pool](), nn.BatchNorm2d(5)))
    result = fold(model, torch.randn(IMAGE))
    assert layers(result).count("conv2d") <= 1


@every_pool
def test_a_pool_before_a_conv_and_a_norm(pool: str) -> None:
    """conv and norm fold, whatever the pool does before them."""
    model = seeded(lambda: nn.Sequential(POOLS[pool](), nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5)))
    assert layers(fold(model, torch.randn(IMAGE))) == ["conv2d"]


@every_pool
def test_a_padded_conv_before_a_pool_and_a_linear(pool: str) -> None:
    """Dense to the end, where all borders are plain coefficients; the pool alone decides how many."""

    def function(m: Any, x: Tensor) -> Tensor:
        return m.fc(m.pool(m.conv(x)).flatten(1))

    def build() -> nn.Module:
        made = POOLS[pool]()
        size = made(torch.zeros(1, 16, *IMAGE[2:])).numel()
        return Of(function, conv=nn.Conv2d(4, 16, 3, padding=1), pool=made, fc=nn.Linear(size, 2))

    assert layers(fold(seeded(build), torch.randn(IMAGE))) == ["linear"]


def test_a_functional_pad_in_every_mode_between_pointwise_layers() -> None:
    for mode in ("constant", "reflect", "replicate", "circular"):
        model = seeded(
            lambda mode=mode: nn.Sequential(
                nn.Conv2d(4, 6, 1), Call(lambda x: F.pad(x, (1, 2, 0, 1), mode=mode)), nn.BatchNorm2d(6)
            )
        )
        assert layers(fold(model, torch.randn(IMAGE))).count("conv2d") == 1
