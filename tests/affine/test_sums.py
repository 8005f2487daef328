"""Sums in another order, so that addends of one value stand side by side."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from graphsurgery.capture import capture
from graphsurgery.cost import op_name
from graphsurgery.graph import structural_hash
from graphsurgery.passes.fold_affine import FoldAffine


class Two(nn.Module):
    """Two convolutions and a sum that is given."""

    def __init__(self, add: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.add = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), add

    def forward(self, x: Tensor) -> Tensor:
        return self.add(x, self.first(x), self.second(x))


X = torch.randn(3, 4, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("add", "left"),
    [
        (lambda x, a, b: a + torch.tanh(x) + b, ["tanh", "conv2d", "add"]),
        (
            lambda x, a, b: torch.tanh(x) + a + torch.sigmoid(x) + b,
            ["tanh", "sigmoid", "conv2d", "add", "add"],
        ),
        (
            lambda x, a, b: (a + torch.tanh(x)) + (torch.sigmoid(x) + b),
            ["tanh", "sigmoid", "conv2d", "add", "add"],
        ),
        (lambda x, a, b: torch.relu(a + torch.tanh(x) + x), ["tanh", "conv2d", "add", "relu"]),
    ],
    ids=["between", "alternating", "in-two-sums", "residual"],
)
def test_addends_of_one_value_are_added_first_and_folded(
    add: Callable[[Tensor, Tensor, Tensor], Tensor], left: list[str]
) -> None:
    model = Two(add).double().eval()
    result = FoldAffine().run(capture(model, (X,)))
    ops = [op_name(node) for node in result.graph_module.graph.nodes if node.op == "call_function"]
    assert sorted(ops) == sorted(left)
    for batch in (1, 2, 3):
        wanted = model(X[:batch])
        assert (result.graph_module(X[:batch]) - wanted).abs().max() <= 1e-10 * wanted.abs().max()
    assert not FoldAffine().run(result.graph_module).changes


@pytest.mark.parametrize(
    "add",
    [
        lambda x, a, b: torch.tanh(a) + torch.relu(x) + torch.tanh(b),
        lambda x, a, b: torch.relu(a + torch.tanh(x)) + b,
        lambda x, a, b: a.mean((2, 3), keepdim=True) + torch.tanh(x) + b,  # broadcast: no plain sum
        lambda x, a, b: torch.tanh(x) + torch.sigmoid(x) + x,
    ],
    ids=["nothing-together", "apart", "broadcast", "no-layer"],
)
def test_a_sum_in_which_nothing_folds_keeps_its_order(
    add: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> None:
    gm = capture(Two(add).double().eval(), (X,))
    result = FoldAffine().run(gm)
    assert not result.changes
    assert structural_hash(result.graph_module) == structural_hash(gm)
