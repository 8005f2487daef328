"""commute-pointwise: what moves to which side, what stays, and why."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from random_chains import Call, Constant, warmed
from torch import Tensor, fx, nn

import graphsurgery as gs
import graphsurgery.passes.commute_pointwise as commute_pointwise
from graphsurgery.affine.certify import LIMIT
from graphsurgery.affine.region import Scope
from graphsurgery.capture import capture
from graphsurgery.cost import graph_cost, op_name
from graphsurgery.graph import module_path, structural_hash
from graphsurgery.passes.commute_pointwise import CommutePointwise
from graphsurgery.restore import restore
from graphsurgery.rewrite.contracts import PassResult

IMAGE = torch.randn(2, 4, 8, 6, generator=torch.Generator().manual_seed(1))
TOKENS = torch.randn(2, 10, 4, generator=torch.Generator().manual_seed(2))
LINE = IMAGE[:, :, 0]
VOLUME = torch.randn(2, 4, 4, 6, 4, generator=torch.Generator().manual_seed(3))


def sequence(*layers: nn.Module | Callable[[Tensor], Tensor]) -> nn.Module:
    """A chain in evaluation mode, seeded, its norms with statistics that are not trivial."""
    model = nn.Sequential(*(layer if isinstance(layer, nn.Module) else Call(layer) for layer in layers))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            warmed(module)
    return model.eval()


def commute(model: nn.Module, x: Tensor, **capture_options: Any) -> PassResult:
    """Commute in float64, compare at two batch sizes with the model itself, and run the pass again."""
    model = copy.deepcopy(model).double()
    gm = capture(model, (x.double(),), **capture_options)
    before = structural_hash(gm)
    result = CommutePointwise().run(gm)
    assert structural_hash(gm) == before, "the pass changed the graph that it was given"
    for batch in (1, 3):
        y = torch.randn(
            batch, *x.shape[1:], dtype=torch.float64, generator=torch.Generator().manual_seed(batch)
        )
        with torch.no_grad():
            expected, got = model(y), result.graph_module(y)
        assert got.shape == expected.shape
        assert (got - expected).abs().max() <= 1e-12 * expected.abs().max()
    again = CommutePointwise().run(result.graph_module)
    assert not again.changes, "a second run found something"
    assert structural_hash(again.graph_module) == structural_hash(result.graph_module)
    old, new = graph_cost(gm), graph_cost(result.graph_module)
    assert new.macs <= old.macs
    assert new.params == old.params
    if result.changes:
        assert new.flops + new.moved < old.flops + old.moved
    for change in result.changes:
        assert change.residual is not None
        assert change.residual <= LIMIT
    return result


def ops(gm: fx.GraphModule) -> list[str]:
    return [op_name(node) for node in gm.graph.nodes if node.op == "call_function"]


def codes(result: PassResult) -> list[str]:
    return [refusal.code for refusal in result.refusals]


def unchanged(model: nn.Module, x: Tensor) -> PassResult:
    result = commute(model, x)
    gm = capture(copy.deepcopy(model).double(), (x.double(),))
    assert not result.changes
    assert structural_hash(result.graph_module) == structural_hash(gm)
    return result


# -- 1. moves --------------------------------------------------------------------------------------------

LAYERS = {
    "conv": lambda: nn.Conv2d(4, 6, 1),
    "conv-no-bias": lambda: nn.Conv2d(4, 6, 1, bias=False),
    "conv-grouped": lambda: nn.Conv2d(4, 6, 1, groups=2),
    "conv-depthwise": lambda: nn.Conv2d(4, 4, 1, groups=4),
    "conv-same": lambda: nn.Conv2d(4, 6, 1, padding="same"),
    "norm": lambda: nn.BatchNorm2d(4),
    "scale": lambda: Constant("mul", torch.rand(4, 1, 1) + 0.5),
    "scale-per-row": lambda: Constant("mul", torch.rand(1, 4, 1, 1) + 0.5),
    "scalar": lambda: Constant("div", torch.tensor(3.0)),
    "shift": lambda: Constant("add", torch.randn(4, 1, 1)),
    "constant-minus": lambda: Constant("rsub", torch.randn(4, 1, 1)),
    "negative": lambda: Constant("neg", torch.zeros(1)),
}
FEWER = {
    "avg-pool": lambda x: F.avg_pool2d(x, 2),
    "avg-pool-overlapping": lambda x: F.avg_pool2d(x, 3, 2),
    "avg-pool-ceil": lambda x: F.avg_pool2d(x, 4, ceil_mode=True),
    "avg-pool-padding-not-counted": lambda x: F.avg_pool2d(x, 2, padding=1, count_include_pad=False),
    "adaptive-uneven": lambda x: F.adaptive_avg_pool2d(x, (3, 4)),
    "adaptive-one": lambda x: F.adaptive_avg_pool2d(x, 1),
    "mean": lambda x: x.mean((2, 3)),
    "mean-kept": lambda x: x.mean((-1, -2), keepdim=True),
    "mean-of-rows": lambda x: x.mean(3),
    "mean-with-batch": lambda x: x.mean((2, 3)).unsqueeze(0),
    "flatten-and-mean": lambda x: x.flatten(2).mean(-1),
    "flatten-and-mean-kept": lambda x: x.flatten(2).mean(-1, keepdim=True),
    "resized": lambda x: F.interpolate(x, size=(4, 3), mode="bilinear", antialias=True),
    "cropped": lambda x: F.pad(x, (-1, -1, 0, -2)),
}
MORE = {
    "nearest": lambda x: F.interpolate(x, scale_factor=2),
    "nearest-exact": lambda x: F.interpolate(x, size=(11, 7), mode="nearest-exact"),
    "bilinear": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "bilinear-aligned": lambda x: F.interpolate(x, size=(9, 13), mode="bilinear", align_corners=True),
    "bicubic": lambda x: F.interpolate(x, scale_factor=1.5, mode="bicubic"),
    "reflect": lambda x: F.pad(x, (2, 1, 1, 3), mode="reflect"),
    "replicate": lambda x: F.pad(x, (2, 1, 1, 3), mode="replicate"),
    "circular": lambda x: F.pad(x, (2, 1, 1, 3), mode="circular"),
}


def pairs(movers: dict[str, Any], *often: str) -> list[tuple[str, str]]:
    """Every layer with some movers and every mover with some layers."""
    found = [(layer, mover) for layer in LAYERS for mover in often]
    return list(dict.fromkeys(found + [(layer, mover) for layer in ("conv", "norm") for mover in movers]))


@pytest.mark.parametrize(("layer", "mover"), pairs(FEWER, "avg-pool", "mean"))
def test_moves_a_layer_behind_what_leaves_fewer_positions(layer: str, mover: str) -> None:
    result = commute(sequence(LAYERS[layer](), FEWER[mover]), IMAGE)
    (change,) = result.changes
    assert "behind" in change.detail
    assert change.cost_after.flops < change.cost_before.flops


@pytest.mark.parametrize(("layer", "mover"), pairs(MORE, "bilinear"))
def test_moves_a_layer_before_what_makes_more_positions(layer: str, mover: str) -> None:
    result = commute(sequence(MORE[mover], LAYERS[layer]()), IMAGE)
    (change,) = result.changes
    assert "before" in change.detail
    assert (
        change.cost_after.flops + change.cost_after.moved
        < change.cost_before.flops + change.cost_before.moved
    )


def test_a_2x2_pool_first_takes_a_quarter_of_the_multiplications() -> None:
    result = commute(sequence(nn.Conv2d(4, 6, 1), nn.AvgPool2d(2)), IMAGE)
    (change,) = result.changes
    assert ops(result.graph_module) == ["avg_pool2d", "conv2d"]
    assert change.kind == "conv2d+avg_pool2d"
    assert change.cost_before.macs == 4 * change.cost_after.macs == 4 * 6 * 8 * 6
    assert change.parameters == ()


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (lambda: sequence(nn.Conv1d(4, 6, 1), nn.AvgPool1d(2)), LINE),
        (lambda: sequence(nn.Conv1d(4, 6, 1), nn.AdaptiveAvgPool1d(1)), LINE),
        (
            lambda: sequence(lambda x: F.interpolate(x, scale_factor=2, mode="linear"), nn.Conv1d(4, 6, 1)),
            LINE,
        ),
        (lambda: sequence(lambda x: F.interpolate(x, scale_factor=3), nn.BatchNorm1d(4)), LINE),
        (lambda: sequence(nn.Conv3d(4, 6, 1), nn.AvgPool3d(2)), VOLUME),
        (
            lambda: sequence(
                lambda x: F.interpolate(x, scale_factor=2, mode="trilinear"), nn.Conv3d(4, 6, 1)
            ),
            VOLUME,
        ),
        (lambda: sequence(lambda x: F.interpolate(x, scale_factor=2), nn.BatchNorm3d(4)), VOLUME),
        (lambda: sequence(nn.Linear(4, 6), lambda x: x.mean(1)), TOKENS),
        (lambda: sequence(nn.Linear(4, 6), lambda x: x.mean(1, keepdim=True)), TOKENS),
        (lambda: sequence(nn.Linear(6, 3), lambda x: x.flatten(1, 2).mean(1)), IMAGE),
        (lambda: sequence(nn.Linear(6, 3), lambda x: x.flatten(1, 2).mean(1, keepdim=True)), IMAGE),
        (lambda: sequence(Constant("mul", torch.rand(4)), lambda x: x.sum(1)), TOKENS),
        (lambda: sequence(Constant("add", torch.rand(1, 1, 4)), lambda x: x.mean(1)), TOKENS),
        (lambda: sequence(nn.Conv2d(4, 6, 1, bias=False), lambda x: x.sum((2, 3))), IMAGE),
        (lambda: sequence(nn.Conv2d(4, 6, 1, bias=False), nn.AvgPool2d(2, padding=1)), IMAGE),
        (lambda: sequence(nn.Conv2d(4, 6, 1, bias=False), nn.AvgPool2d(2, divisor_override=3)), IMAGE),
        (lambda: sequence(nn.ZeroPad2d(2), nn.Conv2d(4, 6, 1, bias=False)), IMAGE),
        # per column, and only rows are averaged
        (lambda: sequence(Constant("mul", torch.rand(6)), lambda x: x.mean(2)), IMAGE),
    ],
)
def test_moves_in_other_ranks_and_layouts(model: Callable[[], nn.Module], x: Tensor) -> None:
    assert len(commute(model(), x).changes) == 1


def test_moves_a_whole_run_and_across_several_calls() -> None:
    run = sequence(
        nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 5, 1), nn.ReflectionPad2d(1), nn.AvgPool2d(2)
    )
    result = commute(run, IMAGE)
    assert ops(result.graph_module) == ["pad", "avg_pool2d", "conv2d", "batch_norm", "conv2d"]
    assert len(result.changes) == 1


def test_a_layer_between_an_interpolation_and_a_pool_goes_where_there_are_fewest_positions() -> None:
    up_and_down = sequence(lambda x: F.interpolate(x, scale_factor=2), nn.Conv2d(4, 6, 1), nn.AvgPool2d(8))
    assert ops(commute(up_and_down, IMAGE).graph_module)[-1] == "conv2d"
    up_more = sequence(lambda x: F.interpolate(x, scale_factor=4), nn.Conv2d(4, 6, 1), nn.AvgPool2d(2))
    assert ops(commute(up_more, IMAGE).graph_module)[0] == "conv2d"


def test_the_graph_is_read_no_oftener_for_more_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Moves that are apart from each other are made in one walk: the time grows with the graph only."""
    scopes: list[Scope] = []

    def counted(gm: fx.GraphModule) -> Scope:
        scopes.append(Scope(gm))
        return scopes[-1]

    def run(blocks: int) -> tuple[int, int]:
        scopes.clear()
        block = (nn.Conv2d(4, 4, 1), nn.AvgPool2d(3, 2, 1, count_include_pad=False), nn.ReLU())
        block = (*block, nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 1), nn.ReLU())
        gm = capture(sequence(*block * blocks), (IMAGE,))
        return len(CommutePointwise().run(gm).changes), len(scopes)

    monkeypatch.setattr(commute_pointwise, "Scope", counted)
    few, read = run(1)
    assert few == 2
    assert run(6) == (6 * few, read)


