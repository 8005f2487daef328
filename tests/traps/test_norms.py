"""Norms over another axis, with other statistics, or on the other side of something.

| case                                                  | where                                             |
|-------------------------------------------------------|---------------------------------------------------|
| Linear + BatchNorm1d, as many tokens as features      | passes/test_fold_affine: a_norm_over_tokens       |
| affine=False, momentum=None, large eps behind Linear  | passes/test_fold_affine: folds_linear_and_norm    |
| running variance of zero                              | passes/test_fold_affine: folds_a_running_variance |
| functional batch norm                                 | passes/test_fold_affine: folds_functional         |
| track_running_stats=False                             | passes/test_fold_affine: refuses_batch_statistics |
| everything else                                       | here                                              |
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from folding import Of, assert_same, codes, fold, layers, ops, seeded
from torch import Tensor, nn

from graphsurgery.capture import capture
from graphsurgery.passes import FoldAffine


@pytest.mark.parametrize("tokens", [3, 7])
def test_a_norm_over_tokens_that_are_not_as_many_as_features(tokens: int) -> None:
    """(N, T, C): the norm is over axis 1. A Linear cannot hold a scale per token."""
    model = seeded(lambda: nn.Sequential(nn.Linear(8, 5), nn.BatchNorm1d(tokens)))
    result = fold(model, torch.randn(2, tokens, 8))
    assert ops(result) == ["linear", "batch_norm"]
    assert "costs-more" in codes(result)


def test_a_norm_over_tokens_that_were_moved_to_the_features() -> None:
    """Between two transposes the norm is over the Linear's own features, tokens as many as these."""

    def function(m: Any, x: Tensor) -> Tensor:
        return m.norm(m.fc(x).transpose(1, 2)).transpose(1, 2)

    model = seeded(lambda: Of(function, fc=nn.Linear(8, 5), norm=nn.BatchNorm1d(5)))
    assert ops(fold(model, torch.randn(2, 5, 8))) == ["linear"]


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("eps", [1e-12, 1e-5, 0.5])
def test_unusual_norms_behind_a_conv(affine: bool, momentum: float | None, eps: float) -> None:
    model = seeded(
        lambda: nn.Sequential(nn.Conv1d(3, 4, 3, bias=False), nn.BatchNorm1d(4, eps, momentum, affine))
    )
    assert ops(fold(model, torch.randn(2, 3, 7))) == ["conv1d"]


def test_a_tiny_variance_beside_a_large_eps() -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=10.0)))
    model[1].running_var.fill_(1e-30)
    assert ops(fold(model, torch.randn(2, 3, 5, 6))) == ["conv2d"]


def test_a_norm_in_an_exported_graph() -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).double()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    result = FoldAffine().run(capture(torch.export.export(model, (x,))))
    assert ops(result) == ["conv2d"]
    assert_same(result.graph_module, model, x + 1)


def test_a_norm_in_a_decomposed_exported_graph() -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).double()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    program = torch.export.export(model, (x,)).run_decompositions({})
    result = FoldAffine().run(capture(program))
    assert layers(result) == ["conv2d"]
    assert_same(result.graph_module, model, x + 1)


def test_a_model_in_training_mode_is_folded_as_in_evaluation() -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).double().train()
    before = model[1].running_mean.clone()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    gm = capture(model, (x,))
    assert "training mode" in "".join(gm.meta["graphsurgery"].notes)
    result = FoldAffine().run(gm)
    assert ops(result) == ["conv2d"]
    assert model.training
    assert torch.equal(model[1].running_mean, before)
    assert_same(result.graph_module, model.eval(), x)


def test_refuses_a_norm_that_trains_in_evaluation() -> None:
    """`F.batch_norm(training=True)` whatever the mode: its statistics are the batch's."""

    def function(m: Any, x: Tensor) -> Tensor:
        return F.batch_norm(m.conv(x), None, None, m.weight, m.bias, training=True)

    model = seeded(
        lambda: Of(function, conv=nn.Conv2d(3, 4, 3), weight=torch.rand(4) + 0.5, bias=torch.randn(4))
    )
    result = fold(model, torch.randn(2, 3, 6, 6))
    assert not result.changes
    assert "batch-statistics" in codes(result)


@pytest.mark.parametrize("norm", [nn.InstanceNorm2d(4, affine=True), nn.GroupNorm(2, 4)])
def test_norms_over_the_sample_are_never_folded(norm: nn.Module) -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.Conv2d(4, 2, 1)))
    result = fold(model, torch.randn(2, 3, 6, 6))
    assert not result.changes
    assert layers(result) == ["conv2d", "conv2d"]


@pytest.mark.parametrize("rank", [1, 2])
def test_a_norm_before_a_padded_conv(rank: int) -> None:
    """The padded zeros are zeros behind the norm: its shift is not the same at the border."""
    conv, norm = ((nn.Conv1d, nn.BatchNorm1d), (nn.Conv2d, nn.BatchNorm2d))[rank - 1]
    model = seeded(lambda: nn.Sequential(norm(3), conv(3, 8, 3, padding=1)))
    result = fold(model, torch.randn(2, 3, *(6, 7)[:rank]))
    assert layers(result)[-1] == f"conv{rank}d"


def test_a_norm_without_shift_before_a_padded_conv_is_folded() -> None:
    model = seeded(lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3, padding=1)))
    with torch.no_grad():
        model[0].bias.zero_()
        model[0].running_mean.zero_()
    result = fold(model, torch.randn(2, 3, 6, 7))
    assert layers(result)[-1] == "conv2d"


def test_a_norm_added_to_its_input_before_a_linear_over_columns() -> None:
    """Scale and shift are per channel, the Linear's features are columns: one run must find all there is."""
    model = seeded(
        lambda: Of(
            lambda m, x: m.fc(x + 2 * m.norm(x)), norm=nn.BatchNorm2d(3), fc=nn.Linear(4, 1, bias=False)
        )
    )
    result = fold(model, torch.randn(2, 3, 6, 4))
    assert layers(result) == ["linear"]


@pytest.mark.parametrize("positive", [True, False], ids=["all-positive", "some-negative"])
def test_a_norm_between_relu_and_max_pool(positive: bool) -> None:
    """A scale that is negative turns the maximum into a minimum: the norm may not pass the pool."""

    def build() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.MaxPool2d(2), nn.Conv2d(4, 5, 2)
        )

    model = seeded(build)
    if positive:
        with torch.no_grad():
            model[2].weight.abs_()
    else:
        assert (model[2].weight < 0).any()
    result = fold(model, torch.randn(2, 3, 10, 10))
    assert layers(result).count("conv2d") == 2
    if not positive:
        assert layers(result) == ["conv2d", "batch_norm", "conv2d"]
        assert "not-affine" in codes(result)


def test_a_layer_norm_with_weights_per_position_before_a_conv_along_it() -> None:
    """Its affine part scales columns, which a conv over them cannot hold."""
    model = seeded(lambda: nn.Sequential(nn.LayerNorm(8), nn.Conv1d(3, 4, 3, padding=1)))
    with torch.no_grad():
        model[0].weight.normal_()
        model[0].bias.normal_()
    result = fold(model, torch.randn(2, 3, 8))
    assert not result.changes
    assert ops(result) == ["layer_norm", "conv1d"]
