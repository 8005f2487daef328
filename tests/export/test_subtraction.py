"""`1.0 - mask` with a mask of integers, which torch's exporter cannot translate."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import graphsurgery as gs
from graphsurgery.errors import ExportError
from graphsurgery.export import exporter


class Masked(nn.Module):
    """As in XLNet: what is hidden is one minus what is seen."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        hidden: Tensor = self.linear(x) - (1.0 - mask) * 1e3 + (2 - mask)
        return hidden


def case() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    mask = torch.ones(2, 4, dtype=torch.uint8)  # unsigned: it cannot be negated
    mask[1, 2:] = 0
    return Masked().eval(), (torch.randn(2, 4), mask)


def test_a_number_less_a_mask_of_integers_is_exported(tmp_path: Path) -> None:
    model, inputs = case()
    written = gs.optimize(model, inputs).export_onnx(tmp_path / "masked.onnx")
    assert written.verdict is not None
    assert written.verdict.ok


def test_detects_that_the_exporter_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, torch's exporter has learned it, and `cast_subtrahends` can go."""
    model, inputs = case()
    monkeypatch.setattr(exporter, "cast_subtrahends", lambda _: 0)
    with pytest.raises(ExportError, match="cannot be translated"):
        gs.optimize(model, inputs, verify="off").export_onnx(tmp_path / "masked.onnx")