def test_names_modules_and_source_stay() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = sequence(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6))

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x).mean((2, 3))

    net = Net().eval()
    result = commute(net, IMAGE)
    (conv,) = (node for node in result.graph_module.graph.nodes if op_name(node) == "conv2d")
    assert module_path(conv) == "body.0"
    restored = restore(result.graph_module)
    assert set(restored.state_dict()) == set(net.state_dict())
    assert isinstance(restored.get_submodule("body.1"), nn.BatchNorm2d)
    assert result.changes[0].before[0].source == result.changes[0].after[1].source != ""


def test_sizes_may_be_free() -> None:
    free = torch.export.Dim.AUTO
    shapes = ({0: free, 2: free, 3: free},)
    for layers in (
        (nn.Conv2d(4, 6, 1), lambda x: F.avg_pool2d(x, 2)),
        (nn.Conv2d(4, 6, 1), lambda x: x.mean((2, 3))),
        (nn.Conv2d(4, 6, 1), lambda x: x.mean(3)),
        (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), nn.Conv2d(4, 6, 1)),
    ):
        model = sequence(*layers)
        result = commute(model, IMAGE, dynamic_shapes=shapes)
        assert len(result.changes) == 1
        other = torch.randn(3, 4, 6, 12, dtype=torch.float64)
        expected, got = copy.deepcopy(model).double()(other), result.graph_module(other)
        # float64 sums in another order, relative to the largest value
        assert torch.allclose(got, expected, rtol=0, atol=1e-12 * float(expected.detach().abs().max()))
        for node in result.graph_module.graph.nodes:
            if node.op == "call_function":
                assert not isinstance(node.meta["val"].shape[0], int)


