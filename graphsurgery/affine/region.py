"""A region: calls from one live entry to one exit, and how it is run in float64 at any batch size.

Running in float64 folds constants (weight norm, scaled parameters) from their leaves, so that nothing is
rounded to the model's dtype on the way; the certificate would be blind to such a step.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import fx

from graphsurgery.affine import rules
from graphsurgery.affine.atoms import Axes
from graphsurgery.affine.runner import as_recorded, call, narrows, runner, widened
from graphsurgery.cost import FLOPS, Cost, CostModel, kind_of, node_cost, op_name
from graphsurgery.graph import get_attr_value
from graphsurgery.values import Sizes, constant_nodes, is_tensor, tensor_meta


@dataclass(frozen=True)
class Tally:
    """What a stretch of calls consists of.

    Attributes:
        cost: what it costs now, per sample; of the parameters those that only it reads.
        heavy: how many calls multiply by weights.
        layers: how many calls multiply by weights or pool.
        moving: how many calls only view or permute.
        shares: how many of its calls read parameters that other calls read too.
    """

    cost: Cost = field(default_factory=Cost)
    heavy: int = 0
    layers: int = 0
    moving: int = 0
    shares: int = 0

    def __add__(self, other: Tally) -> Tally:
        """Both stretches, one after the other."""
        return Tally(
            self.cost + other.cost,
            self.heavy + other.heavy,
            self.layers + other.layers,
            self.moving + other.moving,
            self.shares + other.shares,
        )

    def __sub__(self, other: Tally) -> Tally:
        """What is left of a stretch without its first part."""
        return Tally(
            self.cost - other.cost,
            self.heavy - other.heavy,
            self.layers - other.layers,
            self.moving - other.moving,
            self.shares - other.shares,
        )


class Scope:
    """One graph under analysis: its symbols, its constants, and their float64 values when asked for.

    Attributes:
        gm: the graph module; not changed.
        sizes: its symbols.
        constant: its constant nodes.
        primes: the primes that stand for symbolic sizes.
        cost_model: what is cheaper than what.
        mac_growth: how many times the heavy multiplications of what it replaces a form may take.
        memory: what was found for regions with equal axes (see `choice.options`).
    """

    def __init__(self, gm: fx.GraphModule, cost_model: CostModel = FLOPS, mac_growth: float = 1.0) -> None:
        """Read symbols and constants off a graph."""
        self.gm, self.cost_model, self.mac_growth = gm, cost_model, mac_growth
        self.sizes = Sizes(gm.graph)
        self.constant = constant_nodes(gm.graph)
        self.primes = tuple(self.sizes.primes)
        self._readers = self._read_by()
        self._order = {node: i for i, node in enumerate(gm.graph.nodes)}
        self._attributes: dict[str, set[fx.Node]] = {}
        for node in gm.graph.nodes:
            if node.op == "get_attr":
                self.reads(node)
        self._tallies: dict[fx.Node, Tally] = {}
        self._held: dict[fx.Node, Any] | None = None
        self.memory: dict[Any, Any] = {}

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """A node's shape, symbols as primes."""
        return tuple(self.sizes.prime(size) for size in tensor_meta(node).shape)

    def actual(self, size: int, batch: int) -> int:
        """A size written with primes, at a real batch size; other symbols as in the example."""
        return self.sizes.actual(size, batch)

    def between(self, entry: fx.Node, exit_: fx.Node) -> tuple[fx.Node, ...]:
        """All calls on the way from a value to a call, the call included, in graph order."""
        found = {exit_}
        stack = [exit_]
        while stack:
            for operand in rules.live_operands(stack.pop(), self.constant):
                if operand is not entry and operand not in found:
                    found.add(operand)
                    stack.append(operand)
        return tuple(sorted(found, key=self._order.__getitem__))

    def reads(self, node: fx.Node) -> None:
        """Note that a `get_attr` node reads its attribute."""
        self._attributes.setdefault(str(node.target), set()).add(node)

    def forget(self, node: fx.Node) -> None:
        """Note that a node is erased."""
        if node.op == "get_attr":
            self._attributes[str(node.target)].discard(node)

    def attributes_read_by(self, nodes: Collection[fx.Node]) -> set[str]:
        """Names of the attributes that only the given nodes read, of all that were noted."""
        readers = set(nodes)
        names = {str(node.target) for node in nodes if node.op == "get_attr"}
        return {name for name in names if self._attributes[name] <= readers}

    def knows(self, node: fx.Node) -> bool:
        """Whether a node was in the graph when it was read."""
        return node in self._order

    def position(self, node: fx.Node) -> int:
        """Where a node stands in the graph."""
        return self._order[node]

    def entry_axes(self, entry: fx.Node) -> Axes:
        """The axes of an entry to itself."""
        return Axes.entry(self.shape(entry), self.primes)

    def axes(self, entry: fx.Node, exit_: fx.Node, instead: Mapping[fx.Node, Axes] | None = None) -> Axes:
        """What the calls between an entry and a call do to the axes of the entry.

        Args:
            entry: the value that they read.
            exit_: the last of them.
            instead: axes to go on with behind some of them, in place of what they do.

        Raises:
            NoFold: they are not affine as a whole.
        """
        known = {entry: self.entry_axes(entry)}
        for node in self.between(entry, exit_):
            known[node] = rules.follow(node, known.__getitem__, self.constant, self.sizes)
            known.update({node: instead[node]} if instead and node in instead else {})
        return known[exit_]

    def _read_by(self) -> dict[int, set[fx.Node]]:
        """For each parameter or buffer, by identity, the calls that compute from it."""
        reads: dict[fx.Node, set[int]] = {}
        readers: dict[int, set[fx.Node]] = {}
        for node in self.gm.graph.nodes:
            if node.op == "get_attr" and is_tensor(node):
                reads[node] = {id(get_attr_value(self.gm, str(node.target)))}
                continue
            through = set().union(*(reads.get(operand, set()) for operand in node.all_input_nodes))
            if node in self.constant:
                reads[node] = through
            else:
                for tensor in through:
                    readers.setdefault(tensor, set()).add(node)
        return readers

    def tally(self, node: fx.Node) -> Tally:
        """What one call consists of."""
        if node not in self._tallies:
            params, shares = self.params((node,))
            heavy = int(is_heavy(node))
            self._tallies[node] = Tally(
                node_cost(node, self.sizes) + Cost(params=params),
                heavy,
                heavy or int("pool" in op_name(node)),
                int(kind_of(node) == "movement"),
                int(shares),
            )
        return self._tallies[node]

    def count_as(self, node: fx.Node, tally: Tally) -> None:
        """Count a call as something else than its op says: a part of another call."""
        self._tallies[node] = tally

    def params(self, nodes: Sequence[fx.Node]) -> tuple[int, bool]:
        """Numbers in the tensors that only the given calls read, and whether they read others too."""
        inside = set(nodes)
        stack = [operand for node in nodes for operand in node.all_input_nodes if operand in self.constant]
        seen, tensors, total, shared = set(stack), set(), 0, False
        while stack:
            node = stack.pop()
            if node.op == "get_attr" and is_tensor(node):
                tensor = get_attr_value(self.gm, str(node.target))
                if id(tensor) not in tensors:
                    tensors.add(id(tensor))
                    own = self._readers.get(id(tensor), set()) <= inside
                    total += tensor.numel() if own else 0
                    shared |= not own
            for operand in node.all_input_nodes:
                if operand not in seen:
                    seen.add(operand)
                    stack.append(operand)
        return total, shared

    def constant_value(self, node: fx.Node) -> torch.Tensor:
        """The float64 value of a constant node, computed from its leaves (integers stay integers)."""
        value = self.constant_values((node,))[node]
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"constant {node.name!r} is not a tensor")
        return value

    @contextmanager
    def holding_constants(self) -> Iterator[None]:
        """Keep the float64 values of constants meanwhile: those of one fold, not of a whole model."""
        self._held = {}
        try:
            yield
        finally:
            self._held = None

    def constant_values(self, nodes: Iterable[fx.Node]) -> dict[fx.Node, Any]:
        """Float64 values of constant nodes; nothing is kept, so that a large model is not held twice."""
        values: dict[fx.Node, Any] = {} if self._held is None else self._held
        needed: list[fx.Node] = []
        stack = list(nodes)
        while stack:
            node = stack.pop()
            if node not in values:
                values[node] = None
                needed.append(node)
                stack.extend(node.all_input_nodes)
        for node in sorted(needed, key=self._order.__getitem__):
            if node.op == "get_attr":
                value: Any = get_attr_value(self.gm, str(node.target)).detach()
                values[node] = widened(value)
            elif narrows(node):
                # A rounding that the model asks for is part of its function: do it, then widen.
                source = fx.node.map_arg(node.args, lambda n: as_recorded(values[n], n))
                values[node] = widened(node.target(*source, **node.kwargs))  # type: ignore[operator]  # an op
            else:
                values[node] = call(node, lambda n: values[n])
        return values


