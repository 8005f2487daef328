"""A view to constant sizes, as nodes to be inserted."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir

__all__ = ["view"]


def view(value: onnx_ir.Value, sizes: Sequence[int]) -> list[onnx_ir.Node]:
    """Return the `Constant` of the sizes and the `Reshape` to them, in no graph yet.

    Args:
        value: What is viewed.
        sizes: As `Reshape` takes them: -1 is worked out, 0 is as it was.

    Returns:
        Both nodes; the view is the output of the last.
    """
    tensor = onnx_ir.tensor(list(sizes), dtype=onnx_ir.DataType.INT64)
    shape = onnx_ir.node("Constant", inputs=[], attributes={"value": tensor})
    return [shape, onnx_ir.node("Reshape", inputs=[value, shape.outputs[0]])]
