"""Small networks with something to fold, or nothing, and the least that an exact rewrite can leave of each.

`heavy` is the least number of heavy nodes (Conv, ConvTranspose, Gemm, MatMul) of the ONNX graph, `nodes` the
least number of all nodes where that is plain by hand (an activation behind a layer is none: onnxruntime runs
both as one), `macs` the least heavy multiplications per sample where that is the point; otherwise none may be
added. The figures are worked out on paper, not taken from a run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from fold_blocks import Call, Cat, Sum, as_trained, diverse, mobileone, repvgg, seq
from torch import Tensor, nn
from torch.nn import AvgPool2d, BatchNorm1d, BatchNorm2d, Conv1d, Conv2d, Conv3d, ConvTranspose2d, Linear

Build = Callable[[], nn.Module]


@dataclass(frozen=True)
class Case:
    """One network.

    Attributes:
        name: What it is.
        group: What kind of fold it asks for.
        build: Makes the module.
        shape: Shape of the input, batch included.
        heavy: Least number of heavy nodes.
        nodes: Least number of nodes, None where that is not plain.
        macs: Least heavy multiplications per sample; None: as many as before.
        integer: Size of the vocabulary, where the input is of indices.
    """

    name: str
    group: str
    build: Build
    shape: tuple[int, ...]
    heavy: int
    nodes: int | None = None
    macs: int | None = None
    integer: int | None = None

    def make(self) -> tuple[nn.Module, Tensor]:
        """The module in evaluation mode, seeded, and an input."""
        torch.manual_seed(0)
        model = as_trained(self.build())
        x = torch.randint(self.integer, self.shape) if self.integer else torch.randn(self.shape)
        return model, x


MAP, ROWS, TOKENS = (2, 6, 12, 12), (2, 16), (2, 5, 16)


def _attention(x: Tensor, norm: Any, q: Any, k: Any, v: Any) -> Tensor:
    y = norm(x)
    return (q(y) @ k(y).transpose(1, 2)).softmax(-1) @ v(y)


def _two_norms(x: Tensor, conv: Any, first: Any, second: Any) -> Tensor:
    y = conv(x)
    return torch.relu(first(y)) + torch.relu(second(y))


def _heads_apart_and_together(x: Tensor, first: Any, second: Any) -> Tensor:
    y = first(x).reshape(x.shape[0], 5, 4, 6).permute(0, 2, 1, 3)
    return second(y.permute(0, 2, 1, 3).reshape(x.shape[0], 5, 24))


def _three_heads(x: Tensor, stem: Any, *heads: Any) -> Tensor:
    y = stem(x)
    return torch.relu(heads[0](y)) + torch.tanh(heads[1](y)) + torch.sigmoid(heads[2](y))


def _two_outputs(x: Tensor, conv: Any, norm: Any) -> tuple[Tensor, Tensor]:
    y = conv(x)
    return torch.relu(y), norm(y)


def _halves(x: Tensor, layer: Any) -> Tensor:
    a, b = layer(x).chunk(2, -1)
    return a - 2 * b


# fmt: off
NORMS = (
    Case("conv + norm", "norm", lambda: seq(Conv2d(6, 8, 3, padding=1), BatchNorm2d(8)), MAP, 1, 1),
    Case("norm + conv, unpadded", "norm", lambda: seq(BatchNorm2d(6), Conv2d(6, 8, 3)), MAP, 1, 1),
    Case("norm + conv, padded", "norm", lambda: seq(BatchNorm2d(6), Conv2d(6, 8, 3, padding=1)), MAP, 1, 2),
    Case("Linear + norm", "norm", lambda: seq(Linear(16, 24), BatchNorm1d(24)), ROWS, 1, 1),
    Case("norm + Linear", "norm", lambda: seq(BatchNorm1d(16), Linear(16, 24)), ROWS, 1, 1),
    Case("Linear + norm over as many tokens as features", "norm",
         lambda: seq(Linear(8, 8), BatchNorm1d(8)), (2, 8, 8), 1, 3),
    Case("depthwise + norm", "norm",
         lambda: seq(Conv2d(6, 6, 3, padding=1, groups=6, bias=False), BatchNorm2d(6)), MAP, 1, 1),
    Case("grouped, strided + norm", "norm",
         lambda: seq(Conv2d(6, 12, 3, 2, 1, groups=3), BatchNorm2d(12)), MAP, 1, 1),
    Case("dilated + norm", "norm",
         lambda: seq(Conv2d(6, 8, 3, padding=2, dilation=2), BatchNorm2d(8)), MAP, 1, 1),
    Case("transposed + norm", "norm", lambda: seq(ConvTranspose2d(6, 8, 3, 2, 1), BatchNorm2d(8)), MAP, 1, 1),
    Case("transposed grouped + norm", "norm",
         lambda: seq(ConvTranspose2d(6, 9, 3, 2, 1, groups=3), BatchNorm2d(9)), MAP, 1, 1),
    Case("transposed depthwise + norm", "norm",
         lambda: seq(ConvTranspose2d(6, 6, 2, 2, groups=6), BatchNorm2d(6)), MAP, 1, 1),
    Case("conv1d + norm", "norm", lambda: seq(Conv1d(6, 8, 3), BatchNorm1d(8)), (2, 6, 12), 1, 1),
    Case("conv3d + norm", "norm", lambda: seq(Conv3d(4, 6, 3), nn.BatchNorm3d(6)), (2, 4, 6, 7, 5), 1, 1),
    Case("one conv, two norms", "norm",
         lambda: Call(_two_norms, Conv2d(6, 8, 3), BatchNorm2d(8), BatchNorm2d(8)), MAP, 1, 6),
    Case("conv whose value is also an output, norm", "norm",
         lambda: Call(_two_outputs, Conv2d(6, 8, 3), BatchNorm2d(8)), MAP, 1, 3),
    Case("one Linear used twice, norm after one use", "norm",
         lambda: Call(lambda x, f, g: g(f(torch.relu(f(x)))), Linear(16, 16), BatchNorm1d(16)), ROWS, 2),
)
CONSTANTS = (
    Case("conv * scalar + scalar", "constant",
         lambda: Call(lambda x, f: f(x) * 0.5 + 1.5, Conv2d(6, 8, 3)), MAP, 1, 1),
    Case("conv * (C, 1, 1) - (1, C, 1, 1)", "constant",
         lambda: Call(lambda x, f, a, b: f(x) * a - b, Conv2d(6, 8, 3), constants=((8, 1, 1), (1, 8, 1, 1))),
         MAP, 1, 1),
    Case("conv * (W,) with W = channels", "constant",
         lambda: Call(lambda x, f, a: f(x) * a, Conv2d(6, 8, 3), constants=((8,),)), (2, 6, 10, 10), 1, 2),
    Case("input normalisation + padded conv", "constant",
         lambda: Call(lambda x, f, m, s: f((x - m) / s), Conv2d(3, 8, 3, 2, 1),
                      constants=((1, 3, 1, 1), (1, 3, 1, 1))), (2, 3, 16, 16), 1, 2),
    Case("layer scale in a residual MLP", "constant",
         lambda: Call(lambda x, f, g, s: x + s * g(torch.relu(f(x))), Linear(16, 32), Linear(32, 16),
                      constants=((16,),)), ROWS, 2, 3),
    Case("zero pad + conv", "constant", lambda: seq(nn.ZeroPad2d(1), Conv2d(6, 8, 3)), MAP, 1, 1),
)
CHAINS = (
    Case("1x1 + 3x3, unbiased, padded", "chain",
         lambda: seq(Conv2d(6, 12, 1, bias=False), Conv2d(12, 8, 3, padding=1)), MAP, 1, 1),
    Case("1x1 + 3x3, biased, unpadded", "chain", lambda: seq(Conv2d(6, 12, 1), Conv2d(12, 8, 3)), MAP, 1, 1),
    Case("1x1 + 3x3, biased, padded, small map", "chain",
         lambda: seq(Conv2d(6, 12, 1), Conv2d(12, 8, 3, padding=1)), (2, 6, 8, 8), 1, 2),
    Case("1x1 stride 2 + 3x3, padded", "chain",
         lambda: seq(Conv2d(6, 12, 1, 2, bias=False), Conv2d(12, 8, 3, padding=1)), MAP, 1, 1),
    Case("3x3 + 1x1", "chain", lambda: seq(Conv2d(6, 12, 3, padding=1), Conv2d(12, 8, 1)), MAP, 1, 1),
    Case("3x3 dilated + norm + 1x1", "chain",
         lambda: seq(Conv2d(6, 12, 3, padding=2, dilation=2), BatchNorm2d(12), Conv2d(12, 8, 1)), MAP, 1, 1),
    Case("3x3 + 3x3, unpadded", "chain", lambda: seq(Conv2d(6, 32, 3), Conv2d(32, 4, 3)), MAP, 1, 1),
    Case("grouped + grouped 1x1", "chain",
         lambda: seq(Conv2d(8, 16, 3, padding=1, groups=2), Conv2d(16, 8, 1, groups=2)), (2, 8, 9, 9), 1, 1),
    Case("grouped + dense 1x1", "chain",
         lambda: seq(Conv2d(8, 16, 3, padding=1, groups=2), Conv2d(16, 4, 1)), (2, 8, 9, 9), 1, 1),
    Case("1x1 + transposed", "chain",
         lambda: seq(Conv2d(6, 12, 1, bias=False), ConvTranspose2d(12, 8, 2, 2)), MAP, 1, 1),
    Case("transposed + 1x1", "chain",
         lambda: seq(ConvTranspose2d(6, 12, 2, 2), Conv2d(12, 8, 1)), MAP, 1, 1),
    Case("conv1d 1 + 3", "chain", lambda: seq(Conv1d(6, 12, 1), Conv1d(12, 8, 3)), (2, 6, 12), 1, 1),
    Case("conv3d 3 + 1", "chain", lambda: seq(Conv3d(4, 8, 3), Conv3d(8, 4, 1)), (2, 4, 6, 7, 5), 1, 1),
    Case("conv + average pool", "chain",
         lambda: seq(Conv2d(6, 8, 3, padding=1), AvgPool2d(2)), MAP, 1, 1),
    Case("conv + flatten + Linear", "chain",
         lambda: seq(Conv2d(5, 50, 5, 2), nn.Flatten(), Linear(1250, 100)), (2, 5, 13, 13), 1, 2),
    Case("Linear 64-128-10", "chain", lambda: seq(Linear(64, 128), Linear(128, 10)), (2, 64), 1, 1),
    Case("Linear 512-768-32-512", "chain",
         lambda: seq(Linear(512, 768), Linear(768, 32), Linear(32, 512)), (2, 512), 2, 2),
    Case("Linear + dropout + norm + Linear", "chain",
         lambda: seq(Linear(16, 32), nn.Dropout(), BatchNorm1d(32), Linear(32, 8)), ROWS, 1, 1),
    Case("global pool + Linear + norm", "chain",
         lambda: seq(nn.AdaptiveAvgPool2d(1), nn.Flatten(), Linear(6, 10), BatchNorm1d(10)), MAP, 1, 3),
    Case("embedding + Linear", "chain",
         lambda: seq(nn.Embedding(50, 16), Linear(16, 8)), (2, 7), 0, 1, integer=50),
)
BRANCHES = (
    Case("RepVGG block", "branch", lambda: repvgg(6), MAP, 1, 1),
    Case("RepVGG block, conv1d", "branch", lambda: repvgg(6, 1), (2, 6, 12), 1, 1),
    Case("RepVGG block, conv3d", "branch", lambda: repvgg(4, 3), (2, 4, 6, 7, 5), 1, 1),
    Case("MobileOne block, dense", "branch", lambda: mobileone(6, 1), MAP, 1, 1),
    Case("MobileOne block, depthwise", "branch", lambda: mobileone(6, 6), MAP, 1, 1),
    Case("1x3 + 3x1 + 3x3, with norms", "branch",
         lambda: Sum(*(seq(Conv2d(6, 8, k, padding=(k[0] // 2, k[1] // 2), bias=False), BatchNorm2d(8))
                       for k in ((1, 3), (3, 1), (3, 3)))), MAP, 1, 1),
    Case("diverse branch block", "branch", lambda: diverse(6), MAP, 1, 1),
    Case("average pool beside a conv", "branch",
         lambda: Sum(Conv2d(6, 6, 3, padding=1), AvgPool2d(3, 1, 1)), MAP, 1, 1),
    Case("x + Linear(x)", "branch", lambda: Sum(None, Linear(16, 16)), ROWS, 1, 1),
    Case("x + conv(x)", "branch", lambda: Sum(None, Conv2d(6, 6, 3, padding=1)), MAP, 1, 1),
    Case("LoRA on a Linear", "branch",
         lambda: Call(lambda x, w, a, b: w(x) + 2 * b(a(x)), Linear(64, 64), Linear(64, 4, bias=False),
                      Linear(4, 64, bias=False)), (2, 64), 1, 1),
    Case("LoRA on a conv", "branch",
         lambda: Call(lambda x, w, a, b: w(x) + 2 * b(a(x)), Conv2d(16, 16, 3, padding=1),
                      Conv2d(16, 2, 3, padding=1, bias=False), Conv2d(2, 16, 1, bias=False)),
         (2, 16, 9, 9), 1, 1),
    Case("two Linear concatenated + Linear", "branch",
         lambda: seq(Cat(-1, Linear(16, 24), Linear(16, 8)), Linear(32, 8)), ROWS, 1, 1),
    Case("3x3 and 1x1 concatenated + 1x1", "branch",
         lambda: seq(Cat(1, Conv2d(6, 8, 3, padding=1), Conv2d(6, 8, 1)), Conv2d(16, 8, 1)), MAP, 1, 1),
    Case("chunks of one Linear recombined", "branch", lambda: Call(_halves, Linear(16, 24)), ROWS, 1, 1),
    Case("slice of a Linear", "branch", lambda: Call(lambda x, f: f(x)[:, 3:9], Linear(16, 24)), ROWS, 1, 1),
    Case("x + P x over tokens", "branch",
         lambda: Call(lambda x, p: x + p @ x, constants=((5, 5),)), TOKENS, 1, 1),
    Case("branches in a chain in a branch, Linear", "branch",
         lambda: Sum(None, seq(Linear(16, 24), Sum(None, Linear(24, 24)), Linear(24, 16))), ROWS, 1, 1),
    Case("branches in a chain in a branch, conv", "branch",
         lambda: Sum(None, seq(Sum(Conv2d(6, 12, 3, padding=1), seq(Conv2d(6, 12, 1), BatchNorm2d(12))),
                               Conv2d(12, 6, 1))), MAP, 1, 1),
    Case("one Linear into three narrow heads", "branch",
         lambda: Call(_three_heads, Linear(64, 512), *(Linear(512, 8) for _ in range(3))), (2, 64), 3, 5,
         macs=3 * 64 * 8),
)
MOVES = (
    Case("permutes that cancel + conv", "movement",
         lambda: seq(Call(lambda x: x.permute(0, 2, 3, 1)), Call(lambda x: x.permute(0, 3, 1, 2)),
                     Conv2d(6, 8, 3)), MAP, 1, 1),
    Case("heads split and merged between Linear", "movement",
         lambda: Call(_heads_apart_and_together, Linear(16, 24), Linear(24, 16)), TOKENS, 1, 2),
    Case("einsum with a parameter + Linear", "movement",
         lambda: Call(lambda x, f, w: f(torch.einsum("btc,cd->btd", x, w)), Linear(24, 16),
                      constants=((16, 24),)), TOKENS, 1, 2),
    Case("1x1 + average pool", "commute", lambda: seq(Conv2d(6, 8, 1), AvgPool2d(2)), MAP, 1, 2,
         macs=6 * 6 * 6 * 8),
    Case("1x1 + global pool + Linear", "commute",
         lambda: seq(Conv2d(6, 32, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), Linear(32, 10)), MAP, 1, 3,
         macs=6 * 10),
    Case("interpolation + 1x1", "commute",
         lambda: Call(lambda x, f: f(F.interpolate(x, scale_factor=2.0, mode="bilinear")), Conv2d(6, 6, 1)),
         MAP, 1, 2, macs=12 * 12 * 6 * 6),
    Case("RMS norm's weight into two Linear", "norm affine",
         lambda: Call(lambda x, n, f, g: torch.relu(f(n(x))) * g(n(x)), nn.RMSNorm(16, eps=1e-5),
                      Linear(16, 24), Linear(16, 24)), ROWS, 2, 9),
    Case("layer norm's affine into q, k, v", "norm affine",
         lambda: Call(_attention, nn.LayerNorm(16), *(Linear(16, 16) for _ in range(3))), TOKENS, 3),
)
STAY = (
    Case("Linear 1024-16-1024", "stays", lambda: seq(Linear(1024, 16), Linear(16, 1024)), (2, 1024), 2, 2),
    Case("depthwise + pointwise", "stays",
         lambda: seq(Conv2d(16, 16, 3, padding=1, groups=16), Conv2d(16, 32, 1)), (2, 16, 12, 12), 2, 2),
    Case("depthwise 3x1 + 1x3", "stays",
         lambda: seq(Conv2d(6, 6, (3, 1), groups=6), Conv2d(6, 6, (1, 3), groups=6)), MAP, 2, 2),
    Case("conv + ReLU + conv", "stays",
         lambda: seq(Conv2d(6, 12, 1), nn.ReLU(), Conv2d(12, 8, 3)), MAP, 2, 2),
    Case("average pool + 1x1", "stays", lambda: seq(AvgPool2d(2), Conv2d(6, 8, 1)), MAP, 1, 2),
    Case("1x1 + 3x3, biased, padded, large map", "stays",
         lambda: seq(Conv2d(6, 12, 1), Conv2d(12, 8, 3, padding=1)), (1, 6, 128, 128), 2, 2),
)
# fmt: on
CASES: tuple[Case, ...] = (*NORMS, *CONSTANTS, *CHAINS, *BRANCHES, *MOVES, *STAY)
