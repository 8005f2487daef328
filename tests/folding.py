"""Fold a model and compare it with itself in float64, for the tests of known traps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from random_chains import warmed
from torch import Tensor, fx, nn

from graphsurgery.capture import capture
from graphsurgery.cost import graph_cost, op_name
from graphsurgery.graph import capture_info, structural_hash
from graphsurgery.passes import EliminateIdentity, FoldAffine
from graphsurgery.rewrite import PassResult

_LIMIT = 1e-10  # of the largest value of an output


class Of(nn.Module):
    """A module that computes `function(self, x)`; its parts are modules, parameters or tensors (buffers)."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """A model in evaluation mode, from one seed, with norms whose statistics are not trivial."""
    torch.manual_seed(0)
    model = build()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            if module.affine:
                warmed(module)
            else:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return model.eval()


def fold(model: nn.Module, x: Tensor, **options: Any) -> PassResult:
    """Fold in float64; compare at the batch of `x` and, where the batch is free, at two others; run again.

    No fold may be found wrong by its own certificate: a right answer that only a check saved is a bug too.
    """
    model = copy.deepcopy(model).double()
    gm = EliminateIdentity().run(capture(model, (x.double(),))).graph_module
    before = structural_hash(gm)
    result = FoldAffine(**options).run(gm)
    assert structural_hash(gm) == before, "the pass changed the graph that it was given"
    assert not {"certificate", "internal"} & set(codes(result)), result.refusals
    for batch in (1, 3, x.shape[0]) if capture_info(gm).dynamic_batch else (x.shape[0],):
        generator = torch.Generator().manual_seed(batch)
        y = torch.randn(batch, *x.shape[1:], dtype=torch.float64, generator=generator)
        assert_same(result.graph_module, model, y)
    assert not FoldAffine(**options).run(result.graph_module).changes, "a second run found something"
    assert graph_cost(result.graph_module).macs <= graph_cost(gm).macs
    return result


def assert_same(got: Callable[[Tensor], Any], wanted: Callable[[Tensor], Any], x: Tensor) -> None:
    """Both give the same outputs up to rounding in float64, and outputs that are worth comparing."""
    with torch.no_grad():
        pairs = list(zip(outputs(got(x)), outputs(wanted(x)), strict=True))
    for value, expected in pairs:
        assert value.shape == expected.shape
        assert value.dtype == expected.dtype
        largest = expected.abs().max()
        assert expected.numel() == 1 or expected.max() - expected.min() > 1e-3 * largest, "nearly constant"
        assert (value - expected).abs().max() <= _LIMIT * largest


def outputs(result: Any) -> tuple[Tensor, ...]:
    """The outputs of a model, one or several."""
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


def ops(result: PassResult | fx.GraphModule) -> list[str]:
    """The names of the calls of a graph, in order; what only moves constants is left out of no list."""
    gm = result.graph_module if isinstance(result, PassResult) else result
    return [op_name(node) for node in gm.graph.nodes if node.op == "call_function"]


def layers(result: PassResult | fx.GraphModule) -> list[str]:
    """The calls that multiply by weights or normalise."""
    heavy = ("conv", "linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "batch_norm")
    return [name for name in ops(result) if name.startswith(heavy)]


def codes(result: PassResult) -> list[str]:
    """The codes of all refusals."""
    return [refusal.code for refusal in result.refusals]
