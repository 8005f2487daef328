"""Symbolic sizes bound to numbers, and which values are constant."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from graphsurgery.capture import capture
from graphsurgery.cost import op_name
from graphsurgery.values import Sizes, constant_nodes, tensor_meta


def graph_of(dynamic: bool) -> torch.fx.Graph:
    free = torch.export.Dim.DYNAMIC
    shapes = ({0: free, 2: free, 3: free},) if dynamic else None
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Flatten(2)).eval()
    return capture(model, (torch.randn(2, 3, 9, 12),), dynamic_shapes=shapes).graph


def test_a_dynamic_batch_is_one_per_sample_and_a_prime_for_analysis() -> None:
    graph = graph_of(dynamic=False)
    sizes = Sizes(graph)
    batch = tensor_meta(next(n for n in graph.nodes if n.op == "placeholder")).shape[0]
    assert len(sizes.batch) == 1
    assert sizes.others == ()
    assert (sizes.per_sample(batch), sizes.at(batch, 7)) == (1, 7)
    prime = sizes.prime(batch)
    assert all(prime % n for n in range(2, 2000))
    assert sizes.actual(prime * 12, 5) == 60


def test_sizes_behind_a_strided_conv_are_symbols_of_their_own() -> None:
    graph = graph_of(dynamic=True)
    sizes = Sizes(graph)
    conv = next(n for n in graph.nodes if op_name(n) == "conv2d")
    flat = next(n for n in graph.nodes if op_name(n) in ("flatten", "reshape"))
    height, width = (sizes.prime(n) for n in tensor_meta(conv).shape[2:])
    assert height != width
    assert sizes.prime(tensor_meta(flat).shape[2]) == height * width
    assert (sizes.actual(height, 1), sizes.actual(width, 1)) == (5, 6)
    assert sizes.actual(height * width * 4, 1) == 120


def test_a_size_of_another_graph_is_an_error() -> None:
    sizes = Sizes(graph_of(dynamic=False))
    conv = next(n for n in graph_of(dynamic=True).nodes if op_name(n) == "conv2d")
    with pytest.raises(KeyError, match="not a size of the graph"):
        sizes.prime(tensor_meta(conv).shape[2])


def test_constants_are_what_depends_on_parameters_and_literals_alone() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.rand(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.sqrt(self.scale + 1) + x.new_zeros(x.shape[0], 1)

    graph = capture(Model().eval(), (torch.randn(2, 4),)).graph
    names = {op_name(node) for node in constant_nodes(graph)}
    assert names >= {"get_attr", "add", "sqrt"}
    assert "mul" not in names
    assert "new_zeros" not in names, "its size depends on the batch"
