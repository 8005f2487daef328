"""fold-affine: what folds, into what, under which name; what does not, and why."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from random_chains import Call, Constant, MatMul, warmed
from torch import Tensor, fx, nn

from graphsurgery.affine import write
from graphsurgery.affine.certify import LIMIT
from graphsurgery.affine.coefficients import Coefficients
from graphsurgery.affine.region import Region
from graphsurgery.capture import capture
from graphsurgery.cost import Cost, graph_cost, layer_counts, op_name
from graphsurgery.errors import PassError
from graphsurgery.graph import structural_hash
from graphsurgery.passes.eliminate_identity import EliminateIdentity
from graphsurgery.passes.fold_affine import FoldAffine
from graphsurgery.restore import restore
from graphsurgery.rewrite.contracts import PassResult

HEAVY = ("conv", "linear")


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """A model in evaluation mode with norms whose statistics are not trivial."""
    torch.manual_seed(0)
    model = build()
    for module in model.modules():
        if (
            isinstance(module, nn.modules.batchnorm._BatchNorm)
            and module.affine
            and module.track_running_stats
        ):
            warmed(module)
    return model.eval()


def fold(model: nn.Module, x: Tensor, **options: Any) -> PassResult:
    """Fold in float64, compare at two batch sizes with the model itself, and run the pass again."""
    model = copy.deepcopy(model).double()
    gm = capture(model, (x.double(),))
    gm = EliminateIdentity().run(gm).graph_module
    before = structural_hash(gm)
    result = FoldAffine(**options).run(gm)
    assert structural_hash(gm) == before, "the pass changed the graph that it was given"
    for batch in (1, 3):
        y = torch.randn(
            batch, *x.shape[1:], dtype=torch.float64, generator=torch.Generator().manual_seed(batch)
        )
        with torch.no_grad():
            expected, got = model(y), result.graph_module(y)
        assert got.shape == expected.shape
        assert (got - expected).abs().max() <= 1e-10 * expected.abs().max()
    again = FoldAffine(**options).run(result.graph_module)
    assert not again.changes, "a second run found something"
    assert structural_hash(again.graph_module) == structural_hash(result.graph_module)
    assert graph_cost(result.graph_module).macs <= graph_cost(gm).macs
    return result


def ops(gm: fx.GraphModule) -> list[str]:
    return [op_name(node) for node in gm.graph.nodes if node.op == "call_function"]


def codes(result: PassResult) -> list[str]:
    return [refusal.code for refusal in result.refusals]


# -- 1. folds --------------------------------------------------------------------------------------------

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
POOLS = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2, 4], ids=["dense", "grouped", "depthwise"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_folds_conv_and_norm(rank: int, groups: int, bias: bool) -> None:
    def build() -> nn.Module:
        conv = CONVS[rank](4, 8, 3, stride=2, padding=1, groups=groups, bias=bias)
        return nn.Sequential(conv, NORMS[rank](8))

    result = fold(seeded(build), torch.randn(2, 4, *(7, 6, 5)[:rank]))
    assert ops(result.graph_module) == [f"conv{rank}d"]
    (change,) = result.changes
    assert change.parameters == ("0.weight", "0.bias")
    assert change.kind == f"conv{rank}d+batch_norm"
    assert change.residual is not None
    assert change.residual <= LIMIT


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_folds_norm_before_an_unpadded_conv(rank: int) -> None:
    model = seeded(lambda: nn.Sequential(NORMS[rank](4), CONVS[rank](4, 6, 2, groups=2)))
    assert ops(fold(model, torch.randn(2, 4, *(7, 6, 5)[:rank])).graph_module) == [f"conv{rank}d"]


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (lambda: nn.BatchNorm1d(6), (2, 8)),
        (lambda: nn.BatchNorm1d(6, affine=False), (2, 8)),
        (lambda: nn.BatchNorm1d(6, momentum=None, eps=0.1), (2, 8)),
    ],
    ids=["affine", "no-affine", "momentum-none-large-eps"],
)
def test_folds_linear_and_norm(norm: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(8, 6), norm(), nn.Linear(6, 9)))
    with torch.no_grad():
        model[1].running_mean.normal_()
        model[1].running_var.uniform_(0.1, 3)
    assert ops(fold(model, torch.randn(shape)).graph_module) == ["linear"]


def test_folds_a_running_variance_of_zero() -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    with torch.no_grad():
        model[1].running_var.zero_()
    assert ops(fold(model, torch.randn(2, 3, 6, 6)).graph_module) == ["conv2d"]


def test_folds_functional_batch_norm() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.register_buffer("mean", torch.randn(4))
            self.register_buffer("var", torch.rand(4) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(self.conv(x), self.mean, self.var)

    assert ops(fold(seeded(Model), torch.randn(2, 3, 6, 6)).graph_module) == ["conv2d"]


def bare_linear(m: Any, x: Tensor) -> Tensor:
    return F.linear(F.linear(x, m.w1), m.w2, m.b)


def bare_matmul(m: Any, x: Tensor) -> Tensor:
    return x @ m.w1.T @ m.w2.T + m.b


def bare_addmm(m: Any, x: Tensor) -> Tensor:
    return torch.addmm(m.b, x @ m.w1.T, m.w2.T, beta=2, alpha=0.5)


@pytest.mark.parametrize("spelling", [bare_linear, bare_matmul, bare_addmm])
def test_folds_linear_in_all_its_spellings(spelling: Callable[[Any, Tensor], Tensor]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1, self.w2 = nn.Parameter(torch.randn(12, 8)), nn.Parameter(torch.randn(5, 12))
            self.b = nn.Parameter(torch.randn(5))

        def forward(self, x: Tensor) -> Tensor:
            return spelling(self, x)

    result = fold(seeded(Model), torch.randn(2, 8))
    assert [op for op in ops(result.graph_module) if op != "permute"] == ["linear"]
    assert not any(
        "bias" in str(target) for target in restore(result.graph_module).state_dict() if "." not in target
    )


def test_folds_a_matrix_on_the_left_and_one_on_the_right() -> None:
    model = seeded(lambda: nn.Sequential(MatMul(6, 12, left=True), MatMul(12, 3, left=True)))
    result = fold(model, torch.randn(2, 6, 5))
    assert (
        layer_counts(result.graph_module).get("linear", 0) + layer_counts(result.graph_module).get("conv", 0)
        == 1
    )


CONSTANTS = {
    "scalar-mul": (lambda: Call(lambda x: x * 3.0)),
    "scalar-div": (lambda: Call(lambda x: x / 3)),
    "scalar-rsub": (lambda: Call(lambda x: 1.5 - x)),
    "scalar-sub-alpha": (lambda: Call(lambda x: torch.sub(x, 2.0, alpha=3))),
    "one": (lambda: Constant("mul", torch.rand(1) + 0.5)),
    "0-d": (lambda: Constant("rmul", torch.tensor(1.7))),
    "(C,1,1)-mul": (lambda: Constant("rmul", torch.rand(6, 1, 1) + 0.5)),
    "(1,C,1,1)-div": (lambda: Constant("div", torch.rand(1, 6, 1, 1) + 0.5)),
    "(C,1,1)-rsub": (lambda: Constant("rsub", torch.randn(6, 1, 1))),
    "(C,1,1)-add-alpha": (lambda: Constant("add", torch.randn(6, 1, 1))),
    "integer": (lambda: Constant("mul", torch.arange(1, 7).reshape(6, 1, 1))),
    "neg": (lambda: Constant("neg", torch.zeros(1))),
    "zero-scale": (lambda: Constant("mul", torch.zeros(6, 1, 1))),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_folds_constants_after_a_conv(name: str) -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), CONSTANTS[name]()))
    assert ops(fold(model, torch.randn(2, 3, 5, 6)).graph_module) == ["conv2d"]


def test_folds_a_constant_per_column_never_as_one_per_channel() -> None:
    """W == C_out: a constant of shape (W,) scales columns; only a dense layer could hold it, at a cost."""
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 6, 1), Constant("mul", torch.rand(6) + 0.5)))
    result = fold(model, torch.randn(2, 3, 6, 6))
    assert not result.changes
    assert codes(result) == ["costs-more"]


def test_folds_strided_conv_flatten_linear_into_one_linear() -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(5, 50, 5, stride=2), nn.Flatten(), nn.Linear(1250, 100)))
    result = fold(model, torch.randn(2, 5, 13, 13))
    assert ops(result.graph_module) == ["reshape", "linear"]
    (change,) = result.changes
    assert change.parameters == ("2.weight", "2.bias"), "named after the Linear, which it resembles most"
    # by hand: the conv has 50 * 25 outputs of 5 * 25 products each, the Linear 1250 * 100; then 845 * 100
    conv, linear = 50 * 25 * 125, 1250 * 100
    assert change.cost_before == Cost(conv + linear, 0, 0, 50 * 125 + 50 + 1250 * 100 + 100, 3)
    assert change.cost_after == Cost(845 * 100, 0, 0, 845 * 100 + 100, 2)
    restored = restore(result.graph_module)
    assert isinstance(restored.get_submodule("2"), nn.Linear)
    assert restored.get_submodule("2").weight.shape == (100, 845)


def test_folds_padded_strided_conv_flatten_linear() -> None:
    """Borders are exact in the dense form: taps that fall outside read nothing."""
    model = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(2, 16, 3, stride=1, padding=1), nn.BatchNorm2d(16), nn.Flatten(), nn.Linear(16 * 36, 4)
        )
    )
    assert ops(fold(model, torch.randn(2, 2, 6, 6)).graph_module) == ["reshape", "linear"]


def test_folds_a_product_of_matrices_at_its_cheapest_cut() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 4), nn.Linear(4, 64)))
    result = fold(model, torch.randn(2, 64))
    shapes = [
        tuple(m.weight.shape) for m in restore(result.graph_module).modules() if isinstance(m, nn.Linear)
    ]
    assert shapes == [(4, 64), (64, 4)]


def test_folds_all_of_a_long_chain() -> None:
    model = seeded(lambda: nn.Sequential(*[nn.Linear(12, 12) for _ in range(12)]))
    assert ops(fold(model, torch.randn(2, 12)).graph_module) == ["linear"]


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"kernel_size": 3, "padding": 1}, {"kernel_size": 1}),
        ({"kernel_size": 2, "stride": 2}, {"kernel_size": 1, "stride": 1}),
        ({"kernel_size": 1}, {"kernel_size": 3, "stride": 2}),
        ({"kernel_size": 2}, {"kernel_size": 2, "dilation": 2}),
        ({"kernel_size": 2, "padding": 1}, {"kernel_size": 2}),
    ],
    ids=["3p1,1", "2s2,1", "1,3s2", "2,2d2", "2p1,2"],
)
def test_folds_conv_into_conv(rank: int, first: dict[str, int], second: dict[str, int]) -> None:
    def build() -> nn.Module:
        return nn.Sequential(CONVS[rank](3, 24, **first), CONVS[rank](24, 2, **second))

    result = fold(seeded(build), torch.randn(2, 3, *(9, 8, 7)[:rank]))
    assert ops(result.graph_module) == [f"conv{rank}d"]


def test_folds_a_strided_1x1_before_a_padded_conv_into_a_dilated_one() -> None:
    """Stride 2 makes the padded zeros harmless where nothing of the entry lies below them."""
    model = seeded(
        lambda: nn.Sequential(nn.Conv2d(3, 16, 1, stride=2, bias=False), nn.Conv2d(16, 2, 3, padding=1))
    )
    result = fold(model, torch.randn(2, 3, 12, 12))
    (conv,) = (m for m in restore(result.graph_module).modules() if isinstance(m, nn.Conv2d))
    assert (conv.dilation, conv.stride, conv.padding) == ((2, 2), (2, 2), (2, 2))


@pytest.mark.parametrize("pads", [(1, 1, 1, 1), (0, 1, 0, 1), (2, 1, 0, 3), (-1, 0, -1, 0)], ids=str)
def test_folds_zeros_around_a_conv_into_it(pads: tuple[int, ...]) -> None:
    """Zeros join the conv where it can hold them; a conv with its norm folds behind those that it cannot."""
    model = seeded(lambda: nn.Sequential(nn.ZeroPad2d(pads), nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4)))
    found = ops(fold(model, torch.randn(2, 3, 8, 8)).graph_module)
    assert found[-1] == "conv2d"
    assert "batch_norm" not in found
    if pads == (1, 1, 1, 1):
        assert found == ["conv2d"]


def test_folds_a_biased_1x1_before_zeros_exactly() -> None:
    """The bias reaches all positions but the zeros: it becomes a map, worth it beside large savings."""
    model = seeded(lambda: nn.Sequential(nn.Conv2d(4, 64, 1), nn.ZeroPad2d(1), nn.Conv2d(64, 2, 3)))
    assert ops(fold(model, torch.randn(2, 4, 8, 8)).graph_module) == ["conv2d", "add"]


def test_refuses_to_fold_through_a_pad_with_another_value() -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.ConstantPad2d(1, 2.0), nn.Conv2d(8, 2, 3)))
    assert not refused(model, torch.randn(2, 3, 8, 8), "pad-value").changes


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_folds_average_pooling_into_the_conv_before(rank: int) -> None:
    model = seeded(lambda: nn.Sequential(CONVS[rank](3, 4, 3, padding=1), POOLS[rank](2)))
    # a 3-D kernel grows from 3**3 to 4**3 taps: more than the default allows
    result = fold(model, torch.randn(2, 3, *(8, 6, 4)[:rank]), max_param_growth=2.5)
    assert ops(result.graph_module) == [f"conv{rank}d"]


def test_folds_input_normalisation_before_an_unpadded_conv() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
            self.register_buffer("mean", torch.rand(1, 3, 1, 1))
            self.register_buffer("std", torch.rand(1, 3, 1, 1) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv((x - self.mean) / self.std)

    assert ops(fold(seeded(Model), torch.randn(2, 3, 6, 6)).graph_module) == ["conv2d"]


def test_folds_the_scale_of_an_input_normalisation_before_a_padded_conv() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, padding=1)
            self.register_buffer("mean", torch.rand(1, 3, 1, 1))
            self.register_buffer("std", torch.rand(1, 3, 1, 1) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv((x - self.mean) / self.std)

    assert ops(fold(seeded(Model), torch.randn(2, 3, 6, 6)).graph_module) == ["sub", "conv2d"]


def test_folds_views_and_permutes_around_a_linear() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 10)
            self.register_buffer("gamma", torch.rand(10, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) * self.gamma

    result = fold(seeded(Model), torch.randn(2, 6, 4, 5))
    assert "mul" not in ops(result.graph_module)
    assert "fc.weight" in restore(result.graph_module).state_dict()


def test_folds_permutes_that_cancel_into_nothing() -> None:
    model = seeded(
        lambda: nn.Sequential(
            nn.ReLU(), Call(lambda x: x.permute(0, 2, 3, 1)), Call(lambda x: x.permute(0, 3, 1, 2)), nn.ReLU()
        )
    )
    assert ops(fold(model, torch.randn(2, 3, 4, 5)).graph_module) == ["relu", "relu"]


def test_folds_constants_computed_in_the_graph_from_their_leaves() -> None:
    model = seeded(
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 6)), nn.Linear(6, 4))
    )
    assert [op for op in ops(fold(model, torch.randn(2, 8)).graph_module) if op == "linear"] == ["linear"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_folds_in_the_dtype_of_the_model(dtype: torch.dtype) -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).to(dtype)
    x = torch.randn(2, 3, 6, 6).to(dtype)
    result = FoldAffine().run(capture(model, (x,)))
    assert ops(result.graph_module) == ["conv2d"]
    assert result.graph_module(x).dtype == dtype
    reference = copy.deepcopy(model).double()(x.double())
    error = (result.graph_module(x).double() - reference).abs().max()
    own = (model(x).double() - reference).abs().max()
    assert error <= 2 * own + 4 * torch.finfo(dtype).eps * reference.abs().max()


def test_folds_in_evaluation_even_with_dropout_between() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(8, 12), nn.Dropout(0.5), nn.Linear(12, 4)))
    assert ops(fold(model, torch.randn(2, 8)).graph_module) == ["linear"]


def test_folds_with_a_static_batch() -> None:
    model = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Call(lambda x: x.reshape(2, -1)), nn.Linear(64, 3)
        )
    ).double()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    gm = capture(model, (x,), dynamic_shapes=({},))
    result = FoldAffine().run(gm)
    assert layer_counts(result.graph_module).get("norm") is None
    assert (result.graph_module(x) - model(x)).abs().max() <= 1e-10


def test_folds_with_dynamic_positions() -> None:
    """Strided and padded convs over maps of any size, norms folded, checked at three sizes."""
    dynamic = torch.export.Dim.DYNAMIC
    model = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 4, 1),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3),
            nn.BatchNorm2d(4),
        )
    ).double()
    x = torch.randn(2, 3, 17, 20, dtype=torch.float64)
    gm = capture(model, (x,), dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic},))
    result = FoldAffine().run(gm)
    assert ops(result.graph_module) == ["conv2d", "relu", "conv2d"]
    for size in ((17, 20), (32, 9), (11, 11)):
        y = torch.randn(3, 3, *size, dtype=torch.float64)
        assert (result.graph_module(y) - model(y)).abs().max() <= 1e-10


@pytest.mark.parametrize("size", [(8, 12), (12, 8), (20, 4)], ids=str)
def test_folds_patches_of_a_map_of_any_size(size: tuple[int, int]) -> None:
    """The size of the flattened map is a product of two sizes that are no symbols: `(h // 4) * (w // 4)`."""

    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mix, self.head = nn.Conv2d(3, 6, 4, 4), nn.Linear(6, 6), nn.Conv2d(6, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            n, _, h, w = x.shape
            tokens = self.mix(self.embed(x).flatten(2).transpose(1, 2))
            return self.head(tokens.transpose(1, 2).reshape(n, 6, h // 4, w // 4))

    free = torch.export.Dim.DYNAMIC
    model = seeded(Patches).double()
    x = torch.randn(2, 3, 16, 8, dtype=torch.float64)
    gm = capture(model, (x,), dynamic_shapes=({0: free, 2: free, 3: free},))
    result = FoldAffine().run(gm)
    assert ops(result.graph_module) == ["conv2d"]
    y = torch.randn(3, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted = model(y)
    assert (result.graph_module(y) - wanted).abs().max() <= 1e-10 * wanted.abs().max()


@pytest.mark.parametrize("size", [(7, 7), (2, 16), (16, 3)], ids=str)
def test_folds_a_norm_of_a_size_that_the_ranges_leave_one(size: tuple[int, int]) -> None:
    """torch writes `(h - 1) // 16 + 1` for the map behind the convolution, and 1 behind the norm."""
    model = seeded(
        lambda: nn.Sequential(
            nn.ReLU(), nn.Conv2d(3, 3, 3, 16, 1, groups=3, bias=False), nn.BatchNorm2d(3), nn.ReLU()
        )
    ).double()
    free = torch.export.Dim.AUTO
    x = torch.randn(2, 3, 7, 7, dtype=torch.float64)
    gm = capture(model, (x,), dynamic_shapes=({0: free, 2: free, 3: free},))
    shapes = [tuple(node.meta["val"].shape[2:]) for node in gm.graph.nodes if op_name(node) == "conv2d"]
    assert not all(isinstance(n, int) for n in shapes[0]), "nothing is written two ways"
    result = FoldAffine().run(gm)
    assert ops(result.graph_module) == ["relu", "conv2d", "relu"]
    y = torch.randn(3, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted = model(y)
    assert (result.graph_module(y) - wanted).abs().max() <= 1e-10 * wanted.abs().max()


def test_a_size_that_is_written_two_ways_keeps_layers_apart_that_move_positions() -> None:
    """The norm folds into the layer before it; the next layer reads a number where that one read a size."""
    model = seeded(
        lambda: nn.Sequential(
            nn.AvgPool2d(8), nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, padding=1)
        )
    ).double()
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sizes = {2: torch.export.Dim("h", min=8, max=15), 3: torch.export.Dim("w", min=8, max=15)}
    result = FoldAffine().run(capture(model, (x,), dynamic_shapes=({0: torch.export.Dim("n"), **sizes},)))
    assert "internal" not in codes(result)
    assert ops(result.graph_module) == ["avg_pool2d", "conv2d", "conv2d"]
    y = torch.randn(3, 4, 15, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wanted = model(y)
    assert (result.graph_module(y) - wanted).abs().max() <= 1e-10 * wanted.abs().max()


@pytest.mark.parametrize("padding", [0, 1])
def test_a_large_shift_hides_no_scale(padding: int) -> None:
    """A norm of values of 1e10: its scale is 1e-10 beside a shift of one."""
    model = seeded(lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=padding))).double()
    model[0].running_mean.mul_(1e10)
    model[0].running_var.mul_(1e20)
    x = 1e10 * torch.randn(2, 3, 6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    result = FoldAffine().run(capture(model, (x,)))
    assert "batch_norm" not in ops(result.graph_module)
    wanted = model(x)
    assert (result.graph_module(x) - wanted).abs().max() <= 1e-13 * wanted.abs().max()


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_folds_where_gradients_are_switched_off(off: Callable[[], Any]) -> None:
    """Coefficients come from adjoints, whatever mode the caller is in."""
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 2, stride=2), nn.Flatten(), nn.Linear(16, 5)))
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = model.double()
    with off():
        result = FoldAffine().run(capture(model, (x,)))
    assert ops(result.graph_module) == ["reshape", "linear"]
    assert not result.refusals
    wanted = model(x)
    assert (result.graph_module(x) - wanted).abs().max() <= 1e-10 * wanted.abs().max()


# -- 2. leaves alone -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)),
        lambda: nn.Sequential(nn.Linear(6, 6)),
        lambda: nn.Sequential(nn.Identity(), nn.Softmax(-1)),
        lambda: nn.Sequential(Call(lambda x: x * 2), Call(torch.relu), Call(lambda x: x + 1)),
        lambda: nn.Sequential(Call(lambda x: 2 / (x.abs() + 1))),
    ],
    ids=["relu-between", "one-layer", "no-affine", "scales-apart", "constant-over-x"],
)
def test_noop_on(build: Callable[[], nn.Module]) -> None:
    model = seeded(build)
    x = torch.randn(2, 3, 6, 6)
    gm = EliminateIdentity().run(capture(model, (x,))).graph_module
    result = FoldAffine().run(gm)
    assert result.changes == ()
    assert structural_hash(result.graph_module) == structural_hash(gm)


def test_noop_on_two_shifts_that_a_linear_would_hold() -> None:
    """A region without a layer never gains one: two adds do not become an identity Linear."""
    model = seeded(lambda: nn.Sequential(nn.ReLU(), Constant("add", torch.randn(6)), nn.ReLU()))
    assert ops(fold(model, torch.randn(2, 6)).graph_module) == ["relu", "add", "relu"]


# -- 3. refuses ------------------------------------------------------------------------------------------


def refused(model: nn.Module, x: Tensor, code: str) -> PassResult:
    result = fold(model, x)
    assert code in codes(result), [(r.code, r.reason) for r in result.refusals]
    return result


@pytest.mark.parametrize("hidden", [4, 16])
def test_refuses_a_bottleneck_and_states_both_costs(hidden: int) -> None:
    result = refused(
        seeded(lambda: nn.Sequential(nn.Linear(64, hidden), nn.Linear(hidden, 64))),
        torch.randn(2, 64),
        "costs-more",
    )
    (refusal,) = result.refusals
    assert refusal.cost_before is not None
    assert refusal.cost_after is not None
    assert (refusal.cost_before.macs, refusal.cost_after.macs) == (2 * 64 * hidden, 64 * 64)
    assert f"{2 * 64 * hidden:,}" in refusal.reason
    assert f"{64 * 64:,}" in refusal.reason


BLOCKS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "to a map": (
        lambda x: x.transpose(2, 3).reshape(-1, 16, 16, 8).permute(0, 3, 1, 2),
        (2, 4, 4, 4, 4, 8),
    ),
    "of a map": (
        lambda x: x.permute(0, 2, 3, 1).reshape(-1, 4, 4, 4, 4, 32).transpose(2, 3),
        (2, 32, 16, 16),
    ),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_leaves_two_permutes_of_rows_that_would_be_one_of_elements(name: str) -> None:
    """Blocks of a map and their order, as NesT has them: a runtime copies both faster than what they make."""
    function, shape = BLOCKS[name]
    result = fold(Call(function), torch.randn(shape))
    assert not result.changes
    assert graph_cost(result.graph_module).moved == 2 * prod(shape[1:])


def test_folds_such_permutes_where_the_cost_is_the_number_of_nodes() -> None:
    """The one permute is right; it is the count that keeps the two."""
    model, x = Call(BLOCKS["to a map"][0]), torch.randn(BLOCKS["to a map"][1])
    result = FoldAffine(cost=FewCalls()).run(capture(model, (x,)))
    assert ops(result.graph_module).count("permute") == 1
    assert torch.equal(result.graph_module(x), model(x))
    assert graph_cost(result.graph_module).moved == 8 * prod(x.shape[1:])


def test_folds_permutes_of_which_one_copies_elements_already() -> None:
    model = Call(lambda x: x.permute(0, 3, 2, 1).reshape(-1, 4, 4, 4, 4, 6).transpose(2, 3).contiguous())
    x = torch.randn(2, 6, 16, 16)
    result = fold(model, x)
    assert ops(result.graph_module).count("permute") == 1, ops(result.graph_module)


def test_refuses_depthwise_and_pointwise() -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 16, 1)))
    assert not refused(model, torch.randn(2, 16, 8, 8), "costs-more").changes


def test_refuses_a_padded_conv_before_a_padded_conv() -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 2, 3, padding=1)))
    result = refused(model, torch.randn(2, 3, 12, 12), "border")
    assert ops(result.graph_module) == ["conv2d", "conv2d"]


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_refuses_to_fold_through_another_padding_mode_but_folds_the_norm_behind_it(mode: str) -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode), nn.BatchNorm2d(4)))
    result = fold(model, torch.randn(2, 3, 6, 6))
    assert "batch_norm" not in ops(result.graph_module)


def test_refuses_a_conv_read_with_and_without_its_norm() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return torch.relu(y) + torch.relu(self.norm(y))

    result = refused(seeded(Model), torch.randn(2, 3, 6, 6), "several-users")
    assert "relu" in result.refusals[0].reason
    assert not result.changes


def test_refuses_to_copy_the_weights_of_one_conv_for_two_norms() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.a, self.b = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.a(self.conv(x))) + torch.relu(self.b(self.conv(torch.tanh(x))))

    result = refused(seeded(Model), torch.randn(2, 3, 6, 6), "shared-weights")
    assert not result.changes


def test_tied_weights_stay_tied_and_right() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.norm = nn.Linear(6, 6), nn.Linear(6, 6), nn.BatchNorm1d(6)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.norm(self.a(x))) + torch.relu(self.b(torch.tanh(x)))

    result = refused(seeded(Model), torch.randn(2, 6), "shared-weights")
    assert result.graph_module.a.weight is result.graph_module.b.weight


def test_an_intermediate_value_that_is_also_an_output_stays() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.conv(x)
            return y, self.norm(y)

    model = seeded(Model).double()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    result = FoldAffine().run(capture(model, (x,)))
    assert "several-users" in codes(result)
    for got, expected in zip(result.graph_module(x), model(x), strict=True):
        assert torch.equal(got, expected)


def test_refuses_a_norm_over_tokens_with_as_many_tokens_as_features() -> None:
    """(N, T, C) with T == C: the norm is over axis 1, not over the Linear's features."""
    model = seeded(lambda: nn.Sequential(nn.Linear(8, 5), nn.BatchNorm1d(5)))
    result = fold(model, torch.randn(2, 5, 8))
    assert ops(result.graph_module) == ["linear", "batch_norm"]
    assert "costs-more" in codes(result)


