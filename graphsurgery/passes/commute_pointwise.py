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

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
from torch import fx

from graphsurgery.affine.certify import LIMIT, deviation
from graphsurgery.affine.choice import score
from graphsurgery.affine.pointwise import Layer, Mover, read_layer, read_mover
from graphsurgery.affine.region import Scope, is_heavy
from graphsurgery.affine.replay import draw, replay
from graphsurgery.cost import Cost, node_cost, op_name
from graphsurgery.graph import annotate, copy_graph_module, fake_mode
from graphsurgery.rewrite.contracts import Change, NodeRef, Pass, PassResult, Refusal
from graphsurgery.values import tensor_meta

__all__ = ["CommutePointwise"]

_LONGEST = 8  # layers, or movers, that change places at once
_SAMPLES = 8  # least number of positions over which the certificate takes a feature's scale
_KEPT = ("stack_trace", "nn_module_stack", "source_fn_stack")

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
        work = copy_graph_module(gm)
        changes: list[Change] = []
        while True:
            scope = Scope(work)
            refusals: list[Refusal] = []
            change = next(filter(None, (_settle(scope, found, refusals) for found in _places(scope))), None)
            if change is None:
                break
            changes.append(change)
        if not changes:
            return PassResult(gm, (), tuple(refusals))
        work.graph.lint()
        work.recompile()
        return PassResult(work, tuple(changes), tuple(refusals))


@dataclass(frozen=True)
class _Swap:
    """Layers and movers that follow each other.

    Attributes:
        layers: neighbours, in graph order.
        movers: neighbours, in graph order.
        layers_first: which of them comes first now.
    """

    layers: tuple[Layer, ...]
    movers: tuple[Mover, ...]
    layers_first: bool

    @property
    def entry(self) -> fx.Node:
        return self.layers[0].live if self.layers_first else self.movers[0].live

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        layers = tuple(layer.node for layer in self.layers)
        movers = tuple(node for mover in self.movers for node in mover.nodes)
        return layers + movers if self.layers_first else movers + layers


# -- what may change places


def _places(scope: Scope) -> Iterator[list[_Swap]]:
    """For every mover, all swaps in which it touches the layers."""
    for node in list(scope.gm.graph.nodes):
        mover = read_mover(scope, node)
        if mover is None:
            continue
        yield list(_swaps_behind(scope, mover))
        for user in mover.node.users:
            yield list(_swaps_before(scope, mover, user))


def _swaps_behind(scope: Scope, mover: Mover) -> Iterator[_Swap]:
    """Layers that end at the mover, to go behind it and behind the movers that follow it."""
    movers = [mover]
    while len(movers) < _LONGEST and not movers[-1].drops and len(movers[-1].node.users) == 1:
        following = next(iter(movers[-1].node.users))
        behind = read_mover(scope, following)
        if behind is None and len(following.users) == 1:  # a view that a mean reads
            behind = read_mover(scope, next(iter(following.users)))
        if behind is None or behind.live is not movers[-1].node:
            break
        movers.append(behind)
    layers: list[Layer] = []
    value = mover.live
    while len(layers) < _LONGEST:
        layer = read_layer(scope, value)
        if layer is None:
            return
        layers.insert(0, layer)
        for count in range(1, len(movers) + 1):
            swap = _Swap(tuple(layers), tuple(movers[:count]), True)
            if _apart(swap):
                yield swap
        if len(value.users) > 1:
            return
        value = layer.live


def _swaps_before(scope: Scope, mover: Mover, user: fx.Node) -> Iterator[_Swap]:
    """Layers that start at a reader of the mover, to go before it and before the movers that feed it."""
    movers = [mover]
    while len(movers) < _LONGEST and len(movers[0].live.users) == 1:
        before = read_mover(scope, movers[0].live)
        if before is None:
            break
        movers.insert(0, before)
    if any(found.drops for found in movers):
        return
    layers: list[Layer] = []
    while len(layers) < _LONGEST:
        layer = read_layer(scope, user)
        if layer is None:
            return
        layers.append(layer)
        for count in range(1, len(movers) + 1):
            swap = _Swap(tuple(layers), tuple(movers[-count:]), False)
            if _apart(swap):
                yield swap
        if len(user.users) != 1:
            return
        user = next(iter(user.users))


