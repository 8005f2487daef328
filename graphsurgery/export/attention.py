"""Attention over three axes, five or more, which torch's exporter cannot translate, on four.

`(B, ..., L, D)` with several axes between batch and length (Hiera has heads and windows) becomes
`(B, H, L, D)` and back; `(H, L, D)` gets a batch of one. A mask of more than two axes goes the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from graphsurgery.graph import annotate

__all__ = ["on_four_axes"]

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


def on_four_axes(program: ExportedProgram) -> int:
    """Rewrite attention in an exported program, in place, before it is translated.

    Left alone are attention over two axes, or with free sizes between batch and length, and query, key and
    value with other axes there, but for grouped heads over three axes.

    Args:
        program: The program; its nodes carry fake values.

    Returns:
        How many calls were rewritten.
    """
    gm = program.graph_module
    found = [node for node in gm.graph.find_nodes(op="call_function", target=_ATTENTION) if _fits(node)]
    for node in found:
        query = node.args[0].meta["val"]
        with gm.graph.inserting_before(node):
            changed = tuple(_four(gm, value) for value in node.args[:3])
            mask = _mask(node)
            if mask is not None and mask.meta["val"].ndim > 2:
                node.replace_input_with(mask, _aligned(gm, mask, query.shape))
        node.args = (*changed, *node.args[3:])
        annotate(gm, node)
        with gm.graph.inserting_after(node):
            if query.ndim == 3:
                back = _call(gm, torch.ops.aten.squeeze.dim, None, 0)
            else:
                back = _call(gm, torch.ops.aten.unflatten.int, None, 1, [int(n) for n in query.shape[1:-2]])
        node.replace_all_uses_with(back)
        back.args = (node, *back.args[1:])
        annotate(gm, back)
    if found:
        gm.recompile()
    return len(found)


def _fits(node: fx.Node) -> bool:
    values = [value.meta["val"] for value in node.args[:3] if isinstance(value, fx.Node)]
    if len(values) != 3 or len({value.ndim for value in values}) != 1 or values[0].ndim in (2, 4):
        return False
    heads = [tuple(value.shape[1:-2]) for value in values]
    return heads[0] == heads[1] == heads[2] and all(isinstance(size, int) for size in heads[0])


def _mask(node: fx.Node) -> fx.Node | None:
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    return mask if isinstance(mask, fx.Node) else None


def _aligned(gm: fx.GraphModule, mask: fx.Node, query: Sequence[Any]) -> fx.Node:
    """Return the mask, of more than two axes, with the axes between batch and length of the query."""
    while mask.meta["val"].ndim < len(query):
        mask = _call(gm, torch.ops.aten.unsqueeze.default, mask, 0)
        annotate(gm, mask)
    between = [int(size) for size in query[1:-2]]
    own = mask.meta["val"].shape[1:-2]
    if [*own] != between and any(size != 1 for size in own):  # of ones, it is repeated by the addition
        mask = _call(gm, torch.ops.aten.expand.default, mask, [-1, *between, -1, -1])
        annotate(gm, mask)
    return _four(gm, mask)


def _four(gm: fx.GraphModule, value: Any) -> fx.Node:
    if value.meta["val"].ndim == 3:
        made = _call(gm, torch.ops.aten.unsqueeze.default, value, 0)  # what is called heads in torch
    else:
        made = _call(gm, torch.ops.aten.flatten.using_ints, value, 1, -3)
    annotate(gm, made)
    return made


def _call(gm: fx.GraphModule, target: Callable[..., Any], *args: Any) -> fx.Node:
    return gm.graph.call_function(target, args)