def test_refuses_batch_statistics() -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)))
    result = FoldAffine().run(capture(model, (torch.randn(2, 3, 6, 6),)))
    assert not result.changes
    assert "batch-statistics" in codes(result)


def test_refuses_weights_that_are_not_finite() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)))
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    gm = capture(model, (torch.randn(2, 6),))
    result = FoldAffine().run(gm)
    assert not result.changes
    assert "not-finite" in codes(result)


def test_refuses_what_does_not_fit_the_dtype() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))).half()
    with torch.no_grad():
        model[0].weight.fill_(3e4)
        model[1].weight.fill_(3e4)
    result = FoldAffine().run(capture(model, (torch.zeros(2, 6).half(),)))
    assert not result.changes
    assert "overflow" in codes(result)


def test_refuses_parallel_branches_that_cost_more_as_one_and_names_them() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.deep, self.full = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.deep(x) + self.full(x))

    result = refused(seeded(Model), torch.randn(2, 8, 6, 6), "costs-more")
    (refusal,) = result.refusals
    assert {node.module for node in refusal.nodes} >= {"deep", "full"}
    assert f"{36 * 8 * (9 + 8):,} MACs" in refusal.reason
    assert f"{36 * 8 * 8 * 9:,} MACs" in refusal.reason


def test_refuses_a_norm_between_nonlinear_calls_and_quotes_the_source() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.norm(torch.tanh(x)))

    result = refused(seeded(Model), torch.randn(2, 3, 6, 6), "not-affine")
    (refusal,) = result.refusals
    assert refusal.nodes[0].module == "norm"
    assert "test_fold_affine.py" in refusal.nodes[0].source
    assert "tanh" in refusal.reason
    assert "relu" in refusal.reason


