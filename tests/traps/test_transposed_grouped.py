"""Transposed convolutions, whose weight is laid out (in, out / groups, *kernel), and groups.

All cases are here; plain grouped and depthwise convolutions with a norm are in passes/test_fold_affine.
"""

from __future__ import annotations

import pytest
import torch
from folding import Of, codes, fold, layers, ops, seeded
from random_chains import Call
from torch import nn

TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
GROUPS = pytest.mark.parametrize("groups", [1, 2, 4], ids=["dense", "grouped", "depthwise"])


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@GROUPS
def test_a_transposed_conv_and_its_norm(rank: int, groups: int, bias: bool) -> None:
    def build() -> nn.Module:
        conv = TRANSPOSED[rank](4, 4, 3, stride=2, padding=1, output_padding=1, groups=groups, bias=bias)
        return nn.Sequential(conv, NORMS[rank](4))

    result = fold(seeded(build), torch.randn(2, 4, *(5, 4, 3)[:rank]))
    assert len(layers(result)) == 1


@GROUPS
def test_a_transposed_conv_that_makes_more_features_than_it_reads(groups: int) -> None:
    """out != in tells a transposed layout from the other at once."""
    model = seeded(
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 8, 2, stride=2, groups=groups), nn.BatchNorm2d(8))
    )
    result = fold(model, torch.randn(2, 4, 3, 5))
    assert len(layers(result)) == 1


@GROUPS
def test_a_norm_before_a_transposed_conv(groups: int) -> None:
    model = seeded(
        lambda: nn.Sequential(
            nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 8, 2, stride=2, groups=groups, bias=False)
        )
    )
    result = fold(model, torch.randn(2, 4, 3, 5))
    assert len(layers(result)) == 1


@GROUPS
def test_a_transposed_conv_whose_border_reads_less(groups: int) -> None:
    """Stride 3 and kernel 2 leave holes that only the bias fills; the norm scales them too."""
    model = seeded(
        lambda: nn.Sequential(
            nn.ConvTranspose1d(4, 4, 2, stride=3, output_padding=2, dilation=2, groups=groups),
            nn.BatchNorm1d(4),
        )
    )
    result = fold(model, torch.randn(2, 4, 5))
    assert len(layers(result)) == 1


@pytest.mark.parametrize("groups", [1, 2], ids=["dense", "grouped"])
def test_a_transposed_conv_that_leaves_one_column(groups: int) -> None:
    """Padding takes away all but one position; the sum of the value with itself calls for probing."""
    model = seeded(
        lambda: nn.Sequential(
            nn.ConvTranspose2d(2, 4, (4, 3), (2, 1), (0, 2), groups=groups, bias=False),
            Call(lambda y: 1.5 * (y + y)),
        )
    )
    result = fold(model, torch.randn(2, 2, 4, 3))
    assert ops(result) == ["conv_transpose2d"]


def test_a_transposed_conv_before_a_1x1() -> None:
    model = seeded(lambda: nn.Sequential(nn.ConvTranspose2d(3, 24, 2, stride=2), nn.Conv2d(24, 2, 1)))
    result = fold(model, torch.randn(2, 3, 4, 5))
    assert len(layers(result)) == 1


@pytest.mark.parametrize("second", [2, 3, 6])
def test_a_channel_shuffle_between_grouped_convs(second: int) -> None:
    """Groups of other channels: only a dense layer could hold both, at a cost."""
    model = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(6, 6, 3, groups=2), nn.ChannelShuffle(2), nn.Conv2d(6, 6, 1, groups=second)
        )
    )
    result = fold(model, torch.randn(2, 6, 6, 5))
    assert layers(result) == ["conv2d", "conv2d"] or second == 6


def test_a_channel_shuffle_by_hand_between_grouped_convs() -> None:
    def shuffle(x: torch.Tensor) -> torch.Tensor:
        n, c, h, w = x.shape
        return x.reshape(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)

    model = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(6, 6, 3, groups=2), Call(shuffle), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1, groups=3)
        )
    )
    result = fold(model, torch.randn(2, 6, 6, 5))
    assert layers(result).count("conv2d") == 2
    assert "batch_norm" not in ops(result)


def test_a_grouped_conv_before_one_with_other_groups() -> None:
    model = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(12, 12, 3, groups=3), nn.BatchNorm2d(12), nn.Conv2d(12, 12, 1, groups=2)
        )
    )
    result = fold(model, torch.randn(2, 12, 6, 5))
    assert layers(result) == ["conv2d", "conv2d"]
    assert "costs-more" in codes(result)


def test_depthwise_convs_in_a_row() -> None:
    """A 5x5 takes 25 multiplications where two 3x3 take 18; from two 1-D kernels of two taps come three."""
    square = seeded(lambda: nn.Sequential(*[nn.Conv2d(4, 4, 3, groups=4) for _ in range(2)]))
    assert layers(fold(square, torch.randn(2, 4, 20, 20))) == ["conv2d", "conv2d"]
    line = seeded(lambda: nn.Sequential(*[nn.Conv1d(4, 4, 2, groups=4) for _ in range(2)]))
    assert layers(fold(line, torch.randn(2, 4, 9))) == ["conv1d"]


@pytest.mark.parametrize("module", [True, False], ids=["module", "by-hand"])
def test_a_norm_behind_a_pixel_shuffle(module: bool) -> None:
    """Each of its channels is four of the conv's features, which do not lie apart by four."""

    def by_hand(x: torch.Tensor) -> torch.Tensor:
        n, c, h, w = x.shape
        return x.reshape(n, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, c // 4, 2 * h, 2 * w)

    def build() -> nn.Module:
        shuffle = nn.PixelShuffle(2) if module else Call(by_hand)
        return nn.Sequential(nn.Conv2d(3, 16, 3), shuffle, nn.BatchNorm2d(4))

    assert layers(fold(seeded(build), torch.randn(2, 3, 5, 6))) == ["conv2d"]


def test_a_pixel_unshuffle_before_a_conv() -> None:
    model = seeded(lambda: nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, 4, 1), nn.BatchNorm2d(4)))
    assert layers(fold(model, torch.randn(2, 3, 6, 4))) == ["conv2d"]


def test_a_transposed_conv_called_with_an_output_size() -> None:
    model = seeded(
        lambda: Of(
            lambda m, x: m.norm(m.conv(x, output_size=[8, 10])),
            conv=nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1),
            norm=nn.BatchNorm2d(6),
        )
    )
    result = fold(model, torch.randn(2, 4, 4, 5))
    assert len(layers(result)) == 1
