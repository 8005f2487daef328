"""What must stay apart: folds that would cost more, and calls that are not linear after all.

| case                                              | where                                                  |
|---------------------------------------------------|--------------------------------------------------------|
| bottlenecks, with both costs stated               | passes/test_fold_affine: refuses_a_bottleneck          |
| depthwise + pointwise                             | passes/test_fold_affine: refuses_depthwise             |
| more parameters than the limit                    | passes/test_fold_affine: refuses_more_parameters       |
| conv + relu + conv                                | passes/test_fold_affine: noop_on                       |
| everything else                                   | here                                                   |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from folding import Of, codes, fold, layers, ops, seeded
from random_chains import Call
from torch import Tensor, nn

from graphsurgery.capture import capture
from graphsurgery.cost import graph_cost
from graphsurgery.passes import FoldAffine

IMAGE = (2, 3, 8, 8)


def test_a_bottleneck_of_1024_and_16() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(1024, 16), nn.Linear(16, 1024)))
    result = fold(model, torch.randn(2, 1024))
    assert not result.changes
    (refusal,) = result.refusals
    assert refusal.code == "costs-more"
    assert refusal.cost_before is not None
    assert refusal.cost_after is not None
    assert (refusal.cost_before.macs, refusal.cost_after.macs) == (2 * 1024 * 16, 1024 * 1024)
    assert "32,768" in refusal.reason
    assert "1,048,576" in refusal.reason


def test_a_chain_with_one_cheap_cut() -> None:
    """512 -> 768 -> 32 -> 512: the wide layer goes, the narrow one stays."""
    model = seeded(lambda: nn.Sequential(nn.Linear(512, 768), nn.Linear(768, 32), nn.Linear(32, 512)))
    result = fold(model, torch.randn(2, 512))
    assert layers(result) == ["linear", "linear"]
    assert graph_cost(result.graph_module).macs == 2 * 512 * 32


def test_a_factorised_embedding() -> None:
    """A table of 300 x 4 and a projection to 64: multiplied out it is 300 x 64."""
    model = seeded(lambda: nn.Sequential(nn.Embedding(300, 4), nn.Linear(4, 64)))
    gm = capture(model, (torch.randint(300, (2, 5)),))
    result = FoldAffine().run(gm)
    assert not result.changes
    assert ops(result) == ["embedding", "linear"]


def test_a_matrix_that_gets_too_big() -> None:
    """Conv, flatten, Linear: as one matrix of every pixel by every output it would take more."""
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 2, 3, padding=1), nn.Flatten(), nn.Linear(128, 64)))
    result = fold(model, torch.randn(IMAGE))
    assert not result.changes
    (refusal,) = result.refusals
    assert refusal.code == "costs-more"
    assert refusal.cost_after is not None
    assert refusal.cost_after.macs == 3 * 64 * 64


def test_a_matrix_with_too_many_parameters() -> None:
    """A conv over a large map and a small Linear: fewer multiplications, many times the parameters."""
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 1, 3, padding=1), nn.Flatten(), nn.Linear(64, 4)))
    x = torch.randn(IMAGE)
    result = fold(model, x)
    assert not result.changes
    assert "costs-more" in codes(result)
    assert any("times the parameters" in refusal.reason for refusal in result.refusals)
    assert layers(fold(model, x, max_param_growth=10.0)) == ["linear"]


@pytest.mark.parametrize("outer", [16, 32])
def test_an_inverted_bottleneck_without_its_activation(outer: int) -> None:
    """Expand, depthwise, project: the dense conv of all three takes more than they do."""
    model = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(outer, 2 * outer, 1),
            nn.Conv2d(2 * outer, 2 * outer, 5, groups=2 * outer, bias=False),
            nn.Conv2d(2 * outer, outer, 1),
        )
    )
    x = torch.randn(2, outer, 8, 8)
    before = graph_cost(capture(model, (x,))).macs
    result = fold(model, x)
    assert graph_cost(result.graph_module).macs <= before
    assert len(layers(result)) >= 2


NOT_LINEAR: dict[str, Callable[[Tensor], Tensor]] = {
    "abs": torch.abs,
    "square": torch.square,
    "product": lambda y: y * y,
    "half-product": lambda y: y * y.abs(),
    "own-mean": lambda y: y * y.mean((2, 3), keepdim=True),
    "own-norm": lambda y: y / y.norm(dim=1, keepdim=True),
    "leaky": lambda y: F.leaky_relu(y, 0.9),
    "elu": F.elu,
    "clamp": lambda y: y.clamp(-0.3, 0.3),
    "hardtanh": F.hardtanh,
    "hardswish": F.hardswish,
    "softplus": lambda y: F.softplus(y, beta=3),
    "gelu": F.gelu,
    "where": lambda y: torch.where(y > 0, y, 2 * y),
    "maximum": lambda y: torch.maximum(y, y.mean(1, keepdim=True)),
    "round": lambda y: torch.round(y * 4) / 4,
    "floor-div": lambda y: torch.div(y * 8, 2, rounding_mode="floor"),
    "remainder": lambda y: y % 0.7,
    "sort": lambda y: y.sort(-1).values,
    "max-pool": lambda y: F.max_pool2d(y, 2),
    "max-pool-padded": lambda y: F.max_pool2d(y, 3, 1, 1),
    "adaptive-max": lambda y: F.adaptive_max_pool2d(y, 4),
    "lp-pool": lambda y: F.lp_pool2d(y, 2, 2),
    "softmax": lambda y: y.softmax(1),
    "layer-norm": lambda y: F.layer_norm(y, y.shape[1:]),
    "std": lambda y: y - y.std(1, keepdim=True),
    "cast": lambda y: y.to(torch.float32).to(torch.float64),
}


@pytest.mark.parametrize("name", NOT_LINEAR)
def test_two_convs_around_what_is_not_linear(name: str) -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, 1), Call(NOT_LINEAR[name]), nn.Conv2d(8, 2, 1)))
    assert layers(fold(model, torch.randn(IMAGE))) == ["conv2d", "conv2d"]


def test_two_convs_around_a_prelu_whose_slope_is_nearly_one() -> None:
    """Probed at small inputs or compared in float32 it would look linear."""

    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 1), nn.PReLU(8, init=1 - 1e-7), nn.Conv2d(8, 2, 1))

    assert layers(fold(seeded(build), torch.randn(IMAGE))) == ["conv2d", "conv2d"]


@pytest.mark.parametrize("gate", ["sigmoid", "plain"])
def test_a_gate_is_not_linear(gate: str) -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.c(y * (m.b(x).sigmoid() if gate == "sigmoid" else m.b(x)))

    def build() -> nn.Module:
        return Of(function, a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(3, 8, 1), c=nn.Conv2d(8, 2, 1))

    assert layers(fold(seeded(build), torch.randn(IMAGE))) == ["conv2d"] * 3


def test_a_product_of_two_values_that_come_from_one() -> None:
    """x A x^T: both operands are affine in x, their product is not."""

    def function(m: Any, x: Tensor) -> Tensor:
        return m.out(m.q(x) @ m.k(x).transpose(1, 2))

    model = seeded(lambda: Of(function, q=nn.Linear(6, 6), k=nn.Linear(6, 6), out=nn.Linear(5, 3)))
    assert layers(fold(model, torch.randn(2, 5, 6))) == ["linear", "linear", "matmul", "linear"]


def test_a_value_between_folds_that_a_nonlinear_call_reads() -> None:
    """ReLU in one of two paths: the sum may not be taken for parallel branches of one conv."""

    def function(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.b(y) + m.c(torch.relu(y))

    def build() -> nn.Module:
        return Of(function, a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 2, 1), c=nn.Conv2d(8, 2, 1))

    assert "relu" in ops(fold(seeded(build), torch.randn(IMAGE)))