def test_refuses_more_parameters_than_the_limit() -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.AvgPool2d(2)))
    x = torch.randn(2, 8, 8, 8)
    assert fold(model, x).changes
    assert not fold(model, x, max_param_growth=1.0).changes


@pytest.mark.parametrize(
    "pool",
    [
        nn.AvgPool2d(2, ceil_mode=True),
        nn.AvgPool2d(3, padding=1, count_include_pad=False),
        nn.AdaptiveAvgPool2d(2),
    ],
    ids=["ceil", "count-exclude-pad", "adaptive-uneven"],
)
def test_pools_with_windows_that_differ_are_never_a_conv(pool: nn.Module) -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), pool))
    assert not fold(model, torch.randn(2, 8, 7, 7)).changes


def test_refuses_to_fold_a_padded_pool_into_the_conv_before() -> None:
    """The zeros that the pool counts are not what the conv, and its bias, would give there."""
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3, bias=True), nn.AvgPool2d(2, stride=2, padding=1)))
    assert not refused(model, torch.randn(2, 3, 9, 9), "border").changes


def test_the_batch_is_never_folded_away() -> None:
    model = seeded(
        lambda: nn.Sequential(
            nn.Linear(6, 6),
            Call(lambda x: x.reshape(-1, 6)),
            nn.Linear(6, 3),
            Call(lambda x: x.reshape(-1, 4, 3)),
        )
    )
    assert [op for op in ops(fold(model, torch.randn(2, 4, 6)).graph_module) if op == "linear"] == ["linear"]