@dataclass(frozen=True)
class Region:
    """All calls between one live value and one call, each affine in what it reads of them.

    Attributes:
        scope: the graph.
        entry: the live value that it reads.
        exit: the call whose value leaves it.
        axes: what it does to the axes of the entry.
        summed: the sum of the tallies of the calls that die with it, where the caller has it.
        shared: those of its calls that other regions of the same plan hold too; they give no names.
    """

    scope: Scope
    entry: fx.Node
    exit: fx.Node
    axes: Axes = field(compare=False)
    summed: Tally | None = field(default=None, compare=False)
    shared: frozenset[fx.Node] = frozenset()

    @cached_property
    def nodes(self) -> tuple[fx.Node, ...]:
        """Its calls in graph order; the last one is the exit."""
        return self.scope.between(self.entry, self.exit)

    @cached_property
    def tally(self) -> Tally:
        """What the region consists of and costs."""
        own = self.summed or sum((self.scope.tally(node) for node in self.nodes), Tally())
        if not own.shares:
            return own
        params, shares = self.scope.params(self.nodes)  # weights may be shared within the region only
        return replace(own, cost=replace(own.cost, params=params), shares=int(shares))

    def runner(self, batch: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """The region as a function of its entry, in float64, at the given batch size (see `runner`)."""
        return runner(self.scope, self.entry, self.nodes, batch)


ELEMENTWISE = frozenset({"mul", "div", "neg", "add", "sub", "rsub", "batch_norm"})
"""Ops that scale and shift a value, where their other operands are constant."""


def is_heavy(node: fx.Node) -> bool:
    """Whether a call multiplies by weights."""
    name = op_name(node)
    return name.startswith("conv") or name in ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum")
