"""Rewrite a graph to as few permutes as a choice of orders allows."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import prod
from operator import getitem

import torch
from torch import fx

from graphsurgery.cost import axis_order, op_name
from graphsurgery.graph import copy_graph_module
from graphsurgery.layout import norms
from graphsurgery.layout.certify import certificate
from graphsurgery.layout.choice import UNIT, Term, choose
from graphsurgery.layout.orders import Order, moves, natural, relative, through
from graphsurgery.layout.rules import Mode, Rule, rule_of
from graphsurgery.layout.write import Writer
from graphsurgery.values import Sizes, constant_nodes, is_tensor, tensor_meta

__all__ = ["NORM_PRICES", "PREFERRED", "Settled", "permutes", "settle"]

_ROUNDS = 4

NORM_PRICES = {"layer_norm": 0.3, "rms_norm": 0.3, "batch_norm": 0.05}
"""What writing a norm for another layout costs, where a permute costs 1."""

PREFERRED = "graphsurgery_preferred"
"""Key in the `meta` of the permutes to start from."""


@dataclass(frozen=True)
class Settled:
    """What was done to a graph.

    Attributes:
        turned: Names of the calls that now work in another order.
        residual: Largest deviation in float64 of one of them from what it was.
        changed: Whether the graph was written anew.
    """

    turned: tuple[str, ...] = ()
    residual: float = 0.0
    changed: bool = False


def permutes(gm: fx.GraphModule) -> list[fx.Node]:
    """The calls that put live values into another order."""
    constant = constant_nodes(gm.graph)
    return [n for n in gm.graph.nodes if n.op == "call_function" and n not in constant and axis_order(n)]


def settle(gm: fx.GraphModule, *, norm_prices: Mapping[str, float] = NORM_PRICES) -> Settled:
    """Write the graph of `gm` anew with fewer permutes, if there is a way.

    Where calls could take one of several orders they take that of the nearest permute, and of one with
    `PREFERRED` in its `meta` before all others.

    Args:
        gm: A captured graph; its graph is replaced, its attributes stay.
        norm_prices: What writing a norm of a name for another layout costs, where a permute costs 1; a norm
            that is not named stays as it is.

    Returns:
        What was done; nothing where no permute would be saved.
    """
    work = copy_graph_module(gm)
    norms.lift(work, norm_prices)
    done = Settled()
    load = _load(work)
    for _ in range(_ROUNDS):
        before = work.graph
        work.graph, step = _Plan(work, norm_prices).written()
        if _load(work) >= load:
            work.graph = before
            break
        load = _load(work)
        done = Settled(done.turned + step.turned, max(done.residual, step.residual), True)
    if load >= _load(gm):
        return Settled()
    gm.graph = work.graph
    return done


def _load(gm: fx.GraphModule) -> tuple[int, int]:
    return len(permutes(gm)), len(gm.graph.nodes)


@dataclass
class _Plan:
    """One graph, the orders its calls may work in, and those they shall."""

    gm: fx.GraphModule
    norm_prices: Mapping[str, float]
    rules: dict[fx.Node, Rule] = field(default_factory=dict)
    modes: dict[fx.Node, Mode] = field(default_factory=dict)
    aliases: dict[fx.Node, tuple[fx.Node, Order]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Read the graph."""
        self.sizes = Sizes(self.gm.graph)
        self.constant = constant_nodes(self.gm.graph)
        self.readers: dict[fx.Node, list[tuple[fx.Node, Order]]] = {}
        for node in self.gm.graph.nodes:
            if node in self.constant:
                continue
            order = axis_order(node) if node.op == "call_function" else None
            if order is not None:
                value, alias = self.seen(node.all_input_nodes[0])
                self.aliases[node] = value, through(alias, tuple(order))
                continue
            if node.op == "call_function" and node.target is not getitem:
                rule = rule_of(node, self.constant, self.sizes)
                if rule is not None and (not rule.norm or op_name(node) in self.norm_prices):
                    self.rules[node] = rule
            for operand in node.all_input_nodes:
                if is_tensor(operand) and operand not in self.constant and not _only_size(node):
                    value, alias = self.seen(operand)
                    self.readers.setdefault(value, []).append((node, alias))
        self.propose()

    def seen(self, node: fx.Node) -> tuple[fx.Node, Order]:
        """The value that a node is a permute of, and in which order; itself where it is none."""
        return self.aliases.get(node) or (node, natural(tensor_meta(node).dim()))

    def maker(self, value: fx.Node) -> fx.Node:
        """The call that makes a value: that of the tuple whose piece it is."""
        while value.op == "call_function" and value.target is getitem:
            value = value.all_input_nodes[0]
        return value

    def values(self, maker: fx.Node) -> Iterator[fx.Node]:
        """The values that a call makes."""
        if is_tensor(maker):
            yield maker
        else:
            for user in maker.users:
                yield from self.values(user) if user.target is getitem else ()

    # -- which order each call could work in

    def propose(self) -> None:
        """Spread the orders that permutes ask for, from near to far, the preferred ones first."""
        for chosen in (True, False):
            self.queue: deque[Callable[[], None]] = deque()
            for alias, (value, order) in self.aliases.items():
                if (PREFERRED in alias.meta) is chosen and order != natural(len(order)):
                    self.queue.append(partial(self.ask, value, order))
                    for reader in alias.users:
                        self.queue.append(partial(self.offer, reader, relative(order, natural(len(order)))))
            while self.queue:
                self.queue.popleft()()

    def ask(self, value: fx.Node, order: Order) -> None:
        """Have a value made in an order, if its call can."""
        maker = self.maker(value)
        rule = self.rules.get(maker)
        if rule is None or maker in self.modes or order == natural(len(order)):
            return
        reads = rule.back(order)
        if reads is not None:
            self.set(maker, Mode(reads, order))

    def offer(self, reader: fx.Node, order: Order) -> None:
        """Have a call read in an order, if it can."""
        rule = self.rules.get(reader)
        if rule is None or reader in self.modes or order == natural(len(order)):
            return
        makes = rule.onward(order)
        if makes is not None:
            self.set(reader, Mode(order, makes))

    def set(self, node: fx.Node, mode: Mode) -> None:
        self.modes[node] = mode
        for operand in self.live(node):
            value, alias = self.seen(operand)
            if len(alias) == len(mode.reads):
                self.queue.append(partial(self.ask, value, through(alias, mode.reads)))
        for value in self.values(node):
            for reader, alias in self.readers.get(value, ()):
                self.queue.append(partial(self.offer, reader, relative(alias, mode.makes)))

    def live(self, node: fx.Node) -> list[fx.Node]:
        return [o for o in node.all_input_nodes if is_tensor(o) and o not in self.constant]

    # -- which order each call shall work in

    def price(self, node: fx.Node) -> float:
        """What working in another order costs in itself, where a permute costs 1."""
        if not self.rules[node].norm:
            return 0.0
        native = (
            op_name(node) != "batch_norm" and self.modes[node].reads[-1] == len(self.modes[node].reads) - 1
        )
        return 0.0 if native else self.norm_prices[op_name(node)]

    def terms(self) -> list[Term]:
        """Prices of all copies of all values."""
        largest = max((self.elements(value) for value in self.readers), default=1) or 1
        terms: list[Term] = []
        for value, readers in self.readers.items():
            shape = [self.sizes.prime(size) for size in tensor_meta(value).shape]
            if not shape:
                continue
            maker, kept = self.maker(value), natural(len(shape))
            made = (kept, self.modes[maker].makes if maker in self.modes else kept)
            wishes: dict[Order, list[tuple[fx.Node, int]]] = {}
            always: set[Order] = set()
            for reader, alias in readers:
                mode = self.modes.get(reader)
                plain = through(alias, natural(len(alias)))
                turned = through(alias, mode.reads) if mode and len(mode.reads) == len(alias) else plain
                if plain == turned:
                    always.add(plain)
                    continue
                wishes.setdefault(plain, []).append((reader, 0))
                wishes.setdefault(turned, []).append((reader, 1))
            for order in dict.fromkeys((*always, *wishes)):
                if made == (order, order):
                    continue
                maker_literal = None
                if order in made:
                    maker_literal = (maker, made.index(order))
                real = moves(shape, made[0], order) or moves(shape, made[1], order)
                price = UNIT + UNIT * self.elements(value) // (10 * largest) if real else UNIT // 100
                readers_of = tuple(wishes.get(order, ()))
                terms.append(Term(price, readers_of, order in always, maker_literal))
        return terms

    def elements(self, value: fx.Node) -> int:
        return prod(self.sizes.per_sample(size) for size in tensor_meta(value).shape)

    def written(self) -> tuple[fx.Graph, Settled]:
        """The graph in the orders that cost least."""
        extra = {node: int(UNIT * self.price(node)) + 10 for node in self.modes}
        chosen = choose(self.terms(), extra)
        writer = Writer(self.gm, self.sizes, self.constant)
        turned: list[str] = []
        residual = 0.0
        for node in self.gm.graph.nodes:
            if node in self.aliases:
                value, order = self.aliases[node]
                writer.aliases[node] = value, order
                continue
            writer.working_on(node)
            if node in chosen and node in self.modes:
                mode = self.modes[node]
                writer.made[node] = self.rules[node].write(writer, mode), mode.makes
                writer.expect(writer.made[node][0], node, mode.makes)
                turned.append(node.name)
                certified = certificate(writer, node, mode.makes)
                residual = max(residual, certified)
                continue
            if _only_size(node):
                value, order = self.seen(node.all_input_nodes[0])
                source, have = writer.made[value]
                new = writer.graph.node_copy(node, lambda _, s=source: s)  # type: ignore[misc]
                new.args = (source, have.index(order[int(node.args[1]) % len(order)]))
                writer.made[node] = new, ()
                continue
            if node.op == "call_function" and node.target is getitem:
                source, have = writer.made[node.all_input_nodes[0]]
                writer.made[node] = writer.call(getitem, source, node.args[1]), have
                continue
            new = writer.copy(node)
            rank = tensor_meta(node).dim() if is_tensor(node) else _rank_of_pieces(node)
            writer.made[node] = new, natural(rank)
        return writer.graph, Settled(tuple(turned), residual)


def _rank_of_pieces(node: fx.Node) -> int:
    value = node.meta.get("val")
    first = value[0] if isinstance(value, (list, tuple)) and value else None
    return first.dim() if isinstance(first, torch.Tensor) else 0


def _only_size(node: fx.Node) -> bool:
    """Whether a call asks for one size of a value, in whatever order that is."""
    return op_name(node) == "sym_size" and len(node.args) == 2 and isinstance(node.args[1], int)
