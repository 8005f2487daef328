"""Maps that are flattened in front of a Linear: where a graph has them, and how each is listed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from graphsurgery.affine.per_position import is_pointwise
from graphsurgery.affine.pools import pool_call, pooled, takes_whole_map
from graphsurgery.affine.region import Scope
from graphsurgery.affine.spread import Flat, NoMap, linear_of
from graphsurgery.cost import SPLITS, axis_order, op_name
from graphsurgery.rewrite.moves import is_reshape, merged_axes
from graphsurgery.values import is_tensor, tensor_meta

__all__ = ["FlattenedMap", "HeadSearch", "without_channels"]

_COPIES = ("clone", "contiguous")


@dataclass(frozen=True)
class FlattenedMap:
    """A map and how it is flattened.

    Attributes:
        entry: the map, with its channels on axis `flat.channels`.
        flattened: what a Linear reads.
        flat: how it lists the map.
    """

    entry: fx.Node
    flattened: fx.Node
    flat: Flat

    @property
    def positions(self) -> list[int]:
        """The axes of `entry` that are positions."""
        return [axis for axis in range(1, len(self.flat.sizes) + 1) if axis != self.flat.channels]


class HeadSearch:
    """Looks for the flattened maps of a graph."""

    def __init__(self, scope: Scope, channels_last: bool) -> None:
        """Read a graph.

        Args:
            scope: the graph.
            channels_last: whether the channels of its maps are on the last axis, or else on axis 1.
        """
        self.scope, self.channels_last = scope, channels_last

    def heads(self) -> list[FlattenedMap]:
        """All flattened maps that a Linear reads, in graph order.

        Raises:
            NoMap: one of them cannot be rewritten.
        """
        found = []
        for node in self.scope.gm.graph.nodes:
            if self.flattened(node):
                found.append(self._head(node))
            elif self._lists(node) and takes_whole_map(node) and self._feeds_linear(node):
                raise _global_pool(node)
        return found

    def _lists(self, node: fx.Node) -> bool:
        """Whether a live call makes a list for each sample of a value with more axes."""
        if node.op != "call_function" or not is_tensor(node) or node in self.scope.constant:
            return False
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or not is_tensor(source):
            return False
        return tensor_meta(node).dim() == 2 < tensor_meta(source).dim()

    def flattened(self, node: fx.Node) -> bool:
        """Whether a value is a flattened map that a Linear reads; a view of tokens as rows is none."""
        if not self._lists(node) or not is_reshape(node) or not self._feeds_linear(node):
            return False
        sizes = self.scope.shape(node.args[0])  # type: ignore[arg-type]  # the value that is reshaped
        return self.scope.shape(node)[1] != sizes[-1] or 1 in sizes[1:]

    def _feeds_linear(self, node: fx.Node) -> bool:
        """Whether a Linear reads a value, perhaps behind other calls on lists of features."""
        stack, seen = [node], {node}
        while stack:
            for user in stack.pop().users:
                if linear_of(user, self.scope.constant) is not None:
                    return True
                listed = tensor_meta(user).dim() == 2 if is_tensor(user) else op_name(user) in SPLITS
                if user not in seen and listed:
                    seen.add(user)
                    stack.append(user)
        return False

    def _head(self, node: fx.Node) -> FlattenedMap:
        source: Any = node.args[0]
        before, after = self.scope.shape(source), self.scope.shape(node)
        if before[0] != after[0]:
            raise NoMap("mixed-axes", node, f"flattens {_text(source)} to {_text(node)}, which mixes samples")
        if not 3 <= len(before) <= 5:
            raise NoMap("mixed-axes", node, f"flattens {_text(source)}, which is no map of 1 to 3 axes")
        moves = [node]
        order = list(range(len(before)))
        while True:
            turned = axis_order(source)
            if turned is not None and turned[0] == 0:
                order = [turned[axis] for axis in order]
            elif self._splits_maps(source):
                inner = self.scope.shape(source.args[0])
                merged = merged_axes(inner, self.scope.shape(source))
                if order == sorted(order):
                    order = list(range(len(inner)))  # flattened in one or in two steps
                elif merged is not None:
                    order = [axis for group in order for axis in merged[group]]
                else:
                    break
            elif op_name(source) not in _COPIES:
                break
            moves.insert(0, source)
            source = source.args[0]
        rank = tensor_meta(source).dim()
        channels = rank - 1 if self.channels_last else 1
        axes = [channels, *(axis for axis in range(1, rank) if axis != channels)]
        sizes = tuple(int(tensor_meta(source).shape[axis]) for axis in axes)
        self._look_for_pool(source)
        return FlattenedMap(
            source,
            node,
            Flat(sizes, tuple(1 + axes.index(axis) for axis in order[1:]), tuple(moves), channels),
        )

    def _splits_maps(self, node: fx.Node) -> bool:
        """Whether a reshape gives the elements of each sample's map in other axes."""
        source: Any = node.args[0] if node.args else None
        if node.op != "call_function" or not is_reshape(node) or not 3 <= tensor_meta(source).dim() <= 5:
            return False
        return self.scope.shape(source)[0] == self.scope.shape(node)[0]

    def _look_for_pool(self, node: fx.Node) -> None:
        """Refuse a pool in front of the flatten that is no identity on the example's map.

        Raises:
            NoMap: there is one.
        """
        while is_tensor(node):
            if takes_whole_map(node):
                raise _global_pool(node)
            source: Any = pooled(node)
            if source is not None:
                have, want = _text(source, 2), _text(node, 2)
                raise NoMap(
                    "pool-not-identity",
                    pool_call(node),
                    f"makes {want} of {have}; take an example whose map is {want}"
                    if all(isinstance(size, int) for size in tensor_meta(source).shape[2:])
                    else f"makes {want} of a map of any size; take an example whose map is {want}, and fix "
                    "its height and width in the capture: this pass frees them",
                )
            if not (is_pointwise(node) or op_name(node) == "batch_norm"):
                return
            source = node.args[0]
            if not isinstance(source, fx.Node):
                return
            node = source


def without_channels(node: fx.Node) -> NoMap:
    """Why the kernel fits a map neither with its channels on axis 1 nor with them on the last."""
    source: fx.Node = node.args[0]  # type: ignore[assignment]  # the value that is reshaped
    return NoMap(
        "fixed-size",
        node,
        f"flattens {_text(source)}: the maps that are flattened have their channels neither all on axis 1 "
        "nor all on the last axis",
    )


def _global_pool(node: fx.Node) -> NoMap:
    return NoMap(
        "global-pool",
        pool_call(node),
        f"takes the {takes_whole_map(node)} of the whole map, which it can of a map of any size; "
        "without it the scores at the example's size would be others",
    )


def _text(node: fx.Node, first: int = 0) -> str:
    return "(" + ", ".join(str(size) for size in tensor_meta(node).shape[first:]) + ")"
