"""Layers, weights and values that are shared.

| case                                              | where                                                  |
|---------------------------------------------------|--------------------------------------------------------|
| a conv called twice, each call with its own norm  | passes/test_fold_affine: refuses_to_copy_the_weights   |
| a conv's value read with and without its norm     | passes/test_fold_affine: refuses_a_conv_read_with      |
| tied weights, one of the two foldable             | passes/test_fold_affine: tied_weights_stay_tied        |
| an intermediate value that is also an output      | passes/test_fold_affine: an_intermediate_value         |
| weight norm                                       | passes/test_fold_affine: folds_constants_computed      |
| everything else                                   | here                                                   |
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from folding import Of, assert_same, codes, fold, layers, ops, seeded
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import graphsurgery as gs

IMAGE = (2, 3, 6, 6)


def test_one_value_read_by_two_norms() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        return torch.relu(m.a(y)) + torch.relu(m.b(y))

    model = seeded(lambda: Of(function, conv=nn.Conv2d(3, 4, 3), a=nn.BatchNorm2d(4), b=nn.BatchNorm2d(4)))
    result = fold(model, torch.randn(IMAGE))
    assert not result.changes, "two convs would cost twice as much"
    assert "several-users" in codes(result)


def test_one_value_whose_two_norms_are_summed() -> None:
    """The two paths meet again in a sum: all of it is one conv."""

    def function(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        return m.a(y) + m.b(y)

    model = seeded(lambda: Of(function, conv=nn.Conv2d(3, 4, 3), a=nn.BatchNorm2d(4), b=nn.BatchNorm2d(4)))
    assert ops(fold(model, torch.randn(IMAGE))) == ["conv2d"]


def test_a_conv_called_once_with_and_once_without_its_norm() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        return torch.relu(m.conv(x)) + torch.relu(m.norm(m.conv(torch.tanh(x))))

    model = seeded(lambda: Of(function, conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4)))
    result = fold(model, torch.randn(IMAGE))
    assert "shared-weights" in codes(result)
    assert result.graph_module.get_parameter("conv.weight").shape == (4, 3, 3, 3)


def test_a_weight_used_twice_in_one_chain_is_folded() -> None:
    """No other call reads it: both uses go."""
    model = seeded(lambda: Of(lambda m, x: m.fc(m.fc(x)), fc=nn.Linear(6, 6)))
    result = fold(model, torch.randn(2, 6))
    assert ops(result) == ["linear"]


def test_a_tied_weight_that_is_used_transposed_elsewhere() -> None:
    """An encoder's weight is the decoder's, transposed; only the decoder has a norm behind it."""

    def function(m: Any, x: Tensor) -> Tensor:
        hidden = torch.relu(m.encoder(x))
        return torch.relu(m.norm(nn.functional.linear(hidden, m.encoder.weight.t())))

    model = seeded(lambda: Of(function, encoder=nn.Linear(12, 8), norm=nn.BatchNorm1d(12)))
    result = fold(model, torch.randn(2, 12))
    assert "shared-weights" in codes(result), "a copy of the weight is dearer than the norm"
    assert torch.equal(result.graph_module.get_parameter("encoder.weight").float(), model.encoder.weight)


def test_a_value_read_by_a_second_branch() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        y = m.first(x)
        return torch.tanh(m.second(y)) * torch.sigmoid(y.mean((1, 2, 3), keepdim=True))

    model = seeded(lambda: Of(function, first=nn.Conv2d(3, 8, 3), second=nn.Conv2d(8, 2, 1)))
    assert layers(fold(model, torch.randn(IMAGE))).count("conv2d") <= 2


def test_a_shift_before_a_split_and_a_layer() -> None:
    """One reader gives a tuple, of which one part is used: the shift may join the Linear alone, or stay."""

    def function(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x + m.shift
        _, part = y.split([2, 4], 2)
        return torch.relu(m.fc(y)), torch.tanh(part)

    model = seeded(lambda: Of(function, shift=torch.randn(1), fc=nn.Linear(6, 2)))
    assert layers(fold(model, torch.randn(2, 5, 6))) == ["linear"]


@pytest.mark.parametrize("where", ["conv", "norm"])
def test_a_forward_hook_that_changes_a_value(where: str) -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    hooked = model[0] if where == "conv" else model[1]
    hooked.register_forward_hook(lambda module, args, output: output * output)
    result = fold(model, torch.randn(IMAGE))
    assert "mul" in ops(result)
    assert ("batch_norm" in ops(result)) == (where == "conv"), "the square stands between conv and norm"


def test_a_forward_pre_hook_that_changes_a_value() -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    model[1].register_forward_pre_hook(lambda module, args: (torch.relu(args[0]),))
    result = fold(model, torch.randn(IMAGE))
    assert ops(result) == ["conv2d", "relu", "batch_norm"]


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight + weight.transpose(-1, -2)


@pytest.mark.parametrize("kind", ["weight-norm", "spectral-norm", "symmetric"])
def test_parametrized_weights(kind: str) -> None:
    def build() -> nn.Module:
        conv = nn.Conv2d(3, 4, 3)
        match kind:
            case "weight-norm":
                parametrizations.weight_norm(conv)
            case "spectral-norm":
                parametrizations.spectral_norm(conv)
            case _:
                parametrize.register_parametrization(conv, "weight", Symmetric())
        return nn.Sequential(conv, nn.BatchNorm2d(4))

    result = fold(seeded(build), torch.randn(IMAGE))
    assert layers(result)[-1] == "conv2d"
    assert "batch_norm" not in ops(result)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_the_old_weight_norm() -> None:
    model = seeded(lambda: nn.Sequential(nn.utils.weight_norm(nn.Linear(6, 5)), nn.BatchNorm1d(5)))
    with torch.no_grad():
        model(torch.randn(2, 6))  # a weight that was computed with gradients cannot be copied
    assert layers(fold(model, torch.randn(2, 6))) == ["linear"]


def test_the_old_spectral_norm() -> None:
    model = seeded(lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(6, 5)), nn.BatchNorm1d(5)))
    assert layers(fold(model, torch.randn(2, 6))) == ["linear"]


@pytest.mark.slow
def test_a_shared_weight_in_onnx(tmp_path: Path) -> None:
    """One weight, two layers, one of them before a norm: the file is right and holds the weight once."""

    def function(m: Any, x: Tensor) -> Tensor:
        return torch.relu(m.norm(m.a(x))) + torch.relu(m.b(torch.tanh(x)))

    def build() -> nn.Module:
        a, b = nn.Linear(40, 40), nn.Linear(40, 40)
        b.weight = a.weight
        return Of(function, a=a, b=b, norm=nn.BatchNorm1d(40))

    result = gs.optimize(seeded(build), (torch.randn(2, 40),))
    exported = result.export_onnx(tmp_path / "tied.onnx", verify=True)
    assert exported.verdict is not None
    assert exported.verdict.ok
    assert exported.size_bytes < 2 * 40 * 40 * 4


def test_a_value_returned_twice() -> None:
    def function(m: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = m.norm(m.conv(x))
        return y, x, y

    model = seeded(lambda: Of(function, conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4)))
    result = fold(model, torch.randn(IMAGE))
    assert ops(result) == ["conv2d"]
    found = gs.optimize(model.double(), (torch.randn(IMAGE, dtype=torch.float64),)).module
    assert_same(found, model, torch.randn(IMAGE, dtype=torch.float64))