def test_a_layer_that_is_called_twice_moves_twice() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(F.avg_pool2d(self.conv(x), 2))
            return F.adaptive_avg_pool2d(self.conv(x), 1)

    result = commute(Net().eval(), IMAGE)
    assert ops(result.graph_module) == ["avg_pool2d", "conv2d", "relu", "adaptive_avg_pool2d", "conv2d"]
    assert len(list(restore(result.graph_module).parameters())) == 2


# -- 2. leaves alone -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (lambda: sequence(nn.AvgPool2d(2), nn.Conv2d(4, 6, 1)), IMAGE),
        (lambda: sequence(nn.Conv2d(4, 6, 1), nn.Upsample(scale_factor=2)), IMAGE),
        (lambda: sequence(nn.Conv2d(4, 6, 3), nn.AvgPool2d(2)), IMAGE),
        (lambda: sequence(nn.Conv2d(4, 6, 1, stride=2), nn.AvgPool2d(2)), IMAGE),
        (lambda: sequence(nn.Conv2d(4, 6, 1, padding=1), nn.AvgPool2d(2)), IMAGE),
        (lambda: sequence(nn.Conv2d(4, 6, 1), nn.MaxPool2d(2)), IMAGE),
        (lambda: sequence(nn.Conv2d(4, 6, 1), nn.ReLU(), nn.AvgPool2d(2)), IMAGE),
        # a constant of shape (W,) is per column, also where there are as many columns as channels
        (lambda: sequence(Constant("mul", torch.rand(4)), nn.AvgPool2d(2)), IMAGE[:, :, :4, :4]),
        (lambda: sequence(Constant("add", torch.rand(10, 4)), lambda x: x.mean(1)), TOKENS),
        (lambda: sequence(nn.Linear(4, 6), lambda x: x.mean(-1)), TOKENS),
        (lambda: sequence(nn.Linear(6, 3), nn.AvgPool2d((2, 1))), IMAGE),
        (lambda: sequence(nn.Conv2d(4, 6, 1), lambda x: x.mean()), IMAGE),
        (lambda: sequence(nn.Conv2d(4, 6, 1), lambda x: x.mean((1, 2))), IMAGE),
        (lambda: sequence(nn.BatchNorm1d(10), lambda x: x.mean(1)), TOKENS),
        (lambda: sequence(lambda x: F.pad(x, (1, 1), value=2.0), nn.Conv2d(4, 6, 1)), IMAGE),
        (lambda: sequence(nn.Conv2d(4, 6, 1), lambda x: x.flatten(1).mean(1)), IMAGE),
        (lambda: sequence(nn.LayerNorm(4), lambda x: x.mean(1)), TOKENS),
        (lambda: sequence(lambda x: x * x, nn.AvgPool2d(2)), IMAGE),
        (lambda: sequence(lambda x: torch.ones(4, 1, 1).to(x) / x, nn.AvgPool2d(2)), IMAGE),
    ],
)
def test_noop_on(model: Callable[[], nn.Module], x: Tensor) -> None:
    assert not unchanged(model(), x).refusals


