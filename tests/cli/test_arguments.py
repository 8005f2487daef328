"""MODEL, --input and output paths: read, or refused in one sentence."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from graphsurgery.cli.errors import UsageError, first_line, nearest
from graphsurgery.cli.inputs import example_inputs, parse_input
from graphsurgery.cli.loading import LoadedModel, load_model, reject_non_finite
from graphsurgery.cli.outputs import check_writable

MODELS = """
import torch
from torch import nn
from beside import WIDTH

instance = nn.Linear(WIDTH, 2)
number = 3

def plain():
    return nn.Linear(WIDTH, 2)

def with_inputs():
    return nn.Linear(WIDTH, 2), [torch.zeros(2, WIDTH)]

def raising():
    raise RuntimeError("no weights here. Fetch them first.")

def text():
    return "model"

def bad_inputs():
    return nn.Linear(WIDTH, 2), 4

def triple():
    return nn.Linear(WIDTH, 2), 4, 5

class Holder:
    build = staticmethod(plain)
"""


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("sys.path", ["unused", *__import__("sys").path])
    (tmp_path / "beside.py").write_text("WIDTH = 5\n")
    path = tmp_path / "models.py"
    path.write_text(MODELS)
    return path


@pytest.mark.parametrize("factory", ["plain", "instance", "Holder.build"])
def test_loads_a_factory_from_a_file(models: Path, factory: str) -> None:
    loaded = load_model(f"{models}:{factory}")
    assert isinstance(loaded.model, nn.Linear)
    assert loaded.model.in_features == 5
    assert loaded.example_inputs is None


def test_loads_inputs_with_the_model(models: Path) -> None:
    inputs = load_model(f"{models}:with_inputs").example_inputs
    assert isinstance(inputs, tuple)
    assert inputs[0].shape == (2, 5)


def test_loads_a_module_by_its_dotted_name() -> None:
    assert isinstance(load_model("torch.nn:Identity").model, nn.Identity)


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        ("plian", "has no factory 'plian'; did you mean 'plain'?"),
        ("raising", "raised RuntimeError: no weights here"),
        ("text", "returned a str; expected an nn.Module"),
        ("number", "is a int; expected a function"),
        ("bad_inputs", "returned example inputs of type int"),
        ("triple", "returned a tuple of 3; expected an nn.Module or (nn.Module, example inputs)"),
    ],
)
def test_refuses_a_factory(models: Path, factory: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_model(f"{models}:{factory}")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("model", "'model' is not understood"),
        (":factory", "is not understood"),
        ("nowhere/model.py:factory", "nowhere/model.py, which does not exist"),
        ("no_such_module:factory", "the module 'no_such_module', which cannot be found"),
        ("torch.no_such_part:factory", "the module 'torch.no_such_part', which cannot be found"),
        ("torch.nn:Linaer", "did you mean 'Linear'?"),
        ("nowhere.pt2", "nowhere.pt2 does not exist"),
    ],
)
def test_refuses_a_model_that_is_not_there(spec: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_model(spec)
    assert said in str(caught.value)


def test_refuses_a_file_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", list(__import__("sys").path))
    path = tmp_path / "broken.py"
    path.write_text("import a_module_that_is_not_installed\n")
    with pytest.raises(UsageError, match=r"importing .*broken\.py failed: ModuleNotFoundError"):
        load_model(f"{path}:factory")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_refuses_weights_that_are_not_finite(value: float) -> None:
    model = nn.Linear(3, 2)
    with torch.no_grad():
        model.weight[1, 2] = value
    with pytest.raises(UsageError, match=r"'weight' of here holds 1 of 6 values that are NaN or infinite"):
        reject_non_finite(LoadedModel(model), "here")


def test_lets_an_infinite_mask_through() -> None:
    """It stays as it is, and is looked at: one NaN in it, or the same values in a parameter, are refused."""
    model = nn.Linear(3, 2)
    mask = torch.full((2, 2), float("-inf"))
    model.register_buffer("mask", mask.clone())
    reject_non_finite(LoadedModel(model), "here")
    assert torch.equal(model.get_buffer("mask"), mask)

    model.get_buffer("mask")[0, 1] = float("nan")
    with pytest.raises(UsageError, match=r"'mask' of here holds 1 of 4 values"):
        reject_non_finite(LoadedModel(model), "here")
    model.register_buffer("mask", None)
    model.scores = nn.Parameter(mask)
    with pytest.raises(UsageError, match=r"'scores' of here holds 4 of 4 values"):
        reject_non_finite(LoadedModel(model), "here")


@pytest.mark.parametrize(
    ("text", "name", "shape", "dtype"),
    [
        ("1x3x8x8", "", (1, 3, 8, 8), None),
        ("7", "", (7,), None),
        ("1x16:int64", "", (1, 16), torch.int64),
        ("ids=2x4:bool", "ids", (2, 4), torch.bool),
    ],
)
def test_reads_an_input(text: str, name: str, shape: tuple[int, ...], dtype: torch.dtype | None) -> None:
    spec = parse_input(text)
    assert (spec.name, spec.shape, spec.dtype) == (name, shape, dtype)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1x3x", "is not understood"),
        ("1,3", "is not understood"),
        ("1x0x8", "size of 0"),
        ("1x3:flaot32", "did you mean 'float32'?"),
        ("1x3:quux", "expected one of float16"),
    ],
)
def test_refuses_an_input(text: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_input(text)
    assert said in str(caught.value)


def test_inputs_are_seeded_and_take_the_dtype_of_the_model() -> None:
    loaded = LoadedModel(nn.Linear(4, 2).double())
    (first,), (second,) = (example_inputs(["3x4"], loaded, "m") for _ in range(2))
    assert first.dtype == torch.float64
    assert torch.equal(first, second)


def test_integers_index_every_embedding() -> None:
    loaded = LoadedModel(nn.ModuleList([nn.Embedding(50, 4), nn.Embedding(3, 4)]))
    (ids,) = example_inputs(["20x20:int64"], loaded, "m")
    assert (int(ids.min()), int(ids.max())) == (0, 2)


def test_named_inputs_make_a_mapping() -> None:
    inputs = example_inputs(["a=1x2", "b=1x3:int64"], None, "m")
    assert {name: tuple(value.shape) for name, value in inputs.items()} == {"a": (1, 2), "b": (1, 3)}


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ([], "m brings no example inputs"),
        (["a=1x2", "1x3"], "name all of them or none"),
        (["a=1x2", "a=1x3"], "names 'a' twice"),
    ],
)
def test_refuses_a_set_of_inputs(texts: list[str], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        example_inputs(texts, LoadedModel(nn.Linear(2, 2)), "m")
    assert said in str(caught.value)


def test_a_program_may_bring_positional_and_keyword_inputs() -> None:
    class Sum(nn.Module):
        def forward(self, a: torch.Tensor, *, b: torch.Tensor) -> torch.Tensor:
            return a + b

    program = torch.export.export(Sum(), (torch.zeros(2),), {"b": torch.ones(2)})
    loaded = LoadedModel(program)
    assert loaded.program_brings_inputs
    assert example_inputs([], loaded, "m") is None
    assert len(example_inputs(["2", "2"], loaded, "m")) == 2


def test_inputs_of_the_command_line_replace_those_of_the_model() -> None:
    loaded = LoadedModel(nn.Linear(2, 2), torch.zeros(1, 2))
    assert example_inputs([], loaded, "m") is loaded.example_inputs
    assert example_inputs(["9x2"], loaded, "m")[0].shape == (9, 2)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
@pytest.mark.parametrize("option", ["-o", "--save", "--report"])
def test_refuses_to_replace_a_pipe(tmp_path: Path, option: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match=f"{option} .*pipe is a device or a pipe; name a regular file"):
        check_writable({option: tmp_path / "pipe"})
    assert (tmp_path / "pipe").is_fifo()


def test_finds_unwritable_outputs_beforehand(tmp_path: Path) -> None:
    check_writable({"-o": tmp_path / "a.onnx", "--save": None, "--report": tmp_path / "b.json"})
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    for path, said in (
        (tmp_path, "is a folder"),
        (tmp_path / "none" / "a.onnx", "does not exist"),
        (tmp_path / "file" / "a.onnx", "does not exist"),
    ):
        with pytest.raises(UsageError, match=said):
            check_writable({"-o": path})
    for option in ("MODEL", "--data"):
        with pytest.raises(UsageError, match=f"{option} and -o name the same file"):
            check_writable({"-o": tmp_path / "a"}, {option: tmp_path / "." / "a"})
    with pytest.raises(UsageError, match="-o and --report name the same file"):
        check_writable({"-o": tmp_path / "a", "--report": tmp_path / "a"})


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_finds_a_folder_without_write_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UsageError, match="Permission denied"):
        check_writable({"-o": tmp_path / "a.onnx"})


def test_messages_are_short() -> None:
    assert first_line(ValueError("first. second\nthird")) == "ValueError: first"
    assert first_line(KeyError()) == "KeyError"
    assert len(first_line(ValueError("x" * 999))) == 240
    assert nearest("fold-afine", ["fold-affine", "merge"]) == "; did you mean 'fold-affine'?"
    assert nearest("zzz", ["fold-affine"]) == ""
