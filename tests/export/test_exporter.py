"""ONNX files: names, a free batch, whole or not at all, compared with the original."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import graphsurgery as gs
from graphsurgery.errors import ExportError, RuntimeUnavailableError, VerificationError
from graphsurgery.export import OPSET, OnnxSession, export_onnx, load_model, node_counts


@dataclass(frozen=True)
class Info:
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    input_names: tuple[str, ...] = ("image",)
    output_names: tuple[str, ...] = ("logits",)
    dynamic_batch: bool = True


def image(rows: int = 1) -> Tensor:
    return torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def network() -> nn.Sequential:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4)
    norm.running_mean.normal_()  # type: ignore[union-attr]
    norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.GELU(), nn.Flatten(), nn.Linear(144, 5)).eval()


def wrong(network: nn.Sequential) -> nn.Sequential:
    other = copy.deepcopy(network)
    with torch.no_grad():
        other[0].weight[1, 1, 1, 1] *= 1.01  # type: ignore[index, operator]
    return other


def files(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_names_batch_opset_and_verdict(network: nn.Module, tmp_path: Path) -> None:
    result = export_onnx(network, Info((image(),)), tmp_path / "out.onnx")
    model = load_model(tmp_path / "out.onnx")
    assert [value.name for value in model.graph.input] == ["image"]
    assert [value.name for value in model.graph.output] == ["logits"]
    for value in (model.graph.input[0], model.graph.output[0]):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
    assert not any(node.op_type == "Cast" for node in model.graph.node)
    assert result.opset == OPSET == model.opset_import[0].version
    assert result.size_bytes == (tmp_path / "out.onnx").stat().st_size
    assert result.verdict is not None
    assert result.verdict.ok
    assert result.verdict.batch_sizes == (1, 2, 5)
    assert [verdict.candidate for verdict in result.verdicts] == [
        "onnxruntime out.onnx (not optimised)",
        "onnxruntime out.onnx (optimised)",
    ]
    assert not result.external_data
    assert files(tmp_path) == ["out.onnx"]
    assert node_counts(tmp_path / "out.onnx")["Conv"] == 1


def test_static_batch_keeps_the_sizes(network: nn.Module, tmp_path: Path) -> None:
    result = export_onnx(network, Info((image(3),), dynamic_batch=False), tmp_path / "out.onnx")
    model = load_model(tmp_path / "out.onnx")
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 3
    assert result.verdict is not None
    assert result.verdict.batch_sizes == (3,)


def test_external_data_lies_beside_the_file_and_is_replaced_with_it(
    network: nn.Module, tmp_path: Path
) -> None:
    info, path = Info((image(),)), tmp_path / "out.onnx"
    result = export_onnx(network, info, path, external_data=True, verify=False)
    assert result.external_data
    assert result.verdict is None
    assert files(tmp_path) == ["out.onnx", "out.onnx.data"]
    export_onnx(network, info, path, external_data=True)
    assert files(tmp_path) == ["out.onnx", "out.onnx.1.data"]
    export_onnx(network, info, path, verify=False)
    assert files(tmp_path) == ["out.onnx"]


@pytest.mark.parametrize("external", [False, True])
def test_a_file_that_differs_is_not_left_behind(
    network: nn.Sequential, tmp_path: Path, external: bool
) -> None:
    path = tmp_path / "out.onnx"
    path.write_bytes(b"old")
    with pytest.raises(VerificationError, match=r"onnxruntime out.onnx .* differs from torch Sequential"):
        export_onnx(wrong(network), Info((image(),)), path, reference=network, external_data=external)
    assert files(tmp_path) == ["out.onnx"]
    assert path.read_bytes() == b"old"


def test_keywords_several_inputs_and_outputs(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor, *, ids: Tensor) -> dict[str, Tensor]:
            y = self.layer(x) + ids[:, None]
            return {"logits": y, "classes": y.argmax(1)}

    torch.manual_seed(0)
    kwargs = {"x": torch.randn(2, 4), "ids": torch.tensor([3, 9])}
    info = Info((), kwargs, ("x", "ids"), ("logits", "classes"))
    result = export_onnx(Two().eval(), info, tmp_path / "two.onnx")
    assert result.verdict is not None
    assert [output.dtype for output in result.verdict.outputs] == ["float32", "int64"]
    model = load_model(tmp_path / "two.onnx")
    assert [value.name for value in model.graph.input] == ["x", "ids"]
    assert {v.type.tensor_type.shape.dim[0].dim_param for v in model.graph.input} == {"batch"}


class Named(nn.Module):
    """Inputs, outputs and a parameter under the names that calls of the graph have."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.Parameter(torch.tensor([0.5, -1.0, 2.0]))
        self.fc = nn.Linear(3, 3)

    def forward(self, add: Tensor) -> dict[str, Tensor]:
        first = self.fc(add + self.relu)
        return {"mul": torch.relu(first), "linear": first * 2, "relu": first.sigmoid()}


