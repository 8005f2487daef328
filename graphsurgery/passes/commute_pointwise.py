"""Commute pointwise layers with pools, means, interpolations and pads, to the side where they cost less.

Rule:      layer(mover(x)) == mover(layer(x)), whichever takes fewer multiplications, then less other work
Requires:  a layer that acts on features (1x1 convolution, Linear, batch norm in evaluation, constant scale
           and shift) and a call that acts on positions, with no axis in common (else no match); refused with:
           `several-users` a value between them is read elsewhere too;
           `shift` the layer adds something, and the call does not turn a map of one number into a map of that
           number (padded pool, zero pad, sum);
           `folds-instead` the layer saves more by folding into the heavy layer beside it;
           `not-finite` its weights hold NaN or infinity;  `certificate` both orders differ in float64
Preserves: signature, shapes, dtypes; values up to rounding. Weights and their names are not touched.
Source:    the mixed product rule (A x I)(I x B) = (I x B)(A x I) of Kronecker products
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import fx

from graphsurgery.affine.certify import LIMIT, SAMPLES, deviation, draw
from graphsurgery.affine.pointwise import Layer, Mover
from graphsurgery.affine.region import Scope
from graphsurgery.affine.runner import runner
from graphsurgery.affine.swaps import Swap, fold_lost, swaps
from graphsurgery.cost import FLOPS, Cost, node_cost, op_name
from graphsurgery.graph import annotate, copy_graph_module, origin
from graphsurgery.rewrite.contracts import Change, NodeRef, Pass, PassResult, Refusal
from graphsurgery.values import tensor_meta

__all__ = ["CommutePointwise"]


aten = torch.ops.aten


@dataclass(frozen=True)
class CommutePointwise(Pass):
    """Moves pointwise layers across calls that act on positions alone, where that is strictly cheaper.

    1. Layers before a call that leaves fewer positions (pool, mean, crop): behind it.
    2. Layers behind a call that makes more positions (interpolation, pad): before it.

    Heavy multiplications never rise; then `2 * macs + elementwise + moved` has to fall, or the number of
    calls. So no move is ever undone.
    """

    name: ClassVar[str] = "commute-pointwise"
    summary: ClassVar[str] = (
        "pointwise layers across pools, means, interpolations and pads to the cheaper side"
    )

    def run(self, gm: fx.GraphModule) -> PassResult:
        """See `Pass.run`."""
        if not any(swaps(Scope(gm))):
            return PassResult(gm)
        work = copy_graph_module(gm)
        changes: list[Change] = []
        while True:  # what moved may move on
            scope = Scope(work)
            refusals: list[Refusal] = []
            made = [change for found in swaps(scope) if (change := _settle(scope, found, refusals))]
            if not made:
                break
            changes += made
        if not changes:
            return PassResult(gm, (), tuple(refusals))
        work.graph.lint()
        work.recompile()
        return PassResult(work, tuple(changes), tuple(refusals))


# -- whether it pays


def _settle(scope: Scope, found: list[Swap], refusals: list[Refusal]) -> Change | None:
    """Make the swap that saves most and may be made; else say why the one that would save most may not."""
    paying: list[tuple[tuple[float, int], Swap, Cost, Cost]] = []
    for swap in found:
        before, after = _cost(scope, swap.nodes), _cost(scope, _sketch(scope, swap))
        gain = (FLOPS.score(after)[0] - FLOPS.score(before)[0], after.nodes - before.nodes)
        if after.macs <= before.macs and gain < (0, 0):
            paying.append((gain, swap, before, after))
    first: Refusal | None = None
    for gain, swap, before, after in sorted(paying, key=lambda item: item[0]):
        blocked = _blocked(scope, swap, int(-gain[0]))
        outcome = _move(scope, swap, before, after) if blocked is None else blocked
        if isinstance(outcome, Change):
            return outcome
        refs = tuple(NodeRef.of(node) for node in swap.nodes)
        first = first or Refusal(CommutePointwise.name, outcome[0], refs, outcome[1], before, after)
    if first is not None:
        refusals.append(first)
    return None


def _cost(scope: Scope, nodes: tuple[fx.Node, ...]) -> Cost:
    return sum((node_cost(node, scope.sizes) for node in nodes), Cost())


def _blocked(scope: Scope, swap: Swap, gain: int) -> tuple[str, str] | None:
    for node in swap.nodes[:-1]:
        if len(node.users) != 1:
            others = len(node.users) - 1
            return "several-users", f"{node.name!r} is read by {others} other call(s), which need it as it is"
    for mover in swap.movers:
        shifting = next((layer for layer in swap.layers if layer.shifts), None)
        if shifting is not None and not mover.keeps_constants:
            return (
                "shift",
                f"{shifting.node.name!r} adds a constant, which {mover.node.name!r} would not leave as it is",
            )
    beside, lost = fold_lost(scope, swap)
    if lost >= gain:
        return (
            "folds-instead",
            f"moving saves {gain:,} operations; beside {beside} the layer can fold, which saves {lost:,}",
        )
    return None


# -- making it


def _sketch(scope: Scope, swap: Swap) -> tuple[fx.Node, ...]:
    """The swapped calls in a graph of their own, to be counted."""
    graph = fx.Graph()
    stand_ins: dict[fx.Node, fx.Node] = {}

    def outside(node: fx.Node) -> fx.Node:
        if node not in stand_ins:
            stand_ins[node] = graph.placeholder(node.name)
            stand_ins[node].meta = node.meta
        return stand_ins[node]

    return _write(scope.gm, swap, graph, outside)


def _write(
    gm: fx.GraphModule, swap: Swap, graph: fx.Graph, outside: Callable[[fx.Node], fx.Node]
) -> tuple[fx.Node, ...]:
    """Write the swapped calls at the graph's insertion point; `outside` maps what they read."""
    made: list[fx.Node] = []
    value = outside(swap.entry)
    layers: tuple[Layer | Mover, ...] = swap.layers
    for part in (*swap.movers, *layers) if swap.layers_first else (*layers, *swap.movers):
        old = part.node
        reads = {part.live: value}
        node = graph.node_copy(old, lambda n: reads[n] if n in reads else outside(n))  # noqa: B023 (called here)
        node.meta = origin(old)
        if isinstance(part, Mover) and part.drops:
            node.args = (value, sorted(part.axes), swap.keeps_rank)
        annotate(gm, node)
        made.append(node)
        value = node
    wanted = swap.nodes[-1]
    if tensor_meta(value).dim() > tensor_meta(wanted).dim():
        sizes = [size if isinstance(size, int) else -1 for size in tensor_meta(wanted).shape]
        if sizes.count(-1) > 1:
            view = graph.call_function(aten.squeeze.dims, (value, swap.gone))
        else:
            view = graph.call_function(aten.reshape.default, (value, sizes))
        view.meta = origin(wanted) | {"val": wanted.meta["val"]}
        made.append(view)
    return tuple(made)


