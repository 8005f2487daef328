"""Whole networks from Linear to 1x1 convolution or the other way, on onnxruntime, and back again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest
import timm
import torch
import torchvision
from swapping import MOVES, codes, ops, same_weights, seeded, swapped, work
from timm.models.metaformer import GroupNorm1, MetaFormer
from timm.models.mlp_mixer import MlpMixer
from torch import fx, nn
from torchvision.models.resnet import Bottleneck, ResNet

import graphsurgery as gs
from graphsurgery.capture import capture
from graphsurgery.layout.settle import permutes
from graphsurgery.passes.conv1x1_to_linear import Conv1x1ToLinear
from graphsurgery.passes.linear_to_conv1x1 import LinearToConv1x1
from graphsurgery.rewrite.contracts import Pass


@dataclass(frozen=True)
class Network:
    """A network, its picture size and its number of blocks."""

    build: Callable[[], nn.Module]
    size: int
    blocks: int


def network_in_network() -> nn.Module:
    """Min Lin, Qiang Chen and Shuicheng Yan, "Network In Network", 2014: CIFAR-10, a fifth as wide."""

    def part(inputs: int, wide: int, narrow: int, out: int, kernel: int) -> list[nn.Module]:
        layers: list[nn.Module] = [nn.Conv2d(inputs, wide, kernel, padding=kernel // 2), nn.ReLU()]
        for a, b in ((wide, narrow), (narrow, out)):
            layers += [nn.Conv2d(a, b, 1), nn.ReLU()]
        return layers

    first = [*part(3, 38, 32, 19, 5), nn.MaxPool2d(3, 2, ceil_mode=True), nn.Dropout()]
    second = [*part(19, 38, 38, 38, 5), nn.AvgPool2d(3, 2, ceil_mode=True), nn.Dropout()]
    third = [*part(38, 38, 38, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*first, *second, *third)


def created(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, **options)


FULL = [pytest.mark.sweep]
LINEAR = [
    pytest.param(Network(created("vit_tiny_patch16_224", img_size=32, depth=2), 32, 2), id="vit"),
    pytest.param(
        Network(
            created(
                "swin_tiny_patch4_window7_224", img_size=56, window_size=7, depths=(1, 2), num_heads=(3, 6)
            ),
            *(56, 3),
        ),
        id="swin",
        marks=pytest.mark.sweep,
    ),
    pytest.param(
        Network(lambda: MlpMixer(10, 32, patch_size=8, num_blocks=2, embed_dim=32), 32, 2), id="mixer"
    ),
    pytest.param(Network(created("vit_tiny_patch16_224"), 224, 12), id="vit_tiny", marks=FULL),
    pytest.param(Network(created("swin_tiny_patch4_window7_224"), 224, 12), id="swin_tiny", marks=FULL),
    pytest.param(Network(created("mixer_s16_224"), 224, 8), id="mixer_s16", marks=FULL),
]
CONV = [
    pytest.param(Network(lambda: ResNet(Bottleneck, [1, 2, 1, 1]), 64, 5), id="resnet"),
    pytest.param(
        Network(
            lambda: MetaFormer(
                *(3, 10),
                depths=(1, 1, 2, 1),
                dims=(16, 24, 32, 48),
                norm_layers=GroupNorm1,
                use_mlp_head=False,
            ),
            *(64, 5),
        ),
        id="poolformer",
        marks=pytest.mark.sweep,
    ),
    pytest.param(Network(network_in_network, 32, 3), id="network-in-network"),
    pytest.param(Network(torchvision.models.resnet50, 224, 16), id="resnet50", marks=FULL),
    pytest.param(Network(created("poolformer_s12"), 224, 12), id="poolformer_s12", marks=FULL),
]


def constant_products(path: Path) -> list[str]:
    """Products of an ONNX file that have a weight."""
    graph = onnx.load(path).graph
    weights = {item.name for item in graph.initializer}
    return [n.name for n in graph.node if n.op_type in ("Gemm", "MatMul") and weights & set(n.input)]


def pointwise_convolutions(path: Path) -> list[str]:
    """Convolutions of an ONNX file that have a kernel of one and one group."""
    graph = onnx.load(path).graph
    shapes = {item.name: list(item.dims) for item in graph.initializer}
    found = []
    for node in graph.node:
        groups = next((a.i for a in node.attribute if a.name == "group"), 1)
        if node.op_type == "Conv" and groups == 1 and set(shapes[node.input[1]][2:]) == {1}:
            found.append(node.name)
    return found


def moves(gm: fx.GraphModule) -> int:
    """Number of calls that only move."""
    return len(ops(gm)) - len(work(gm))


def swap_there_and_back(net: Network, there: type[Pass], back: type[Pass], path: Path) -> tuple[int, int]:
    """Permutes before and after the swap; everything else is asserted here."""
    model, x = seeded(net.build), torch.randn(2, 3, net.size, net.size)
    result = gs.optimize(model, x, passes=[there()])
    assert result.report.verification is not None
    assert result.report.verification.ok
    result.export_onnx(path)
    gm = capture(model, (x,))
    first = there().run(gm)
    assert not codes(first)
    names = swapped(first)
    last = back(only="swapped").run(first.graph_module)
    assert swapped(last) == names
    assert not codes(last)
    assert work(last.graph_module) == work(gm)
    assert moves(last.graph_module) <= moves(gm)
    assert len(permutes(last.graph_module)) <= len(permutes(gm))
    same_weights(gm.state_dict(), last.graph_module)
    return len(permutes(gm)), len(permutes(first.graph_module))


@pytest.mark.slow
@pytest.mark.parametrize("net", LINEAR)
def test_all_linear_layers_as_convolutions(net: Network, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    before, after = swap_there_and_back(net, LinearToConv1x1, Conv1x1ToLinear, path)
    assert not constant_products(path)
    assert after <= before + 2 * net.blocks


@pytest.mark.slow
@pytest.mark.parametrize("net", CONV)
def test_all_pointwise_convolutions_as_linear_layers(net: Network, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    before, after = swap_there_and_back(net, Conv1x1ToLinear, LinearToConv1x1, path)
    assert not pointwise_convolutions(path)
    assert after <= before + 3 * net.blocks


@pytest.mark.slow
def test_the_helpers_see_what_was_not_swapped(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(16, 3))
    gs.optimize(seeded(lambda: model), torch.randn(2, 3, 2, 2), passes=[]).export_onnx(tmp_path / "m.onnx")
    assert len(constant_products(tmp_path / "m.onnx")) == 1
    assert len(pointwise_convolutions(tmp_path / "m.onnx")) == 1
    assert "conv2d" not in MOVES
    assert ops(capture(model, (torch.randn(2, 3, 2, 2),))) == ["conv2d", "reshape", "linear"]
