"""ONNX files on either side of a verification."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from graphsurgery.errors import VerificationError
from graphsurgery.export import OnnxSession, latency_ms, node_counts
from graphsurgery.verify import Baseline, Inputs, OnnxRunner, verify
from graphsurgery.verify.runners import match_feeds


class Net(nn.Module):
    """The torch twin of `write`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(2, 4, 3), nn.Linear(64, 5)

    def forward(self, image: Tensor) -> Tensor:
        y: Tensor = self.head(torch.relu(self.conv(image)).flatten(1))
        return y


def write(path: Path, net: Net, *, error: float = 0.0, output: str = "logits") -> Path:
    arrays = {
        "w": net.conv.weight.detach().numpy().copy(),
        "b": net.conv.bias.detach().numpy(),  # type: ignore[union-attr]
        "hw": net.head.weight.detach().numpy(),
        "hb": net.head.bias.detach().numpy(),
    }
    arrays["w"][1, 1, 1, 1] *= 1 + error
    nodes = [
        helper.make_node("Conv", ["image", "w", "b"], ["c"]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("Flatten", ["r"], ["f"]),
        helper.make_node("Gemm", ["f", "hw", "hb"], [output], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 2, 6, 6])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["batch", 5])],
        [numpy_helper.from_array(np.ascontiguousarray(a), name) for name, a in arrays.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def net() -> Net:
    return Net().eval()


def image() -> Tensor:
    return torch.randn(2, 2, 6, 6, generator=torch.Generator().manual_seed(1))


def test_a_batch_that_is_baked_into_a_file_is_seen_at_another_one_or_the_note_says_so(
    net: Net, tmp_path: Path
) -> None:
    """The file declares a free batch, and holds that of the example in a shape."""
    good = write(tmp_path / "good.onnx", net)
    model = onnx.load(good)
    flatten = next(node for node in model.graph.node if node.op_type == "Flatten")
    flatten.op_type = "Reshape"
    flatten.input.append("shape")
    model.graph.initializer.append(numpy_helper.from_array(np.array([2, 64]), "shape"))
    onnx.save(model, baked := tmp_path / "baked.onnx")
    said = "the batch is free, but 2 was the only size that was run"
    sides: list[tuple[object, object]] = [(net, baked), (baked, net), (good, baked)]
    for one, other in sides:
        verdict = verify(one, other, image())
        assert verdict.ok
        assert any(said in note for note in verdict.notes)
        assert not verify(one, other, image(), dynamic_batch=True).ok
    assert not any(said in note for note in verify(net, good, image(), dynamic_batch=True).notes)
    assert not any(said in note for note in verify(net, net, image()).notes)  # nothing says that it is free
    fixed = onnx.load(good)
    fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    onnx.save(fixed, tmp_path / "fixed.onnx")
    assert not any(said in note for note in verify(net, tmp_path / "fixed.onnx", image()).notes)


def test_torch_against_onnx_and_the_other_way_round(net: Net, tmp_path: Path) -> None:
    good, bad = write(tmp_path / "a.onnx", net), write(tmp_path / "b.onnx", net, error=1e-3)
    baseline = Baseline(net, image(), dynamic_batch=True)
    assert baseline.compare(good).ok
    assert not baseline.compare(bad).ok
    assert baseline.compare(str(good)).outputs[0].float64 is None
    swapped = verify(good, net, image(), dynamic_batch=True)
    assert swapped.ok
    assert "the other way round" in swapped.notes[0]
    assert swapped.anchor == "torch Net in float64"
    assert not verify(bad, net, image(), dynamic_batch=True).ok


def test_onnx_against_onnx_is_anchored_in_the_reference_evaluator(net: Net, tmp_path: Path) -> None:
    good, bad = write(tmp_path / "a.onnx", net), write(tmp_path / "b.onnx", net, error=1e-3)
    verdict = verify(good, good, {"image": image()}, dynamic_batch=True)
    assert verdict.ok
    assert verdict.anchor == "onnxruntime a.onnx in float64"
    assert verdict.outputs[0].native is not None
    assert 0 < verdict.outputs[0].native.reference_max_error < 1e-3  # type: ignore[operator]
    assert not verify(good, bad, image(), dynamic_batch=True).ok


def test_a_large_onnx_reference_has_no_anchor_and_says_so(
    net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graphsurgery.export.evaluator._MAX_MACS", 1.0)
    good, bad = write(tmp_path / "a.onnx", net), write(tmp_path / "b.onnx", net, error=1e-3)
    verdict = verify(good, good, image(), dynamic_batch=True)
    assert verdict.ok
    assert "no float64 anchor" in verdict.anchor
    assert any("bound from how far these move" in note for note in verdict.notes)
    assert not verify(good, bad, image(), dynamic_batch=True).ok


def test_output_names_of_two_files_must_agree(net: Net, tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.onnx", net), write(tmp_path / "b.onnx", net, output="scores")
    verdict = verify(a, b, image())
    assert not verdict.ok
    assert "outputs are called scores, expected logits" in verdict.reason


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "is a directory"),
        (lambda path: path.write_bytes(b"not a model" * 50), "cannot be read as an ONNX model"),
        (lambda path: path.write_bytes(b""), "holds no ONNX graph"),
    ],
    ids=["missing", "folder", "garbage", "empty"],
)
def test_files_that_are_no_models(net: Net, tmp_path: Path, make: object, reason: str) -> None:
    path = tmp_path / "bad.onnx"
    make(path)  # type: ignore[operator]
    with pytest.raises(VerificationError, match=reason) as caught:
        verify(net, path, image())
    assert "\n" not in str(caught.value)


