"""1x1 convolutions as Linear layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from swapping import codes, ops, same_weights, seeded, swap, swapped, there_and_back
from torch import Tensor, nn

import graphsurgery as gs
from graphsurgery.capture import capture
from graphsurgery.cost import op_name
from graphsurgery.errors import PassError
from graphsurgery.graph import structural_hash
from graphsurgery.layout import exchange
from graphsurgery.layout.settle import permutes
from graphsurgery.passes.conv1x1_to_linear import Conv1x1ToLinear
from graphsurgery.passes.linear_to_conv1x1 import LinearToConv1x1

IMAGE = torch.randn(2, 4, 7, 6, generator=torch.Generator().manual_seed(1))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 with norms and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(4, 3, 1, bias=False), nn.BatchNorm2d(3)
        self.conv2, self.norm2 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.conv3, self.norm3 = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(self.conv1(x)))
        y = torch.relu(self.norm2(self.conv2(y)))
        return torch.relu(x + self.norm3(self.conv3(y)))


class SqueezeExcite(nn.Module):
    """Two 1x1 convolutions on a map of one position."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.down, self.up = nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(torch.relu(self.down(self.pool(x)))))


def pair(rank: int, **options: Any) -> nn.Sequential:
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
    return nn.Sequential(conv(4, 6, 1, **options), nn.SiLU(), conv(6, 5, 1))


# -- 1. swaps --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"stride": 2},
        {"padding": 1},
        {"stride": 3, "padding": 2, "dilation": 2},
        {"padding": "same"},
    ],
    ids=str,
)
def test_swaps_a_pair(rank: int, options: dict[str, Any]) -> None:
    x = torch.randn(2, 4, *(7, 6, 5)[:rank])
    result = swap(Conv1x1ToLinear(), seeded(lambda: pair(rank, **options)), x)
    calls = ops(result.graph_module)
    assert calls.count("linear") == 2
    assert not any(name.startswith("conv") for name in calls)
    assert len(permutes(result.graph_module)) == 2, "one at each end of the stretch"
    assert calls.count("slice") == (rank if "stride" in options else 0)


def test_swaps_an_unbatched_picture() -> None:
    model = seeded(lambda: pair(2))
    result = gs.optimize(model, IMAGE[0], passes=["conv1x1-to-linear"], dynamic_shapes=(None,))
    assert ops(result.graph_module).count("linear") == 2
    assert result.report.verification is not None
    assert result.report.verification.ok


def test_swaps_on_one_position_without_a_permute() -> None:
    result = swap(Conv1x1ToLinear(), seeded(SqueezeExcite), IMAGE)
    assert ops(result.graph_module).count("linear") == 2
    assert not permutes(result.graph_module)


def test_swaps_a_bottleneck() -> None:
    result = swap(Conv1x1ToLinear(), seeded(lambda: nn.Sequential(Bottleneck(), Bottleneck())), IMAGE)
    assert ops(result.graph_module).count("linear") == 4
    assert len(permutes(result.graph_module)) == 6, "around each 3x3 and at the ends"
    kept = swap(Conv1x1ToLinear(layout="channels-first"), seeded(Bottleneck), IMAGE)
    assert len(permutes(kept.graph_module)) == 4
    norms = [node for node in kept.graph_module.graph.nodes if op_name(node) == "batch_norm"]
    assert all(node.meta["val"].dim() == 4 for node in norms)


@pytest.mark.parametrize("size", [(8, 12), (9, 13)], ids=str)
def test_swaps_a_patch_embedding(size: tuple[int, int]) -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(4, 6, 4, stride=4), nn.Flatten(2)))
    x = torch.randn(2, 4, *size)
    assert not swap(Conv1x1ToLinear(), model, x).changes
    result = swap(Conv1x1ToLinear(patches=True), model, x)
    assert ops(result.graph_module).count("linear") == 1
    weight = result.graph_module.state_dict()["0.weight"]
    assert torch.equal(weight, model[0].weight.double().reshape(6, 64))  # type: ignore[index, operator, union-attr]