def _apart(swap: _Swap) -> bool:
    """Whether no layer acts on an axis that a mover acts on."""
    acts = frozenset[int]().union(*(layer.axes for layer in swap.layers))
    return not any(acts & mover.axes for mover in swap.movers)


# -- whether it pays


def _settle(scope: Scope, swaps: list[_Swap], refusals: list[Refusal]) -> Change | None:
    """Make the swap that saves most and may be made; else say why the one that would save most may not."""
    paying: list[tuple[tuple[int, int], _Swap, Cost, Cost]] = []
    for swap in swaps:
        before, after = _cost(scope, swap.nodes), _cost(scope, _sketch(scope, swap))
        gain = (score(after)[0] - score(before)[0], after.nodes - before.nodes)
        if after.macs <= before.macs and gain < (0, 0):
            paying.append((gain, swap, before, after))
    first: Refusal | None = None
    for gain, swap, before, after in sorted(paying, key=lambda found: found[0]):
        blocked = _blocked(scope, swap, -gain[0])
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


def _blocked(scope: Scope, swap: _Swap, gain: int) -> tuple[str, str] | None:
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
    beside, lost = _fold_lost(scope, swap)
    if lost >= gain:
        return (
            "folds-instead",
            f"moving saves {gain:,} operations; beside {beside} the layer can fold, which saves {lost:,}",
        )
    return None


def _fold_lost(scope: Scope, swap: _Swap) -> tuple[str, int]:
    """The heavy neighbour that the layers would move away from, and what a fold into it saves."""
    if swap.layers_first:
        beside, moved = swap.entry, swap.layers
        near = len(beside.users) == 1
    else:
        last, moved = swap.layers[-1].node, swap.layers[::-1]
        beside = next(iter(last.users))
        near = len(last.users) == 1
    weight = beside.args[1] if len(beside.args) > 1 else None
    if not near or not is_heavy(beside) or weight not in scope.constant:
        return "", 0
    inner = next((layer.node for layer in moved if layer.heavy), None)
    if inner is None:
        return repr(beside.name), _cost(scope, tuple(layer.node for layer in moved)).flops
    own, other = (node_cost(node, scope.sizes).macs for node in (beside, inner))
    near_side, far_side = _features(inner) if swap.layers_first else _features(inner)[::-1]
    # The neighbour, dense, with the features of the inner layer's far side.
    folded = own * _groups(beside) * far_side // near_side
    return repr(beside.name), max(0, 2 * (own + other - folded))


def _groups(node: fx.Node) -> int:
    groups = node.args[6] if op_name(node).startswith("conv") and len(node.args) > 6 else 1
    return groups if isinstance(groups, int) else 1


def _features(node: fx.Node) -> tuple[int, int]:
    """Features that a heavy layer reads and makes."""
    weight = node.args[1]
    shape = tuple(int(size) for size in tensor_meta(weight).shape)  # type: ignore[arg-type]  # a node
    if op_name(node) == "matmul":
        return shape[0], shape[1]
    return shape[1] * _groups(node), shape[0]


# -- making it