# -- 4. names, costs, changes ----------------------------------------------------------------------------


def test_names_the_conv_after_the_conv_and_drops_what_is_unused() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.stem(x))

    result = fold(seeded(Model), torch.randn(2, 3, 6, 6))
    assert set(restore(result.graph_module).state_dict()) == {"stem.0.weight", "stem.0.bias"}


def test_changes_report_costs_and_nodes() -> None:
    result = fold(
        seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))), torch.randn(2, 3, 6, 6)
    )
    (change,) = result.changes
    out = 4 * 4 * 4
    assert change.cost_before == Cost(out * 27, 2 * out, 0, 4 * 27 + 4 + 16, 2)
    assert change.cost_after == Cost(out * 27, 0, 0, 4 * 27 + 4, 1)
    assert [node.op for node in change.before] == ["conv2d", "batch_norm"]
    assert [node.op for node in change.after] == ["conv2d"]


# -- 6. a wrong fold -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)),
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.Flatten(), nn.Linear(32, 4)),
        lambda: nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 2, 1)),
        lambda: nn.Sequential(
            Constant("mul", torch.rand(3, 1, 1) + 1),
            nn.BatchNorm2d(3),
            Constant("mul", torch.rand(3, 1, 1) + 1),
        ),
    ],
    ids=["closed", "dense", "rows", "scale"],
)
def test_detects_a_wrong_fold(build: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """One coefficient off by 1e-3 of itself: the fold is dropped and the model stays as it was."""
    right = write.fill

    def wrong(*args: Any) -> Coefficients:
        filled = right(*args)
        name = "weight" if "weight" in filled.slots else "scale"
        value = filled.slots[name].clone()
        value.view(-1)[value.abs().argmax()] *= 1 + 1e-3
        return Coefficients(filled.form, {**filled.slots, name: value}, filled.method)

    model = seeded(build)
    x = torch.randn(2, 3, 6, 6)
    gm = capture(model, (x,))
    assert FoldAffine().run(gm).changes
    monkeypatch.setattr(write, "fill", wrong)
    result = FoldAffine().run(gm)
    assert not result.changes
    assert "certificate" in codes(result)
    assert torch.equal(result.graph_module(x), model(x))


# -- names that are taken, axes in other places, sizes of nothing -----------------------------------------


@pytest.mark.parametrize("kernel", [1, 2])
def test_positions_that_read_only_padding(kernel: int) -> None:
    """No convolution crops more than there is, and none is tried."""

    class OnlyPadding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv1d(3, 4, 1, padding=4), nn.Conv1d(4, 2, kernel)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x)[:, :, 11:])[:, :1, :1] + x

    result = fold(seeded(OnlyPadding), torch.randn(2, 3, 5), max_param_growth=math.inf)
    assert "internal" not in codes(result)


