"""Sizes of one captured graph: which depend on each other, and which of them the graph was made for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.export import Dim

import graphsurgery as gs
from graphsurgery.capture import capture
from graphsurgery.graph import capture_info
from graphsurgery.verify.inputs import as_inputs, battery

DYNAMIC = Dim.DYNAMIC


def _derived(kind: str) -> tuple[Any, Any, Any]:
    n = Dim("n")
    a, b = torch.randn(6, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    m = torch.randn(3, 3, dtype=torch.float64)
    return {
        "concatenated": (lambda a, b: torch.cat([b, b]) + a, (a, b), ({0: 2 * n}, {0: n})),
        "sums": (lambda b, a: b.sum() + a.sum(), (b, a), ({0: n}, {0: 2 * n})),
        "one more": (lambda a, b: a[1:] + b, (a[:4], b), ({0: n + 1}, {0: n})),
        "square": (lambda b, m: m @ b, (b, m), ({0: n}, {0: n, 1: n})),
        "second axis": (lambda b, m: m @ b, (b, m[:2]), ({0: n}, {1: n})),
        "fixed beside it": (lambda b, m: b + m.sum(), (b, m), ({0: n}, None)),
        "other size": (lambda b, m: b + m.sum(), (b, m), ({0: n}, {0: Dim("k")})),
    }[kind]


@pytest.mark.parametrize(
    "kind",
    ["concatenated", "sums", "one more", "square", "second axis", "fixed beside it", "other size"],
)
def test_verification_keeps_sizes_that_depend_on_the_batch_together(kind: str) -> None:
    torch.manual_seed(0)
    function, inputs, shapes = _derived(kind)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
            value = function(first, second)
            result: torch.Tensor = self.linear(value.expand(2, 4) if value.dim() == 0 else value)
            return result

    model = Two().double().eval()
    result = gs.optimize(model, inputs, dynamic_shapes=shapes)
    verdict = result.report.verification
    assert verdict is not None
    assert verdict.ok
    assert isinstance(result.module, fx.GraphModule)
    info = capture_info(result.module)
    runs = battery(
        as_inputs(inputs),
        dynamic_batch=info.dynamic_batch,
        refused=info.refused_batches,
        axes=info.batch_axes,
    )
    shapes_run = {tuple(tensor.shape for tensor in run.inputs.tensors()) for run in runs}
    assert len(shapes_run) > 1  # another batch than the example's is among them
    for run in runs:
        torch.testing.assert_close(result.module(*run.inputs.args), model(*run.inputs.args))


class Masked(nn.Module):
    """As in transformers: the mask is read by row numbers, and not at all where it is all ones."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(9, 4), nn.Linear(4, 2)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden = self.table(ids)
        if torch.compiler.is_compiling() or not bool((mask == 1).all()):
            hidden = hidden * mask[torch.arange(ids.shape[0])].unsqueeze(-1)
        result: torch.Tensor = self.head(hidden)
        return result


def test_one_row_with_a_mask_of_one_row_is_taken_and_a_mask_of_one_row_for_two_is_not() -> None:
    torch.manual_seed(0)
    ids, mask = torch.randint(0, 9, (2, 5)), torch.ones(2, 5, dtype=torch.int64)
    mask[1, 3:] = 0
    model = Masked().eval()
    gm = gs.capture(model, {"ids": ids, "mask": mask})
    info = capture_info(gm)
    assert info.refused_batches == ()
    assert not any("not of 1" in note for note in info.notes)
    torch.testing.assert_close(gm(ids=ids[1:], mask=mask[1:]), model(ids=ids[1:], mask=mask[1:]))
    # The model takes this one, for a mask of ones is not read; the graph would read its second row.
    with pytest.raises(ValueError, match=r"mask\.shape\[0\] != 1 or ids\.shape\[0\] == 1"):
        gm(ids=ids, mask=mask[:1])


def test_a_mask_that_no_condition_ties_to_the_batch_changes_with_it() -> None:
    torch.manual_seed(0)
    ids, mask = torch.randint(0, 9, (2, 5)), torch.ones(2, 5, dtype=torch.int64)
    result = gs.optimize(Masked().eval(), {"ids": ids, "mask": mask})
    assert capture_info(result.graph_module).batch_axes == ((0, 0, 1, 0), (1, 0, 1, 0))
    verdict = result.report.verification
    assert verdict is not None
    assert verdict.ok
    assert len(verdict.batch_sizes) > 1
    assert not any("declined" in note for note in verdict.notes)