def test_swaps_channels_last_linear_layers_of_convnext_kind() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.depthwise, self.norm = nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.LayerNorm(4)
            self.up, self.down = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.depthwise(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            return x + self.down(torch.relu(self.up(y)))

    result = swap(Conv1x1ToLinear(), seeded(Net), IMAGE)
    assert ops(result.graph_module).count("linear") == 2
    assert len(permutes(result.graph_module)) == 2, "as many as before"


def test_swaps_the_layers_that_are_named() -> None:
    result = swap(Conv1x1ToLinear(only=("*.conv3",)), seeded(lambda: nn.Sequential(Bottleneck())), IMAGE)
    assert swapped(result) == ("0.conv3",)


@pytest.mark.parametrize(
    "build",
    [
        lambda: pair(2),
        lambda: pair(2, stride=2),
        Bottleneck,
        SqueezeExcite,
        lambda: nn.Sequential(Bottleneck(), nn.Conv2d(4, 4, 3), Bottleneck(), SqueezeExcite()),
    ],
)
def test_there_and_back(build: Callable[[], nn.Module]) -> None:
    model = seeded(build)
    _, back = there_and_back(Conv1x1ToLinear(), LinearToConv1x1(), model, IMAGE)
    assert ops(back.graph_module) == ops(capture(model, (IMAGE,)))


def test_one_module_called_as_both() -> None:
    """The 1x1 convolution and the Linear of one parameter: one of them reads it through a view."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(20, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            as_linear = nn.functional.linear(x.mean((2, 3)), self.conv.weight[:, :, 0, 0], self.conv.bias)
            return self.conv(x).mean((2, 3)) + as_linear

    result = gs.optimize(seeded(Both), torch.randn(4, 20, 2, 2), passes=["conv1x1-to-linear"])
    assert ops(result.graph_module).count("linear") == 2
    assert result.report.verification is not None
    assert result.report.verification.ok


def padded() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 6, 1, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 1, stride=(2, 1), padding=(0, 2))
    )


def test_strides_and_padding_come_back() -> None:
    gm = capture(seeded(padded), (IMAGE,))
    there = Conv1x1ToLinear().run(gm)
    assert ops(there.graph_module).count("constant_pad_nd") == 2
    back = LinearToConv1x1(only="swapped").run(there.graph_module)
    assert ops(back.graph_module) == ops(gm)
    x = torch.randn(3, 4, 7, 6)
    assert torch.equal(back.graph_module(x), gm(x))  # the same calls, the same weights


def test_an_unbatched_picture_comes_back() -> None:
    gm = capture(seeded(lambda: pair(2)), (IMAGE[0],), dynamic_shapes=None)
    there = Conv1x1ToLinear().run(gm)
    back = LinearToConv1x1(only="swapped").run(there.graph_module)
    assert ops(back.graph_module) == ops(gm)
    same_weights(gm.state_dict(), back.graph_module)


def test_swaps_a_padded_channel_of_free_sizes() -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(1, 1, 1, padding=1), nn.Flatten(2))).double()
    free = {0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    gm = capture(model, (torch.randn(2, 1, 5, 6, dtype=torch.float64),), dynamic_shapes=(free,))
    result = Conv1x1ToLinear().run(gm)
    assert swapped(result) == ("0",)
    x = torch.randn(3, 1, 7, 9, dtype=torch.float64)
    assert (result.graph_module(x) - model(x)).abs().max() < 1e-12


def test_norms_between_permutes_of_the_model_come_back() -> None:
    class Norm(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    gm = capture(seeded(lambda: nn.Sequential(nn.Conv2d(4, 8, 1), Norm(8), nn.Conv2d(8, 4, 1))), (IMAGE,))
    there = Conv1x1ToLinear().run(gm)
    assert len(permutes(there.graph_module)) == 2
    back = LinearToConv1x1(only="swapped").run(there.graph_module)
    assert sorted(ops(back.graph_module)) == sorted(ops(gm))


# -- 2. leaves alone -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Conv2d(4, 4, 3, padding=1),
        lambda: nn.Conv2d(4, 4, (1, 3)),
        lambda: nn.ConvTranspose2d(4, 4, 1),
        lambda: nn.Linear(6, 3),
    ],
)
def test_noop_on(build: Callable[[], nn.Module]) -> None:
    result = swap(Conv1x1ToLinear(), seeded(build), IMAGE)
    assert not result.changes
    assert not result.refusals


def test_does_not_run_by_default() -> None:
    assert Conv1x1ToLinear not in {type(item) for item in gs.passes.default_passes()}


# -- 3. refuses ------------------------------------------------------------------------------------------


def test_refuses_groups() -> None:
    result = swap(Conv1x1ToLinear(), seeded(lambda: nn.Conv2d(4, 4, 1, groups=2)), IMAGE)
    assert codes(result) == ["groups"]
    assert "2 groups" in result.refusals[0].reason
    assert not result.changes


def test_refuses_patches_of_a_free_size() -> None:
    model = seeded(lambda: nn.Conv2d(4, 6, 2, stride=2))
    auto = torch.export.Dim.AUTO
    gm = capture(model, (torch.randn(2, 4, 8, 10),), dynamic_shapes=({0: auto, 2: auto, 3: auto},))
    assert codes(Conv1x1ToLinear(patches=True).run(gm)) == ["free-sizes"]


def test_refuses_weights_that_are_not_finite() -> None:
    model = seeded(lambda: pair(2))
    with torch.no_grad():
        model[0].weight[0, 0] = torch.inf  # type: ignore[index, operator]
    result = Conv1x1ToLinear().run(capture(model, (IMAGE,)))
    assert codes(result) == ["not-finite"]


def test_refuses_options() -> None:
    with pytest.raises(PassError, match="layout must be 'channels-first' or 'channels-last', got 'NHWC'"):
        Conv1x1ToLinear(layout="NHWC")  # type: ignore[arg-type]


# -- 4. dtypes, runtimes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_any_float_dtype(dtype: torch.dtype) -> None:
    model = seeded(Bottleneck).to(dtype)
    result = gs.optimize(model, IMAGE.to(dtype), passes=["conv1x1-to-linear"])
    assert result.report.verification is not None
    assert result.report.verification.ok
    assert torch.equal(result.module.state_dict()["conv3.weight"], model.conv3.weight[..., 0, 0])


def test_the_callers_model_is_untouched() -> None:
    model = seeded(Bottleneck)
    state = copy.deepcopy(model.state_dict())
    gs.optimize(model, IMAGE, passes=["conv1x1-to-linear"])
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("layout", ["channels-first", "channels-last"])
def test_onnxruntime_agrees(layout: Any, tmp_path: Path) -> None:
    result = gs.optimize(seeded(Bottleneck), IMAGE, passes=[Conv1x1ToLinear(layout=layout)])
    result.export_onnx(tmp_path / "model.onnx")
    kinds = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]
    assert kinds.count("Conv") == 1
    assert kinds.count("MatMul") + kinds.count("Gemm") == 2
    assert kinds.count("Transpose") == 4


# -- 5. a wrong swap is caught ---------------------------------------------------------------------------


def test_detects_one_coefficient_that_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    real = exchange.Exchange.weight

    def off(self: Any, like: Any, value: Any, shape: Any) -> Any:
        node = real(self, like, value, shape)
        with self.work.graph.inserting_after(node):
            changed = self.call(like, torch.ops.aten.mul.Tensor, node, 1 + 1e-3)
        return changed

    monkeypatch.setattr(exchange.Exchange, "weight", off)
    gm = capture(seeded(lambda: pair(2)), (IMAGE,))
    result = Conv1x1ToLinear().run(gm)
    assert codes(result) == ["certificate", "certificate"]
    assert not result.changes
    assert structural_hash(result.graph_module) == structural_hash(gm)
