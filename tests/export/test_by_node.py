"""Files in bfloat16, run node by node: what torch computes up to rounding, and wrong weights are caught."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import set_external_data
from torch import Tensor, nn

from graphsurgery.errors import RuntimeUnavailableError, VerificationError
from graphsurgery.export.by_node import NodeByNode, holds_bfloat16
from graphsurgery.export.sessions import OnnxSession
from graphsurgery.verify import Baseline
from graphsurgery.verify.runners import OnnxVariant

X = torch.tensor([1.5, -2.0], dtype=torch.bfloat16)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        weights = (q @ k.transpose(1, 2) / 4).float().softmax(-1).to(x.dtype)
        return self.out(weights @ v)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Tensor, Path]:
    torch.manual_seed(0)
    model, x = Attention().to(torch.bfloat16).eval(), torch.randn(2, 5, 16).to(torch.bfloat16)
    path = tmp_path_factory.mktemp("file") / "attention.onnx"
    torch.onnx.export(model, (x,), path, dynamo=True, external_data=True, verbose=False)
    return model, x, path


def test_outputs_are_those_of_torch(written: tuple[nn.Module, Tensor, Path]) -> None:
    model, x, path = written
    graph = NodeByNode(path)
    (name,) = graph.inputs
    (found,) = graph.run({name: x}).values()
    assert found.dtype == torch.bfloat16
    assert found.shape == x.shape
    verdict = Baseline(model, (x,), dynamic_batch=False).compare(OnnxVariant("by node", graph))
    assert verdict.ok, str(verdict)
    assert holds_bfloat16(path)


def test_nodes_that_do_the_same_share_a_session(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)), nn.Linear(8, 3))
    x = torch.randn(2, 8).to(torch.bfloat16)
    path = tmp_path / "chain.onnx"
    torch.onnx.export(model.to(torch.bfloat16).eval(), (x,), path, dynamo=True, verbose=False)
    graph = NodeByNode(path)
    (name,) = graph.inputs
    (found,) = graph.run({name: x}).values()
    nodes = onnx.load(path).graph.node
    assert len(graph._sessions) == len({node.op_type for node in nodes}) < len(nodes)
    torch.testing.assert_close(found, model(x))


def test_detects_wrong_weights(written: tuple[nn.Module, Tensor, Path], tmp_path: Path) -> None:
    model, x, path = written
    proto = onnx.load(path)
    weight = next(
        t for t in proto.graph.initializer if len(t.dims) == 2 and t.data_type == TensorProto.BFLOAT16
    )
    array = numpy_helper.to_array(weight)
    changed = (array.astype(np.float32) * 1.1).astype(array.dtype)
    weight.CopyFrom(numpy_helper.from_array(changed, weight.name))
    onnx.save(proto, tmp_path / "wrong.onnx")
    graph = NodeByNode(tmp_path / "wrong.onnx")
    assert not Baseline(model, (x,), dynamic_batch=False).compare(OnnxVariant("by node", graph)).ok


def test_no_file_without_bfloat16_is_taken_for_one(tmp_path: Path) -> None:
    path = tmp_path / "float32.onnx"
    torch.onnx.export(nn.Linear(3, 2).eval(), (torch.randn(1, 3),), path, dynamo=True, verbose=False)
    assert not holds_bfloat16(path)


def test_refuses_control_flow_and_unknown_names(tmp_path: Path) -> None:
    value = [helper.make_tensor_value_info("y", TensorProto.BFLOAT16, [2])]
    inner = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "branch", [], value)
    condition = helper.make_tensor_value_info("c", TensorProto.BOOL, [])
    given = helper.make_tensor_value_info("x", TensorProto.BFLOAT16, [2])
    node = helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)
    onnx.save(
        helper.make_model(helper.make_graph([node], "g", [condition, given], value)), tmp_path / "if.onnx"
    )
    with pytest.raises(RuntimeUnavailableError, match="operator If"):
        NodeByNode(tmp_path / "if.onnx")
    node = helper.make_node("Neg", ["z"], ["y"])
    onnx.save(helper.make_model(helper.make_graph([node], "g", [given], value)), tmp_path / "z.onnx")
    with pytest.raises(VerificationError, match="'z', which no node gives"):
        NodeByNode(tmp_path / "z.onnx").run({"x": torch.zeros(2, dtype=torch.bfloat16)})


def saved(
    path: Path, nodes: list[onnx.NodeProto], *weights: TensorProto, out: int = TensorProto.BFLOAT16
) -> Path:
    """A graph from `x` to `y`, of two bfloat16 numbers each."""
    given = [helper.make_tensor_value_info("x", TensorProto.BFLOAT16, [2])]
    found = [helper.make_tensor_value_info("y", out, None)]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
    graph = helper.make_graph(nodes, "g", given, found, list(weights))
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def test_operands_of_two_types_are_refused(tmp_path: Path) -> None:
    """Widened to float32 they would run, and the file does not: onnxruntime says the same of it."""
    weight = numpy_helper.from_array(np.ones(2, np.float32), "w")
    path = saved(tmp_path / "mixed.onnx", [helper.make_node("Add", ["x", "w"], ["y"])], weight)
    with pytest.raises(
        VerificationError, match=r"mixed\.onnx is no valid ONNX model: .*Add.* tensor\(float\)"
    ):
        NodeByNode(path)
    with pytest.raises(VerificationError, match="onnxruntime cannot load"):
        OnnxSession(path)


def test_a_type_that_is_not_the_declared_one_is_refused(tmp_path: Path) -> None:
    node = helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT)
    path = saved(tmp_path / "cast.onnx", [node])
    with pytest.raises(VerificationError, match=r"cast\.onnx is no valid ONNX model: .*Cast"):
        NodeByNode(path)
    assert NodeByNode(saved(path, [node], out=TensorProto.FLOAT)).run({"x": X})["y"].dtype == torch.float32


def test_a_value_of_unknown_type_is_refused(tmp_path: Path) -> None:
    nodes = [helper.make_node("Own", ["x"], ["t"], domain="own"), helper.make_node("Neg", ["t"], ["y"])]
    with pytest.raises(RuntimeUnavailableError, match="of which type 't' is, an output of Own"):
        NodeByNode(saved(tmp_path / "own.onnx", nodes))


def test_shapes_in_a_file_of_their_own_are_read(tmp_path: Path) -> None:
    """The type of what a Reshape gives follows only where its shape is known."""
    weight = numpy_helper.from_array(np.array([2, 1]), "s")
    set_external_data(weight, "data.bin")
    path = tmp_path / "model.onnx"
    nodes = [helper.make_node("Reshape", ["x", "s"], ["t"]), helper.make_node("Neg", ["t"], ["y"])]
    saved(path, nodes, weight)
    assert not onnx.load(path, load_external_data=False).graph.initializer[0].HasField("raw_data")
    assert torch.equal(NodeByNode(path).run({"x": X})["y"], -X[:, None])


@pytest.mark.parametrize("opset", [20, 22])
def test_a_type_that_the_opset_does_not_take_is_refused(tmp_path: Path, opset: int) -> None:
    """Convolutions take bfloat16 from opset 22 on; before, onnxruntime calls the file invalid."""
    weight = helper.make_tensor("w", TensorProto.BFLOAT16, [1, 1, 1], [2.0])
    given, found = (helper.make_tensor_value_info(n, TensorProto.BFLOAT16, [2, 1, 3]) for n in "xy")
    graph = helper.make_graph([helper.make_node("Conv", ["x", "w"], ["y"])], "g", [given], [found], [weight])
    path, x = tmp_path / "conv.onnx", torch.arange(6, dtype=torch.bfloat16).reshape(2, 1, 3)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10), path)
    if opset == 22:
        assert torch.equal(NodeByNode(path).run({"x": x})["y"], 2 * x)
        return
    with pytest.raises(VerificationError, match=r"Conv.*unsupported type.*a later opset \(22 for"):
        NodeByNode(path)
    with pytest.raises(VerificationError, match=r"Type 'tensor\(bfloat16\)'.*is invalid"):
        OnnxSession(path)
