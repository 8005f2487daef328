"""The opset of a file: as asked for, or as early as its operators allow."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

import graphsurgery as gs
from graphsurgery.export import check_opset
from graphsurgery.export.opset import LEAST, OPSET, OPSET_BFLOAT16


def picture_network(dtype: torch.dtype) -> gs.OptimizeResult:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 5)
    )
    return gs.optimize(model.eval().to(dtype), torch.randn(2, 3, 8, 8).to(dtype))


def opset_of(path: Path) -> int:
    return int(onnx.load(path).opset_import[0].version)


def test_a_file_is_written_in_the_opset_asked_for(tmp_path: Path) -> None:
    result = picture_network(torch.float32)
    for asked, written in ((None, OPSET), (LEAST, LEAST), (23, 23)):
        done = result.export_onnx(tmp_path / "m.onnx", opset=asked)
        assert done.opset == written == opset_of(tmp_path / "m.onnx")
        assert done.verdict is not None
        assert done.verdict.ok


def test_bfloat16_takes_the_opset_that_its_operators_need(tmp_path: Path) -> None:
    done = picture_network(torch.bfloat16).export_onnx(tmp_path / "m.onnx")
    assert done.opset == OPSET_BFLOAT16 == opset_of(tmp_path / "m.onnx")
    assert done.verdict is not None
    assert done.verdict.ok
    onnx.checker.check_model(onnx.load(tmp_path / "m.onnx"), full_check=True)


def test_bfloat16_of_products_stays_in_the_usual_one(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).eval().to(torch.bfloat16)
    result = gs.optimize(model, torch.randn(2, 4).to(torch.bfloat16))
    assert result.export_onnx(tmp_path / "m.onnx").opset == OPSET


def test_an_opset_asked_for_is_not_changed_silently(tmp_path: Path) -> None:
    """In bfloat16 convolutions are no ONNX at 20: that is said, and nothing is written."""
    with pytest.raises(gs.VerificationError, match="bfloat16"):
        picture_network(torch.bfloat16).export_onnx(tmp_path / "m.onnx", opset=20)
    assert list(tmp_path.iterdir()) == []


def test_no_opset_is_promised_that_onnxruntime_does_not_take(tmp_path: Path) -> None:
    with pytest.raises(gs.ExportError, match=r"to \d+, the latest") as error:
        check_opset(99)
    latest = int(str(error.value).partition(" to ")[2].partition(",")[0])
    assert OPSET_BFLOAT16 <= latest <= onnx.defs.onnx_opset_version()
    done = picture_network(torch.float32).export_onnx(tmp_path / "m.onnx", opset=latest)
    assert done.opset == latest
    assert done.verdict is not None
    assert done.verdict.ok


@pytest.mark.parametrize("opset", [17, 11, 0, -1, 99, True])
def test_what_cannot_be_written_is_said(opset: int) -> None:
    with pytest.raises(gs.ExportError, match="expected a number from 18"):
        check_opset(opset)
