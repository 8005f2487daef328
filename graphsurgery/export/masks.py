"""Rows of attention that a boolean mask hides entirely, as torch answers them: with zeros.

torch's exporter writes a mask as `Where(mask, 0, lowest)`, added to the scores, and behind the softmax a
`Where(IsNaN(w), 0, w)` for rows that hide everything. The lowest finite number gives no NaN there but equal
weights, so the mean of all values comes out where torch gives zeros (padding on the left of a decoder's input
does that). With minus infinity, as the comment in the exporter's own source has it, the guard works.
"""

from __future__ import annotations

import numpy as np
import onnx_ir

__all__ = ["hide_rows", "of_attention"]

_ATTENTION = "aten.scaled_dot_product_attention.default"
_ORIGIN = "pkg.torch.onnx.fx_node"


def hide_rows(model: onnx_ir.Model) -> int:
    """Write minus infinity into the masks of guarded attention, in place; before the origins are stripped.

    Args:
        model: What torch's exporter made.

    Returns:
        How many masks were changed.
    """
    changed = 0
    for softmax in list(model.graph.all_nodes()):
        if not _guarded(softmax) or softmax.inputs[0] is None:
            continue
        added = softmax.inputs[0].producer()
        if added is None or added.op_type != "Add":
            continue
        for place, value in enumerate(added.inputs):
            chosen = value.producer() if value is not None else None
            if chosen is not None and chosen.op_type == "Where" and of_attention(chosen):
                changed += _replace(chosen, 2)
            elif value is not None and value.is_initializer():
                changed += _replace(added, place)
    return changed


def of_attention(node: onnx_ir.Node) -> bool:
    """Return whether torch's exporter wrote a node for a call of attention, by the origins that it notes."""
    return _ATTENTION in node.metadata_props.get(_ORIGIN, "")


def _guarded(node: onnx_ir.Node) -> bool:
    """Whether it is the softmax of an attention with a boolean mask: others have no guard."""
    if node.op_type != "Softmax" or not of_attention(node):
        return False
    return any(user.op_type == "IsNaN" for user, _ in node.outputs[0].uses())


def _replace(node: onnx_ir.Node, place: int) -> int:
    """Read the mask from a constant of its own, with minus infinity for the lowest number."""
    value, graph = node.inputs[place], node.graph
    constant = onnx_ir.convenience.get_const_tensor(value) if value is not None else None
    if constant is None or graph is None or not constant.dtype.is_floating_point():
        return 0
    numbers = constant.numpy()
    lowest = numbers == constant.dtype.min
    if not lowest.any():
        return 0
    tensor = onnx_ir.tensor(np.where(lowest, -np.inf, numbers).astype(numbers.dtype), dtype=constant.dtype)
    made = onnx_ir.node("Constant", inputs=[], attributes={"value": tensor})
    graph.insert_before(node, made)
    node.replace_input_with(place, made.outputs[0])
    return 1