# -- 3. refuses ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mover",
    [
        lambda x: F.avg_pool2d(x, 2, padding=1),
        lambda x: F.avg_pool2d(x, 2, divisor_override=3),
        lambda x: x.sum((2, 3)),
    ],
    ids=["counted-padding", "divisor", "sum"],
)
@pytest.mark.parametrize("layer", ["conv", "norm", "shift"])
def test_refuses_a_shift_before(mover: Callable[[Tensor], Tensor], layer: str) -> None:
    (refusal,) = unchanged(sequence(LAYERS[layer](), mover), IMAGE).refusals
    assert refusal.code == "shift"
    assert refusal.cost_before is not None
    assert refusal.cost_after is not None
    assert refusal.cost_after.flops < refusal.cost_before.flops


def test_refuses_a_shift_behind_zeros() -> None:
    assert codes(unchanged(sequence(nn.ZeroPad2d(1), nn.Conv2d(4, 6, 1)), IMAGE)) == ["shift"]


def test_moves_only_what_does_not_shift() -> None:
    plain = nn.Conv2d(6, 5, 1, bias=False)
    result = commute(
        sequence(
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 6, 3),
            nn.BatchNorm2d(6),
            plain,
            nn.AvgPool2d(2, padding=1),
        ),
        IMAGE,
    )
    assert ops(result.graph_module)[-2:] == ["avg_pool2d", "conv2d"]
    assert len(result.changes) == 1


