"""The examples run from start to end, and their stored weights are what they claim."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

DIGITS = Path(__file__).parent.parent / "examples" / "digits"


@pytest.mark.slow
def test_the_digits_demo_holds(tmp_path: Path) -> None:
    command = [sys.executable, str(DIGITS / "demo.py"), "--out", "digits.onnx"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all three give the same answers" in done.stdout
    assert (tmp_path / "digits.onnx").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "files"),
    [
        pytest.param("two_heads", {"fc.onnx", "conv.onnx"}, id="two-heads"),
        pytest.param("pointwise", {"linear.onnx", "back.onnx"}, id="pointwise"),
        pytest.param("rounding", {"ones.onnx", "small.onnx"}, id="rounding"),
        pytest.param("collapse", {"network.onnx"}, id="collapse"),
    ],
)
def test_the_demo_holds(name: str, files: set[str], tmp_path: Path) -> None:
    command = [sys.executable, str(DIGITS.parent / name / "demo.py"), "--out", "files"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all checks hold" in done.stdout
    assert "WRONG" not in done.stdout
    assert {path.name for path in (tmp_path / "files").iterdir()} == files


def test_the_digits_weights_are_small_floats() -> None:
    path = DIGITS / "digits.safetensors"
    assert path.stat().st_size < 1_000_000
    dtypes = {str(tensor.dtype) for tensor in load_file(path).values()}
    assert dtypes == {"torch.float32", "torch.int64"}  # int64: the norms' counters of batches
