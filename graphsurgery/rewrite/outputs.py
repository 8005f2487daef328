"""Giving a graph other outputs than it has."""

from __future__ import annotations

import copy
from typing import Any

from torch import fx
from torch.fx.graph import _PyTreeCodeGen
from torch.utils import _pytree as pytree

__all__ = ["set_outputs"]


def set_outputs(gm: fx.GraphModule, outputs: Any) -> None:
    """Make a graph return something else; how it takes and checks its arguments stays.

    Args:
        gm: The graph module; changed, and not compiled again.
        outputs: Nodes of it and plain values, in any nesting of tuples, lists and dictionaries.
    """
    node = gm.graph.output_node()
    node.meta.pop("val", None)
    codegen = gm.graph._codegen
    if not isinstance(codegen, _PyTreeCodeGen):
        node.args = (outputs,)
        return
    leaves, spec = pytree.tree_flatten(outputs)
    node.args = (tuple(leaves),)
    own = copy.copy(codegen)  # other graphs share the one that was there
    own.pytree_info = codegen.pytree_info._replace(out_spec=spec)
    gm.graph._codegen = own
