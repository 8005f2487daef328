"""Models that cannot be captured whole, and wrong grafts, for the tests of partial surgery."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from folding import seeded
from random_chains import warmed
from torch import Tensor, nn

import graphsurgery as gs
from graphsurgery import partial


def block(inputs: int, outputs: int) -> nn.Sequential:
    """conv + norm + ReLU, of which two fold into one."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), warmed(nn.BatchNorm2d(outputs)), nn.ReLU())


class Loop(nn.Module):
    """A loop over a foldable block that ends by a value; a head that is a chain of Linears."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = block(3, 8), block(8, 8)
        self.head = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        turns = 0
        while x.abs().sum() > 1 and turns < 3:
            x, turns = 0.1 * self.body(x), turns + 1
        return self.head(x.mean((2, 3)))


def loop() -> nn.Module:
    """The network above in float64, its norms not trivial."""
    return seeded(Loop).double().eval()


def picture(*shape: int, seed: int = 0) -> Tensor:
    """Seeded noise in float64."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def part(result: gs.PartsResult, path: str) -> gs.Part:
    """The part at a path."""
    return next(part for part in result.parts if part.path == path)


def statuses(result: gs.PartsResult) -> dict[str, str]:
    """Status, or the code of a refusal, by path."""
    return {part.path: part.code or part.status for part in result.parts}


def spoil_after_its_check(
    monkeypatch: pytest.MonkeyPatch, chosen: Callable[[nn.Module], bool], by: float = 1e-2
) -> None:
    """Move one weight of the parts that are chosen when they were found right."""
    fold = partial.fold_part

    def spoiled(module: nn.Module, *rest: Any) -> Any:
        outcome = fold(module, *rest)
        if outcome.result is not None and chosen(module):
            with torch.no_grad():
                next(outcome.result.module.parameters()).view(-1)[0] += by
        return outcome

    monkeypatch.setattr(partial, "fold_part", spoiled)
