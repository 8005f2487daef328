"""`optimize --parts`, run in this process: output, files and exit codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from commands import enter, run

import graphsurgery as gs

MODEL = """
import torch
from torch import nn

class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))

    def forward(self, pictures):
        picture = torch.stack([picture.mean(1) for picture in pictures])
        return self.head(picture) if picture.sum() < 100 else picture

def branching():
    torch.manual_seed(0)
    return Branching().eval(), ([torch.randn(8, 5), torch.randn(8, 3)],)
"""


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    enter(tmp_path, monkeypatch)
    (tmp_path / "parts_model.py").write_text(MODEL)
    return f"{tmp_path / 'parts_model.py'}:branching"


def test_writes_each_part_and_a_report(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = run("optimize", model, "--parts", "-o", "made", "--report", "made.json")
    out = capsys.readouterr().out
    assert code == 0, out
    assert [path.name for path in Path("made").iterdir()] == ["head.onnx"]
    report = gs.PartsReport.from_json(Path("made.json").read_text())
    assert [(part.path, part.status) for part in report.parts] == [("", "refused"), ("head", "folded")]
    for text in ("head [Sequential]", "192 -> 32", "its control flow depends on", "wrote made/head.onnx"):
        assert text in out


@pytest.mark.parametrize("wrong", [("head",), ("head", "tail")], ids=len)
def test_a_part_whose_file_differs_is_no_success(
    model: str, wrong: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    two = MODEL.replace(
        "self.head =", "self.tail = nn.Sequential(nn.Linear(8, 9), nn.Linear(9, 4))\n        self.head ="
    )
    two = two.replace("else picture", "else self.tail(picture)")
    two = two.replace("return self.head(picture)", "return self.head(picture) + self.tail(picture)")
    Path("parts_model.py").write_text(two)
    export = gs.OptimizeResult.export_onnx

    def differs(self: gs.OptimizeResult, path: Path, **options: Any) -> Any:
        if path.stem in wrong:
            raise gs.VerificationError("it differs")
        return export(self, path, **options)

    monkeypatch.setattr(gs.OptimizeResult, "export_onnx", differs)
    assert run("optimize", model, "--parts", "-o", "made") == 1
    found = capsys.readouterr()
    assert f"{wrong[-1]} was not written as ONNX: it differs" in found.out + found.err
    assert ("a part was not written, see the notes" in found.out) == (len(wrong) == 1)
    assert [path.name for path in Path("made").iterdir()] == ["tail.onnx"] * (len(wrong) == 1)


def test_without_parts_the_way_out_is_named(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("optimize", model) == 2
    assert "gs.optimize_parts" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--save", "made.pt2"), "no exported program"),
        (("-o", "made.onnx"), "is no folder"),
        (("-o", "nowhere/made"), "nowhere does not exist"),
        (("--data", "made.npz"), "--data cannot be had"),
        (("--passes", "fold-nothing"), "no pass named"),
    ],
)
def test_refuses_before_the_work(
    model: str, arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("optimize", model, "--parts", *arguments) == 2
    assert words in " ".join(capsys.readouterr().err.split())
