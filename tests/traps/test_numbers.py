"""Numbers at the ends of their range, and verdicts that a fixed tolerance gets wrong.

| case                                     | where                                            |
|------------------------------------------|--------------------------------------------------|
| weights of one, ELU, large differences   | verify/test_verify: accepts_weights_of_one       |
| one coefficient off by 1e-3              | verify/test_verify, affine/test_certify          |
| float16, bfloat16, float64, mixed        | test_low_precision                               |
| NaN weights                              | test_pipeline: nan_weights_are_named             |
| NaN = NaN                                | verify/test_verify: nan_and_infinity_must_agree  |
| argmax near ties                         | verify/test_verify; behind a fold, here          |
| everything else                          | here                                             |
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from folding import Of, assert_same, fold, layers, ops, seeded
from torch import Tensor, nn

import graphsurgery as gs
from graphsurgery.errors import VerificationError


def scaled(model: nn.Module, factor: float) -> nn.Module:
    """Multiply the last layer."""
    last = list(model.children())[-1]
    with torch.no_grad():
        for parameter in last.parameters():
            parameter *= factor
    return model


@pytest.mark.parametrize("factor", [1e20, 1e-20], ids=["large", "small"])
def test_outputs_of_any_magnitude(factor: float) -> None:
    """Relative to the outputs, nothing is different: folded, accepted, and an error of 1e-3 is seen."""
    model = seeded(
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1))
    )
    scaled(model, factor)
    x = torch.randn(2, 3, 7, 7)
    result = gs.optimize(model, x)
    assert layers(result.graph_module) == ["conv2d", "conv2d"]
    assert result.report.verification.ok, str(result.report.verification)
    with torch.no_grad():
        result.module.get_parameter("3.weight")[0, 0] *= 1 + 1e-3
    assert not gs.verify(model, result.module, x).ok


def test_a_product_above_the_range_of_float32_is_refused() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    for part in model.children():
        with torch.no_grad():
            part.weight.mul_(1e20)
    x = 1e-30 * torch.randn(3, 4)
    result = gs.optimize(model, x)
    assert [refusal.code for refusal in result.report.refusals] == ["overflow"]
    assert "does not fit torch.float32" in result.report.refusals[0].reason
    assert torch.equal(result.module(x), model(x))


def test_weights_of_zero() -> None:
    """The bias is all that is left, which is right and no reason to stop."""
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)))
    with torch.no_grad():
        model[0].weight.zero_()  # type: ignore[union-attr, operator]
    x = torch.randn(2, 3, 7, 7)
    result = gs.optimize(model, x)
    assert layers(result.graph_module) == ["conv2d"]
    assert not result.module.get_parameter("0.weight").any()
    with torch.no_grad():
        torch.testing.assert_close(result.module.double()(x.double()), model.double()(x.double()))


@pytest.mark.parametrize("kind", ["layer-scale", "norm"])
def test_scales_of_zero_are_never_divided_by(kind: str) -> None:
    """A layer scale that starts at zero, a norm with dead channels: no inverse of them is formed."""

    def function(m: Any, x: Tensor) -> Tensor:
        return x + m.scale * m.down(torch.relu(m.up(x)))

    def build() -> nn.Module:
        if kind == "layer-scale":
            scale = nn.Parameter(torch.tensor([0.0, 1.0, 0.0, -2.0]))
            return Of(function, scale=scale, up=nn.Linear(4, 8), down=nn.Linear(8, 4))
        norm = nn.BatchNorm2d(6)
        return nn.Sequential(nn.Conv2d(3, 6, 3), norm, nn.ReLU(), nn.Conv2d(6, 4, 1))

    model = seeded(build)
    if kind == "norm":
        with torch.no_grad():
            model[1].weight[::2] = 0.0  # type: ignore[index, union-attr, operator]
    result = fold(model, torch.randn(2, 5, 4) if kind == "layer-scale" else torch.randn(2, 3, 7, 7))
    assert not {"mul", "batch_norm"} & set(ops(result))
    assert all(bool(p.isfinite().all()) for p in result.graph_module.parameters())


def test_a_running_variance_of_zero() -> None:
    """A channel that never moved: 1 / sqrt(eps) is large and finite."""
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)))
    model[1].running_var[2] = 0.0  # type: ignore[index, union-attr, operator]
    assert layers(fold(model, torch.randn(2, 3, 7, 7))) == ["conv2d"]


def test_a_mask_of_infinities_is_no_bad_weight() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        scores = m.b(m.a(x)) @ x.transpose(1, 2) + m.mask
        return torch.softmax(scores, -1) @ x

    def build() -> nn.Module:
        mask = torch.full((5, 5), float("-inf")).triu(1)
        return Of(function, a=nn.Linear(6, 6), b=nn.Linear(6, 6), mask=mask)

    model = seeded(build).double()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    result = gs.optimize(model, x)
    assert result.report.verification.ok, str(result.report.verification)
    assert [change.kind for change in result.report.changes] == ["linear+linear"]
    assert_same(result.graph_module, model, x)


def tied(*pairs: tuple[int, int]) -> nn.Module:
    """A classifier, some of whose classes have the weights of another one."""

    def function(m: Any, x: Tensor) -> Tensor:
        return m.head(m.norm(m.fc(x))).argmax(1)

    model = seeded(lambda: Of(function, fc=nn.Linear(8, 16), norm=nn.BatchNorm1d(16), head=nn.Linear(16, 4)))
    with torch.no_grad():
        for to, of in pairs:
            model.head.weight[to] = model.head.weight[of]  # type: ignore[index, union-attr]
            model.head.bias[to] = model.head.bias[of]  # type: ignore[index, union-attr]
    return model


def test_an_argmax_at_a_tie_behind_a_fold() -> None:
    """Rounding decides which of two like classes is the greatest: such rows are counted, others equal."""
    model = tied((2, 0))
    with torch.no_grad():
        model.head.bias[[0, 2]] += 2.0  # type: ignore[index, union-attr]
    result = gs.optimize(model, torch.randn(16, 8))
    assert len(result.report.changes) == 1
    (output,) = result.report.verification.outputs
    assert output.ok
    assert 0 < output.undecided < output.elements
    assert output.mismatches == 0


def test_an_argmax_that_is_at_a_tie_everywhere_is_not_called_equal() -> None:
    with pytest.raises(VerificationError, match="inconclusive: rounding decides every value"):
        gs.optimize(tied((2, 0), (3, 1)), torch.randn(16, 8))
