"""The whole of a model whose decisions hang on rounding, beside one that is wrong."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from graphsurgery.capture.inputs import Inputs
from graphsurgery.partial.whole import Whole


class Picks(nn.Module):
    """Keeps the rows whose score is at least that of the first one: which does, rounding decides."""

    def __init__(self, least: float, scale: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 6))
        self.least, self.scale = least, scale

    def forward(self, x: Tensor) -> Tensor:
        scores = x @ self.weight
        return scores[scores >= self.least] * self.scale


@pytest.mark.parametrize(
    ("scale", "right"), [(1.0, True), (1.5, False), (float("nan"), False), (float("inf"), False)]
)
@pytest.mark.parametrize("seed", range(4))
def test_a_result_is_held_against_the_spread_of_the_original(seed: int, scale: float, right: bool) -> None:
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(seed)) + 1
    with torch.no_grad():
        least = float((x @ Picks(0.0).weight)[0])
    whole = Whole(Picks(least).eval(), "forward", [Inputs((x,), {})])
    (check,) = whole.checks(Picks(least, scale).eval())
    assert check.ok == right, check.reason
    assert not check.decided
    assert ("further off than rounding moves the original" in check.reason) == (not right)
