"""`graphsurgery verify`: sides of every kind, runtimes, the place of a difference, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
from commands import enter, run
from onnx import numpy_helper

from graphsurgery.cli.app import OUT

MODELS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, picture):
        return self.head(torch.relu(self.norm(self.conv(picture))).mean((2, 3)))

def net():
    torch.manual_seed(1)
    return Net().eval()

def other():
    model = net()
    with torch.no_grad():
        model.head.weight[0, 0] *= 1.01
    return model
"""

INPUT = ("--input", "2x3x6x6")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models as a file, the first as .onnx and .pt2, and a copy of the .onnx with one weight changed."""
    path = tmp_path_factory.mktemp("verify")
    (path / "verify_models.py").write_text(MODELS)
    model = f"{path / 'verify_models.py'}:net"
    assert run("optimize", model, "-o", str(path / "n.onnx"), "--save", str(path / "n.pt2"), *INPUT) == 0
    graph = onnx.load(path / "n.onnx")
    tensor = next(t for t in graph.graph.initializer if t.name == "head.weight")
    array = numpy_helper.to_array(tensor).copy()
    array.reshape(-1)[3] *= 1.1
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(graph, path / "bad.onnx")
    return path


@pytest.fixture(autouse=True)
def own_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(folder, monkeypatch)


ALL = ("reference", "onnxruntime-unoptimised", "onnxruntime", "torch")


def on(*names: str) -> list[str]:
    return [part for name in names for part in ("--runtime", name)]


@pytest.mark.parametrize(
    "sides",
    [("n.onnx", "n.onnx"), ("verify_models.py:net", "n.onnx"), ("n.onnx", "verify_models.py:net")],
    ids=" ".join,
)
def test_equal_sides_on_several_runtimes(sides: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", *sides, *INPUT, *on(*ALL)) == 2  # one that was asked for has not run
    lines = capsys.readouterr().out.splitlines()
    table = {line.split("│")[0].strip(): line.split("│")[1].strip() for line in lines if line.count("│") == 2}
    assert {name: table[name] for name in ALL} == dict.fromkeys(ALL, "equal") | {"torch": "not run"}


def test_runtimes_that_all_ran_are_a_success() -> None:
    assert run("verify", "n.onnx", "n.onnx", *INPUT, *on("reference", "onnxruntime")) == 0


def test_other_batches_are_run_where_they_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    for more, sizes in (((), [2]), (("--dynamic-batch",), [1, 2, 5])):
        assert run("verify", "verify_models.py:net", "n.onnx", *INPUT, "--json", *more) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["batch_sizes"] == sizes
        assert any("the only size that was run" in note for note in found["notes"]) == (not more)


def test_exported_programs_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", "n.pt2", "n.pt2", *on("torch")) == 0
    assert run("verify", "verify_models.py:other", "n.pt2", *INPUT) == 1
    out = capsys.readouterr().out
    assert "departs from torch Net" in out
    assert "in head" in out


@pytest.mark.parametrize("width", [250, 60])
def test_a_difference_is_located(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OUT, "_width", width)  # sentences are not broken on a narrow terminal
    assert run("verify", "verify_models.py:net", "bad.onnx", *INPUT) == 1
    out = capsys.readouterr().out
    assert "first difference: Gemm" in out
    assert "verify_models.py:11, in forward: return self.head(" in out
    assert "the file itself, not a runtime" in out
    assert run("verify", "n.onnx", "bad.onnx", *INPUT, "--no-locate") == 1
    assert "first difference" not in capsys.readouterr().out


def test_json_holds_runtimes_and_place(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", "verify_models.py:net", "verify_models.py:other", *INPUT, "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert found["location"]["stands_for"]["module"] == "head"
    assert found["unlocated"] == ""
    assert run("verify", "verify_models.py:net", "n.onnx", *INPUT, "--json", *on("reference", "torch")) == 2
    found = json.loads(capsys.readouterr().out)
    assert [(item["runtime"], item["status"]) for item in found["runtimes"]] == [
        ("reference", "equal"),
        ("torch", "not run"),
    ]
    assert found["location"] is None


def test_a_place_that_cannot_be_found_leaves_the_verdict(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object, **options: object) -> None:
        raise RuntimeError("no way")

    monkeypatch.setattr("graphsurgery.localize", fails)
    assert run("verify", "verify_models.py:net", "bad.onnx", *INPUT) == 1
    assert "could not be located: RuntimeError: no way" in capsys.readouterr().out


def test_what_cannot_be_compared_is_exit_code_2(capfd: pytest.CaptureFixture[str]) -> None:
    assert run("verify", "n.onnx", "n.onnx", *INPUT, *on("torch")) == 2
    assert "nothing was compared, no runtime could be run: torch not run" in capfd.readouterr().err
    assert run("verify", "n.onnx", "n.onnx", *INPUT, *on("onnxruntim")) == 2
    assert "did you mean 'onnxruntime'?" in capfd.readouterr().err
    assert run("verify", "n.onnx", "n.onnx", *INPUT, *on("caffe")) == 2
    assert "expected one of torch, torch-compile, reference" in capfd.readouterr().err
