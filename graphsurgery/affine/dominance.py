"""Which calls a call keeps alive: post-dominators of a graph's values.

A call p post-dominates n when every path from n to an output runs through p: then n dies with p. Immediate
post-dominators form a tree (the parent of n is the lowest common ancestor of its readers), and the subtree
of p is all that lives for p alone.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import fx


class PostDominators:
    """The post-dominator tree of the values of a graph that are not constant.

    Attributes:
        parent: the immediate post-dominator of each live node; None for the output.
        readers: the live readers of each live node.
    """

    def __init__(self, graph: fx.Graph, constant: Collection[fx.Node]) -> None:
        """Build the tree, last node first, in n log n."""
        self.parent: dict[fx.Node, fx.Node | None] = {}
        self.readers: dict[fx.Node, list[fx.Node]] = {}
        self._depth: dict[fx.Node, int] = {}
        self._jump: dict[fx.Node, fx.Node] = {}
        for node in reversed(graph.nodes):
            if node in constant:
                continue
            readers = [user for user in node.users if user in self.parent]
            if not readers and node.op != "output":
                continue  # nothing reads it: it is dead already
            self.readers[node] = readers
            parent = readers[0] if readers else None
            for reader in readers[1:]:
                parent = self._meet(parent, reader)
            self._add(node, parent)

    def dies_with(self, node: fx.Node, other: fx.Node) -> bool:
        """Whether everything that `node` is for runs through `other` (a node dies with itself)."""
        if node not in self._depth or other not in self._depth:
            return False
        return self._depth[node] >= self._depth[other] and self._climb(node, self._depth[other]) is other

    def _add(self, node: fx.Node, parent: fx.Node | None) -> None:
        self.parent[node] = parent
        if parent is None:
            self._depth[node], self._jump[node] = 0, node
            return
        self._depth[node] = self._depth[parent] + 1
        far = self._jump[parent]
        # Jump pointers of skewed length: Myers, "An applicative random-access stack", 1983.
        even = self._depth[parent] - self._depth[far] == self._depth[far] - self._depth[self._jump[far]]
        self._jump[node] = self._jump[far] if even and far is not parent else parent

    def _climb(self, node: fx.Node, depth: int) -> fx.Node:
        while self._depth[node] > depth:
            far = self._jump[node]
            if self._depth[far] >= depth:
                node = far
            else:
                node = self._above(node)
        return node

    def _above(self, node: fx.Node) -> fx.Node:
        parent = self.parent[node]
        return node if parent is None else parent

    def _meet(self, a: fx.Node | None, b: fx.Node) -> fx.Node | None:
        if a is None:
            return None
        depth = min(self._depth[a], self._depth[b])
        a, b = self._climb(a, depth), self._climb(b, depth)
        while a is not b:
            if self._depth[a] == 0:
                return None
            if self._jump[a] is not self._jump[b]:
                a, b = self._jump[a], self._jump[b]
            else:
                a, b = self._above(a), self._above(b)
        return a
