"""A value that several calls read: into all of them where that pays, else into none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from folding import Of, fold, layers, ops, seeded
from torch import Tensor, nn

from graphsurgery.affine.choice import DEFAULT_PARAM_GROWTH
from graphsurgery.affine.dissolve import dissolved
from graphsurgery.affine.region import Scope
from graphsurgery.affine.search import Fold, Search
from graphsurgery.capture import capture
from graphsurgery.cost import graph_cost
from graphsurgery.restore import restore

ROWS = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
IMAGE = torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(2))


def parted(first: nn.Module, *heads: nn.Module, beside: Callable[[Tensor], Any] | None = None) -> nn.Module:
    """Heads behind one layer, each with an activation of its own, and what is `beside` them."""

    def forward(self: Any, x: Tensor) -> tuple[Tensor, ...]:
        y = self.first(torch.tanh(x))
        outs = [torch.tanh(head(y)) for head in self.heads]
        return (*outs, beside(y)) if beside else tuple(outs)

    return Of(forward, first=first, heads=nn.ModuleList(heads))


def wide() -> tuple[nn.Module, ...]:
    """A layer that is larger than what its heads need."""
    return nn.Linear(8, 64), nn.Linear(64, 2), nn.Linear(64, 3), nn.Linear(64, 4)


def plans(build: Callable[[], nn.Module], x: Tensor) -> tuple[list[Fold], list[Fold]]:
    """The folds of a search, and the same with values dissolved."""
    search = Search(Scope(capture(seeded(build), (x,))), DEFAULT_PARAM_GROWTH)
    before = search.folds()
    return before, dissolved(search, before)


def test_one_layer_goes_into_three_heads() -> None:
    before, after = plans(lambda: parted(*wide()), ROWS)
    assert not before, "no head alone takes it in"
    assert len(after) == 3
    assert {fold.region.entry.name for fold in after} == {"tanh"}
    positions = [fold.region.scope.position(fold.region.exit) for fold in after]
    assert positions == sorted(positions, reverse=True), "the last exit is written first"
    (first,) = after[0].region.shared & after[1].region.shared & after[2].region.shared
    assert first.name.startswith("linear")
    costs = sum((fold.region.tally.cost for fold in after[1:]), after[0].region.tally.cost)
    assert costs.macs == 8 * 64 + 64 * (2 + 3 + 4), "the layer itself is counted once"

    result = fold(seeded(lambda: parted(*wide())), ROWS)
    assert layers(result) == ["linear"] * 3
    assert graph_cost(result.graph_module).macs == 8 * (2 + 3 + 4)


def test_the_heads_keep_their_names() -> None:
    result = fold(seeded(lambda: parted(*wide())), ROWS)
    state = {name: tuple(value.shape) for name, value in restore(result.graph_module).state_dict().items()}
    assert state == {
        f"heads.{i}.{slot}": (width, 8) if slot == "weight" else (width,)
        for i, width in enumerate((2, 3, 4))
        for slot in ("weight", "bias")
    }


@pytest.mark.parametrize(
    "build",
    [
        lambda: parted(nn.Linear(8, 2), nn.Linear(2, 64), nn.Linear(2, 64)),
        lambda: parted(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.ReLU()),
        lambda: parted(*wide(), beside=lambda y: y),
        lambda: parted(*wide(), beside=torch.sigmoid),
        lambda: parted(*wide(), beside=lambda y: torch.sigmoid(y[:, :3])),
        lambda: parted(*wide(), beside=lambda y: y[:, :3] * y[:, 3:6]),
    ],
    ids=["bottleneck", "read-bare", "output", "sigmoid", "sigmoid-behind-a-slice", "product"],
)
def test_what_one_reader_needs_as_it_is_stays_for_all(build: Callable[[], nn.Module]) -> None:
    before, after = plans(build, ROWS)
    assert [(fold.region.entry, fold.region.exit) for fold in after] == [
        (fold.region.entry, fold.region.exit) for fold in before
    ]
    result = fold(seeded(build), ROWS)
    assert layers(result) == layers(fold(result.graph_module, ROWS)), "and a second run finds no more"
    assert len(layers(result)) == sum(isinstance(m, nn.Linear) for m in build().modules())


def test_a_sliced_reader_takes_it_in_too() -> None:
    """All readers are affine: a slice of the value and a head behind it."""

    def forward(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.first(torch.tanh(x))
        return torch.tanh(self.left(y[:, :32])), torch.tanh(self.right(y[:, 32:]))

    def build() -> nn.Module:
        return Of(forward, first=nn.Linear(8, 64), left=nn.Linear(32, 2), right=nn.Linear(32, 3))

    result = fold(seeded(build), ROWS)
    assert layers(result) == ["linear"] * 2
    assert graph_cost(result.graph_module).macs == 8 * (2 + 3)


def test_a_scale_and_shift_go_into_queries_keys_and_values() -> None:
    def forward(self: Any, x: Tensor) -> tuple[Tensor, ...]:
        y = torch.tanh(x) * self.scale + self.shift
        return tuple(torch.sigmoid(layer(y)) for layer in (self.q, self.k, self.v))

    def build() -> nn.Module:
        numbers = {"scale": nn.Parameter(torch.rand(8) + 0.5), "shift": nn.Parameter(torch.randn(8))}
        projections = {"q": nn.Linear(8, 8), "k": nn.Linear(8, 8, bias=False), "v": nn.Linear(8, 4)}
        return Of(forward, **numbers, **projections)

    result = fold(seeded(build), torch.randn(2, 5, 8))
    assert ops(result) == ["tanh", "linear", "sigmoid", "linear", "sigmoid", "linear", "sigmoid"]
    assert [change.parameters for change in result.changes] == [
        (f"{name}.weight", f"{name}.bias") for name in ("q", "k", "v")
    ]


def test_a_batch_norm_goes_into_two_convolutions() -> None:
    build = lambda: parted(nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1), nn.Conv2d(4, 2, 3))  # noqa: E731
    result = fold(seeded(build), IMAGE)
    assert layers(result) == ["conv2d", "conv2d"]
    assert set(restore(result.graph_module).state_dict()) == {
        f"heads.{i}.{slot}" for i in (0, 1) for slot in ("weight", "bias")
    }


def test_what_parts_again_is_taken_in_all_the_way() -> None:
    def forward(self: Any, x: Tensor) -> tuple[Tensor, ...]:
        y = self.first(torch.tanh(x))
        z = self.second(y)
        return torch.tanh(self.a(y)), torch.tanh(self.b(z)), torch.tanh(self.c(z))

    def build() -> nn.Module:
        heads = {"a": nn.Linear(64, 2), "b": nn.Linear(48, 2), "c": nn.Linear(48, 3)}
        return Of(forward, first=nn.Linear(8, 64), second=nn.Linear(64, 48), **heads)

    _, after = plans(build, ROWS)
    assert [fold.region.entry.name for fold in after] == ["tanh"] * 3
    assert [len(fold.region.shared) for fold in after] == [2, 2, 1]
    result = fold(seeded(build), ROWS)
    assert layers(result) == ["linear"] * 3
    assert graph_cost(result.graph_module).macs == 8 * (2 + 2 + 3)


def test_a_value_that_paths_leave_and_meet_again_is_one_region() -> None:
    """Nothing parts here: the branches end in one sum, and the search takes them as a whole."""

    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.first(torch.tanh(x))
        return torch.tanh(self.a(y) + self.b(y))

    def build() -> nn.Module:
        return Of(forward, first=nn.Linear(8, 64), a=nn.Linear(64, 3), b=nn.Linear(64, 3))

    before, after = plans(build, ROWS)
    assert before == after
    assert layers(fold(seeded(build), ROWS)) == ["linear"]


def test_tied_heads_are_counted_once() -> None:
    """Two heads with one weight: apart, they would need two."""

    def build() -> nn.Module:
        model = parted(nn.Linear(8, 9), nn.Linear(9, 8), nn.Linear(9, 8))
        model.heads[1].weight, model.heads[1].bias = model.heads[0].weight, model.heads[0].bias
        return model

    gm = capture(seeded(build).double(), (ROWS.double(),))
    result = fold(seeded(build), ROWS)
    assert graph_cost(result.graph_module).params <= graph_cost(gm).params
