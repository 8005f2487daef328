"""`AvgPool2d(2, divisor_override=3)`, whose divisor torch's exporter leaves out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphsurgery as gs
from graphsurgery.errors import VerificationError
from graphsurgery.export import exporter


def network(axes: int, **options: Any) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    pool = (nn.AvgPool2d, nn.AvgPool3d)[axes - 2]
    return nn.Sequential(nn.ReLU(), pool(2, **options)).eval(), torch.randn(2, 3, *range(5, 5 + axes))


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"divisor_override": 3},
        {"stride": 1, "padding": 1, "divisor_override": 3},
        {"padding": 1, "count_include_pad": False, "divisor_override": -2},
        {"stride": 1, "ceil_mode": True, "divisor_override": 5},
        {"padding": 1, "count_include_pad": False},
    ],
    ids=lambda options: "-".join(map(str, options)),
)
def test_the_divisor_is_in_the_file(axes: int, options: dict[str, Any], tmp_path: Path) -> None:
    model, x = network(axes, **options)
    written = gs.optimize(model, x).export_onnx(tmp_path / "pool.onnx")
    assert written.verdict is not None
    assert written.verdict.ok


def test_a_window_over_the_padding_is_refused_and_not_written(tmp_path: Path) -> None:
    model, x = network(2, ceil_mode=True, divisor_override=3)
    with pytest.raises(VerificationError, match="differs"):
        gs.optimize(model, x).export_onnx(tmp_path / "pool.onnx")
    assert not (tmp_path / "pool.onnx").exists()


def test_detects_that_the_exporter_leaves_it_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, torch's exporter has learned it, and `write_divisors` can go."""
    model, x = network(2, divisor_override=3)
    monkeypatch.setattr(exporter, "write_divisors", lambda _: 0)
    with pytest.raises(VerificationError, match="differs"):
        gs.optimize(model, x).export_onnx(tmp_path / "pool.onnx")
