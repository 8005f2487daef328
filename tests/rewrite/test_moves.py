"""Two moves as one, against torch."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from graphsurgery.cost import axis_order
from graphsurgery.rewrite.moves import composed

aten = torch.ops.aten


def call(graph: fx.Graph, target: Any, source: fx.Node, *args: Any) -> fx.Node:
    node = graph.call_function(target, (source, *args))
    node.meta["val"] = target(source.meta["val"], *args)
    return node


def entry(shape: list[int]) -> fx.Node:
    node = fx.Graph().placeholder("x")
    node.meta["val"] = torch.arange(math.prod(shape)).reshape(shape)
    return node


@st.composite
def permutes(draw: st.DrawFn, rank: int) -> tuple[Any, ...]:
    order = draw(st.permutations(range(rank)))
    signed = [axis - rank * draw(st.booleans()) for axis in order]
    options: list[tuple[Any, ...]] = [(aten.permute.default, signed)]
    axes = st.integers(-rank, rank - 1)
    options.append((aten.transpose.int, draw(axes), draw(axes)))
    if rank == 2:
        options.append((aten.t.default,))
    return draw(st.sampled_from(options))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data(), st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_permute_of_permute(data: st.DataObject, shape: list[int]) -> None:
    x = entry(shape)
    inner = call(x.graph, *_with(data, x))
    outer = call(x.graph, *_with(data, inner))
    order = axis_order(inner)
    assert order is not None
    assert torch.equal(x.meta["val"].permute(order), inner.meta["val"])
    move = composed(outer, inner)
    assert move is not None
    assert torch.equal(move[0](x.meta["val"], move[1]), outer.meta["val"])


def _with(data: st.DataObject, source: fx.Node) -> tuple[Any, ...]:
    target, *args = data.draw(permutes(source.meta["val"].dim()))
    return (target, source, *args)


RESHAPES: list[tuple[Any, ...]] = [
    (aten.reshape.default, [4, -1]),
    (aten.reshape.default, [2, 2, 6]),
    (aten.flatten.using_ints, 0, 1),
    (aten.unsqueeze.default, 1),
    (aten.squeeze.default,),
]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.sampled_from(RESHAPES), st.sampled_from(RESHAPES))
def test_reshape_of_reshape(first: tuple[Any, ...], last: tuple[Any, ...]) -> None:
    x = entry([2, 1, 3, 4])
    inner = call(x.graph, first[0], x, *first[1:])
    outer = call(x.graph, last[0], inner, *last[1:])
    move = composed(outer, inner)
    assert move is not None
    assert torch.equal(move[0](x.meta["val"], move[1]), outer.meta["val"])


def test_a_permute_of_a_reshape_is_not_one_move() -> None:
    x = entry([2, 6])
    inner = call(x.graph, aten.reshape.default, x, [3, 4])
    assert composed(call(x.graph, aten.permute.default, inner, [1, 0]), inner) is None


def test_reading_bits_as_another_type_is_no_move() -> None:
    x = entry([2, 6])
    inner = call(x.graph, aten.view.dtype, x, torch.float64)
    assert composed(call(x.graph, aten.reshape.default, inner, [12]), inner) is None
