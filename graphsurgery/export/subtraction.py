"""`1.0 - mask` with a mask of integers, which torch's exporter cannot translate.

It promotes the operands of `rsub` as if they were those of `sub`, and finds no such overload; with the cast
that the promotion means written out there is nothing to promote.
"""

from __future__ import annotations

import torch
from torch.export import ExportedProgram

from graphsurgery.graph import annotate

__all__ = ["cast_subtrahends"]

_SUBTRACT = torch.ops.aten.rsub.Scalar


def cast_subtrahends(program: ExportedProgram) -> int:
    """Cast what a number is subtracted by to the dtype of the difference, in place, before translation.

    Args:
        program: The program; its nodes carry fake values.

    Returns:
        How many casts were written.
    """
    gm, count = program.graph_module, 0
    for node in gm.graph.find_nodes(op="call_function", target=_SUBTRACT):
        subtrahend, dtype = node.args[0], node.meta["val"].dtype
        if subtrahend.meta["val"].dtype == dtype:
            continue
        with gm.graph.inserting_before(node):
            cast = gm.graph.call_function(torch.ops.aten._to_copy.default, (subtrahend,), {"dtype": dtype})
        annotate(gm, cast)
        node.replace_input_with(subtrahend, cast)
        count += 1
    if count:
        gm.recompile()
    return count
