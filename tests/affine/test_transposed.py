"""Transposed convolutions: exact forms, grouped weights, borders, what they compose with and what not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from random_chains import Constant, warmed
from torch import Tensor, fx, nn

import graphsurgery as gs
from graphsurgery.affine import write
from graphsurgery.affine.certify import LIMIT, residual
from graphsurgery.affine.choice import Option, options
from graphsurgery.affine.coefficients import fill
from graphsurgery.affine.region import Region, Scope
from graphsurgery.capture import capture
from graphsurgery.cost import graph_cost, op_name
from graphsurgery.passes.fold_affine import FoldAffine
from graphsurgery.restore import restore
from graphsurgery.rewrite.contracts import PassResult

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
SIZES = (4, 3, 5)
GEOMETRY: dict[str, dict[str, int]] = {
    "2s2": {"kernel_size": 2, "stride": 2},
    "3s2p1o1": {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
    "4s2p1": {"kernel_size": 4, "stride": 2, "padding": 1},
    "2s3d2o2": {"kernel_size": 2, "stride": 3, "dilation": 2, "output_padding": 2},
    "3s1": {"kernel_size": 3},
    "3s1p1": {"kernel_size": 3, "padding": 1},
    "2s1p2d3o1": {"kernel_size": 2, "padding": 2, "dilation": 3, "output_padding": 1},
    "2s3": {"kernel_size": 2, "stride": 3},
    "1s2": {"kernel_size": 1, "stride": 2},
}
GROUPS = {"dense": (4, 6, 1), "grouped": (4, 6, 2), "depthwise": (4, 4, 4), "multiplied": (4, 8, 4)}


def seeded(*builders: Callable[[], nn.Module]) -> nn.Module:
    """Layers in a row, in evaluation mode, float64, with norms whose statistics are not trivial."""
    torch.manual_seed(0)
    model = nn.Sequential(*(build() for build in builders))
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            warmed(module)
    return model.double().eval()


def whole(model: nn.Module, x: Tensor) -> tuple[Region, tuple[Option, ...]]:
    """All of a network as one region, and its forms, cheapest first."""
    scope = Scope(capture(model, (x,)))
    entry = next(node for node in scope.gm.graph.nodes if node.op == "placeholder")
    exit_ = next(iter(scope.gm.graph.output_node().all_input_nodes))
    region = Region(scope, entry, exit_, scope.axes(entry, exit_))
    return region, options(region)


def certified(model: nn.Module, x: Tensor) -> tuple[str, dict[str, Tensor]]:
    """Kind and slots of the cheapest form, all forms certified."""
    region, found = whole(model, x.double())
    filled = [fill(region, option.form) for option in found]
    for each in filled:
        assert residual(region, each.form, each.slots) <= LIMIT, each.form.kind
    return filled[0].form.kind, filled[0].slots


def fold(model: nn.Module, x: Tensor, **settings: Any) -> PassResult:
    """Fold, compare with the model at two batch sizes, and run the pass again."""
    gm = capture(model, (x.double(),))
    result = FoldAffine(**settings).run(gm)
    for batch in (1, 3):
        y = torch.randn(batch, *x.shape[1:], generator=torch.Generator().manual_seed(batch)).double()
        with torch.no_grad():
            expected, got = model(y), result.graph_module(y)
        assert got.shape == expected.shape
        assert (got - expected).abs().max() <= 1e-10 * expected.abs().max()
    assert not FoldAffine(**settings).run(result.graph_module).changes, "a second run found something"
    assert graph_cost(result.graph_module).macs <= graph_cost(gm).macs
    return result


def ops(gm: fx.GraphModule) -> list[str]:
    return [op_name(node) for node in gm.graph.nodes if node.op == "call_function"]


def codes(result: PassResult) -> list[str]:
    return [refusal.code for refusal in result.refusals]


def scaled(conv: nn.Module, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of a transposed convolution with its norm, by the layout of its weight."""
    gain = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    per_group = conv.weight.shape[1]
    weight = conv.weight.detach().clone()
    for i in range(conv.in_channels):
        group = i // (conv.in_channels // conv.groups)
        for o in range(per_group):
            weight[i, o] *= gain[group * per_group + o]
    bias = conv.bias if conv.bias is not None else torch.zeros(conv.out_channels, dtype=torch.float64)
    return weight.detach(), ((bias - norm.running_mean) * gain + norm.bias).detach()