def test_outputs_may_have_names_of_calls_and_parameters(tmp_path: Path) -> None:
    torch.manual_seed(0)
    file = tmp_path / "out.onnx"
    result = gs.optimize(Named().eval(), torch.randn(2, 3), passes=[]).export_onnx(file)
    assert result.verdict is not None
    assert result.verdict.ok
    model = load_model(file)
    assert [value.name for value in model.graph.input] == ["add"]
    assert [value.name for value in model.graph.output] == ["mul", "linear", "relu"]


class Holed(nn.Module):
    """A mapping in which one value is no tensor, between two that are."""

    def __init__(self, between: object) -> None:
        super().__init__()
        self.first, self.last, self.between = nn.Linear(3, 4), nn.Linear(3, 4), between

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"first": self.first(x).relu(), "between": self.between, "last": self.last(x).sin()}


def test_a_none_among_the_outputs_takes_its_name_with_it(tmp_path: Path) -> None:
    model, x, file = Holed(None).eval(), torch.randn(2, 3), tmp_path / "out.onnx"
    result = gs.optimize(model, x).export_onnx(file)
    assert result.verdict is not None
    assert result.verdict.ok
    found = OnnxSession(file).run({"x": x})
    assert list(found) == ["first", "last"]
    # float32 on another runtime
    torch.testing.assert_close(found["last"], model(x)["last"].detach(), rtol=1e-5, atol=1e-6)


def test_a_number_among_the_outputs_is_declined_by_name(tmp_path: Path) -> None:
    result = gs.optimize(Holed(3).eval(), torch.randn(2, 3), verify="off")
    with pytest.raises(ExportError, match="its output 'between' is the number 3"):
        result.export_onnx(tmp_path / "out.onnx")


def test_more_names_than_outputs_are_an_error(network: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"2 names \(logits, more\) for 1 outputs"):
        export_onnx(network, Info((image(),), output_names=("logits", "more")), tmp_path / "out.onnx")


def test_outputs_with_the_name_of_an_input_have_one_of_their_own(tmp_path: Path) -> None:
    class Same(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            return {"x": x.relu(), "x_out": x + y, "y": x * 2}

    file = tmp_path / "out.onnx"
    result = gs.optimize(Same(), (torch.randn(2, 3), torch.randn(2, 3))).export_onnx(file)
    assert result.verdict is not None
    assert result.verdict.ok
    model = load_model(file)
    assert [value.name for value in model.graph.input] == ["x", "y"]
    assert [value.name for value in model.graph.output] == ["x_out_out", "x_out", "y_out"]


def test_what_cannot_be_translated_is_one_sentence_and_no_file(tmp_path: Path) -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if float(x.sum()) > 0 else x

    with pytest.raises(ExportError, match="Branches cannot be translated to ONNX") as caught:
        export_onnx(Branches(), Info((image(),)), tmp_path / "out.onnx")
    assert len(str(caught.value)) < 500
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "reason"), [("missing/out.onnx", "does not exist; create it first"), (".", "is a directory")]
)
def test_unwritable_paths(network: nn.Module, tmp_path: Path, name: str, reason: str) -> None:
    with pytest.raises(ExportError, match=reason):
        export_onnx(network, Info((image(),)), tmp_path / name)
    assert files(tmp_path) == []


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_not_replaced(network: nn.Module, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "out.onnx")
    with pytest.raises(ExportError, match="is a device or a pipe; name a regular file"):
        export_onnx(network, Info((image(),)), tmp_path / "out.onnx")
    assert files(tmp_path) == ["out.onnx"]
    assert (tmp_path / "out.onnx").is_fifo()


