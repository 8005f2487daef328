"""Erasing calls and constants that a rewrite left unread."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

__all__ = ["erase_unread"]


def erase_unread(nodes: Iterable[fx.Node]) -> None:
    """Erase those of the given nodes that nothing reads any more, then what only they read."""
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if not node._erased and not node.users and node.op != "placeholder" and not node.is_impure():
            stack += node.all_input_nodes
            node.graph.erase_node(node)
