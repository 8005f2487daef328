"""1 x 1 convolutions of few channels behind a softmax or product, as one product: nothing is moved."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.export import Dim

import graphsurgery as gs
from graphsurgery.export import OnnxSession, exporter, node_counts

LENGTH = 20


class TalkingHeads(nn.Module):
    """As in CaiT: the scores of all heads mixed before the softmax and behind it."""

    def __init__(self, heads: int = 4, *, bias: bool = True, shared: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads = heads
        self.qkv = nn.Linear(6 * heads, 18 * heads)
        self.before = nn.Conv2d(heads, heads, 1, bias=bias)
        self.behind = self.before if shared else nn.Conv2d(heads, heads, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).reshape(x.shape[0], x.shape[1], 3, self.heads, 6).permute(2, 0, 3, 1, 4)
        query, key, value = parts.unbind(0)
        scores = self.before(query @ key.transpose(-2, -1) * 0.4).softmax(-1)
        mixed: Tensor = self.behind(scores) @ value
        return mixed.transpose(1, 2).flatten(2)


class Apart(nn.Module):
    """A 1 x 1 convolution of a softmax over positions, with other settings."""

    def __init__(
        self, channels: int, wide: int, *, stride: int = 1, groups: int = 1, padding: int = 0
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(channels, wide, 1, stride=stride, groups=groups, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.conv(x.softmax(-1))
        return found.tanh()


class Behind(nn.Module):
    """A 1 x 1 convolution behind others, whose channels come in blocks: at once, or through a product."""

    def __init__(self, gated: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)
        self.gate = nn.Conv2d(3, 4, 3) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        x = x.softmax(-1)
        found: Tensor = self.first(x)
        found = self.last(found if self.gate is None else found * self.gate(x))
        return found


class Mixed(nn.Module):
    """A 1 x 1 convolution behind one of the calls whose results have no blocks, and elementwise ones."""

    def __init__(self, source: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.source, self.conv = source, nn.Conv2d(4, 3, 1)
        self.line, self.norm = nn.Linear(16, 16), nn.LayerNorm(16)
        self.register_buffer("seen", torch.randn(16, 16) > 0)
        self.register_buffer("bias", torch.randn(4, 1, 16))

    def forward(self, x: Tensor) -> Tensor:
        match self.source:
            case "softmax":
                x = x.softmax(-1)
            case "linear":
                x = self.line(x)
            case "norm":
                x = self.norm(x)
            case "product":
                x = x @ x.transpose(-1, -2)
            case "permute":
                x = x.sigmoid().transpose(-1, -2)
            case "view":
                x = x.sigmoid().flatten(1).unflatten(1, (4, 16, 16))
        x = torch.where(self.seen, -x / 3, x * x - 1) + self.bias
        found: Tensor = self.conv(x)
        return found.tanh()


def written(model: nn.Module, x: Tensor, path: Path, **options: object) -> dict[str, int]:
    done = gs.optimize(model.eval(), x, verify="off", **options).export_onnx(path)  # type: ignore[arg-type]
    assert done.verdict is not None
    assert done.verdict.ok
    return dict(node_counts(path))


@pytest.mark.parametrize("heads", [4, 15])
@pytest.mark.parametrize("bias", [True, False])
def test_talking_heads_are_products(
    heads: int, bias: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = TalkingHeads(heads, bias=bias), torch.randn(2, LENGTH, 6 * heads)
    counts = written(model, x, tmp_path / "short.onnx")
    assert counts.get("Conv", 0) == 0
    assert counts["MatMul"] == 4
    assert counts.get("Add", 0) == 2 * bias
    monkeypatch.setattr(exporter, "few_channels_as_matmul", lambda _: 0)
    counts = written(model, x, tmp_path / "long.onnx")
    assert (counts["Conv"], counts["MatMul"]) == (2, 2)


@pytest.mark.parametrize(("channels", "wide"), [(3, 5), (5, 3), (1, 7), (7, 1)])
@pytest.mark.parametrize("size", [(16, 16), (13, 40)], ids=str)
def test_channels_and_sides_that_differ(
    channels: int, wide: int, size: tuple[int, int], tmp_path: Path
) -> None:
    counts = written(Apart(channels, wide), torch.randn(2, channels, *size), tmp_path / "net.onnx")
    assert counts.get("Conv", 0) == 0
    assert counts["MatMul"] == 1


@pytest.mark.parametrize("source", ["softmax", "linear", "norm", "product", "permute", "view"])
def test_elementwise_calls_between_change_nothing(source: str, tmp_path: Path) -> None:
    counts = written(Mixed(source), torch.randn(2, 4, 16, 16), tmp_path / "net.onnx", passes=())
    assert counts.get("Conv", 0) == 0
    assert counts["Where"] == 1
    assert counts["MatMul"] == 1 + (source == "product")


def test_an_output_keeps_its_name_shape_and_type(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    model = nn.Sequential(nn.Softmax(-1), nn.Conv2d(3, 5, 1)).eval()
    counts = written(model, torch.randn(2, 3, 16, 17), path)
    assert counts.get("Conv", 0) == 0
    proto = onnx.load(path)
    (output,) = proto.graph.output
    assert output.name == "output"
    kind = output.type.tensor_type
    assert kind.elem_type == onnx.TensorProto.FLOAT
    assert [dim.dim_param or dim.dim_value for dim in kind.shape.dim] == ["batch", 5, 16, 17]
    named = {value.name: value.type.tensor_type for value in proto.graph.value_info}
    (product,) = [node for node in proto.graph.node if node.op_type == "MatMul"]
    assert named[product.output[0]].elem_type == onnx.TensorProto.FLOAT


class SharedBias(nn.Module):
    """A 1 x 1 convolution of a softmax whose bias another call reads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 5, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        assert self.conv.bias is not None
        return self.conv(x.softmax(-1)).tanh(), x.mean() + self.conv.bias