def test_folder_that_cannot_be_written(
    network: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(ExportError, match=r"cannot write .*out.onnx: Permission denied"):
        export_onnx(network, Info((image(),)), tmp_path / "out.onnx")


def test_no_runtime_for_the_dtype_is_not_passed(
    network: nn.Sequential, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> Any:
        raise RuntimeUnavailableError(f"onnxruntime cannot run {path}: no kernels")

    monkeypatch.setattr("graphsurgery.export.proof.NodeByNode", refuse)
    module, info = copy.deepcopy(network).to(torch.bfloat16), Info((image().to(torch.bfloat16),))
    with pytest.raises(VerificationError) as caught:
        export_onnx(module, info, tmp_path / "out.onnx")
    assert f"{tmp_path / 'out.onnx'}: " in str(caught.value)
    assert ".tmp" not in str(caught.value)
    assert files(tmp_path) == []
    assert export_onnx(module, info, tmp_path / "out.onnx", verify=False).verdict is None


def test_export_prints_nothing(network: nn.Module, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    export_onnx(network, Info((image(),)), tmp_path / "out.onnx", verify=False)
    assert capfd.readouterr() == ("", "")


def test_file_is_whole(network: nn.Module, tmp_path: Path) -> None:
    export_onnx(network, Info((image(),)), tmp_path / "out.onnx", external_data=True)
    onnx.checker.check_model(os.fspath(tmp_path / "out.onnx"), full_check=True)


class Picture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, stride=2), nn.Conv2d(4, 5, 1)

    def forward(self, picture: Tensor, mask: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(picture))) * mask.sum()


@pytest.mark.parametrize("batch", [None, Dim.DYNAMIC])
def test_sizes_that_were_made_free_stay_free(tmp_path: Path, batch: Any) -> None:
    torch.manual_seed(0)
    model, file = Picture().eval(), tmp_path / "out.onnx"
    free = {2: Dim.DYNAMIC, 3: Dim.DYNAMIC} | ({} if batch is None else {0: batch})
    shapes = {"picture": free, "mask": {1: Dim.DYNAMIC}}
    example = (torch.randn(2, 3, 9, 11), torch.rand(3, 4))
    gs.optimize(model, example, dynamic_shapes=shapes).export_onnx(file)
    named = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in load_model(file).graph.input
    }
    first = 2 if batch is None else "batch"
    assert named == {"picture": [first, 3, "picture_dim2", "picture_dim3"], "mask": [3, "mask_dim1"]}
    inputs = (torch.randn(2 if batch is None else 3, 3, 14, 8), torch.rand(3, 7))
    found = OnnxSession(file).run({"picture": inputs[0], "mask": inputs[1]})
    assert found["output"].shape == model(*inputs).shape
    verdict = gs.verify(model, file, inputs)  # the bound comes from the model's own rounding against float64
    assert verdict.ok, str(verdict)


def test_sizes_have_the_names_that_the_caller_gave(tmp_path: Path) -> None:
    n, h = Dim("n"), Dim("h")
    shapes = {"picture": {0: n, 2: 2 * h + 1, 3: Dim("width", min=5)}, "mask": {1: Dim("n_mask")}}
    file = tmp_path / "out.onnx"
    gs.optimize(
        Picture().eval(), (torch.randn(2, 3, 9, 11), torch.rand(3, 4)), dynamic_shapes=shapes
    ).export_onnx(file)
    graph = load_model(file).graph
    named = [
        [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    ]
    assert named[:2] == [["n", 3, "2*h + 1", "width"], [3, "n_mask"]]
    assert named[2][:3] == ["n", 5, "h"]
    assert "width" in named[2][3]


def test_no_source_path_is_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "out.onnx"
    gs.optimize(Picture().eval(), (image(), torch.rand(3, 4))).export_onnx(file)
    assert b"pkg.torch" not in file.read_bytes()
    assert os.fsencode(__file__) not in file.read_bytes()
    assert b"def forward" not in file.read_bytes()


class Unbound(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        return torch.relu(image.unbind(1)[0])


def test_the_batch_is_named_in_shapes_that_the_translation_has_frozen(tmp_path: Path) -> None:
    """torch's exporter freezes the shapes of the pieces of an unbind."""
    export_onnx(Unbound().eval(), Info((image(),)), tmp_path / "out.onnx")
    model = load_model(tmp_path / "out.onnx")
    values = [*model.graph.input, *model.graph.output, *model.graph.value_info]
    free = {dim.dim_param for value in values for dim in value.type.tensor_type.shape.dim} - {""}
    assert free == {"batch"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_experts_of_transformers_are_refused_with_the_way_out(dtype: torch.dtype, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
        use_cache=False,
    )
    model = transformers.MixtralForCausalLM(config).eval().to(dtype)
    tokens = {"input_ids": torch.randint(0, 50, (2, 6))}
    with pytest.raises(ExportError, match=r'set_experts_implementation\("batched_mm"\) before gs.optimize'):
        gs.optimize(model, tokens).export_onnx(tmp_path / "experts.onnx")
    model.set_experts_implementation("batched_mm")
    written = gs.optimize(model, tokens).export_onnx(tmp_path / "experts.onnx")
    assert written.verdict is not None
    assert written.verdict.ok
