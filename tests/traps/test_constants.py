"""Constants of every shape on either side of an operation, and operations in place.

| case                                              | where                                                  |
|---------------------------------------------------|--------------------------------------------------------|
| (W,) with W == C_out                              | passes/test_fold_affine: a_constant_per_column         |
| scalar, (1,), 0-d, (C,1,1), (1,C,1,1), integer    | passes/test_fold_affine: folds_constants_after_a_conv  |
| constant first (mul, sub), add and sub with alpha | passes/test_fold_affine: folds_constants_after_a_conv  |
| a constant over what was read (2 / |x|)           | passes/test_fold_affine: noop_on                       |
| addmm with alpha and beta                         | passes/test_fold_affine: folds_linear_in_all           |
| a buffer that forward writes                      | test_capture: refuses_with_one_sentence                |
| everything else                                   | here                                                   |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from folding import Of, codes, fold, layers, ops, seeded
from random_chains import Constant
from torch import Tensor, nn

import graphsurgery as gs

SIDE = 6  # as many columns and rows as channels: a shape alone tells nothing


def behind_a_conv(function: Callable[[Tensor, Tensor], Tensor], value: Tensor, kernel: int = 3) -> nn.Module:
    """`function(conv(x), value)`, six channels of six by six."""
    conv = nn.Conv2d(3, SIDE, kernel, padding=kernel // 2)
    return seeded(lambda: Of(lambda m, x: function(m.conv(x), m.value), conv=conv, value=value))


IMAGE = (2, 3, SIDE, SIDE)
PER_CHANNEL = {
    "mul-left": lambda y, c: c * y,
    "mul-right": lambda y, c: y * c,
    "div": lambda y, c: y / c,
    "add-left": lambda y, c: c + y,
    "add-alpha": lambda y, c: torch.add(y, c, alpha=3),
    "add-alpha-left": lambda y, c: torch.add(c, y, alpha=3),
    "sub": lambda y, c: y - c,
    "sub-left": lambda y, c: c - y,
    "sub-alpha-left": lambda y, c: torch.sub(c, y, alpha=2),
    "rsub": lambda y, c: torch.rsub(y, c, alpha=2),
    "addcmul": lambda y, c: c + 2 * y * c,
    "integer-mul": lambda y, c: y * (c * 5).ceil().to(torch.int64),
    "integer-div": lambda y, c: y / (c * 5).ceil().to(torch.int32),
    "bool-mul": lambda y, c: y * (c > 0.8),
}


@pytest.mark.parametrize("name", PER_CHANNEL)
@pytest.mark.parametrize("shape", [(), (1,), (SIDE, 1, 1), (1, SIDE, 1, 1)], ids=str)
def test_constants_per_channel(name: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    value = torch.rand(shape) + 0.5
    assert layers(fold(behind_a_conv(PER_CHANNEL[name], value), torch.randn(IMAGE))) == ["conv2d"]


@pytest.mark.parametrize("name", ["mul-left", "div", "sub-left"])
@pytest.mark.parametrize("shape", [(SIDE,), (1, SIDE), (SIDE, 1), (1, SIDE, 1), (1, 1, 1, SIDE)], ids=str)
def test_constants_per_row_or_column_with_as_many_as_channels(name: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    result = fold(behind_a_conv(PER_CHANNEL[name], torch.rand(shape) + 0.5, kernel=1), torch.randn(IMAGE))
    assert layers(result) == ["conv2d"]
    if name != "sub-left":  # that one folds into a map
        assert not result.changes
        assert "costs-more" in codes(result)


@pytest.mark.parametrize("name", ["mul-right", "add-alpha", "sub-left"])
@pytest.mark.parametrize("shape", [(SIDE, SIDE), (SIDE, SIDE, SIDE), (SIDE, 1, SIDE)], ids=str)
def test_constants_that_differ_by_position(name: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    result = fold(behind_a_conv(PER_CHANNEL[name], torch.rand(shape) + 0.5), torch.randn(IMAGE))
    assert len(ops(result)) == 2, "the map stays beside the conv"
    assert layers(result) == ["conv2d"]
    assert "costs-more" in codes(result)


def test_a_norm_behind_a_map_of_shifts() -> None:
    """The norm's scale goes into the conv and into the map, which keeps its shape."""
    model = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(3, SIDE, 3, padding=1),
            Constant("add", torch.randn(SIDE, SIDE, SIDE)),
            nn.BatchNorm2d(SIDE),
        )
    )
    assert ops(fold(model, torch.randn(IMAGE))) == ["conv2d", "add"]


@pytest.mark.parametrize("op", ["mul", "add"])
def test_constants_that_differ_by_sample(op: str) -> None:
    """(N, C, 1, 1): the batch is fixed by the constant; no layer has weights per sample."""
    model = seeded(
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), Constant(op, torch.rand(2, 4, 1, 1)), nn.BatchNorm2d(4))
    )
    result = fold(model, torch.randn(IMAGE))
    assert layers(result).count("conv2d") == 1


