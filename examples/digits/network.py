"""A small network for 8x8 digits, written the way such networks are written.

Nothing in it was arranged for graphsurgery: branches that help training (RepVGG), a normalisation of
the input, a narrow linear layer before the classifier, a head that flattens a strided convolution. At
inference much of that is one linear map after another, which is what folding removes.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

WEIGHTS = Path(__file__).with_name("digits.safetensors")


class ConvNormReLU(nn.Sequential):
    """A 3x3 convolution, its batch norm and a ReLU."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )


class BranchBlock(nn.Module):
    """RepVGG's training-time block: 3x3, 1x1 and identity, each with its own norm, summed."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv3x3 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm3x3 = nn.BatchNorm2d(channels)
        self.conv1x1 = nn.Conv2d(channels, channels, 1, bias=False)
        self.norm1x1 = nn.BatchNorm2d(channels)
        self.identity = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, c, h, w) to the same shape."""
        branches = self.norm3x3(self.conv3x3(x)) + self.norm1x1(self.conv1x1(x)) + self.identity(x)
        return F.relu(branches)


class Mix(nn.Module):
    """A 3x3 convolution whose channels a 1x1 convolution then brings down, normalised once."""

    def __init__(self, in_channels: int, hidden: int, out_channels: int) -> None:
        super().__init__()
        self.spatial = nn.Conv2d(in_channels, hidden, 3, padding=1)
        self.channels = nn.Conv2d(hidden, out_channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, in_channels, h, w) to (n, out_channels, h, w)."""
        return F.relu(self.norm(self.channels(self.spatial(x))))


class DigitNet(nn.Module):
    """Pictures (n, 1, 8, 8), float32 from 0 to 16, to logits (n, 10)."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(4.9))
        self.register_buffer("std", torch.tensor(6.0))
        self.stem = ConvNormReLU(1, 32)
        self.blocks = nn.Sequential(BranchBlock(32), BranchBlock(32))
        self.down = ConvNormReLU(32, 64, stride=2)
        self.deep = BranchBlock(64)
        self.mix = Mix(64, 48, 32)
        self.reduce = nn.Conv2d(32, 64, 3, stride=2, padding=1)
        self.project = nn.Linear(64 * 2 * 2, 64)
        self.dropout = nn.Dropout(0.3)
        self.embed = nn.Linear(64, 32)
        self.classify = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (n, 10) of pictures (n, 1, 8, 8)."""
        x = self.blocks(self.stem((x - self.mean) / self.std))
        x = self.mix(self.deep(self.down(x)))
        x = F.relu(self.project(self.reduce(x).flatten(1)))
        return self.classify(self.embed(self.dropout(x)))


def trained() -> DigitNet:
    """Return the network with the weights that ``train.py`` stored, in eval mode."""
    model = DigitNet()
    model.load_state_dict(load_file(WEIGHTS))
    return model.eval()
