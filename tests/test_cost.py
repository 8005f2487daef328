"""Costs against counts made by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from random_chains import Call
from torch import Tensor, nn

from graphsurgery.capture import capture
from graphsurgery.cost import Cost, copied, graph_cost, layer_counts


def cost_of(model: nn.Module, *x: Tensor) -> Cost:
    return graph_cost(capture(model.eval(), x))


IMAGE = torch.randn(2, 4, 6, 8)
COUNTS: dict[str, tuple[Callable[[], nn.Module], Tensor, Cost]] = {
    # out 3 x 4 x 6, each of 4 * 9 products
    "conv": (lambda: nn.Conv2d(4, 3, 3), IMAGE, Cost(3 * 4 * 6 * 36, 0, 0, 3 * 36 + 3, 1)),
    "grouped": (
        lambda: nn.Conv2d(4, 8, 3, groups=2, bias=False),
        IMAGE,
        Cost(8 * 4 * 6 * 18, 0, 0, 8 * 18, 1),
    ),
    "strided": (lambda: nn.Conv2d(4, 3, 2, stride=2), IMAGE, Cost(3 * 3 * 4 * 16, 0, 0, 3 * 16 + 3, 1)),
    # each of 4 x 6 x 8 inputs meets 3 * 4 weights
    "transposed": (lambda: nn.ConvTranspose2d(4, 3, 2), IMAGE, Cost(4 * 6 * 8 * 12, 0, 0, 48 + 3, 1)),
    "linear": (lambda: nn.Linear(8, 5), IMAGE, Cost(4 * 6 * 5 * 8, 0, 0, 45, 1)),
    "norm": (lambda: nn.BatchNorm2d(4), IMAGE, Cost(0, 2 * 192, 0, 16, 1)),
    "relu": (nn.ReLU, IMAGE, Cost(0, 192, 0, 0, 1)),
    "pool": (lambda: nn.AvgPool2d(2), IMAGE, Cost(0, 192, 0, 0, 1)),
    "permute": (lambda: Call(lambda x: x.permute(0, 2, 3, 1)), IMAGE, Cost(0, 0, 192, 0, 1)),
    "transpose": (lambda: Call(lambda x: x.transpose(2, 3)), IMAGE, Cost(0, 0, 192, 0, 1)),
    "reverse": (lambda: Call(lambda x: x.permute(0, 3, 2, 1)), IMAGE, Cost(0, 0, 8 * 192, 0, 1)),
    "view": (lambda: nn.Flatten(), IMAGE, Cost(0, 0, 0, 0, 1)),
    "matmul": (lambda: Call(lambda x: x @ x.transpose(-1, -2)), IMAGE, Cost(4 * 6 * 6 * 8, 0, 192, 0, 2)),
    "einsum": (
        lambda: Call(lambda x: torch.einsum("bchw,bcHw->bhH", x, x)),
        IMAGE,
        Cost(4 * 6 * 8 * 6, 0, 0, 0, 1),
    ),
    # a split copies all of its pieces, picking one is nothing
    "split": (lambda: Call(lambda x: x.split(2, 1)[0] + x.chunk(2, 1)[1]), IMAGE, Cost(0, 96, 384, 0, 3)),
    "unbind": (lambda: Call(lambda x: x.unbind(1)[2]), IMAGE, Cost(0, 0, 192, 0, 1)),
    "narrow": (lambda: Call(lambda x: x.narrow(1, 0, 2)), IMAGE, Cost(0, 0, 0, 0, 1)),
    "unshuffle": (lambda: nn.PixelUnshuffle(2), IMAGE, Cost(0, 0, 192, 0, 1)),
    "reflect": (lambda: nn.ReflectionPad2d(1), IMAGE, Cost(0, 0, 4 * 8 * 10, 0, 1)),
    "tile": (lambda: Call(lambda x: x.tile(2, 1)), IMAGE, Cost(0, 0, 384, 0, 1)),
    "nearest": (
        lambda: Call(lambda x: F.interpolate(x.flatten(2), scale_factor=2)),
        IMAGE,
        Cost(0, 0, 384, 0, 2),
    ),
    "bilinear": (lambda: nn.UpsamplingBilinear2d(scale_factor=2), IMAGE, Cost(0, 768, 0, 0, 1)),
    "vector": (lambda: Call(lambda x: torch.mv(x[0, 0], x[0, 0, 0])), IMAGE, Cost(48, 0, 0, 0, 6)),
    # scores 6 x 6 x 8 for each of 4 heads, then as many for the values
    "attention": (
        lambda: Call(lambda x: F.scaled_dot_product_attention(x, x, x)),
        IMAGE,
        Cost(2 * 4 * 36 * 8, 0, 0, 0, 1),
    ),
}


@pytest.mark.parametrize("name", COUNTS)
def test_cost_of(name: str) -> None:
    build, x, expected = COUNTS[name]
    assert cost_of(build(), x) == expected


@pytest.mark.parametrize(
    "split",
    [
        lambda x: x.split(3, 1),
        lambda x: x.split([1, 3], 1),
        lambda x: x.chunk(2, -1),
    ],
    ids=["split", "split-with-sizes", "chunk"],
)
def test_a_split_copies_all_its_pieces(split: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
    """No runtime but torch eager has views: ONNX Split writes every piece."""
    cost = cost_of(Call(lambda x: split(torch.relu(x))[0]), IMAGE)
    assert cost == Cost(0, 192, 192, 0, 2)


def test_a_slice_is_a_view() -> None:
    assert cost_of(Call(lambda x: torch.relu(x)[:, 1:3]), IMAGE).moved == 0


@pytest.mark.parametrize(
    ("order", "sizes", "times"),
    [
        ((0, 1, 2), (5, 6, 7), 1),
        ((1, 0), (5, 6), 1),  # a matrix
        ((1, 2, 0), (5, 6, 7), 1),
        ((0, 3, 4, 1, 2), (5, 6, 7, 8, 9), 1),  # two blocks change places
        ((0, 4, 2, 3, 1), (5, 1, 6, 7, 8), 8),
        ((0, 4, 1, 2, 3), (5, 1, 6, 7, 8), 1),
        ((1, 0, 2, 3), (1, 5, 6, 7), 1),  # nothing moves
        ((0, 3, 2, 1), (5, 6, 1, 7), 8),  # an axis of one is one that moves
        ((2, 1, 0), (5, 6, 7), 8),
        ((0, 2, 1, 3), (5, 6, 7, 2), 1),
        ((2, 1, 0, 3), (5, 6, 7, 8), 1),  # rows of 8
        ((2, 1, 0, 3), (5, 6, 7, 1), 8),
        ((3, 1, 0, 2), (5, 6, 7, 8), 8),
        ((0, 5, 1, 3, 2, 4), (2, 4, 4, 4, 4, 96), 8),
        ((0, 1, 3, 2, 4, 5), (2, 4, 4, 4, 4, 96), 1),
    ],
)
def test_elements_cost_more_than_rows(order: tuple[int, ...], sizes: tuple[int, ...], times: int) -> None:
    assert copied(1000, order, sizes) == 1000 * times


def test_a_free_batch_is_an_axis_that_moves() -> None:
    dynamic = capture(Call(lambda x: x.permute(2, 1, 0)), (torch.randn(3, 5, 4),))
    assert isinstance(next(iter(dynamic.graph.nodes)).meta["val"].shape[0], torch.SymInt)
    assert graph_cost(dynamic).moved == 8 * 20


def test_flops_are_two_per_multiplication_and_one_per_element() -> None:
    assert Cost(macs=10, elementwise=3).flops == 23


def test_shared_parameters_count_once_and_constants_cost_nothing() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.scale = nn.Linear(4, 4), nn.Parameter(torch.rand(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.relu(self.fc(x))) * torch.exp(self.scale)

    assert cost_of(Model(), torch.randn(3, 4)) == Cost(32, 8, 0, 24, 4)


def test_layers_are_counted_by_kind() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(96, 2)
    ).eval()
    counts = layer_counts(capture(model, (IMAGE,)))
    assert counts == {"conv": 1, "elementwise": 1, "linear": 1, "movement": 1, "norm": 1}
