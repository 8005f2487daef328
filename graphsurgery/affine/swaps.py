"""Layers and movers that may change places (see `graphsurgery.affine.pointwise`), found in a graph."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from graphsurgery.affine.pointwise import Layer, Mover, read_layer, read_mover
from graphsurgery.affine.region import Scope, is_heavy
from graphsurgery.cost import node_cost, op_name
from graphsurgery.values import tensor_meta

__all__ = ["Swap", "fold_lost", "swaps"]

_LONGEST = 8  # layers, or movers, that change places at once


@dataclass(frozen=True)
class Swap:
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
        """The live value that goes in."""
        return self.layers[0].live if self.layers_first else self.movers[0].live

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """All calls, in graph order; the value of the last one comes out."""
        layers = tuple(layer.node for layer in self.layers)
        movers = tuple(node for mover in self.movers for node in mover.nodes)
        return layers + movers if self.layers_first else movers + layers

    @property
    def gone(self) -> list[int]:
        """The axes of the entry that the last value has no more."""
        count = tensor_meta(self.entry).dim() - tensor_meta(self.nodes[-1]).dim()
        axes = sorted(self.movers[-1].axes)
        return axes[len(axes) - count :]

    @property
    def keeps_rank(self) -> bool:
        """Whether a mean has to keep its axes for the layers behind it, which count axes from the front."""
        rank, axes = tensor_meta(self.entry).dim(), sorted(self.movers[-1].axes)
        deepest = max(layer.trailing for layer in self.layers)
        return any(axis >= rank - deepest for axis in axes) or self.gone != axes

    @property
    def positions(self) -> list[int]:
        """The axes of the last value along which a feature is repeated."""
        features = frozenset[int]().union(*(layer.axes for layer in self.layers))
        kept = [axis for axis in range(tensor_meta(self.entry).dim()) if axis not in self.gone]
        return [index for index, axis in enumerate(kept) if axis not in features]


def swaps(scope: Scope) -> Iterator[list[Swap]]:
    """For every mover, all swaps in which it touches the layers.

    The caller may make a swap and go on: what is written then is left out, for the scope does not know it.
    """
    for node in list(scope.gm.graph.nodes):
        mover = None if node._erased else read_mover(scope, node)
        if mover is None:
            continue
        yield _known(scope, _swaps_behind(scope, mover))
        for user in list(mover.node.users):
            if not node._erased:
                yield _known(scope, _swaps_before(scope, mover, user))


def _known(scope: Scope, found: Iterator[Swap]) -> list[Swap]:
    """All of them; none where one begins, ends or lies at a call written since the scope was made."""
    every = list(found)
    around = (node for swap in every for node in (swap.entry, *swap.nodes, *swap.nodes[-1].users))
    return every if all(scope.knows(node) for node in around) else []


def _swaps_behind(scope: Scope, mover: Mover) -> Iterator[Swap]:
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
            swap = Swap(tuple(layers), tuple(movers[:count]), True)
            if _apart(swap):
                yield swap
        if len(value.users) > 1:
            return
        value = layer.live


def _swaps_before(scope: Scope, mover: Mover, user: fx.Node) -> Iterator[Swap]:
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
            swap = Swap(tuple(layers), tuple(movers[-count:]), False)
            if _apart(swap):
                yield swap
        if len(user.users) != 1:
            return
        user = next(iter(user.users))


def _apart(swap: Swap) -> bool:
    """Whether no layer acts on an axis that a mover acts on."""
    acts = frozenset[int]().union(*(layer.axes for layer in swap.layers))
    return not any(acts & mover.axes for mover in swap.movers)


def fold_lost(scope: Scope, swap: Swap) -> tuple[str, int]:
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
        return repr(beside.name), sum(node_cost(layer.node, scope.sizes).flops for layer in moved)
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
