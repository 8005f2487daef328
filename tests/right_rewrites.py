"""Right rewrites of random networks, many of them badly scaled: what no verdict may call wrong.

The rewrites are made here, in float64 and stored once, by code that shares nothing with the library.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

DTYPES = (torch.float32, torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float64)
SCALES = {torch.float16: 0.5, torch.bfloat16: 6.0, torch.float32: 6.0, torch.float64: 6.0}
"""Channels are scaled by powers of ten up to this one; the next layer takes most of it back."""


@dataclass(frozen=True)
class Rewrite:
    """A network, the same with its norms folded and its chains of Linear merged, and an input.

    Attributes:
        kind: what it is made of.
        before: the network.
        after: what computes the same.
        x: an input in the network's dtype.
        dear: whether it is to be compared on as few cases and draws as a network of many GFLOP.
    """

    kind: str
    before: nn.Module
    after: nn.Module
    x: Tensor
    dear: bool


class Affine(nn.Module):
    """A scale and a shift along axis 1, float64 until the network is cast."""

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(scale), nn.Parameter(shift)

    def forward(self, x: Tensor) -> Tensor:
        shape = (-1, *[1] * (x.ndim - 2))
        return x * self.scale.view(shape) + self.shift.view(shape)


def rewrite(seed: int) -> Rewrite:
    """Return the rewrite of a seed; each fourth is judged as a dear one."""
    g = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    dtype = DTYPES[seed % len(DTYPES)]
    kind = ("scaled", "sparse", "offset", "ones", "linear", "deep")[seed // len(DTYPES) % 6]
    spread = SCALES[dtype] if kind == "scaled" else 0.3
    depth = 12 if kind == "deep" else 1 + _int(g, 4)
    if kind == "linear":
        before, x = _linears(g, depth, spread)
    else:
        before, x = _convolutions(g, kind, depth, spread)
    before = before.double().to(dtype).eval()
    return Rewrite(kind, before, folded(before), x.to(dtype), dear=seed // 36 % 2 == 1)


def _int(g: torch.Generator, high: int) -> int:
    return int(torch.randint(high, (), generator=g))


def _normal(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=g, dtype=torch.float64)


def _scales(g: torch.Generator, channels: int, spread: float) -> Tensor:
    return 10 ** ((2 * torch.rand(channels, generator=g, dtype=torch.float64) - 1) * spread)


def _convolutions(g: torch.Generator, kind: str, depth: int, spread: float) -> tuple[nn.Sequential, Tensor]:
    layers: list[nn.Module] = []
    channels, size = 3 + _int(g, 3), 6 + _int(g, 5)
    x = _normal(g, 2, channels, size, size)
    act = (nn.ReLU, nn.ELU, nn.GELU, nn.Identity, nn.Tanh)[_int(g, 5)]
    previous = torch.ones(channels, dtype=torch.float64)
    for _ in range(depth):
        width = 4 + _int(g, 60 if kind == "sparse" else 13)
        kernel = 1 + 2 * _int(g, 2)
        conv = nn.Conv2d(channels, width, kernel, padding=kernel // 2, bias=bool(_int(g, 2))).double()
        with torch.no_grad():
            if kind == "ones":
                nn.init.ones_(conv.weight)
            conv.weight /= previous.view(1, -1, 1, 1)
        scale, shift = _scales(g, width, spread), _normal(g, width)
        previous = scale
        if kind == "sparse":  # a channel in two or so is open at a few positions alone, or at none
            shift = scale * (shift - 2.0 * torch.rand(width, generator=g, dtype=torch.float64))
        elif kind == "offset":
            shift = shift * 10.0 ** _int(g, 4)
        else:
            shift = scale * shift
        layers += [conv, Affine(scale, shift), nn.ReLU() if kind == "sparse" else act()]
        channels = width
    tail = _int(g, 3)
    if tail:
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    if tail == 2:
        head = nn.Linear(channels, 7).double()
        with torch.no_grad():
            head.weight /= previous
        layers.append(head)
    return nn.Sequential(*layers), x * 10.0 ** (_int(g, 3) - 1)


def _linears(g: torch.Generator, depth: int, spread: float) -> tuple[nn.Sequential, Tensor]:
    layers: list[nn.Module] = []
    width = 8 + _int(g, 24)
    x = _normal(g, 4, width)
    for _ in range(depth):
        wide, out = 8 + _int(g, 40), 8 + _int(g, 24)
        layers += [nn.Linear(width, wide), Affine(_scales(g, wide, spread), _normal(g, wide))]
        layers += [nn.Linear(wide, out), (nn.ReLU, nn.ELU, nn.GELU)[_int(g, 3)]()]
        width = out
    return nn.Sequential(*layers), x


def folded(model: nn.Module) -> nn.Module:
    """Return a chain with each scale folded into the layer before it, and Linear behind Linear merged."""
    done: list[nn.Module] = []
    for layer in model.children():
        last = done[-1] if done else None
        if isinstance(layer, Affine) and isinstance(last, nn.Conv2d | nn.Linear):
            scale, shift = layer.scale.double(), layer.shift.double()
            weight, bias = _weights(last)
            done[-1] = _like(last, weight * scale.view(-1, *[1] * (weight.ndim - 1)), bias * scale + shift)
        elif isinstance(layer, nn.Linear) and isinstance(last, nn.Linear):
            (first, inner), (second, outer) = _weights(last), _weights(layer)
            done[-1] = _like(layer, second @ first, second @ inner + outer)
        else:
            done.append(copy.deepcopy(layer))
    dtype = next(model.parameters()).dtype
    return nn.Sequential(*done).to(dtype).eval()


def _weights(layer: nn.Conv2d | nn.Linear) -> tuple[Tensor, Tensor]:
    weight = layer.weight.detach().double()
    bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach().double()
    return weight, bias


def _like(layer: nn.Conv2d | nn.Linear, weight: Tensor, bias: Tensor) -> nn.Conv2d | nn.Linear:
    made = copy.deepcopy(layer).double()
    made.weight, made.bias = nn.Parameter(weight), nn.Parameter(bias)
    if isinstance(made, nn.Linear):
        made.in_features = weight.shape[1]
    return made
