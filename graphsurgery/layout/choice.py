"""Which calls work in their other order: a minimum cut.

Every call that may work in another order than the model's has one variable. A value costs one permute for
each order in which it is read and not made, so the cost of a pair of maker and readers is a cut, if both mean
the same by "the other order"; where one's natural order is the other's other one, as behind a transpose, the
variable of one is turned round. Where that cannot be done for all pairs at once (`x + x.mT`), a pair is
priced as if its value had to be moved, which is never too little. The cut decides what is written; whatever
it decides, the result is right.

Source: Greig, Porteous and Seheult, "Exact maximum a posteriori estimation for binary images", 1989, for
energies of binary variables as cuts.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import networkx as nx
from torch import fx

__all__ = ["Literal", "Term", "choose"]

Literal = tuple[fx.Node, int]
"""A call, and 1 if it works in its other order, 0 if in the natural one."""

UNIT = 100_000
_SOURCE, _SINK = "source", "sink"


@dataclass(frozen=True)
class Term:
    """The price of one copy of a value in another order.

    Attributes:
        price: What it costs.
        readers: The copy is needed if one of these holds.
        always: The copy is needed in any case.
        maker: It is not needed if this holds; None if nothing makes the value in that order.
    """

    price: int
    readers: tuple[Literal, ...]
    always: bool
    maker: Literal | None


@dataclass
class _Parity:
    """Which variables are turned round, in classes of variables that are tied to each other."""

    above: dict[fx.Node, tuple[fx.Node, int]] = field(default_factory=dict)

    def find(self, node: fx.Node) -> tuple[fx.Node, int]:
        turned = 0
        while node in self.above:
            node, step = self.above[node]
            turned ^= step
        return node, turned

    def tie(self, a: fx.Node, b: fx.Node, differ: int) -> None:
        (one, s), (other, t) = self.find(a), self.find(b)
        if one is not other:
            self.above[one] = (other, s ^ t ^ differ)

    def value(self, literal: Literal) -> int:
        return literal[1] ^ self.find(literal[0])[1]


def choose(terms: Sequence[Term], extra: Mapping[fx.Node, int]) -> set[fx.Node]:
    """The calls that should work in their other order.

    Args:
        terms: Prices of copies, of the values in graph order.
        extra: For every call that may work in another order, what doing so costs in itself.
    """
    parity = _Parity()
    for term in terms:
        for reader in term.readers:
            if term.maker is not None:
                parity.tie(term.maker[0], reader[0], term.maker[1] ^ reader[1])
    graph = nx.DiGraph()
    graph.add_nodes_from((_SOURCE, _SINK))

    def charge(a: Hashable, b: Hashable, price: int) -> None:
        """A price for `a` on the side of the source and `b` on that of the sink."""
        known = graph.get_edge_data(a, b, {}).get("capacity", 0)
        graph.add_edge(a, b, capacity=known + price)

    for node, price in extra.items():
        if parity.value((node, 1)):
            charge(node, _SINK, price)
        else:
            charge(_SOURCE, node, price)
    for number, term in enumerate(terms):
        maker = None if term.maker is None else term.maker[0]
        side = 0 if term.maker is None else parity.value(term.maker)
        if term.always:
            if maker is not None and side:
                charge(_SOURCE, maker, term.price)
            elif maker is not None:
                charge(maker, _SINK, term.price)
            continue
        for value in (0, 1):
            readers = [reader[0] for reader in term.readers if parity.value(reader) == value]
            copy = (number, value)
            # a copy that its maker cannot spare costs its price once any reader is on its side
            spares = maker if maker is not None and side == value else None
            if readers and value:
                charge(copy, spares or _SINK, term.price)
            elif readers:
                charge(spares or _SOURCE, copy, term.price)
            for reader_node in readers:  # no capacity: without limit
                ends = (reader_node, copy) if value else (copy, reader_node)
                graph.add_edge(*ends)
    _, (ones, _) = nx.minimum_cut(graph, _SOURCE, _SINK)
    return {node for node in extra if (node in ones) == bool(parity.value((node, 1)))}