def test_a_constant_that_repeats_the_value() -> None:
    """A constant with more positions than the value broadcasts the value, not itself."""
    model = seeded(
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1), Constant("mul", torch.rand(4, 1, 5)), nn.BatchNorm2d(4))
    )
    result = fold(model, torch.randn(2, 3, 4, 1))
    assert layers(result) == ["conv2d", "batch_norm"]
    assert "broadcast" in codes(result)


@pytest.mark.parametrize("left", [torch.tensor(2.0), torch.full((SIDE, 1, 1), 1.5)], ids=["0-d", "(C,1,1)"])
def test_a_constant_divided_by_a_value_is_not_affine(left: Tensor) -> None:
    result = fold(behind_a_conv(lambda y, c: c / (y + 10), left), torch.randn(IMAGE))
    assert {"div"} <= set(ops(result)) or {"reciprocal"} <= set(ops(result))
    assert layers(result) == ["conv2d"]


@pytest.mark.parametrize("alpha", [1, 0.5, 0])
@pytest.mark.parametrize("beta", [1, -2, 0])
def test_addmm_with_alpha_and_beta(alpha: float, beta: float) -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        return torch.addmm(m.bias, m.fc(x), m.matrix, beta=beta, alpha=alpha) * m.scale + m.scale

    def build() -> nn.Module:
        return Of(
            function,
            fc=nn.Linear(6, 8),
            bias=torch.randn(5),
            matrix=torch.randn(8, 5),
            scale=torch.linspace(0.5, 2, 5),
        )

    assert len(layers(fold(seeded(build), torch.randn(2, 6)))) <= 1


@pytest.mark.parametrize("rows", [1, 2], ids=["bias-per-head", "bias-per-sample"])
def test_baddbmm_with_alpha_and_beta(rows: int) -> None:
    """A matrix for each of three heads: the batch of matrices is the heads, the samples are its rows."""

    def function(m: Any, x: Tensor) -> Tensor:
        heads = x.transpose(0, 1)
        return torch.baddbmm(m.bias, heads, m.matrix, beta=0.5, alpha=3).transpose(0, 1) * 2

    def build() -> nn.Module:
        return Of(function, bias=torch.randn(3, rows, 5), matrix=torch.randn(3, 6, 5))

    result = fold(seeded(build), torch.randn(2, 3, 6))
    assert len(layers(result)) == 1


def test_operations_in_place() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        y += m.shift
        y.mul_(m.scale)
        y = torch.relu_(y)
        return m.norm(m.last(y))

    def build() -> nn.Module:
        return Of(
            function,
            conv=nn.Conv2d(3, 4, 3),
            last=nn.Conv2d(4, 5, 1),
            norm=nn.BatchNorm2d(5),
            shift=torch.randn(4, 1, 1),
            scale=torch.randn(4, 1, 1),
        )

    assert ops(fold(seeded(build), torch.randn(IMAGE))) == ["conv2d", "relu", "conv2d"]


def test_a_view_taken_before_an_operation_in_place() -> None:
    """The view sees what was written later."""

    def function(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        view = y.flatten(2)
        y.mul_(m.scale)
        return view.sum(-1) + y.amax((2, 3))

    def build() -> nn.Module:
        return Of(function, conv=nn.Conv2d(3, 4, 3), scale=torch.randn(4, 1, 1))

    result = fold(seeded(build), torch.randn(IMAGE))
    assert layers(result) == ["conv2d"]


def test_a_part_written_in_place() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        y[:, :2] *= 3
        y[:, 1:, 0] += m.shift
        return m.norm(y)

    def build() -> nn.Module:
        return Of(function, conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4), shift=torch.randn(3, 1))

    result = fold(seeded(build), torch.randn(IMAGE))
    assert layers(result) == ["conv2d", "batch_norm"]
    assert "not-affine" in codes(result)


def test_blocks_without_gradients_and_detached_values() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = m.conv(x)
        with torch.inference_mode(False):
            return m.norm(y.detach())

    model = seeded(lambda: Of(function, conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4)))
    assert ops(fold(model, torch.randn(IMAGE))) == ["conv2d"]


def test_refuses_a_buffer_that_forward_writes() -> None:
    """A counter beside a fold: what it gives depends on earlier calls."""

    def function(m: Any, x: Tensor) -> Tensor:
        m.count.add_(1)
        return m.norm(m.conv(x)) * m.count

    model = seeded(
        lambda: Of(function, conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4), count=torch.zeros(()))
    )
    with pytest.raises(gs.CaptureError, match="count"):
        gs.optimize(model, (torch.randn(IMAGE),))
