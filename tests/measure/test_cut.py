"""Cuts: the same numbers as in the network, at the example's sizes, under names of their own."""

from __future__ import annotations

import pytest
import torch
from measuring import blocks
from torch import Tensor, fx, nn

import graphsurgery as gs
from graphsurgery.cost import op_name
from graphsurgery.export import OnnxSession
from graphsurgery.graph import structural_hash
from graphsurgery.measure import NotMeasured, OnnxTimer, cut

X = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0))


def named(gm: fx.GraphModule, *ops: str) -> list[str]:
    return [node.name for node in gm.graph.nodes if op_name(node) in ops]


def test_the_whole_graph_computes_what_the_model_does() -> None:
    model = blocks(1)
    gm = gs.capture(model, X)
    before = structural_hash(gm)
    found = cut(gm)
    assert structural_hash(gm) == before
    with torch.no_grad():
        assert torch.equal(found.gm(*found.inputs)[0], model(X))
    assert torch.equal(found.inputs[0], X)


def test_sizes_are_those_of_the_example_where_the_batch_is_free() -> None:
    class Flat(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x).reshape(x.shape[0] * 5, 32).relu().reshape(x.shape[0], 5, 32)

    gm = gs.capture(Flat().eval(), X)
    found = cut(gm, named(gm, "reshape", "relu"))
    assert [tuple(x.shape) for x in found.inputs] == [(3, 5, 32)]
    assert found.gm(*found.inputs)[0].shape == (3, 5, 32)
    assert all(
        isinstance(size, int)
        for node in found.gm.graph.nodes
        if "val" in node.meta and isinstance(node.meta["val"], Tensor)
        for size in node.meta["val"].shape
    )


def test_values_that_leave_are_outputs_and_parts_of_tuples_too() -> None:
    class Halves(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            a, b = torch.tanh(x).chunk(2, -1)
            return torch.relu(a) * b

    gm = gs.capture(Halves().eval(), X)
    split = [node.name for node in gm.graph.nodes if isinstance(node.meta.get("val"), (tuple, list))]
    found = cut(gm, split)
    outputs = found.gm(*found.inputs)
    assert [tuple(y.shape) for y in outputs] == [(3, 5, 16), (3, 5, 16)]


def test_equal_stretches_have_one_key_and_others_another() -> None:
    gm = gs.capture(blocks(2), X)
    first = [node.name for node in gm.graph.nodes if op_name(node) == "linear"]
    assert cut(gm, first[0:3]).key == cut(gm, first[6:9]).key
    assert cut(gm, first[0:3]).key != cut(gm, first[0:2]).key
    assert cut(gm, first[0:3]).key != cut(gs.capture(blocks(2), X[:2]), first[0:3]).key
    assert cut(gm, first[0:1]).key != cut(gs.capture(blocks(2).double(), X.double()), first[0:1]).key


def test_constants_come_along() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.scale = nn.Parameter(torch.randn(8, 32)), nn.Parameter(torch.randn(8, 1))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(nn.functional.linear(x, self.weight * self.scale))

    torch.manual_seed(0)
    model = Scaled().eval()
    gm = gs.capture(model, X)
    found = cut(gm, named(gm, "linear"))
    assert len(found.inputs) == 1
    with torch.no_grad():
        wanted = nn.functional.linear(found.inputs[0], model.weight * model.scale)
        assert torch.equal(found.gm(*found.inputs)[0], wanted)


def test_refuses_a_cut_without_values() -> None:
    with pytest.raises(NotMeasured, match="none of its calls"):
        cut(gs.capture(blocks(1), X), ["no_such_call"])


def test_runs_on_onnxruntime_and_gives_the_same() -> None:
    gm = gs.capture(blocks(1), X)
    found = cut(gm, named(gm, "linear")[:3])
    timer = OnnxTimer()
    timing = timer(found, found, 1, 2)
    assert len(timing.ratios) == 2
    session = OnnxSession(timer._file(found), threads=1)
    feeds = dict(zip(session.input_names, found.inputs, strict=True))
    with torch.no_grad():
        for got, wanted in zip(session.run(feeds).values(), found.gm(*found.inputs), strict=True):
            assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()
