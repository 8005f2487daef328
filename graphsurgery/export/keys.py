"""The keys of attention, transposed by one call.

torch's exporter writes `k.transpose(-2, -1)` for any number of axes: eight nodes that take the shape apart,
view the keys on three axes, transpose those, and view them back. Of four axes it is one `Transpose`, which
onnxruntime takes into the product behind it.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from graphsurgery.export.masks import of_attention

__all__ = ["transpose_keys"]


def transpose_keys(model: onnx_ir.Model) -> int:
    """Write keys of four axes that are transposed on three as one `Transpose`, in place.

    To be called before the origins are stripped, which tell attention from what a user has written.

    Args:
        model: What torch's exporter made.

    Returns:
        How many keys were changed.
    """
    changed = 0
    for last in list(model.graph.all_nodes()):
        keys = _keys(last)
        if keys is None or last.graph is None:
            continue
        made = onnx_ir.node("Transpose", inputs=[keys], attributes={"perm": [0, 1, 3, 2]})
        old, new = last.outputs[0], made.outputs[0]
        new.name, new.shape, new.type = old.name, old.shape, old.type
        last.graph.insert_before(last, made)
        onnx_ir.convenience.replace_all_uses_with(old, new)
        last.graph.remove(last, safe=True)
        changed += 1
    if changed:
        RemoveUnusedNodesPass()(model)
    return changed


def _keys(last: onnx_ir.Node) -> onnx_ir.Value | None:
    """The keys of four axes that `last` views back behind a transposition on three, or None."""
    middle = _before(last, "Reshape")
    first = _before(middle, "Transpose")
    if middle is None or first is None or first.op_type != "Reshape":
        return None
    perm, keys = middle.attributes.get("perm"), first.inputs[0]
    if perm is None or list(perm.as_ints()) != [0, 2, 1]:
        return None
    if keys is None or keys.shape is None or len(keys.shape) != 4:
        return None
    batch, heads, length, width = keys.shape
    own = _sizes_of(first.inputs[1], keys, [-1, length, width])
    return keys if own and _sizes_of(last.inputs[1], keys, [batch, heads, width, length]) else None


def _sizes_of(sizes: onnx_ir.Value | None, keys: onnx_ir.Value, wanted: Sequence[object]) -> bool:
    """Whether a view is to the sizes of these keys.

    The exporter's optimiser makes one view of two, and then what is viewed is not the keys but what a user's
    own view made them of.
    """
    tensor = onnx_ir.convenience.get_const_tensor(sizes) if sizes is not None else None
    if tensor is not None:
        return bool(tensor.numpy().tolist() == list(wanted))
    waiting, read = [sizes], set()
    while waiting:
        made = value.producer() if (value := waiting.pop()) is not None else None
        if made is not None and made.op_type == "Shape":
            read.add(made.inputs[0])
        elif made is not None:
            waiting += made.inputs
    return read == {keys}


def _before(node: onnx_ir.Node | None, op_type: str) -> onnx_ir.Node | None:
    """What makes the first input of a node of attention that is an `op_type`."""
    if node is None or node.op_type != op_type or not of_attention(node):
        return None
    value = node.inputs[0]
    return None if value is None else value.producer()