def test_a_file_that_is_cut_off(net: Net, tmp_path: Path) -> None:
    path = write(tmp_path / "a.onnx", net)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(VerificationError):
        verify(net, path, image())


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        (image().double(), "is torch.float32, got torch.float64"),
        (image()[:, :1], "has shape"),
        ((image(), image()), "has 1 inputs .image., got 2"),
    ],
    ids=["dtype", "shape", "count"],
)
def test_inputs_that_do_not_fit_the_file(net: Net, tmp_path: Path, inputs: object, reason: str) -> None:
    path = write(tmp_path / "a.onnx", net)
    with pytest.raises(VerificationError, match=reason):
        verify(path, path, inputs)


def test_tensors_are_matched_by_name_by_keyword_and_else_in_order() -> None:
    a, b = torch.zeros(2), torch.ones(3)
    wanted = {"b": (torch.float32, ("n",)), "a": (torch.float32, (2,))}

    def feeds(graph: Any, inputs: Inputs, names: tuple[str, ...] | None = None) -> dict[str, int]:
        return {name: len(tensor) for name, tensor in match_feeds(graph, inputs, names, "file").items()}

    assert feeds(wanted, Inputs((a, b)), ("a", "b")) == {"b": 3, "a": 2}
    assert feeds(wanted, Inputs((), {"a": a, "b": b})) == {"b": 3, "a": 2}
    assert feeds({"b": wanted["b"]}, Inputs((a, b)), ("a", "b")) == {"b": 3}  # the file lacks one
    assert feeds(wanted, Inputs((b, a))) == {"b": 3, "a": 2}
    assert feeds(wanted, Inputs((b, a)), ("a",)) == {"b": 3, "a": 2}  # names of other inputs
    with pytest.raises(VerificationError, match=r"has shape \[2\], got \[3\]"):
        feeds(wanted, Inputs((a, b)))


def test_latencies_are_interleaved_medians(net: Net, tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.onnx", net), write(tmp_path / "b.onnx", net)
    for inputs in (image(), [image()], {"image": image()}):
        times = latency_ms([a, b], inputs, 3)
        assert len(times) == 2
        assert all(0 < time < 1000 for time in times)
    with pytest.raises(VerificationError, match="got 2 tensors"):
        latency_ms([a], [image(), image()])


def test_session_and_counts(net: Net, tmp_path: Path) -> None:
    path = write(tmp_path / "a.onnx", net)
    session = OnnxSession(path, optimised=False)
    assert session.inputs == {"image": (torch.float32, ("batch", 2, 6, 6))}
    with torch.no_grad():
        torch.testing.assert_close(session.run({"image": image()})["logits"], net(image()))
    assert node_counts(path) == {"Conv": 1, "Relu": 1, "Flatten": 1, "Gemm": 1}


def test_a_file_with_a_layer_norm_has_a_float64_anchor(tmp_path: Path) -> None:
    torch.manual_seed(2)
    arrays = {"s": torch.rand(6).numpy() + 0.5, "b": torch.randn(6).numpy()}
    graph = helper.make_graph(
        [helper.make_node("LayerNormalization", ["x", "s", "b"], ["y"], axis=-1, epsilon=1e-3, stash_type=1)],
        "norm",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 6])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.save(model, tmp_path / "norm.onnx")
    x = torch.randn(4, 6)
    verdict = verify(tmp_path / "norm.onnx", tmp_path / "norm.onnx", x)
    assert verdict.anchor == "onnxruntime norm.onnx in float64"
    norm = nn.LayerNorm(6, eps=1e-3).double()
    with torch.no_grad():
        norm.weight.copy_(torch.from_numpy(arrays["s"]))
        norm.bias.copy_(torch.from_numpy(arrays["b"]))
    double = OnnxRunner(tmp_path / "norm.onnx").float64()
    assert double is not None
    (found,) = double.run(Inputs((x,))).values()
    # the file's epsilon is a float32, 5e-8 off: of a variance near 1 that is 5e-11
    assert float((found - norm(x.double()).detach()).abs().max()) < 1e-9