def test_a_parameter_called_shift_is_never_overwritten() -> None:
    """The map of shifts that the fold writes must not take the name of a weight that is still read."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.shift = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(2))
            self.position = nn.Parameter(torch.randn(5, 4))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x + self.position, self.weight).relu() * self.shift.sigmoid() + self.shift

    model = seeded(lambda: nn.Sequential(Inner()))
    result = fold(model, torch.randn(2, 5, 4))
    assert result.changes
    assert torch.equal(result.graph_module.get_parameter("0.shift").float(), model[0].shift)


def test_a_norm_with_a_parameter_called_scale_is_folded_beside_it() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)
            self.norm.scale = nn.Parameter(torch.randn(3, 1, 1))
            self.norm.shift = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu((self.norm(x) * 3 - 1) * 2) * self.norm.scale
            return torch.relu(self.norm.shift(y))

    assert fold(seeded(Model), torch.randn(2, 3, 6, 6)).changes


def test_names_a_weight_norm_conv_after_its_module() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 6, 3)), nn.BatchNorm2d(6))

    result = fold(seeded(build), torch.randn(2, 3, 8, 8))
    assert set(restore(result.graph_module).state_dict()) == {"0.weight", "0.bias"}


def test_folds_a_conv_with_one_output_read_through_a_transpose() -> None:
    model = seeded(
        lambda: nn.Sequential(Call(lambda x: x.transpose(2, 3)), nn.Conv2d(3, 1, 3), nn.BatchNorm2d(1))
    )
    result = fold(model, torch.randn(2, 3, 8, 9))
    assert "batch_norm" not in ops(result.graph_module)
    assert all(p.is_contiguous() and p.stride()[-1] == 1 for p in result.graph_module.parameters())


@pytest.mark.parametrize("order", [(1, 0, 2), (1, 2, 0)], ids=["batch-second", "batch-last"])
def test_folds_where_the_batch_is_not_the_first_axis(order: tuple[int, ...]) -> None:
    """(L, N, C) activations: the conv's batch is axis 1 of the entry, its channels or positions axis 0."""
    shape = {(1, 0, 2): (6, 2, 9), (1, 2, 0): (9, 2, 6)}[order]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv1d(6, 8, 3), nn.BatchNorm1d(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(torch.relu(x).permute(order)))

    model = seeded(Model).double()
    x = torch.randn(shape, dtype=torch.float64)
    result = FoldAffine().run(capture(model, (x,)))
    assert "batch_norm" not in ops(result.graph_module), [(r.code, r.reason) for r in result.refusals]
    assert (result.graph_module(x) - model(x)).abs().max() <= 1e-10


