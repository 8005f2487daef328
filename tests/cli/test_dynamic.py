"""`--dynamic`: read, or refused in one sentence; free sizes are in the files, and tried in comparisons."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from commands import enter, run
from torch import nn
from torch.export import Dim

from graphsurgery.cli.dynamic import free_sizes
from graphsurgery.cli.errors import UsageError
from graphsurgery.cli.loading import LoadedModel

MODELS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 4, stride=4), nn.BatchNorm2d(8), nn.Linear(8, 4)
        self.norm.running_mean.normal_(), self.norm.running_var.uniform_(0.5, 2)

    def forward(self, picture):
        return self.head(torch.relu(self.norm(self.conv(picture))).mean((2, 3)))

class Baked(Net):
    def forward(self, picture):
        return self.head(torch.relu(self.norm(self.conv(picture))).sum((2, 3)) / 6)

def net():
    torch.manual_seed(1)
    return Net().eval()

def baked():
    torch.manual_seed(1)
    return Baked().eval()

def fixed():
    return nn.Sequential(nn.Flatten(), nn.Linear(288, 2)), torch.zeros(2, 3, 8, 12)
"""
FREE = ("--input", "2x3x8x12", "--dynamic", "0.0=n", "--dynamic", "0.2=4*h", "--dynamic", "0.3=width:8..64")
MODULE = LoadedModel(nn.Identity())
TWO = {"ids": torch.zeros(2, 5), "mask": torch.zeros(2, 5), "more": {"deep": torch.zeros(2)}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dynamic")
    (path / "dynamic_models.py").write_text(MODELS)
    return path


@pytest.fixture(autouse=True)
def own_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(folder, monkeypatch)


def test_reads_names_ranges_and_multiples() -> None:
    texts = ["ids.1=tokens:2..512", "mask.1=tokens", "ids.0=n:2..", "mask.0=2*n"]
    shapes = free_sizes(texts, TWO, MODULE, "m")
    assert list(shapes) == ["ids", "mask", "more"]
    tokens, n = shapes["ids"][1], shapes["ids"][0]
    assert (tokens.__name__, tokens.min, tokens.max) == ("tokens", 2, 512)
    assert shapes["mask"][1] is tokens
    assert (n.min, n.max) == (Dim("n", min=2).min, Dim("n").max)
    assert shapes["mask"][0].__name__ == (2 * Dim("n", min=2)).__name__
    assert shapes["more"] is None


def test_places_stand_for_positional_inputs() -> None:
    shapes = free_sizes(["1.0=n"], (torch.zeros(3), torch.zeros(3)), MODULE, "m")
    assert shapes[0] is None
    assert shapes[1][0].__name__ == "n"
    assert free_sizes(["0.0=n"], torch.zeros(3), MODULE, "m")[0][0].__name__ == "n"
    assert free_sizes([], (torch.zeros(3),), MODULE, "m") is None


def test_positional_inputs_have_the_names_of_forward() -> None:
    by_place = free_sizes(["0.1=n"], torch.zeros(3, 4), MODULE, "m")
    by_name = free_sizes(["input.1=n"], torch.zeros(3, 4), MODULE, "m")
    assert [list(axes) for axes in by_name] == [list(axes) for axes in by_place] == [[1]]
    with pytest.raises(UsageError, match="expected one of 0, input"):
        free_sizes(["x.1=n"], torch.zeros(3, 4), MODULE, "m")
    with pytest.raises(UsageError, match="axis 1 of input 0 has a size already"):
        free_sizes(["0.1=n", "input.1=m"], torch.zeros(3, 4), MODULE, "m")


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["ids.1"], "is not understood; expected INPUT.AXIS=NAME"),
        (["ids.1=2"], "is not understood"),
        (["ids.x=n"], "is not understood"),
        (["id.1=n"], "id is no input that is a tensor; did you mean 'ids'?"),
        (["more.0=n"], "more is no input that is a tensor; expected one of ids, mask."),
        (["0.1=n"], "expected one of ids, mask."),
        (["ids.1=n", "ids.1=m"], "axis 1 of input ids has a size already"),
        (["ids.1=n:2..9", "mask.1=n:2..8"], "n has another range already"),
        (["ids.1=n:9..9"], "holds less than two sizes"),
        (["ids.1=0*n"], "a multiple of 0 is no size"),
    ],
)
def test_refuses_what_is_no_free_size(texts: list[str], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        free_sizes(texts, TWO, MODULE, "m")
    assert said in str(caught.value)


def test_a_program_has_its_sizes_already() -> None:
    program = torch.export.export(nn.Identity(), (torch.zeros(2),))
    with pytest.raises(UsageError, match="has the free sizes with which it was exported"):
        free_sizes(["0.0=n"], (torch.zeros(2),), LoadedModel(program), "m.pt2")


def test_the_file_takes_other_sizes(folder: Path) -> None:
    assert run("optimize", "dynamic_models.py:net", "-o", "net.onnx", *FREE) == 0
    sizes = onnx.load("net.onnx").graph.input[0].type.tensor_type.shape.dim
    assert [size.dim_param or size.dim_value for size in sizes] == ["n", 3, "4*h", "width"]
    model: Any = __import__("dynamic_models").net().double()
    session = onnxruntime.InferenceSession("net.onnx", providers=["CPUExecutionProvider"])
    for shape in ((1, 3, 4, 9), (5, 3, 20, 33)):
        picture = torch.randn(shape, dtype=torch.float64)
        (given,) = session.run(None, {session.get_inputs()[0].name: picture.float().numpy()})
        # float32 on another runtime, beside float64; a wrong size would be off by parts of one
        np.testing.assert_allclose(given, model(picture).detach().numpy(), atol=1e-5)


def test_a_number_that_is_right_at_one_size_alone_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    pair = ("verify", "dynamic_models.py:net", "dynamic_models.py:baked")
    assert run(*pair, "--input", "2x3x8x12") == 0
    assert run(*pair, *FREE) == 1
    assert run("optimize", "dynamic_models.py:baked", "-o", "baked.onnx", *FREE) == 0
    assert run(*pair[:2], "baked.onnx", "--input", "2x3x8x12") == 1  # the file tells which sizes are free
    assert "on 'h=" in capsys.readouterr().out
    assert run("verify", "baked.onnx", "dynamic_models.py:net", *FREE) == 2
    assert "and baked.onnx is an ONNX file" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("command", "options"),
    [("optimize", ("-o", "fixed.onnx")), ("inspect", ()), ("split-head", ("-o", "fixed.onnx"))],
)
def test_a_size_that_the_model_fixes_is_said(
    command: str, options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command, "dynamic_models.py:fixed", *options, "--dynamic", "0.2=h") == 2
    assert not Path("fixed.onnx").exists()
    assert "the model fixes" in " ".join(capsys.readouterr().err.split())


def test_parts_have_free_sizes_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("optimize", "dynamic_models.py:fixed", "--parts", "--dynamic", "0.2=h") == 2
    assert "--dynamic cannot be had with --parts" in " ".join(capsys.readouterr().err.split())
