"""What the tests of both swaps share."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphsurgery.affine.certify import LIMIT
from graphsurgery.capture import capture
from graphsurgery.cost import op_name
from graphsurgery.graph import capture_info, structural_hash
from graphsurgery.layout.settle import permutes
from graphsurgery.restore import restore
from graphsurgery.rewrite.aliases import same_layout
from graphsurgery.rewrite.contracts import Pass, PassResult
from graphsurgery.values import constant_nodes

MOVES = frozenset(
    ("reshape", "permute", "transpose", "contiguous", "clone", "expand", "squeeze", "unsqueeze", "getitem")
)


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """A network in evaluation mode whose vectors and running statistics are not trivial."""
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if "running_var" in name:
                value.copy_(torch.rand_like(value) + 0.5)
            elif value.is_floating_point() and value.dim() == 1:
                value.copy_(torch.randn_like(value) * 0.2 + (1.0 if name.endswith("weight") else 0.0))
    return model


def ops(gm: fx.GraphModule) -> list[str]:
    """The calls on live values, in order."""
    constant = constant_nodes(gm.graph)
    return [op_name(n) for n in gm.graph.nodes if n.op == "call_function" and n not in constant]


def work(gm: fx.GraphModule) -> list[str]:
    """The calls that do more than move."""
    return [name for name in ops(gm) if name not in MOVES]


def swap(item: Pass, model: nn.Module, x: Tensor) -> PassResult:
    """Swap in float64; compare at two batch sizes with the model; run the pass again."""
    model = copy.deepcopy(model).double()
    gm = capture(model, (x.double(),))
    before = structural_hash(gm)
    state = {name: value.clone() for name, value in gm.state_dict().items()}
    result = item.run(gm)
    assert structural_hash(gm) == before, "the pass changed the graph that it was given"
    assert bool(result.changes) is (structural_hash(result.graph_module) != before)
    restored = restore(result.graph_module)
    for batch in (1, 3) if capture_info(gm).dynamic_batch else (len(x),):
        shape = (batch, *x.shape[1:])
        y = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(batch))
        with torch.no_grad():
            expected, got, module = model(y), result.graph_module(y), restored(y)
        for a, b, c in zip(*map(_tuple, (expected, got, module)), strict=True):
            assert (b - a).abs().max() <= 1e-12 * a.abs().max()
            assert (c - a).abs().max() <= 1e-12 * a.abs().max()
            assert same_layout(a, b)
    for change in result.changes:
        assert change.residual is not None
        assert change.residual <= LIMIT
    same_weights(state, result.graph_module, reshaped=True)
    again = item.run(result.graph_module)
    assert not again.changes, "a second run found something"
    return result


def _tuple(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def same_weights(state: dict[str, Tensor], gm: fx.GraphModule, *, reshaped: bool = False) -> None:
    """Every weight of `state` is in `gm` bit for bit, under its name; maybe in another shape."""
    now = gm.state_dict()
    assert set(now) == set(state)
    for name, value in state.items():
        assert torch.equal(now[name].reshape(value.shape) if reshaped else now[name], value), name


def there_and_back(first: Pass, second: Pass, model: nn.Module, x: Tensor) -> tuple[PassResult, PassResult]:
    """Swap all layers, then those layers back: the same calls but for moves, no more permutes, same bits."""
    gm = capture(model, (x,))
    there = first.run(gm)
    assert there.changes
    back = second.run(there.graph_module)
    assert work(back.graph_module) == work(gm)
    assert len(permutes(back.graph_module)) <= len(permutes(gm))
    same_weights(gm.state_dict(), back.graph_module)
    return there, back


def swapped(result: PassResult) -> tuple[str, ...]:
    """Module paths of the layers that were exchanged."""
    return tuple(ref.module for change in result.changes if "->" in change.kind for ref in change.before)


def codes(result: PassResult) -> list[str]:
    """The codes of all refusals."""
    return [refusal.code for refusal in result.refusals]