def test_refuses_a_squeeze_that_may_drop_the_batch() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).squeeze())

    model = seeded(Model).double()
    gm = capture(model, (torch.randn(3, 1, 4, dtype=torch.float64),))
    result = FoldAffine().run(gm)
    for batch in (1, 3):
        x = torch.randn(batch, 1, 4, dtype=torch.float64)
        assert result.graph_module(x).shape == gm(x).shape
    assert "dynamic-shape" in codes(result)


def test_refuses_tensors_without_elements() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)))
    result = FoldAffine().run(capture(model, (torch.randn(2, 0, 4),)))
    assert not result.changes
    assert codes(result) == ["empty"]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch says that it copies
@pytest.mark.parametrize("kernel", [2, 4, (3, 2)])
def test_folds_a_norm_into_a_conv_with_same_padding_and_even_kernel(kernel: Any) -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, kernel, padding="same"), nn.BatchNorm2d(4)))
    result = fold(model, torch.randn(2, 3, 7, 8))
    assert ops(result.graph_module) == ["conv2d"]
    assert restore(result.graph_module).get_submodule("0").padding == "same"


def test_reports_the_true_cost_of_a_pad_and_a_conv() -> None:
    """Every new node keeps the free batch in its recorded shape."""
    model = seeded(
        lambda: nn.Sequential(
            nn.BatchNorm1d(4),
            nn.Conv1d(4, 3, 2, padding=1, bias=False),
            nn.Conv1d(3, 3, 2, padding="same", bias=False),
        )
    )
    result = fold(model, torch.randn(2, 4, 4))
    total = graph_cost(result.graph_module)
    if result.changes:
        assert total.macs == sum(change.cost_after.macs for change in result.changes)
    for node in result.graph_module.graph.nodes:
        if node.op == "call_function":
            assert isinstance(node.meta["val"].shape[0], torch.SymInt), node