# -- sizes of 0 and 1


class Of(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function


class OfOne(Of):
    def forward(self, a: torch.Tensor) -> Any:
        return self.function(a)


class OfTwo(Of):
    def forward(self, a: torch.Tensor, b: torch.Tensor) -> Any:
        return self.function(a, b)


def _rows(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def _strided() -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for width in (3, 4):
        layers += [nn.Conv2d(width, width + 1, 3, 2, 1), nn.BatchNorm2d(width + 1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 2)).double().eval()
    for layer in model:
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            layer.running_mean.uniform_(-1, 1)
            layer.running_var.uniform_(0.5, 2)
    return model


def test_small_maps_that_the_graph_holds_for_are_taken() -> None:
    model = _strided()
    shapes = ({0: DYNAMIC, 2: DYNAMIC, 3: DYNAMIC},)
    module = gs.optimize(model, _rows(2, 3, 16, 20), dynamic_shapes=shapes).module
    assert isinstance(module, fx.GraphModule)
    assert "!=" not in module.code  # nothing remains to be checked
    for batch in (0, 1, 3):
        for size in ((4, 4), (3, 3), (2, 2), (1, 1), (5, 1), (2, 9), (4, 16), (17, 3)):
            x = _rows(batch, 3, *size)
            torch.testing.assert_close(module(x), model(x))


@pytest.mark.parametrize("size", [(4, 4), (7, 5), (4, 16), (16, 4), (9, 8)], ids=str)
def test_a_map_of_one_patch_is_taken(size: tuple[int, int]) -> None:
    """What is asked of `h // 4 * (w // 4)` in a view is asked of each of the two."""
    torch.manual_seed(0)
    embed, head = nn.Conv2d(3, 6, 4, 4).double(), nn.Conv2d(6, 5, 1).double()

    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = embed, head

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            tokens = self.embed(x).flatten(2).transpose(1, 2).softmax(1).transpose(1, 2)
            result: torch.Tensor = self.head(tokens.reshape(x.shape[0], 6, x.shape[2] // 4, -1))
            return result

    model = Patches().eval()
    gm = capture(model, _rows(2, 3, 16, 20), dynamic_shapes=({0: DYNAMIC, 2: DYNAMIC, 3: DYNAMIC},))
    for batch in (1, 3):
        torch.testing.assert_close(gm(_rows(batch, 3, *size)), model(_rows(batch, 3, *size)))


@pytest.mark.parametrize(
    ("function", "refused", "taken"),
    [
        (lambda a: a.sum(1) if a.shape[1] // 4 != 1 else a.sum(1) * 2, (4, 5, 7), (0, 1, 3, 8, 9)),
        (lambda a: a.sum(1) if a.shape[1] // 4 > 1 else a.sum(1) * 2, (0, 1, 3, 4, 7), (8, 9)),
        (lambda a: a.sum(1) if a.shape[1] // 4 != 0 else a.sum(1) * 2, (1, 3), (4, 5, 8)),
        (lambda a: a.sum(1) if a.shape[1] % 3 != 0 else a.sum(1) * 2, (3, 6, 9), (1, 4, 7, 8)),
        (lambda a: a.sum(1) if a.shape[1] != 6 else a.sum(1) * 2, (6,), (0, 1, 2, 5, 7)),
        (lambda a: a.sum(1) if a.shape[1] > 5 else a.sum(1) * 2, (1, 2, 5), (6, 7)),
    ],
    ids=["no quarter of 1", "quarters", "a quarter", "not by 3", "not 6", "more than 5"],
)
def test_a_branch_of_the_model_is_a_condition(function: Any, refused: Any, taken: Any) -> None:
    model = OfOne(function)
    gm = capture(model, _rows(3, 8), dynamic_shapes=({0: DYNAMIC, 1: DYNAMIC},))
    for size in taken:
        torch.testing.assert_close(gm(_rows(2, size)), model(_rows(2, size)))
    for size in refused:
        with pytest.raises(ValueError, match=r"the graph holds only where|has the size"):
            gm(_rows(2, size))


def test_two_sizes_of_one_together_are_refused_where_they_differ() -> None:
    model = OfTwo(lambda a, b: a.sum() + b.sum() if a.shape[0] * b.shape[0] > 1 else a.sum() - b.sum())
    gm = capture(model, (_rows(6, 3), _rows(4, 3)), dynamic_shapes=({0: DYNAMIC}, {0: DYNAMIC}))
    for sizes in ((1, 4), (6, 1), (2, 2), (1, 2)):
        inputs = [_rows(size, 3) for size in sizes]
        torch.testing.assert_close(gm(*inputs), model(*inputs))
    with pytest.raises(ValueError, match=r"only where a.shape\[0\] != 1 or b.shape\[0\] != 1"):
        gm(_rows(1, 3), _rows(1, 3))
    with pytest.raises(ValueError, match="size 0 on axis 0, expected at least 1"):
        gm(_rows(0, 3), _rows(4, 3))


def test_an_equation_holds_where_a_size_is_one() -> None:
    n = Dim("n")
    model = OfTwo(lambda a, b: a.sum() + b.sum())
    gm = capture(model, (_rows(5, 3), _rows(4, 3)), dynamic_shapes=({0: n + 1}, {0: n}))
    torch.testing.assert_close(gm(_rows(2, 3), _rows(1, 3)), model(_rows(2, 3), _rows(1, 3)))
    with pytest.raises(ValueError, match="only where"):
        gm(_rows(7, 3), _rows(1, 3))


@pytest.mark.parametrize("least", [1, 2, 3])
def test_the_range_of_a_dim_holds_where_the_graph_would(least: int) -> None:
    model = OfOne(lambda a: a.sum(1))
    gm = capture(model, _rows(6, 3), dynamic_shapes=({0: Dim("n", min=least)},))
    torch.testing.assert_close(gm(_rows(least, 3)), model(_rows(least, 3)))
    for size in range(least):
        with pytest.raises(ValueError, match=f"size {size} on axis 0, expected at least {least}"):
            gm(_rows(size, 3))


def test_the_range_of_a_multiple_holds() -> None:
    gm = capture(OfOne(lambda a: a.sum(1)), _rows(6, 3), dynamic_shapes=({0: 2 * Dim("n", min=1)},))
    assert gm(_rows(2, 3)).shape == (2,)
    with pytest.raises(ValueError, match=r"only where a.shape\[0\] >= 2"):
        gm(_rows(0, 3))


def _no_empty(a: torch.Tensor) -> torch.Tensor:
    if not a.shape[0]:
        raise RuntimeError("empty")
    return a.sum(1)


@pytest.mark.parametrize(
    "function", [lambda a: a.sum(1) if a.shape[0] else a.new_zeros(1), _no_empty], ids=["differs", "fails"]
)
@pytest.mark.parametrize(
    "shapes", [None, ({0: DYNAMIC},), ({0: Dim("n")},)], ids=["default", "free", "named"]
)
def test_a_size_of_zero_is_tried(function: Any, shapes: Any) -> None:
    model = OfOne(function)
    gm = capture(model, _rows(6, 3), dynamic_shapes=shapes)
    torch.testing.assert_close(gm(_rows(1, 3)), model(_rows(1, 3)))
    with pytest.raises(ValueError, match="size 0 on axis 0, expected at least 1"):
        gm(_rows(0, 3))


def test_no_samples_are_taken_where_the_graph_holds() -> None:
    model = _strided()
    assert gs.optimize(model, _rows(2, 3, 16, 20)).module(_rows(0, 3, 16, 20)).shape == (0, 2)


def test_a_size_of_one_that_the_model_does_not_take_is_refused() -> None:
    class Single(nn.Module):
        def forward(self, a: torch.Tensor) -> torch.Tensor:
            if a.shape[0] == 1:
                raise RuntimeError("more than one")
            return a.sum(1)

    gm = capture(Single(), _rows(6, 3))
    assert gm(_rows(2, 3)).shape == (2,)
    with pytest.raises(ValueError, match="size 1 on axis 0, expected at least 2"):
        gm(_rows(1, 3))


def test_names_and_ranges_stay_with_reordered_keywords() -> None:
    class Keywords(nn.Module):
        def forward(self, *, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
            return first.sum(1) + second.sum()

    shapes = {"first": {0: Dim("rows", min=2)}, "second": {0: Dim("others")}}
    inputs = {"second": _rows(5, 3), "first": _rows(6, 3)}
    gm = capture(Keywords(), inputs, dynamic_shapes=shapes)
    assert gm(first=_rows(2, 3), second=_rows(1, 3)).shape == (2,)
    with pytest.raises(ValueError, match="'first' has the size 1 on axis 0, expected at least 2"):
        gm(first=_rows(1, 3), second=_rows(5, 3))