def test_a_batch_of_another_size(tmp_path: Path) -> None:
    path, model = tmp_path / "net.onnx", Apart(3, 5)
    written(model, torch.randn(2, 3, 16, 17), path)
    session, exact = OnnxSession(path), model.double()
    for batch in (1, 2, 7):
        x = torch.randn(batch, 3, 16, 17)
        (found,) = session.run({session.input_names[0]: x}).values()
        # products on another runtime, in float32
        torch.testing.assert_close(found.double(), exact(x.double()).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        pytest.param(Apart(16, 4), (2, 16, 16, 16), id="a block of channels in"),
        pytest.param(Apart(4, 16), (2, 4, 16, 16), id="a block of channels out"),
        pytest.param(Apart(4, 4), (2, 4, 15, 17), id="small map"),
        pytest.param(Apart(4, 4, stride=2), (2, 4, 32, 32), id="stride"),
        pytest.param(Apart(4, 4, groups=2), (2, 4, 16, 16), id="groups"),
        pytest.param(Apart(4, 4, padding=1), (2, 4, 16, 16), id="padding"),
        pytest.param(Behind(gated=False), (2, 3, 20, 20), id="behind a convolution"),
        pytest.param(Behind(gated=True), (2, 3, 20, 20), id="behind a product of convolutions"),
        pytest.param(nn.Sequential(nn.Softmax(-1), nn.Conv2d(3, 4, 3)), (2, 3, 20, 20), id="3 x 3"),
        pytest.param(nn.Sequential(nn.Softmax(-1), nn.Conv2d(3, 4, (3, 1))), (2, 3, 20, 20), id="3 x 1"),
        pytest.param(nn.Sequential(nn.Softmax(-1), nn.Conv1d(3, 4, 1)), (2, 3, 400), id="sequence"),
        pytest.param(nn.Sequential(nn.Softmax(-1), nn.Conv3d(3, 4, 1)), (2, 3, 8, 8, 8), id="volume"),
        pytest.param(SharedBias(), (2, 3, 20, 20), id="shared bias"),
        pytest.param(Apart(3, 4).half(), (2, 3, 20, 20), id="half"),
        pytest.param(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Tanh()), (2, 3, 20, 20), id="behind the input"),
        pytest.param(TalkingHeads(shared=True), (2, LENGTH, 24), id="shared"),
    ],
)
def test_others_stay_convolutions(model: nn.Module, shape: tuple[int, ...], tmp_path: Path) -> None:
    x = torch.randn(shape, dtype=next(model.parameters()).dtype)
    counts = written(model, x, tmp_path / "net.onnx", passes=())
    calls = sum(isinstance(part, nn.modules.conv._ConvNd) for part in model.modules())
    assert counts["Conv"] == (2 if isinstance(model, TalkingHeads) else calls)


def test_a_free_height_stays_a_convolution(tmp_path: Path) -> None:
    counts = written(
        Apart(3, 5),
        torch.randn(2, 3, 16, 16),
        tmp_path / "net.onnx",
        dynamic_shapes=({0: Dim.AUTO, 2: Dim("height", min=2, max=64)},),
    )
    assert (counts["Conv"], counts.get("MatMul", 0)) == (1, 0)


def test_a_wrong_coefficient_in_the_product_is_different(tmp_path: Path) -> None:
    model, x, path = TalkingHeads().eval(), torch.randn(2, LENGTH, 24), tmp_path / "net.onnx"
    written(model, x, path)
    assert gs.verify(model, path, x).ok
    proto = onnx.load(path)
    matrix = next(value for value in proto.graph.initializer if list(value.dims) == [4, 4])
    array = numpy_helper.to_array(matrix).copy()
    array[2, 1] *= 1.01
    matrix.CopyFrom(numpy_helper.from_array(array, matrix.name))
    onnx.save(proto, path)
    assert not gs.verify(model, path, x).ok
