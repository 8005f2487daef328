"""Networks and timers for the tests of measured cost: no clock is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from graphsurgery.cost import Cost
from graphsurgery.measure import Cut, MeasuredCost, NotMeasured, Timing


class Attention(nn.Module):
    """A pre-norm attention block, and a bottleneck of which one layer makes more multiplications."""

    def __init__(self, features: int = 32, heads: int = 4, inner: int = 12) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.q, self.k, self.v = (nn.Linear(features, features) for _ in range(3))
        self.out = nn.Linear(features, features)
        self.down, self.up = nn.Linear(features, inner), nn.Linear(inner, features)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, tokens, features)."""
        y = self.norm(x)
        parts = [
            layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        ]
        mixed = nn.functional.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)
        x = x + self.out(mixed)
        return x + torch.tanh(self.up(self.down(x)))


def blocks(count: int = 2, **options: int) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*(Attention(**options) for _ in range(count)))
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight, 1.0, 0.2)
            nn.init.normal_(module.bias, 0.0, 0.2)
    return model.eval()


@dataclass
class FakeTimer:
    """Times that are a function of what a cut costs by counts.

    Attributes:
        price: Milliseconds of a cut.
        noise: What the second times of the blocks are multiplied by, in turn.
        calls: What was asked for.
    """

    price: Callable[[Cost], float]
    noise: tuple[float, ...] = (1.0,)
    calls: list[tuple[Cut, Cut]] = field(default_factory=list)

    def __call__(self, before: Cut, after: Cut, threads: int, blocks: int) -> Timing:
        self.calls.append((before, after))
        old, new = self.price(before.cost), self.price(after.cost)
        noise = [self.noise[i % len(self.noise)] for i in range(blocks)]
        return Timing((old,) * blocks, tuple(new * factor for factor in noise))


def by_nodes(cost: Cost) -> float:
    """A machine on which every call costs the same."""
    return float(cost.nodes)


def by_macs(cost: Cost) -> float:
    """A machine on which calls and memory cost next to nothing."""
    return 1.0 + cost.macs / 1e6


def unable(before: Cut, after: Cut, threads: int, blocks: int) -> Timing:
    """A runtime without a kernel."""
    raise NotMeasured("onnxruntime has no kernel for Linear")


def measured(timer: Any, **options: Any) -> MeasuredCost:
    return MeasuredCost(timer=timer, cache=options.pop("cache", False), **options)