def test_an_error_inside_costs_one_fold_and_not_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    model = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        )
    )
    right = write.fill

    def broken(region: Region, *args: Any) -> Coefficients:
        if any(node.name == "conv2d_1" for node in region.nodes):
            raise RuntimeError("a bug")
        return right(region, *args)

    monkeypatch.setattr(write, "fill", broken)
    result = FoldAffine().run(capture(model, (torch.randn(2, 3, 9, 9),)))
    assert len(result.changes) == 1
    assert "internal" in codes(result)


class Heads(nn.Module):
    """One Linear in front of three heads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(16, 32)
        self.heads = nn.ModuleList(nn.Linear(32, 2) for _ in range(3))

    def forward(self, x: Tensor) -> list[Tensor]:
        y = self.stem(x)
        return [torch.relu(head(y)) for head in self.heads]


def test_a_value_read_by_all_heads_folds_into_all_or_none() -> None:
    x = torch.randn(3, 16)
    whole = fold_heads(seeded(Heads), x)
    assert sorted(change.parameters[0] for change in whole.changes) == [f"heads.{i}.weight" for i in range(3)]
    assert "stem.weight" not in dict(whole.graph_module.named_parameters())

    broken = seeded(Heads)
    with torch.no_grad():
        broken.heads[1].weight[0, 0] = torch.nan
    none = fold_heads(broken, x)
    assert not none.changes
    assert codes(none).count("not-finite") == 3


def fold_heads(model: nn.Module, x: Tensor) -> PassResult:
    model, x = model.double(), x.double()
    result = FoldAffine().run(capture(model, (x,)))
    for got, wanted in zip(result.graph_module(x), model(x), strict=True):
        assert torch.equal(got.isnan(), wanted.isnan())
        assert (got - wanted).nan_to_num().abs().max() <= LIMIT * wanted.nan_to_num().abs().max()
    return result


@pytest.mark.parametrize(
    "options",
    [
        {"max_param_growth": "2"},
        {"max_param_growth": -1},
        {"max_param_growth": float("nan")},
        {"memory_budget": -5},
        {"memory_budget": 1.5},
        {"cost": "nodes"},
        {"cost": 3},
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_errors(options: dict[str, Any]) -> None:
    with pytest.raises(PassError, match=next(iter(options)).split("_")[0]):
        FoldAffine(**options)


class ManyUnits(nn.Module):
    """A norm in front of a Linear among views, or of a product from the left."""

    def __init__(self, views: bool) -> None:
        super().__init__()
        self.norm, self.linear, self.views = nn.BatchNorm1d(6), nn.Linear(6, 4), views
        self.left = nn.Parameter(torch.randn(8, 6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        if not self.views:
            return self.left @ y
        return self.linear(y.transpose(1, 2)).reshape(-1, 5, 2, 2).transpose(1, 2)


@pytest.mark.parametrize("size", [1.0, 1e5, 1e10])
@pytest.mark.parametrize("views", [True, False], ids=["views", "columns"])
def test_folds_coefficients_that_are_tiny_beside_the_shift(size: float, views: bool) -> None:
    """Read off as a difference of two values they would keep no more digits than the shift leaves them."""
    model = seeded(lambda: ManyUnits(views)).double()
    with torch.no_grad():  # values in units of `size`
        model.norm.running_mean.normal_().mul_(size)
        model.norm.running_var.uniform_(0.5, 2).mul_(size**2)
    x = size * torch.randn(3, 6, 5, dtype=torch.float64)
    result = FoldAffine().run(capture(model, (x,)))
    assert "batch_norm" not in ops(result.graph_module)
    wanted = model(x)
    assert (result.graph_module(x) - wanted).abs().max() <= 1e-13 * wanted.abs().max()


# -- more multiplications, where a limit and a cost model allow them


@dataclass(frozen=True)
class FewCalls:
    """A cost model that counts calls only."""

    name: str = "calls"

    def score(self, cost: Cost) -> tuple[float, ...]:
        return (cost.nodes, cost.flops)


def test_folds_into_more_multiplications_where_they_are_allowed() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(32, 12), nn.Linear(12, 32))).double()
    x = torch.randn(2, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gm = capture(model, (x,))
    for refused in (FoldAffine(cost=FewCalls()), FoldAffine(cost=FewCalls(), max_mac_growth=1.3)):
        result = refused.run(gm)
        assert not result.changes
        assert [refusal.code for refusal in result.refusals] == ["costs-more"]
    allowed = FoldAffine(cost=FewCalls(), max_mac_growth=1.4)
    result = allowed.run(gm)
    assert ops(result.graph_module) == ["linear"]
    with torch.no_grad():
        assert (result.graph_module(x) - model(x)).abs().max() <= 1e-10 * model(x).abs().max()
    assert not allowed.run(result.graph_module).changes
    by_flops = FoldAffine(max_mac_growth=1.4).run(gm)
    assert not by_flops.changes
    tight = FoldAffine(cost=FewCalls(), max_mac_growth=1.4, max_param_growth=1.2).run(gm)
    assert "1.2 times the parameters" in tight.refusals[0].reason


def test_refuses_a_limit_on_multiplications_below_one() -> None:
    with pytest.raises(PassError, match="max_mac_growth"):
        FoldAffine(max_mac_growth=0.5)
