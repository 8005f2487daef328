"""One region by hand: every call of a small captured module, from its input to its output."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from graphsurgery.affine.certify import residual
from graphsurgery.affine.choice import options
from graphsurgery.affine.coefficients import Coefficients, fill
from graphsurgery.affine.region import Region, Scope
from graphsurgery.capture import capture


def region_of(model: nn.Module, x: torch.Tensor) -> Region:
    """All calls between a model's input and its (first) output as one region, whatever they cost.

    Raises:
        NoFold: a rule refuses.
    """
    scope = Scope(capture(model.eval(), (x,)))
    (entry,) = scope.gm.graph.find_nodes(op="placeholder")
    (output,) = scope.gm.graph.find_nodes(op="output")
    exit_ = output.args[0]
    exit_ = exit_[0] if isinstance(exit_, (tuple, list)) else exit_
    (entry,) = (node for node in scope.gm.graph.nodes if node.op == "placeholder")
    return Region(scope, entry, exit_, scope.axes(entry, exit_))


def filled(region: Region) -> Iterator[tuple[Coefficients, float]]:
    """Every form of a region with its coefficients and its residual."""
    for option in options(region):
        found = fill(region, option.form)
        yield found, residual(region, found.form, found.slots)