class Branch(nn.Module):
    """A value between layer and mover that another call reads."""

    def __init__(self, up: bool, returned: bool) -> None:
        super().__init__()
        self.conv, self.up, self.returned = nn.Conv2d(4, 6, 1), up, returned

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        between = F.interpolate(x, scale_factor=2) if self.up else self.conv(x)
        out = self.conv(between) if self.up else F.avg_pool2d(between, 2)
        return out, between if self.returned else torch.relu(between)


@pytest.mark.parametrize("up", [False, True], ids=["pool", "interpolate"])
@pytest.mark.parametrize("returned", [False, True], ids=["read", "returned"])
def test_refuses_several_users(up: bool, returned: bool) -> None:
    gm = capture(Branch(up, returned).eval(), (IMAGE,))
    result = CommutePointwise().run(gm)
    assert not result.changes
    assert codes(result) == ["several-users"]
    assert structural_hash(result.graph_module) == structural_hash(gm)


def test_refuses_to_part_a_norm_from_the_convolution_it_folds_into() -> None:
    model = sequence(nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.AvgPool2d(2))
    result = unchanged(model, IMAGE)
    assert codes(result) == ["folds-instead"]
    after = gs.optimize(model, IMAGE).report.after
    assert after.layers.get("norm", 0) == 0