def _move(scope: Scope, swap: Swap, before: Cost, after: Cost) -> Change | tuple[str, str]:
    """Write the swap, compare both in float64, and keep one of them."""
    gm, old = scope.gm, swap.nodes
    exit_ = old[-1]
    with gm.graph.inserting_before(exit_):
        new = _write(gm, swap, gm.graph, lambda node: node)
    residual = _residual(scope, swap, new)
    outcome = _verdict(scope, swap, residual)
    if outcome is not None:
        for node in reversed(new):
            gm.graph.erase_node(node)
        return outcome
    refs = tuple(NodeRef.of(node) for node in old)
    new[-1].meta["val"] = exit_.meta["val"]
    exit_.replace_all_uses_with(new[-1])
    for node in reversed(old):
        gm.graph.erase_node(node)
    kind = "+".join(op_name(node) for node in old)
    layers, movers = (", ".join(op_name(part.node) for part in run) for run in (swap.layers, swap.movers))
    detail = f"{layers} {'behind' if swap.layers_first else 'before'} {movers}"
    return Change(
        CommutePointwise.name, kind, refs, tuple(map(NodeRef.of, new)), (), before, after, residual, detail
    )


def _verdict(scope: Scope, swap: Swap, residual: float) -> tuple[str, str] | None:
    if residual <= LIMIT:
        return None
    constants = {n for layer in swap.layers for n in layer.node.all_input_nodes if n in scope.constant}
    if not all(bool(torch.isfinite(scope.constant_value(node)).all()) for node in constants):
        return "not-finite", "its weights hold NaN or infinity"
    return (
        "certificate",
        f"the two orders differ by {residual:.1e} in float64, expected at most {LIMIT:.0e}; "
        "please report this",
    )


def _residual(scope: Scope, swap: Swap, new: tuple[fx.Node, ...]) -> float:
    """The certificate: both orders in float64 on random dense inputs at the real sizes."""
    wanted, got, positions = [], [], swap.positions
    for seed in range(SAMPLES):
        x = draw(scope, swap.entry, 2, seed)
        with torch.no_grad():
            wanted.append(runner(scope, swap.entry, swap.nodes, 2)(x))
            got.append(runner(scope, swap.entry, new, 2)(x))
        if (seed + 1) * prod(wanted[0].shape[axis] for axis in positions) >= SAMPLES:
            break
    return deviation(torch.stack(wanted), torch.stack(got), [0, *(axis + 1 for axis in positions)])
