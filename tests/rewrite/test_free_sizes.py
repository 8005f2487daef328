"""free_sizes: which sizes of the inputs come free, and who keeps them from it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from folding import Of, seeded
from torch import Tensor, fx, nn

from graphsurgery.capture import capture
from graphsurgery.cost import graph_cost, op_name
from graphsurgery.graph import copy_graph_module
from graphsurgery.rewrite.free_sizes import FixedSize, free_axes, free_sizes

PICTURE = torch.randn(2, 3, 8, 10, generator=torch.Generator().manual_seed(1))


def traced(function: Callable[..., Tensor]) -> tuple[fx.GraphModule, fx.Node]:
    """A graph of `function`, and the first convolution in it."""
    model = seeded(lambda: Of(function, conv=nn.Conv2d(3, 4, 3), map=torch.randn(4, 6, 8)))
    gm = capture(model, PICTURE)
    return gm, next(node for node in gm.graph.nodes if op_name(node) == "conv2d")


def test_height_and_width_come_free() -> None:
    gm, conv = traced(lambda m, x: torch.relu(m.conv(x)))
    work = copy_graph_module(gm)
    work_conv = next(node for node in work.graph.nodes if op_name(node) == "conv2d")
    free = free_sizes(work, {work_conv: (2, 3)})
    assert len(free) == 2
    for node in work.graph.nodes:
        if node.op in ("placeholder", "call_function"):
            assert free_axes(node, free) == (2, 3)
    assert [isinstance(size, int) for size in conv.meta["val"].shape] == [False, True, True, True]
    assert graph_cost(work) == graph_cost(gm), "counted at the example's size"


def test_larger_inputs_are_taken_and_smaller_ones_refused() -> None:
    gm, _ = traced(lambda m, x: torch.relu(m.conv(x)))
    work = copy_graph_module(gm)
    conv = next(node for node in work.graph.nodes if op_name(node) == "conv2d")
    free_sizes(work, {conv: (2, 3)})
    work.recompile()
    for run in (work, fx.Interpreter(work).run):
        assert run(torch.ones(3, 3, 9, 13)).shape == (3, 4, 7, 11)
        with pytest.raises(ValueError, match="the size 7 on axis 2, expected at least 8"):
            run(torch.ones(2, 3, 7, 10))
        with pytest.raises(ValueError, match="the size 4 on axis 1, expected 3"):
            run(torch.ones(2, 4, 9, 13))
    with pytest.raises(ValueError, match="the size 9 on axis 2, expected 8"):
        gm(torch.ones(3, 3, 9, 13))


@pytest.mark.parametrize(
    ("function", "culprit"),
    [
        (lambda m, x: m.conv(x) + m.map, "add"),
        (lambda m, x: m.conv(x).reshape(-1, 2, 2, 6, 8), "reshape"),
        (lambda m, x: m.conv(nn.functional.adaptive_avg_pool2d(x, (8, 10))), "conv2d"),
        (lambda m, x: m.conv(nn.functional.pixel_unshuffle(x, 2)[:, :3]), "pixel_unshuffle"),
    ],
    ids=["embedding", "reshape", "pool", "even-sizes-only"],
)
def test_the_call_that_needs_a_size_is_named(function: Callable[..., Tensor], culprit: str) -> None:
    gm, conv = traced(function)
    with pytest.raises(FixedSize, match=culprit) as caught:
        free_sizes(gm, {conv: (2, 3)})
    assert op_name(caught.value.node) == culprit