def test_parts_a_wide_layer_from_a_convolution_where_the_fold_would_cost_more() -> None:
    narrow = sequence(nn.Upsample(scale_factor=2), nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 3))
    assert ops(commute(narrow, IMAGE).graph_module) == ["conv2d", "upsample_nearest2d", "conv2d"]
    wide = sequence(nn.Upsample(scale_factor=2), nn.Conv2d(4, 16, 1), nn.Conv2d(16, 4, 3))
    assert codes(unchanged(wide, IMAGE)) == ["folds-instead"]


def test_refuses_weights_that_are_not_finite() -> None:
    model = sequence(nn.Conv2d(4, 6, 1), nn.AvgPool2d(2))
    with torch.no_grad():
        model[0].weight[2, 1] = torch.inf
    result = CommutePointwise().run(capture(model, (IMAGE,)))
    assert codes(result) == ["not-finite"]
    assert not result.changes


# -- 4. dtypes, the way through, runtimes ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_any_float_dtype(dtype: torch.dtype) -> None:
    model = sequence(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6), nn.AvgPool2d(2)).to(dtype)
    result = gs.optimize(model, IMAGE.to(dtype), passes=["commute-pointwise"])
    assert len(result.report.changes) == 1
    assert result.report.verification is not None
    assert result.report.verification.ok
    assert result.module(IMAGE.to(dtype)).dtype == dtype


def test_the_callers_model_is_untouched() -> None:
    model = sequence(nn.Conv2d(4, 6, 1), nn.AvgPool2d(2))
    state = copy.deepcopy(model.state_dict())
    expected = model(IMAGE)
    gs.optimize(model, IMAGE)
    assert torch.equal(model(IMAGE), expected)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_runs_by_default_and_before_folding() -> None:
    names = [item.name for item in gs.passes.default_passes()]
    assert names.index("commute-pointwise") < names.index("fold-affine")
    model = sequence(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6), nn.AvgPool2d(2))
    result = gs.optimize(model, IMAGE)
    assert [name for name, _ in result.module.named_children()] == ["0"]
    assert result.report.after.macs == 4 * 6 * 4 * 3


def test_onnxruntime_agrees(tmp_path: Path) -> None:
    model = sequence(
        nn.Conv2d(4, 6, 1),
        nn.BatchNorm2d(6),
        nn.AvgPool2d(2),
        nn.ReLU(),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.Conv2d(6, 3, 1),
        lambda x: x.relu() * 2,
        lambda x: x.mean((2, 3)),
    )
    result = gs.optimize(model, IMAGE, passes=["commute-pointwise"])
    assert len(result.report.changes) == 3
    result.export_onnx(tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").is_file()


# -- 5. a wrong move is caught ---------------------------------------------------------------------------


def test_detects_a_wrong_move(monkeypatch: pytest.MonkeyPatch) -> None:
    """A padded pool is taken for one that keeps constants: the certificate drops the move."""
    monkeypatch.setattr("graphsurgery.affine.pointwise._pools_evenly", lambda node, rank: True)
    result = unchanged(sequence(nn.Conv2d(4, 6, 1), nn.AvgPool2d(2, padding=1)), IMAGE)
    assert codes(result) == ["certificate"]
    assert "please report" in result.refusals[0].reason


def test_detects_one_coefficient_that_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    real = commute_pointwise.runner
    calls = []

    def off(scope: Any, entry: Any, nodes: Any, batch: int) -> Any:
        run = real(scope, entry, nodes, batch)
        calls.append(nodes)
        wrong = len(calls) % 2 == 0  # what stands after the move is run second

        def spoilt(x: Tensor) -> Tensor:
            result = run(x).clone()
            result[:, 1] *= 1 + 1e-3 if wrong else 1
            return result

        return spoilt

    monkeypatch.setattr(commute_pointwise, "runner", off)
    result = CommutePointwise().run(capture(sequence(nn.Conv2d(4, 6, 1), nn.AvgPool2d(2)), (IMAGE,)))
    assert codes(result) == ["certificate"]
    assert not result.changes
