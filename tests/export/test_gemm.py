"""Linear layers on several axes as one product each: fewer nodes, the same numbers."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

import graphsurgery as gs
from graphsurgery.export import OnnxSession, exporter, node_counts
from graphsurgery.export.evaluator import macs
from graphsurgery.export.sessions import read_model


def two() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 6, bias=False), nn.Tanh(), nn.Linear(6, 3))


def run(path: Path, *inputs: Tensor) -> Tensor:
    session = OnnxSession(path)
    (found,) = session.run(dict(zip(session.input_names, inputs, strict=True))).values()
    return found


@pytest.mark.parametrize("shape", [(2, 4, 6), (2, 3, 4, 6), (1, 1, 6)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_linear_with_a_bias_is_one_product(
    shape: tuple[int, ...], dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = two().to(dtype).eval(), tmp_path / "short.onnx"
    result = gs.optimize(model, torch.randn(shape, dtype=dtype), verify="off")
    done = result.export_onnx(path)
    assert done.verdict is not None
    assert done.verdict.ok
    short = node_counts(path)
    assert (short["Gemm"], short["MatMul"], short.get("Add", 0)) == (2, 1, 0)
    monkeypatch.setattr(exporter, "linears_as_gemm", lambda _: 0)
    result.export_onnx(tmp_path / "long.onnx", verify=False)
    long = node_counts(tmp_path / "long.onnx")
    assert (long.get("Gemm", 0), long["MatMul"], long["Add"]) == (0, 3, 2)
    for batch in (1, 2, 7):
        x = torch.randn(batch, *shape[1:], dtype=dtype)
        found = run(path, x)
        assert found.shape == (*x.shape[:-1], 3)
        # products on another runtime, in the model's dtype
        torch.testing.assert_close(found, model(x).detach(), rtol=1e-5, atol=1e-6)


def test_a_wrong_bias_in_the_product_is_different(tmp_path: Path) -> None:
    model, x, path = two().eval(), torch.randn(2, 4, 6), tmp_path / "net.onnx"
    gs.optimize(model, x, verify="off").export_onnx(path)
    proto = onnx.load(path)
    product = next(node for node in proto.graph.node if node.op_type == "Gemm")
    bias = next(value for value in proto.graph.initializer if value.name == product.input[2])
    array = numpy_helper.to_array(bias).copy()
    array[1] += 1e-2
    bias.CopyFrom(numpy_helper.from_array(array, bias.name))
    onnx.save(proto, tmp_path / "wrong.onnx")
    assert gs.verify(model, path, x).ok
    assert not gs.verify(model, tmp_path / "wrong.onnx", x).ok


def test_two_free_sizes_keep_the_product_as_it_was(tmp_path: Path) -> None:
    free = {0: torch.export.Dim("n"), 1: torch.export.Dim("s")}
    result = gs.optimize(two().eval(), torch.randn(2, 4, 6), dynamic_shapes=(free,))
    done = result.export_onnx(tmp_path / "free.onnx")
    assert done.verdict is not None
    assert done.verdict.ok
    assert node_counts(tmp_path / "free.onnx")["MatMul"] == 3
    x = torch.randn(3, 9, 6)
    torch.testing.assert_close(
        run(tmp_path / "free.onnx", x), result.module(x).detach(), rtol=1e-5, atol=1e-6
    )  # as above


def test_what_else_reads_the_product_keeps_it(tmp_path: Path) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(5))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            product = x @ self.weight
            return (product + self.bias).relu(), product.tanh(), (x.sin() @ self.weight) + self.bias[:1]

    torch.manual_seed(0)
    model, x = Both().eval(), torch.randn(2, 4, 6)
    done = gs.optimize(model, x).export_onnx(tmp_path / "both.onnx")
    assert done.verdict is not None
    assert done.verdict.ok
    assert "Gemm" not in node_counts(tmp_path / "both.onnx")


@pytest.mark.parametrize("sizes", [(4, 6), (3, 4, 6)], ids=str)
def test_the_cost_of_a_product_on_a_view_is_known(sizes: tuple[int, ...], tmp_path: Path) -> None:
    """The view leaves the number of rows open, of which there are as many as positions in one sample."""
    gs.optimize(two().eval(), torch.randn(2, *sizes)).export_onnx(tmp_path / "net.onnx")
    positions = 1.0
    for size in sizes[:-1]:
        positions *= size
    model, cost = read_model(tmp_path / "net.onnx"), positions * (6 * 5 + 5 * 6 + 6 * 3)
    assert macs(model) == cost
    for tensor in model.graph.initializer:  # as some exporters write weights
        model.graph.node.insert(0, onnx.helper.make_node("Constant", [], [tensor.name], value=tensor))
    del model.graph.initializer[:]
    assert macs(model) == cost


def test_products_of_integers_stay(tmp_path: Path) -> None:
    """onnxruntime has no Gemm of integers."""

    class Counts(nn.Module):
        weight: Tensor
        shift: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", torch.arange(12).view(4, 3))
            self.register_buffer("shift", torch.tensor([5, 6, 7]))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight + self.shift

    model, x = Counts().eval(), torch.arange(24).view(2, 3, 4)
    done = gs.optimize(model, x).export_onnx(tmp_path / "counts.onnx")
    assert done.verdict is not None
    assert done.verdict.ok
    assert torch.equal(run(tmp_path / "counts.onnx", x), model(x))


def test_sizes_of_zero_keep_the_product(tmp_path: Path) -> None:
    """A view takes a zero for the size that was there, and cannot work one out beside a zero."""

    class Empty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.of_none, self.to_none = nn.Parameter(torch.empty(0, 3)), nn.Parameter(torch.empty(6, 0))
            self.shift, self.nothing = (
                nn.Parameter(torch.tensor([1.0, 2.0, 3.0])),
                nn.Parameter(torch.empty(0)),
            )

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            shifted = x[..., :0].tanh() @ self.of_none + self.shift
            return shifted.relu(), torch.cat([x.sin() @ self.to_none + self.nothing, x], -1)

    done = gs.optimize(Empty().eval(), torch.randn(2, 4, 6)).export_onnx(tmp_path / "empty.onnx")
    assert done.verdict is not None
    assert done.verdict.ok
    assert "Gemm" not in node_counts(tmp_path / "empty.onnx")
    session = OnnxSession(tmp_path / "empty.onnx")
    shifted, same = session.run({session.input_names[0]: torch.ones(3, 4, 6)}).values()
    assert torch.equal(shifted, torch.tensor([1.0, 2.0, 3.0]).expand(3, 4, 3))
    assert torch.equal(same, torch.ones(3, 4, 6))
