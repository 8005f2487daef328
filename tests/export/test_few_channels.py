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
    """A 1 x 1 convolution whose channels come in blocks: from another convolution, through a scale."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.gate, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(self.first(x).sigmoid() * self.gate(x))
        return found


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
        pytest.param(Behind(), (2, 3, 20, 20), id="behind a convolution"),
        pytest.param(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Tanh()), (2, 3, 20, 20), id="behind the input"),
        pytest.param(TalkingHeads(shared=True), (2, LENGTH, 24), id="shared"),
    ],
)
def test_others_stay_convolutions(model: nn.Module, shape: tuple[int, ...], tmp_path: Path) -> None:
    counts = written(model, torch.randn(shape), tmp_path / "net.onnx", passes=())
    calls = sum(isinstance(part, nn.Conv2d) for part in model.modules())
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
