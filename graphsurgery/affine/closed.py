"""Closed forms: coefficients that need no probing, for regions with one layer.

One layer with scales and shifts around it: with `y = c * (W (a * x + b) + e) + d`, the weight is
`diag(c) W diag(a)` (rows and columns of the layer's weight scaled) and, where nothing reads a border, the
bias is `c * (W b + e) + d`. The diagonals are read off by running the calls before and after the layer on
zeros and ones, one element for each channel.

One Linear among views, permutes and scales (`permuted_kernel`): the same, with rows and columns reordered as
the axes say.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import fx

from graphsurgery.affine import rules
from graphsurgery.affine.atoms import Axes
from graphsurgery.affine.forms import Form
from graphsurgery.affine.region import Region, Scope, is_heavy, runner
from graphsurgery.cost import op_name
from graphsurgery.values import is_tensor, tensor_meta

_ELEMENTWISE = frozenset({"mul", "div", "neg", "add", "sub", "rsub", "batch_norm"})
_PLAIN = frozenset({"dropout", "feature_dropout", "alias", "clone", "contiguous", "detach", "_to_copy", "to"})


def closed_form(region: Region, form: Form) -> dict[str, torch.Tensor] | None:
    """The slots of a form in closed form, or None where the region is not one layer between diagonals."""
    if not _straight(region):
        return None
    heavy = [node for node in region.nodes if is_heavy(node)]
    if len(heavy) != 1 or form.kind not in ("linear", "conv1d", "conv2d", "conv3d"):
        return None
    layer = heavy[0]
    channel = _channel_axis(layer)
    index = region.nodes.index(layer)
    before, after = region.nodes[:index], region.nodes[index + 1 :]
    if channel is None or not all(_along(region, node, channel) for node in (*before, *after)):
        return None
    if form.axes != region.axes or any(
        type(step).__name__ in ("Reshape", "Permute", "Pad") for step in form.steps
    ):
        return None
    if "shift" in form.slots or (before and "bias" in form.slots and _reads_outside(form)):
        return None
    weight = region.scope.constant_value(layer.args[1])  # type: ignore[arg-type]  # a node, as in _channel_axis
    if len(form.slots["weight"]) != weight.dim():
        return None
    bias = _bias(region, layer, weight.shape[0])
    if before:
        a, b = _diagonal(region, before, layer.all_input_nodes[0], channel, _inputs(layer, weight))
        bias = bias + (weight * _columns(weight, b)).flatten(1).sum(1)
        weight = weight * _columns(weight, a)
    if after:
        c, d = _diagonal(region, after, layer, channel, weight.shape[0])
        bias = c * bias + d
        weight = weight * c.reshape(-1, *[1] * (weight.dim() - 1))
    if weight.shape != torch.Size(form.slots["weight"]):
        return None
    return {"weight": weight, "bias": bias} if "bias" in form.slots else {"weight": weight}


def _channel_axis(layer: fx.Node) -> int | None:
    name = op_name(layer)
    if not isinstance(layer.args[1], fx.Node):
        return None
    if name == "linear":
        return len(tensor_meta(layer).shape) - 1
    return 1 if name in ("conv1d", "conv2d", "conv3d") else None


def _along(region: Region, node: fx.Node, channel: int) -> bool:
    """Whether a call scales and shifts along the channel axis only."""
    name = op_name(node)
    if name in _PLAIN:
        return True
    if name not in _ELEMENTWISE:
        return False
    if name == "batch_norm":
        return channel == 1
    rank = len(tensor_meta(node).shape)
    for operand in node.all_input_nodes:
        if operand in region.scope.constant:
            shape = region.scope.shape(operand)
            if any(n != 1 and rank - len(shape) + i != channel for i, n in enumerate(shape)):
                return False
    return True


def _reads_outside(form: Form) -> bool:
    return any(atom.window is not None and atom.window.outside for atom in form.axes.atoms())


def _inputs(layer: fx.Node, weight: torch.Tensor) -> int:
    groups = int(layer.args[6]) if op_name(layer) != "linear" and len(layer.args) > 6 else 1  # type: ignore[arg-type]  # an int by the schema
    return weight.shape[1] * groups


def _columns(weight: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """A number for each input channel, in a shape that broadcasts over the weight (grouped: by rows)."""
    per_group = weight.shape[1]
    groups = values.numel() // per_group
    rows = values.reshape(groups, per_group)
    if groups > 1:
        rows = rows.repeat_interleave(weight.shape[0] // groups, 0)
    return rows.reshape(*rows.shape, *[1] * (weight.dim() - 2))


def _bias(region: Region, layer: fx.Node, size: int) -> torch.Tensor:
    bias = layer.args[2] if len(layer.args) > 2 else layer.kwargs.get("bias")
    if isinstance(bias, fx.Node):
        return region.scope.constant_value(bias)
    return torch.zeros(size, dtype=torch.float64)


def _diagonal(
    region: Region, nodes: tuple[fx.Node, ...], source: fx.Node, channel: int, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift of a stretch of calls, one number for each channel."""
    shape = [1] * len(tensor_meta(source).shape)
    shape[channel] = size
    with torch.no_grad():
        run = runner(region.scope, _entry(region.scope, nodes), nodes, 1)
        shift = run(torch.zeros(shape, dtype=torch.float64))
        scale = run(torch.ones(shape, dtype=torch.float64)) - shift
    return scale.flatten(), shift.flatten()


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
    live = next(o for o in nodes[0].all_input_nodes if o not in scope.constant and is_tensor(o))
    axes = Axes.entry(scope.shape(live), scope.primes)
    for node in nodes:
        axes = rules.apply(rules.Step(node, live, axes, scope.sizes))
        live = node
    return axes


def _moves_only(axes: Axes) -> bool:
    return not axes.gone and all(atom.carried for atom in axes.atoms())


def _gain(region: Region, nodes: Sequence[fx.Node]) -> torch.Tensor:
    """What a stretch that moves and scales makes of ones."""
    live = next(o for o in nodes[0].all_input_nodes if o not in region.scope.constant and is_tensor(o))
    ones = torch.ones([region.scope.actual(n, 1) for n in region.scope.shape(live)], dtype=torch.float64)
    run = runner(region.scope, _entry(region.scope, nodes), nodes, 1)
    return run(ones) - run(torch.zeros_like(ones))


def _reordered(sizes: list[int], order: list[int]) -> torch.Tensor:
    return torch.arange(prod(sizes)).reshape(sizes).permute(order).flatten()


def _entry(scope: Scope, nodes: Sequence[fx.Node]) -> fx.Node:
    return rules.live_operands(nodes[0], scope.constant)[0]


def _straight(region: Region) -> bool:
    return all(rules.live_operand(node, region.scope.constant) is not None for node in region.nodes)
