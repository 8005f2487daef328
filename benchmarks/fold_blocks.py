"""Building blocks of the fold cases: sums, concatenations and functions as modules; norms as trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Sum(nn.Module):
    """The sum of branches that read one input; a branch of None is the input itself."""

    def __init__(self, *branches: nn.Module | None) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Identity() if b is None else b for b in branches)

    def forward(self, x: Tensor) -> Tensor:
        total = self.branches[0](x)
        for branch in self.branches[1:]:
            total = total + branch(x)
        return total


class Cat(nn.Module):
    """The concatenation of branches that read one input."""

    def __init__(self, dim: int, *branches: nn.Module) -> None:
        super().__init__()
        self.dim = dim
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], self.dim)


class Call(nn.Module):
    """A function of the input, the given submodules, and random constants of the given shapes."""

    def __init__(
        self,
        function: Callable[..., Any],
        *modules: nn.Module,
        constants: tuple[tuple[int, ...], ...] = (),
    ) -> None:
        super().__init__()
        self.function = function
        self.parts = nn.ModuleList(modules)
        self.constants = nn.ParameterList(torch.rand(shape) + 0.5 for shape in constants)

    def forward(self, x: Tensor) -> Any:
        return self.function(x, *self.parts, *self.constants)


def seq(*layers: nn.Module) -> nn.Sequential:
    """A chain."""
    return nn.Sequential(*layers)


def repvgg(channels: int, rank: int = 2) -> nn.Module:
    """RepVGG's training block: 3x3 + norm, 1x1 + norm, norm; then ReLU."""
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[rank - 1]
    return seq(
        Sum(
            seq(conv(channels, channels, 3, padding=1, bias=False), norm(channels)),
            seq(conv(channels, channels, 1, bias=False), norm(channels)),
            norm(channels),
        ),
        nn.ReLU(),
    )


def mobileone(channels: int, groups: int) -> nn.Module:
    """MobileOne's training block with four 3x3 branches, the 1x1 scale branch and the norm; then ReLU."""
    branches: list[nn.Module] = []
    for kernel in (3, 3, 3, 3, 1):
        conv = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=groups, bias=False)
        branches.append(seq(conv, nn.BatchNorm2d(channels)))
    return seq(Sum(*branches, nn.BatchNorm2d(channels)), nn.ReLU())


def diverse(channels: int) -> nn.Module:
    """The diverse branch block: 3x3, 1x1, 1x1 before 3x3, 1x1 before an average pool, all with norms."""
    return Sum(
        seq(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)),
        seq(nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels)),
        seq(
            nn.Conv2d(channels, channels, 1, bias=False),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        ),
        seq(nn.Conv2d(channels, channels, 1, bias=False), nn.AvgPool2d(3, 1, 1), nn.BatchNorm2d(channels)),
    )


def as_trained(model: nn.Module) -> nn.Module:
    """Give every norm statistics and weights that are not trivial, some scales negative; evaluation mode."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
            if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)):
                module.weight.uniform_(0.5, 2)
                module.weight[::3].neg_()
                if getattr(module, "bias", None) is not None:
                    module.bias.normal_()
    return model.eval()
