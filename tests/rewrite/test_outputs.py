"""A graph with other outputs takes and checks its arguments as before."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from graphsurgery.capture import capture
from graphsurgery.graph import copy_graph_module
from graphsurgery.rewrite.outputs import set_outputs


class Net(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(torch.tanh(x))


def test_a_captured_graph_returns_what_is_set() -> None:
    x = torch.randn(3, 4)
    gm = capture(Net(), (x,))
    other = copy_graph_module(gm)
    tanh, relu = (node for node in other.graph.nodes if node.op == "call_function")
    set_outputs(other, {"a": relu, "b": (tanh, None, 2)})
    other.recompile()
    assert list(other(x)) == ["a", "b"]
    assert torch.equal(other(x)["a"], Net()(x))
    assert torch.equal(other(x)["b"][0], torch.tanh(x))
    assert other(x)["b"][1:] == (None, 2)
    assert torch.equal(gm(x), Net()(x)), "the graph that it was copied of shares how outputs are put together"
    for graph in (gm, other):
        with pytest.raises(ValueError, match="4"):
            graph(torch.randn(3, 5))


def test_a_traced_graph_returns_what_is_set() -> None:
    x = torch.randn(3, 4)
    gm = fx.symbolic_trace(Net())
    set_outputs(gm, {"a": gm.graph.output_node().args[0]})
    gm.recompile()
    assert torch.equal(gm(x)["a"], Net()(x))
