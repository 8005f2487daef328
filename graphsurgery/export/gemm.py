"""Linear layers over several axes, as one `Gemm`.

torch's exporter writes a Linear on more than two axes as `MatMul` and `Add`. Viewed on two axes it is one
`Gemm`, which adds the bias where it writes the product; the views move nothing.
"""

from __future__ import annotations

import onnx_ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from graphsurgery.export.views import view

__all__ = ["linears_as_gemm"]


def linears_as_gemm(model: onnx_ir.Model) -> int:
    """Write `MatMul` with a constant matrix and the `Add` of a constant bias as one `Gemm`, in place.

    Left alone are products with two free sizes or more, since a view leaves one to be worked out, and those
    with a size of zero, which a view takes for "as it was".

    Args:
        model: What torch's exporter made.

    Returns:
        How many were changed.
    """
    changed = 0
    for add in list(model.graph.all_nodes()):
        found = _linear(add)
        if found is None or add.graph is None:
            continue
        x, weight, bias, sizes = found
        graph, old = add.graph, add.outputs[0]
        width_in, width_out = _constant_sizes(weight) or ()
        flat = view(x, [-1, width_in])
        product = onnx_ir.node("Gemm", inputs=[flat[-1].outputs[0], weight, bias])
        product.outputs[0].type = flat[-1].outputs[0].type = x.type
        back = view(product.outputs[0], [*sizes, width_out])
        new = back[-1].outputs[0]
        new.name, new.shape, new.type = old.name, old.shape, old.type
        for node in (*flat, product, *back):
            graph.insert_before(add, node)
        onnx_ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        graph.remove(add, safe=True)
        changed += 1
    if changed:
        RemoveUnusedNodesPass()(model)
    return changed


def _linear(add: onnx_ir.Node) -> tuple[onnx_ir.Value, onnx_ir.Value, onnx_ir.Value, list[int]] | None:
    """The input, matrix and bias of a Linear that ends in this node, and the sizes of its leading axes."""
    if add.op_type != "Add" or len(add.inputs) != 2:
        return None
    for product, bias in (add.inputs, add.inputs[::-1]):
        made = product.producer() if product is not None else None
        if product is None or made is None or made.op_type != "MatMul" or bias is None:
            continue
        x, weight = made.inputs
        if x is None or weight is None or len(list(product.uses())) != 1 or product.is_graph_output():
            continue
        matrix, vector = _constant_sizes(weight), _constant_sizes(bias)
        if matrix is None or len(matrix) != 2 or vector != matrix[1:]:
            continue
        if x.shape is None or len(x.shape) < 3:
            continue
        sizes = [size if isinstance(size, int) else -1 for size in x.shape[:-1]]
        if sizes.count(-1) > 1 or 0 in (*sizes, *matrix):
            continue
        return x, weight, bias, sizes
    return None


def _constant_sizes(value: onnx_ir.Value) -> tuple[int, ...] | None:
    """The sizes of a constant of floats; None of all else."""
    tensor = onnx_ir.convenience.get_const_tensor(value)
    if tensor is None or not tensor.dtype.is_floating_point():
        return None  # onnxruntime multiplies integers in MatMul alone
    return tuple(tensor.shape.numpy())
