"""Rows of attention that a mask hides entirely, as torch answers them: with zeros.

torch's exporter writes a boolean mask as `Where(mask, 0, lowest)`, added to the scores, and behind the
softmax a `Where(IsNaN(w), 0, w)` for rows that hide everything. The lowest finite number gives no NaN there
but equal weights, so the mean of all values comes out where torch gives zeros (padding on the left of a
decoder's input does that). With minus infinity, as the comment in the exporter's own source has it, the guard
works.

A mask of numbers has no guard there: a row of minus infinity comes out as NaN. Where a mask may hold it, such
rows of the answer are replaced by zeros.
"""

from __future__ import annotations

import numpy as np
import onnx_ir

__all__ = ["hide_rows", "of_attention"]

_ATTENTION = "aten.scaled_dot_product_attention.default"
_ORIGIN = "pkg.torch.onnx.fx_node"
_FLOATS = {onnx_ir.DataType.FLOAT, onnx_ir.DataType.DOUBLE}

# What makes minus infinity of finite numbers at most where one of them is huge; what never does; all other
# operators may.
# fmt: off
_FOLLOWED = frozenset((
    "Abs", "Add", "AveragePool", "Cast", "CastLike", "Clip", "Concat", "Expand", "Flatten", "Gather",
    "GatherElements", "GatherND", "Identity", "Max", "Min", "Mul", "Neg", "Pad", "ReduceMax", "ReduceMean",
    "ReduceMin", "Reshape", "Slice", "Split", "Squeeze", "Sub", "Tile", "Transpose", "Trilu", "Unsqueeze",
    "Where",
))
_FINITE = frozenset((
    "BatchNormalization", "Conv", "ConvTranspose", "Cos", "Einsum", "Gelu", "Gemm", "GroupNormalization",
    "LayerNormalization", "MatMul", "RMSNormalization", "Relu", "Sigmoid", "Sin", "Softmax", "Tanh",
))
# fmt: on

_Hidden = dict[tuple[onnx_ir.Value, onnx_ir.Graph | onnx_ir.Function], onnx_ir.Value | None]
"""Which rows a mask hides, by mask and graph; None where it hides none."""


def hide_rows(model: onnx_ir.Model) -> int:
    """Give masks of attention the meaning that they have in torch, in place; before the origins are stripped.

    Args:
        model: What torch's exporter made.

    Returns:
        How many masks were changed, or rows guarded.
    """
    changed = 0
    hidden: _Hidden = {}
    for softmax in list(model.graph.all_nodes()):
        if softmax.op_type != "Softmax" or not of_attention(softmax) or softmax.inputs[0] is None:
            continue
        added = softmax.inputs[0].producer()
        if added is None or added.op_type != "Add":
            continue
        if not _guarded(softmax):
            changed += _guard(softmax, added, hidden)
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


def _guarded(softmax: onnx_ir.Node) -> bool:
    """Whether the mask is a boolean one: others have no guard."""
    return any(user.op_type == "IsNaN" for user, _ in softmax.outputs[0].uses())


def _guard(softmax: onnx_ir.Node, added: onnx_ir.Node, hidden: _Hidden) -> int:
    """Answer with zeros where a mask of numbers hides a row."""
    masks = [value for value in added.inputs if value is not None and not _scores(value)]
    products = [user for user, place in softmax.outputs[0].uses() if user.op_type == "MatMul" and place == 0]
    if len(masks) != 1 or len(products) != 1 or softmax.graph is None:
        return 0
    (mask,), (product,) = masks, products
    key = (mask, softmax.graph)
    if key not in hidden:
        hidden[key] = _hidden(mask, added) if _may_hide(mask) else None
    rows, answer = hidden[key], product.outputs[0]
    if rows is None:
        return 0
    zero = _constant(product, onnx_ir.tensor(0.0, dtype=answer.dtype))
    chosen = onnx_ir.node("Where", inputs=[rows, zero, answer])
    new = chosen.outputs[0]
    new.type, new.shape = answer.type, answer.shape
    if answer.is_graph_output():
        new.name, answer.name = answer.name, None
    onnx_ir.convenience.replace_all_uses_with(answer, new, replace_graph_outputs=True)
    chosen.replace_input_with(2, answer)
    softmax.graph.insert_after(product, chosen)
    return 1


def _scores(value: onnx_ir.Value) -> bool:
    made = value.producer()
    return made is not None and made.op_type == "MatMul" and of_attention(made)


def _hidden(mask: onnx_ir.Value, reader: onnx_ir.Node) -> onnx_ir.Value:
    """Write, before the first reader of a mask, which of its rows are minus infinity: `(..., length, 1)`."""
    made, value = [], mask
    if mask.dtype not in _FLOATS:  # IsInf takes no others before opset 20
        made.append(onnx_ir.node("Cast", inputs=[value], attributes={"to": onnx_ir.DataType.FLOAT}))
        value = made[-1].outputs[0]
    axis = _constant(reader, onnx_ir.tensor([-1]))
    made.append(onnx_ir.node("ReduceMax", inputs=[value, axis], attributes={"keepdims": 1}))
    made.append(onnx_ir.node("IsInf", inputs=[made[-1].outputs[0]], attributes={"detect_positive": 0}))
    if reader.graph is not None:
        reader.graph.insert_before(reader, made)
    return made[-1].outputs[0]


def _constant(reader: onnx_ir.Node, tensor: onnx_ir.TensorProtocol) -> onnx_ir.Value:
    made = onnx_ir.node("Constant", inputs=[], attributes={"value": tensor})
    if reader.graph is not None:
        reader.graph.insert_before(reader, made)
    return made.outputs[0]


def _may_hide(mask: onnx_ir.Value) -> bool:
    """Whether a mask may hold minus infinity: the caller's, one with such a constant, or one not understood.

    The lowest finite number, which masks often have in its place, makes it where two of them are added.
    """
    waiting, seen, lowest, again = [mask], {mask}, 0, False
    while waiting:
        value = waiting.pop()
        constant, made = onnx_ir.convenience.get_const_tensor(value), value.producer()
        if constant is not None:
            numbers = constant.numpy()
            if (numbers == -np.inf).any():
                return True
            lowest += bool((numbers <= constant.dtype.min).any())
        elif made is None or made.op_type not in _FOLLOWED | _FINITE:
            return True
        elif made.op_type in _FOLLOWED:
            for read in made.inputs:
                if read is None or not (read.dtype is None or read.dtype.is_floating_point()):
                    continue
                if read not in seen or onnx_ir.convenience.get_const_tensor(read) is not None:
                    waiting.append(read)
                else:
                    again = True
                seen.add(read)
    return lowest > 1 or (lowest == 1 and again)


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