def _sketch(scope: Scope, swap: _Swap) -> tuple[fx.Node, ...]:
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
    gm: fx.GraphModule, swap: _Swap, graph: fx.Graph, outside: Callable[[fx.Node], fx.Node]
) -> tuple[fx.Node, ...]:
    """Write the swapped calls at the graph's insertion point; `outside` maps what they read."""
    made: list[fx.Node] = []
    value = outside(swap.entry)
    layers: tuple[Layer | Mover, ...] = swap.layers
    for part in (*swap.movers, *layers) if swap.layers_first else (*layers, *swap.movers):
        old = part.node
        reads = {part.live: value}
        node = graph.node_copy(old, lambda n: reads[n] if n in reads else outside(n))  # noqa: B023 (called here)
        node.meta = _origin(old)
        if isinstance(part, Mover) and not part.drops:
            # Not traced: torch 2.14 cannot crop a value of symbolic batch, and says so at length.
            node.meta["val"] = _resized(gm, tensor_meta(value), tensor_meta(old), part.axes)
        else:
            if isinstance(part, Mover):
                node.args = (value, sorted(part.axes), _keeps_rank(swap))
            annotate(gm, node)
        made.append(node)
        value = node
    wanted = swap.nodes[-1]
    if tensor_meta(value).dim() > tensor_meta(wanted).dim():
        sizes = [size if isinstance(size, int) else -1 for size in tensor_meta(wanted).shape]
        if sizes.count(-1) > 1:
            view = graph.call_function(aten.squeeze.dims, (value, _gone(swap)))
        else:
            view = graph.call_function(aten.reshape.default, (value, sizes))
        view.meta = _origin(wanted) | {"val": wanted.meta["val"]}
        made.append(view)
    return tuple(made)


def _origin(node: fx.Node) -> dict[str, Any]:
    return {key: node.meta[key] for key in _KEPT if key in node.meta}


def _resized(
    gm: fx.GraphModule, value: torch.Tensor, old: torch.Tensor, axes: frozenset[int]
) -> torch.Tensor:
    """What a call makes of another value: it decides the sizes of its own axes and keeps all others."""
    sizes = [old.shape[i] if i in axes else size for i, size in enumerate(value.shape)]
    with fake_mode(gm):
        return torch.empty(sizes, dtype=old.dtype, device=old.device)


def _keeps_rank(swap: _Swap) -> bool:
    """Whether a mean has to keep its axes for the layers behind it, which count axes from the front."""
    rank, axes = tensor_meta(swap.entry).dim(), sorted(swap.movers[-1].axes)
    deepest = max(layer.trailing for layer in swap.layers)
    return any(axis >= rank - deepest for axis in axes) or _gone(swap) != axes


def _move(scope: Scope, swap: _Swap, before: Cost, after: Cost) -> Change | tuple[str, str]:
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


def _verdict(scope: Scope, swap: _Swap, residual: float) -> tuple[str, str] | None:
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


def _residual(scope: Scope, swap: _Swap, new: tuple[fx.Node, ...]) -> float:
    """The certificate: both orders in float64 on random dense inputs at the real sizes."""
    wanted, got, positions = [], [], _positions(swap)
    for seed in range(_SAMPLES):
        values = {swap.entry: draw(scope, swap.entry, 2, seed)}
        wanted.append(replay(scope, swap.nodes, values, 2))
        got.append(replay(scope, new, values, 2))
        if (seed + 1) * prod(wanted[0].shape[axis] for axis in positions) >= _SAMPLES:
            break
    return deviation(torch.stack(wanted), torch.stack(got), [0, *(axis + 1 for axis in positions)])


def _positions(swap: _Swap) -> list[int]:
    """The axes of the last value along which a feature is repeated."""
    gone = _gone(swap)
    features = frozenset[int]().union(*(layer.axes for layer in swap.layers))
    kept = [axis for axis in range(tensor_meta(swap.entry).dim()) if axis not in gone]
    return [index for index, axis in enumerate(kept) if axis not in features]


def _gone(swap: _Swap) -> list[int]:
    """The axes of the entry that the last value has no more."""
    count = tensor_meta(swap.entry).dim() - tensor_meta(swap.nodes[-1]).dim()
    axes = sorted(swap.movers[-1].axes)
    return axes[len(axes) - count :]
