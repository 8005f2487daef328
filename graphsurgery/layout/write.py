"""Writing a graph anew, each value in the order that was chosen for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphsurgery.cost import axis_order, op_name
from graphsurgery.graph import annotate, fake_mode, origin
from graphsurgery.layout.orders import Order, moves, natural, relative, through
from graphsurgery.rewrite.moves import is_reshape
from graphsurgery.values import Sizes, is_tensor, tensor_meta

__all__ = ["Spelling", "Writer", "as_arguments", "permute", "sized_as"]

aten = torch.ops.aten

_SPELLING = "graphsurgery_spelling"


@dataclass(frozen=True)
class Spelling:
    """How the model writes its permutes, so that a graph that is turned and turned back has the same calls.

    Attributes:
        permutes: Orders that the model writes as a permute although just two axes change places.
        ones: Orders and shapes of operands that the model permutes although only axes of size 1 move.
    """

    permutes: frozenset[Order] = frozenset()
    ones: frozenset[tuple[Order, str]] = frozenset()

    @classmethod
    def of(cls, gm: fx.GraphModule) -> Spelling:
        """What was kept for a graph, or what is read off it, which is then kept."""
        known = gm.meta.get(_SPELLING)
        if not isinstance(known, cls):
            known = gm.meta[_SPELLING] = cls._read(gm)
        return known

    @classmethod
    def _read(cls, gm: fx.GraphModule) -> Spelling:
        sizes = Sizes(gm.graph)
        written: dict[Order, list[bool]] = {}
        ones = set()
        for node in gm.graph.nodes:
            order = axis_order(node) if node.op == "call_function" else None
            if order is None or not is_tensor(node.args[0]):
                continue
            shape = list(tensor_meta(node.args[0]).shape)
            written.setdefault(tuple(order), []).append(op_name(node) == "permute")
            if not moves([sizes.prime(size) for size in shape], natural(len(shape)), tuple(order)):
                ones.add((tuple(order), str(shape)))
        most = (order for order, found in written.items() if 2 * sum(found) > len(found))
        return cls(frozenset(most), frozenset(ones))


def permute(graph: fx.Graph, value: fx.Node, order: Order, spelling: Spelling | None = None) -> fx.Node:
    """A call that puts the axes of a value in another order: a transpose where just two change places."""
    odd = [axis for axis, source in enumerate(order) if axis != source]
    if len(odd) == 2 and not (spelling is not None and order in spelling.permutes):
        return graph.call_function(aten.transpose.int, (value, *odd))
    return graph.call_function(aten.permute.default, (value, list(order)))


class Writer:
    """A new graph for `gm`, written call by call.

    Attributes:
        graph: The new graph.
        made: For each old value its new node and the order that it has.
        aliases: For each old permute the value that it reads, and in which order.
        constants: The constants of the old graph.
    """

    def __init__(self, gm: fx.GraphModule, sizes: Sizes, constants: frozenset[fx.Node]) -> None:
        """Begin an empty graph; attributes are those of `gm`."""
        self.gm, self.sizes, self.constants = gm, sizes, constants
        self.graph = fx.Graph(tracer_cls=gm.graph._tracer_cls)
        self.graph._codegen = gm.graph._codegen
        self.made: dict[fx.Node, tuple[fx.Node, Order]] = {}
        self.aliases: dict[fx.Node, tuple[fx.Node, Order]] = {}
        self.spelling = Spelling.of(gm)
        self._copies: dict[tuple[fx.Node, Order], fx.Node] = {}
        self._now: fx.Node | None = None

    def copy(self, node: fx.Node) -> fx.Node:
        """Write a node as it is, its operands in their natural order."""
        return self.graph.node_copy(node, lambda operand: self.read(operand))

    def working_on(self, node: fx.Node) -> None:
        """What is written from now on stands for `node`."""
        self._now = node

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Write a call on new nodes."""
        return self.note(self.graph.call_function(target, args, kwargs))

    def note(self, node: fx.Node) -> fx.Node:
        """Record where a new node comes from, and its value."""
        if self._now is not None:
            node.meta.update(origin(self._now))
        annotate(self.gm, node)
        return node

    def expect(self, new: fx.Node, old: fx.Node, order: Order) -> None:
        """Keep the sizes of an old value for the new one: fake kernels may lose symbols."""
        if is_tensor(old):
            sized_as(self.gm, new, [tensor_meta(old).shape[axis] for axis in order])

    def read(self, value: fx.Node, order: Order | None = None) -> fx.Node:
        """An old value in an order (None: natural), permuted if it was not made in it."""
        if value in self.aliases:
            source, alias = self.aliases[value]
            return self.read(source, alias if order is None else through(alias, order))
        node, have = self.made[value]
        want = natural(len(have)) if order is None else order
        if have == want:
            return node
        if (value, want) not in self._copies:
            shape = [self.sizes.prime(size) for size in tensor_meta(value).shape]
            step = relative(have, want)
            sizes = [tensor_meta(node).shape[axis] for axis in step]
            several = sum(not isinstance(size, int) for size in sizes) > 1  # a reshape names one free size
            spelled = (step, str(list(tensor_meta(node).shape))) in self.spelling.ones
            if moves(shape, have, want) or several or spelled:
                new = self.note(permute(self.graph, node, step, self.spelling))
            else:
                new = self.call(aten.reshape.default, node, as_arguments(sizes))
            self._copies[value, want] = new
        return self._copies[value, want]

    def constant(self, node: fx.Node, rank: int, order: Order, *, broadcast: bool = True) -> fx.Node:
        """A constant operand in an order of the value that it meets.

        Reshapes and permutes that only bring a parameter into an order are seen through, so that a graph that
        is turned and turned back reads its parameters as at first.

        Args:
            node: The old constant.
            rank: Number of axes of the value that it meets.
            order: Order of that value.
            broadcast: Whether leading axes of size 1 may be left out.
        """
        value = self.made[node][0]
        full = [1] * (rank - tensor_meta(node).dim()) + list(tensor_meta(node).shape)
        want = [full[axis] for axis in order]
        wide = [axis for axis in order if full[axis] != 1]
        if wide == sorted(wide):
            return self._reshaped(value, want, broadcast)
        missing = rank - tensor_meta(node).dim()
        if sorted(order[:missing]) == list(range(missing)):
            own = tuple(axis - missing for axis in order[missing:])
        else:
            value, own = self._reshaped(value, full, broadcast=False), order
        earlier = axis_order(value)
        if earlier is not None:
            value, own = value.args[0], through(tuple(earlier), own)  # type: ignore[assignment]  # a node
        return value if own == natural(len(own)) else self.note(permute(self.graph, value, own))

    def _reshaped(self, value: fx.Node, shape: list[int], broadcast: bool) -> fx.Node:
        """A constant in another shape, read from before the reshapes that it went through."""
        source = value
        while is_reshape(source):
            source = source.args[0]  # type: ignore[assignment]  # a reshape reads one node
        short = _trimmed(shape) if broadcast else shape
        for candidate in (source, value):
            have = list(tensor_meta(candidate).shape)
            if len(have) <= len(shape) and (_trimmed(have) if broadcast else have) == short:
                return candidate
        return self.call(aten.reshape.default, source, short)


def _trimmed(shape: list[int]) -> list[int]:
    """A shape without its leading axes of size 1."""
    lead = next((axis for axis, size in enumerate(shape) if size != 1), len(shape))
    return shape[lead:]


def sized_as(gm: fx.GraphModule, node: fx.Node, sizes: list[Any]) -> None:
    """Give the recorded value of a node these sizes, if it has others."""
    value = tensor_meta(node)
    if str(sizes) != str(list(value.shape)):
        with fake_mode(gm):
            node.meta["val"] = torch.empty(sizes, dtype=value.dtype, device=value.device)


def as_arguments(shape: list[Any]) -> list[Any]:
    """A shape as arguments of a reshape: a single free size is written -1."""
    return [size if isinstance(size, int) else -1 for size in shape]
