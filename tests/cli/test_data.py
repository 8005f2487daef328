"""`--data`: arrays from an .npz file or a folder of .npy files, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from commands import run

MODELS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.line = nn.Linear(6, 4)

    def forward(self, picture):
        return self.line(picture)

def net():
    torch.manual_seed(1)
    return Net().eval()
"""
INPUT = ("--input", "2x6")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "data_models.py"
    path.write_text(MODELS)
    return f"{path}:net"


def rows(count: int = 5) -> np.ndarray:
    return np.random.default_rng(3).normal(size=(count, 6)).astype(np.float32)


def test_an_npz_with_labels_is_run(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "d.npz", picture=rows(), label=np.arange(5))
    assert run("verify", model, model, *INPUT, "--data", str(tmp_path / "d.npz"), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["data_samples"] == 5
    assert any("label" in note for note in found["notes"])


def test_a_folder_is_run_up_to_the_limit(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "picture.npy", rows(70))
    assert run("optimize", model, *INPUT, "--data", str(tmp_path), "--data-limit", "40", "--json") == 0
    assert json.loads(capsys.readouterr().out)["verification"]["data_samples"] == 40


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"picture": rows().astype(np.float64)}, "is float64, expected float32"),
        ({"picture": rows() * np.nan}, "holds 30 NaN"),
        ({"other": rows(), "more": rows()}, "no array for the input 'picture'"),
        ({"picture": rows()[:0]}, "different numbers of samples, or none"),
        ({"picture": rows()[0, 0]}, "different numbers of samples, or none"),
        ({"picture": np.array([object()])}, "pickled objects are not loaded"),
    ],
    ids=["dtype", "NaN", "name", "empty", "scalar", "pickle"],
)
def test_what_cannot_be_used_is_one_sentence(
    model: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arrays: dict[str, np.ndarray],
    said: str,
) -> None:
    np.savez(tmp_path / "d.npz", **arrays)  # type: ignore[arg-type]  # numpy types its own keyword alone
    assert run("verify", model, model, *INPUT, "--data", str(tmp_path / "d.npz")) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_path_that_is_none(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04 cut off")
    for path in ("missing.npz", "cut.npz", ""):
        assert run("verify", model, model, *INPUT, "--data", str(tmp_path / path)) == 2
        assert "pickled" not in capsys.readouterr().err
