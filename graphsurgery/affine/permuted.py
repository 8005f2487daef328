"""The kernel of one Linear among calls that only move and scale: its own, rows and columns reordered."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import fx

from graphsurgery.affine import rules
from graphsurgery.affine.atoms import Axes
from graphsurgery.affine.forms import Form
from graphsurgery.affine.region import Region, Scope, is_heavy
from graphsurgery.affine.runner import linear_part, runner
from graphsurgery.cost import op_name
from graphsurgery.values import tensor_meta


def permuted_kernel(region: Region, form: Form) -> torch.Tensor | None:
    """`K[1, f, g]` of one Linear among calls that only move and scale; None for any other region."""
    if not _straight(region):
        return None
    heavy = [node for node in region.nodes if is_heavy(node)]
    if len(heavy) != 1 or op_name(heavy[0]) != "linear" or form.axes != region.axes:
        return None
    if any(atom.window is not None or (atom.carried and atom.varied) for atom in region.axes.atoms()):
        return None
    layer, index = heavy[0], region.nodes.index(heavy[0])
    before, after = region.nodes[:index], region.nodes[index + 1 :]
    walked = follow(region.scope, before), follow(region.scope, after)
    if any(axes is not None and not _moves_only(axes) for axes in walked):
        return None
    into, out = walked
    weight = region.scope.constant_value(layer.args[1])  # type: ignore[arg-type]  # a linear's weight is a node
    with torch.no_grad():
        if before and into is not None:
            weight = weight * _gain(region, before)[(0,) * (len(into.dims) - 1)]
            atoms = into.dims[-1]
            order = sorted(range(len(atoms)), key=lambda i: (atoms[i].axis, -atoms[i].stride))
            weight = weight[:, _reordered([a.size for a in atoms], order)]
        if after and out is not None:
            axis = len(tensor_meta(layer).shape) - 1
            found = [a for a in out.atoms() if a.axis == axis]
            by_stride = sorted(range(len(found)), key=lambda i: -found[i].stride)
            order = [by_stride.index(i) for i in range(len(found))]
            rows = _reordered([found[i].size for i in by_stride], order)
            atoms_out = out.atoms()
            gain = _gain(region, after).reshape([region.scope.actual(a.size, 1) for a in atoms_out])
            scale = gain[tuple(slice(None) if a.axis == axis else 0 for a in atoms_out)].flatten()
            weight = weight[rows] * scale[:, None]
    return weight.unsqueeze(0)


def follow(scope: Scope, nodes: Sequence[fx.Node]) -> Axes | None:
    """The axes of a stretch of calls on its own; None for an empty stretch."""
    if not nodes:
        return None
    return scope.axes(_entry(scope, nodes), nodes[-1])


def _moves_only(axes: Axes) -> bool:
    return not axes.gone and all(atom.carried for atom in axes.atoms())


def _gain(region: Region, nodes: Sequence[fx.Node]) -> torch.Tensor:
    """What a stretch that moves and scales makes of ones."""
    live = _entry(region.scope, nodes)
    ones = torch.ones([region.scope.actual(n, 1) for n in region.scope.shape(live)], dtype=torch.float64)
    return linear_part(runner(region.scope, live, nodes, 1), ones)


def _reordered(sizes: list[int], order: list[int]) -> torch.Tensor:
    return torch.arange(prod(sizes)).reshape(sizes).permute(order).flatten()


def _entry(scope: Scope, nodes: Sequence[fx.Node]) -> fx.Node:
    return rules.live_operands(nodes[0], scope.constant)[0]


def _straight(region: Region) -> bool:
    return all(rules.live_operand(node, region.scope.constant) is not None for node in region.nodes)