# -- 1. forms --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize(
    ("rank", "geometry"),
    [(rank, name) for name in GEOMETRY for rank in ((1, 2, 3) if name in ("2s2", "3s2p1o1") else (2,))],
)
def test_folds_a_norm_into_a_transposed_conv(rank: int, groups: str, geometry: str) -> None:
    into, out, parts = GROUPS[groups]
    bias = geometry != "4s2p1"
    settings = GEOMETRY[geometry]
    model = seeded(
        lambda: TRANSPOSED[rank](into, out, groups=parts, bias=bias, **settings), lambda: NORMS[rank](out)
    )
    result = fold(model, torch.randn(2, into, *SIZES[:rank]))
    assert ops(result.graph_module) == [f"conv_transpose{rank}d"]
    layer = restore(result.graph_module).get_submodule("0")
    assert type(layer) is TRANSPOSED[rank]
    for name in ("kernel_size", "stride", "padding", "output_padding", "dilation", "groups"):
        assert getattr(layer, name) == getattr(model[0], name), name
    weight, shift = scaled(model[0], model[1])
    # float64; the absolute part is for coefficients that are read off values about one
    torch.testing.assert_close(layer.weight, weight, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(layer.bias, shift, rtol=1e-12, atol=1e-14)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch says that it copies
@pytest.mark.parametrize("geometry", GEOMETRY)
@pytest.mark.parametrize("sizes", [(1, 1), (1, 2), (2, 2), (4, 4)], ids=str)
def test_every_form_is_exact_also_where_sizes_coincide(geometry: str, sizes: tuple[int, int]) -> None:
    settings = GEOMETRY[geometry]
    model = seeded(lambda: nn.ConvTranspose2d(4, 4, groups=2, **settings), lambda: nn.BatchNorm2d(4))
    if sizes[0] == 1 and geometry == "2s1p2d3o1":
        model[0].output_padding = (2, 2)  # with less, the padding leaves nothing of a single position
    kind, slots = certified(model, torch.randn(2, 4, *sizes))
    if sizes == (4, 4):  # on the smaller maps most taps fall outside: a dense layer may cost less
        assert kind == "conv_transpose2d"
        assert slots["weight"].shape == model[0].weight.shape


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("geometry", ["2s2", "3s2p1o1", "2s3d2o2", "3s1"])
def test_folds_pointwise_layers_around_a_transposed_conv(rank: int, groups: int, geometry: str) -> None:
    model = seeded(
        lambda: CONVS[rank](3, 4, 1, bias=False),
        lambda: TRANSPOSED[rank](4, 6, groups=groups, **GEOMETRY[geometry]),
        lambda: NORMS[rank](6),
        lambda: CONVS[rank](6, 2, 1),
    )
    result = fold(model, torch.randn(2, 3, *SIZES[:rank]))
    assert ops(result.graph_module) == [f"conv_transpose{rank}d"]
    assert set(result.changes[0].parameters) == {"1.weight", "1.bias"}, "named after the transposed layer"


def test_folds_a_linear_over_channels_last_into_a_transposed_conv() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.fc = nn.ConvTranspose2d(4, 12, 2, 2, groups=2), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.up(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    result = fold(seeded(Model), torch.randn(2, 4, 3, 5))
    assert ops(result.graph_module) == ["conv_transpose2d"]
    assert result.changes[0].parameters == ("0.up.weight", "0.up.bias")


def test_keeps_the_groups_of_a_grouped_1x1_in_front() -> None:
    model = seeded(
        lambda: nn.Conv2d(4, 8, 1, groups=4, bias=False), lambda: nn.ConvTranspose2d(8, 4, 2, 2, groups=2)
    )
    kind, slots = certified(model, torch.randn(2, 4, 3, 3))
    assert kind == "conv_transpose2d"
    assert slots["weight"].shape == (4, 2, 2, 2), "two groups of two channels each"


@pytest.mark.parametrize(("second", "expected"), [(2, 2), (4, 4), (8, 4), (1, 1)])
def test_groups_of_two_layers_keep_what_both_keep_apart(second: int, expected: int) -> None:
    model = seeded(
        lambda: nn.Conv1d(4, 8, 3, groups=4, bias=False), lambda: nn.Conv1d(8, 8, 1, groups=second)
    )
    region, found = whole(model, torch.randn(2, 4, 9).double())
    grouped = fill(region, found[0].form)
    assert residual(region, grouped.form, grouped.slots) <= LIMIT
    assert grouped.slots["weight"].shape[1] == 4 // expected


def test_groups_that_do_not_divide_each_other_keep_their_common_blocks() -> None:
    model = seeded(lambda: nn.Conv1d(12, 12, 1, groups=6), lambda: nn.Conv1d(12, 12, 3, groups=4))
    kind, slots = certified(model, torch.randn(2, 12, 5))
    assert (kind, slots["weight"].shape) == ("conv1d", (12, 6, 3))


def test_two_transposed_convs_become_one_where_nothing_is_cropped_between() -> None:
    model = seeded(
        lambda: nn.ConvTranspose2d(3, 16, 2, 2, bias=False), lambda: nn.ConvTranspose2d(16, 2, 2, 2)
    )
    result = fold(model, torch.randn(2, 3, 3, 4))
    (layer,) = (m for m in restore(result.graph_module).modules() if isinstance(m, nn.ConvTranspose2d))
    assert (layer.kernel_size, layer.stride) == ((4, 4), (4, 4))


def test_a_transposed_conv_of_stride_1_and_a_conv_become_one_conv() -> None:
    """Padded convs do not compose, but the zeros around a full convolution read nothing."""
    model = seeded(
        lambda: nn.ConvTranspose2d(2, 24, 3, bias=False), lambda: nn.Conv2d(24, 2, 3, stride=2, padding=1)
    )
    result = fold(model, torch.randn(2, 2, 6, 7))
    (layer,) = (m for m in restore(result.graph_module).modules() if isinstance(m, nn.Conv2d))
    assert (layer.kernel_size, layer.stride, layer.padding) == ((5, 5), (2, 2), (3, 3))


def test_a_conv_along_one_axis_and_a_transposed_conv_along_the_other_become_one() -> None:
    model = seeded(
        lambda: nn.Conv2d(3, 16, (3, 1), bias=False), lambda: nn.ConvTranspose2d(16, 2, (1, 2), (1, 2))
    )
    kind, slots = certified(model, torch.randn(2, 3, 12, 5))
    assert kind == "conv_transpose2d"
    assert slots["weight"].shape == (3, 2, 3, 2)


def test_a_first_layer_on_a_single_position_stays_a_transposed_conv() -> None:
    """A latent vector as a 1x1 map, as image generators begin."""
    model = seeded(
        lambda: nn.Unflatten(1, (10, 1, 1)),
        lambda: nn.ConvTranspose2d(10, 6, 4, bias=False),
        lambda: nn.BatchNorm2d(6),
        lambda: nn.ReLU(),
        lambda: nn.ConvTranspose2d(6, 3, 4, 2, 1, bias=False),
        lambda: nn.BatchNorm2d(3),
    )
    result = fold(model, torch.randn(2, 10))
    assert ops(result.graph_module) == ["reshape", "conv_transpose2d", "relu", "conv_transpose2d"]
    assert restore(result.graph_module).get_submodule("1").weight.shape == (10, 6, 4, 4)


def test_a_shift_before_a_transposed_conv_becomes_a_map_where_that_pays() -> None:
    """Output positions meet different taps, so a constant before the layer differs behind it."""
    model = seeded(lambda: nn.Conv2d(3, 64, 1), lambda: nn.ConvTranspose2d(64, 1, 3, 2, 1, 1))
    result = fold(model, torch.randn(2, 3, 4, 4))
    assert ops(result.graph_module) == ["conv_transpose2d", "add"]
    assert [tuple(b.shape) for b in restore(result.graph_module).buffers()] == [(1, 1, 8, 8)]


def test_a_norm_before_a_transposed_conv_becomes_one_shift_of_its_input() -> None:
    model = seeded(lambda: nn.BatchNorm2d(4), lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2))
    result = fold(model, torch.randn(2, 4, 9, 9))
    assert ops(result.graph_module) == ["add", "conv_transpose2d"]
    gain = model[0].weight / torch.sqrt(model[0].running_var + model[0].eps)
    layer = restore(result.graph_module).get_submodule("1")
    torch.testing.assert_close(layer.weight, model[1].weight * gain.reshape(-1, 1, 1, 1))


def test_branches_of_transposed_convs_become_one() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.narrow = nn.ConvTranspose2d(4, 6, 4, 2, 1), nn.ConvTranspose2d(4, 6, 2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.wide(x) + self.narrow(x)

    result = fold(seeded(Model), torch.randn(2, 4, 3, 5))
    assert ops(result.graph_module) == ["conv_transpose2d"]
    assert result.changes[0].parameters == ("0.wide.weight", "0.wide.bias")


def test_branches_that_leave_a_single_position_are_exact() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.ConvTranspose1d(4, 4, 2, 1, 1, groups=4), nn.BatchNorm1d(4)
            self.second = nn.ConvTranspose1d(4, 4, 2, 1, 1, groups=4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.first(x)) + self.second(x)

    kind, _ = certified(seeded(Model), torch.randn(2, 4, 2))
    assert kind in ("conv1d", "conv_transpose1d")


def test_small_maps_that_views_fix_are_read_from_several_positions() -> None:
    """On a 2x2 map no position writes all taps of a 4x4 kernel inside of the output."""
    model = seeded(
        lambda: nn.Unflatten(1, (4, 2, 2)),
        lambda: nn.ConvTranspose2d(4, 3, 4, 2, 1),
        lambda: nn.BatchNorm2d(3),
    )
    kind, slots = certified(model, torch.randn(2, 16))
    assert kind == "conv_transpose2d"
    assert (slots["weight"] != 0).all()


@pytest.mark.parametrize(
    ("conv", "size"),
    [
        ({"kernel_size": 7, "padding": 3}, 3),
        ({"kernel_size": 3, "padding": 5}, 4),
        ({"kernel_size": 2, "padding": 3, "stride": 3, "dilation": 2}, 2),
        ({"kernel_size": 4, "padding": "same", "dilation": 3}, 5),
        ({"kernel_size": 2, "padding": "same"}, 1),
    ],
    ids=["kernel-larger-than-map", "padding-larger-than-kernel", "both", "same-dilated", "same-one-position"],
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch says that it copies
def test_folds_around_convs_that_reach_far_outside(conv: dict[str, Any], size: int) -> None:
    model = seeded(
        lambda: nn.Conv2d(2, 3, 1, bias=False),
        lambda: nn.Conv2d(3, 4, **conv),
        lambda: nn.BatchNorm2d(4),
        lambda: nn.Conv2d(4, 2, 1),
    )
    kind, _ = certified(model, torch.randn(2, 2, size, size))
    assert kind in ("conv2d", "linear")
    result = fold(model, torch.randn(2, 2, size, size))
    assert len([op for op in ops(result.graph_module) if op in ("conv2d", "linear")]) == 1


def test_folds_a_conv_over_the_whole_map_with_the_linear_behind_it() -> None:
    """A window with one position passes through the view."""
    model = seeded(lambda: nn.Conv2d(3, 40, 4), lambda: nn.Flatten(), lambda: nn.Linear(40, 5))
    assert ops(fold(model, torch.randn(2, 3, 4, 4)).graph_module) == ["conv2d", "reshape"]


# -- 2. what stays ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reader",
    [lambda: nn.Conv2d(6, 6, 3), lambda: nn.AvgPool2d(2), lambda: nn.ConvTranspose2d(6, 6, 3, 2, 1)],
    ids=["conv", "pool", "transposed-after-a-crop"],
)
def test_refuses_a_window_over_what_strides_have_spread(reader: Callable[[], nn.Module]) -> None:
    model = seeded(lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, bias=False), reader)
    result = fold(model, torch.randn(2, 4, 6, 6))
    assert not result.changes
    assert codes(result) == ["transposed"]


def test_refuses_a_map_of_shifts_that_costs_more_than_it_saves() -> None:
    model = seeded(lambda: nn.Conv2d(4, 4, 1), lambda: nn.ConvTranspose2d(4, 3, 3, 2, 1, 1))
    result = fold(model, torch.randn(2, 4, 9, 9))
    assert not result.changes
    assert codes(result) == ["costs-more"]


def test_refuses_a_map_of_shifts_over_positions_that_are_not_fixed() -> None:
    model = seeded(lambda: nn.Conv2d(3, 32, 1), lambda: nn.ConvTranspose2d(32, 2, 2, 2))
    free = {2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
    gm = capture(
        model, (torch.randn(2, 3, 5, 6).double(),), dynamic_shapes=({0: torch.export.Dim("n"), **free},)
    )
    result = FoldAffine().run(gm)
    assert not result.changes
    assert codes(result) == ["position-bias"]


def test_refuses_a_constant_per_column_behind_a_transposed_conv() -> None:
    """W == C_out: a constant of shape (W,) scales columns, not channels."""
    model = seeded(lambda: nn.ConvTranspose2d(3, 6, 2, 2), lambda: Constant("mul", torch.rand(6) + 0.5))
    result = fold(model, torch.randn(2, 3, 3, 3))
    assert not result.changes


def test_refuses_a_weight_that_is_not_constant() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.conv_transpose1d(x[:1], x) * 2

    gm = capture(Model(), (torch.randn(3, 3, 3).double(),))
    assert not FoldAffine().run(gm).changes


# -- 3. free sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("geometry", ["2s2", "3s2p1o1", "3s1", "3s1p1", "2s3d2o2"])
def test_folds_where_height_and_width_are_free(geometry: str) -> None:
    model = seeded(
        lambda: nn.ConvTranspose2d(4, 6, groups=2, **GEOMETRY[geometry]), lambda: nn.BatchNorm2d(6)
    )
    shapes = ({0: torch.export.Dim("n"), 2: torch.export.Dim("height"), 3: torch.export.Dim("width")},)
    gm = capture(model, (torch.randn(2, 4, 5, 6).double(),), dynamic_shapes=shapes)
    result = FoldAffine().run(gm)
    assert ops(result.graph_module) == ["conv_transpose2d"], codes(result)
    for size in ((5, 6), (9, 4)):
        x = torch.randn(3, 4, *size).double()
        assert (result.graph_module(x) - model(x)).abs().max() <= 1e-10


# -- 4. the whole way ------------------------------------------------------------------------------------


class Decoder(nn.Module):
    """Upsampling blocks: grouped, depthwise with pointwise, with an output padding, behind a 1x1."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped, self.norm1 = (
            nn.ConvTranspose2d(8, 12, 4, 2, 1, groups=4, bias=False),
            nn.BatchNorm2d(12),
        )
        self.depthwise, self.norm2 = nn.ConvTranspose2d(12, 12, 3, 2, 1, 1, groups=12), nn.BatchNorm2d(12)
        self.mix = nn.Conv2d(12, 24, 1, bias=False)
        self.last = nn.ConvTranspose2d(24, 3, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(self.grouped(x)))
        x = torch.relu(self.norm2(self.depthwise(x)))
        return self.last(self.mix(x))


def test_optimizes_a_decoder_and_exports_it(tmp_path: Path) -> None:
    model = seeded(Decoder)[0].float()
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(2, 8, 4, 5, generator=torch.Generator().manual_seed(0))
    result = gs.optimize(model, (x,))
    layers = {name: type(m) for name, m in result.module.named_modules() if list(m.parameters(recurse=False))}
    assert layers == dict.fromkeys(("grouped", "depthwise", "last"), nn.ConvTranspose2d)
    assert (result.module.grouped.groups, result.module.depthwise.groups) == (4, 12)
    assert set(result.module.state_dict()) == {
        f"{name}.{slot}" for name in ("grouped", "depthwise", "last") for slot in ("weight", "bias")
    }
    torch.testing.assert_close(result.module(x), model(x))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    result.export_onnx(str(tmp_path / "decoder.onnx"))


# -- 5. wrong folds --------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", GROUPS)
def test_detects_a_slightly_wrong_fold(groups: str) -> None:
    into, out, parts = GROUPS[groups]
    model = seeded(
        lambda: nn.ConvTranspose2d(into, out, 3, 2, 1, 1, groups=parts), lambda: nn.BatchNorm2d(out)
    )
    region, found = whole(model, torch.randn(2, into, 4, 4).double())
    filled = fill(region, found[0].form)
    assert residual(region, filled.form, filled.slots) <= LIMIT
    weight = filled.slots["weight"]
    wrong = weight.clone()
    wrong.view(-1)[wrong.abs().argmax()] *= 1 + 1e-6
    assert residual(region, filled.form, {**filled.slots, "weight": wrong}) > LIMIT
    if parts > 1:  # input channels of two groups exchanged: right in shape, wrong in place
        blocks = weight.reshape(parts, -1, *weight.shape[1:])
        swapped = blocks[[1, 0, *range(2, parts)]].reshape(weight.shape)
        assert residual(region, filled.form, {**filled.slots, "weight": swapped}) > 1e3 * LIMIT
    flipped = weight.flip(2, 3)
    assert residual(region, filled.form, {**filled.slots, "weight": flipped}) > 1e3 * LIMIT


def test_detects_the_scale_of_another_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales laid along the first axis of the weight, as for an ordinary conv, never leave the pass."""

    model = seeded(lambda: nn.ConvTranspose2d(4, 4, 2, 2, groups=2), lambda: nn.BatchNorm2d(4))
    right = write.fill

    def wrong(*args: Any) -> Any:
        filled = right(*args)
        gain = model[1].weight / torch.sqrt(model[1].running_var + model[1].eps)
        filled.slots["weight"] = (model[0].weight * gain.reshape(-1, 1, 1, 1)).detach()
        return filled

    gm = capture(model, (torch.randn(2, 4, 3, 3).double(),))
    monkeypatch.setattr(write, "fill", wrong)
    result = FoldAffine().run(gm)
    assert not result.changes
    assert "certificate" in codes(result)
